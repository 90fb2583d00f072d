"""The state behind all reads, against dictionaries: memtables over a real store, with real checkpoints."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from state_helpers import CLIENTS, CLUSTER, KEY, Author, Layers, RealmModel, write_here
from store_helpers import open_both

from understudy.common import checkpoint, entries, memtable, realm_history, state
from understudy.common.checkpoint_job import Job
from understudy.common.checkpoint_process import Checkpointer
from understudy.common.errors import CorruptionError, UnknownRealm
from understudy.common.memtable import MISSING, Memtable
from understudy.common.operations import Add, Delete, DeleteRange, Operation, Put, Update
from understudy.common.reader import Reader
from understudy.common.records import Record, encode_record
from understudy.common.scan import Scan
from understudy.common.state import RealmHead, State
from understudy.common.store import Store
from understudy.common.types import START, Lsn
from understudy.v1 import log_pb2
from understudy.v1.store_pb2 import CheckpointRow

KEYS = [b"\x00", b"a", b"aa", b"b", b"b\x00", b"c", b"\xff", b"\xff" * 480]
VALUES = [b"", b"0", b"-7", b"9223372036854775807", b"9223372036854775808", b"text", b"v" * 3000]
EVERYTHING = 1 << 30

keys = st.sampled_from(KEYS)
values = st.sampled_from(VALUES)
bounds = st.one_of(st.just(b""), keys)
operations = st.one_of(
    st.builds(Put, keys, values),
    st.builds(Put, keys, values),
    st.builds(Update, keys, values),
    st.builds(Delete, keys),
    st.builds(DeleteRange, bounds, bounds).filter(lambda one: not one.end or one.start < one.end),
    st.builds(Add, keys, st.sampled_from([1, -1, 2**63 - 1, -(2**63)])),
)


def all_of(scan: Scan) -> list[tuple[bytes, bytes]]:
    """What a scan gives, as one page."""
    with scan:
        found_keys, found_values, at_end = scan.page(bytes_max=EVERYTHING, pairs_max=EVERYTHING)
    assert at_end
    return list(zip(found_keys, found_values, strict=True))


def count(of: State, path: str, start: bytes = b"", end: bytes = b"") -> int:
    """How many keys there are."""
    return asyncio.run(Reader(lambda: of).count(path, start, end))[0]


# -- against a model -----------------------------------------------------------------------------------------


class Node:
    """State, log and store; ``write`` puts the oldest frozen memtable into the store."""

    def __init__(self, store: Store, write: Callable[[Memtable], object]) -> None:
        self.store = store
        self.write = write
        self.author = Author()
        self.records: list[Record] = []  # since the last checkpoint
        self.state = State(store)

    def apply(self, record: Record) -> None:
        self.records.append(record)
        self.state.apply(record)

    def restart(self) -> None:
        """As an engine opens: the store's checkpoint, and the log behind it."""
        self.store.refresh()
        self.state = State(self.store)
        self.records = [record for record in self.records if record.lsn > self.state.applied.lsn]
        for record in self.records:
            self.state.apply(record)


@contextlib.contextmanager
def node_in_one_process() -> Iterator[Node]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        Store.create(path, CLUSTER, CheckpointRow(digest=START.digest))
        environment, store = open_both(path)
        with store:
            yield Node(store, lambda table: write_here(environment, table))


@contextlib.contextmanager
def node_with_checkpoint_process() -> Iterator[Node]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "store"
        Store.create(path, CLUSTER, CheckpointRow(digest=START.digest))
        store = stack.enter_context(Store.open(path))
        checkpointer = Checkpointer()
        stack.callback(checkpointer.close)
        checkpointer.start(path, None)
        yield Node(store, lambda table: checkpointer.run(table.parts()))


class StateMachine(RuleBasedStateMachine):
    """Random transactions, drops, marks, checkpoints, scans and restarts."""

    opened: ClassVar[Callable[[], contextlib.AbstractContextManager[Node]]]

    def __init__(self) -> None:
        super().__init__()
        self.paths = ["/a", "/b", "/c"]
        self.scans: list[tuple[Scan, Iterator[tuple[bytes, bytes]]]] = []
        self.unnoticed = False  # a checkpoint is in the store and not yet known to the state
        self._stack = contextlib.ExitStack()
        self.node = self._stack.enter_context(type(self).opened())

    @property
    def author(self) -> Author:
        return self.node.author

    @property
    def state(self) -> State:
        return self.node.state

    def teardown(self) -> None:
        for scan, _ in self.scans:
            scan.close()
        self._stack.close()

    # -- what happens ------------------------------------------------------------------------------------

    @rule(
        realm=st.integers(0, 2),
        client=st.sampled_from(CLIENTS),
        skipped=st.sampled_from([0, 0, 0, 1, 5]),
        what=st.lists(operations, min_size=1, max_size=6),
    )
    def transact(self, realm: int, client: bytes, skipped: int, what: list[Operation]) -> None:
        path = self.paths[realm]
        known = self.author.realms.get(path)
        number = (known.last_number(client) if known else 0) + 1 + skipped
        self.node.apply(self.author.change(path, what, client=client, number=number))

    @rule(
        what=st.sampled_from(
            ["freeze", "write", "checkpoint", "checkpoint all", "other marks", "drop", "restart"]
        ),
        realm=st.integers(0, 2),
    )
    def mark(self, what: str, realm: int) -> None:
        """Whatever else happens: one rule for all, so that half of the steps are transactions."""
        if what == "freeze" and len(self.state.frozen) < 3:
            self.node.apply(self.author.freeze())
        elif what == "write" and self.state.frozen and not self.unnoticed:
            self._write()  # in the store, while entries go on being applied
        elif what == "checkpoint" and self.state.frozen:
            self._checkpoint()
        elif what == "checkpoint all":
            self.node.apply(self.author.freeze())
            while self.state.frozen:
                self._checkpoint()
        elif what == "other marks":
            self.node.apply(self.author.digest_mark())
            self.node.apply(self.author.epoch_start())
        elif what == "drop":
            self.node.apply(self.author.drop(self.paths[realm]))
        elif what == "restart":
            self.unnoticed = False
            self.node.restart()

    def _write(self) -> None:
        self.node.write(self.state.frozen[-1])
        self.unnoticed = True

    def _checkpoint(self) -> None:
        if not self.unnoticed:
            self._write()
        self.unnoticed = False
        lsn = self.state.frozen[-1].position.lsn
        self.state.checkpointed()
        assert self.node.store.current.checkpoint.lsn == lsn
        self.node.records = [record for record in self.node.records if record.lsn > lsn]

    @rule(realm=st.integers(0, 2), start=bounds, end=bounds, reverse=st.booleans(), pairs=st.integers(1, 3))
    def open_scan(self, realm: int, start: bytes, end: bytes, reverse: bool, pairs: int) -> None:
        known = self.author.realms.get(self.paths[realm])
        if known is None:
            with pytest.raises(UnknownRealm):
                self.state.scan(self.paths[realm])
            return
        scan = self.state.scan(known.path, start, end, reverse=reverse)
        self.scans.append((scan, iter(known.between(start, end, reverse=reverse))))
        self._take_page(len(self.scans) - 1, pairs)

    @precondition(lambda self: self.scans)
    @rule(data=st.data(), pairs=st.integers(1, 3))
    def go_on_with_a_scan(self, data: st.DataObject, pairs: int) -> None:
        self._take_page(data.draw(st.integers(0, len(self.scans) - 1)), pairs)

    def _take_page(self, index: int, pairs: int) -> None:
        scan, expected = self.scans[index]
        found_keys, found_values, at_end = scan.page(bytes_max=EVERYTHING, pairs_max=pairs)
        assert list(zip(found_keys, found_values, strict=True)) == list(
            itertools.islice(expected, len(found_keys))
        )
        assert at_end or len(found_keys) == pairs
        if at_end:
            assert list(expected) == []
            scan.close()
            del self.scans[index]

    # -- what must hold at all times -----------------------------------------------------------------------

    @invariant()
    def stands_where_the_log_does(self) -> None:
        assert self.state.applied == self.author.position
        assert self.state.offset == self.author.offset
        assert self.state.time_us == self.author.time_us or self.author.position == START
        assert [row.info.epoch for row in self.state.epochs] == list(range(1, self.author.epoch + 1))

    @invariant()
    def g2_every_realm_is_as_after_its_last_whole_transaction(self) -> None:
        heads = self.state.realms()
        assert list(heads) == sorted(self.author.realms)
        assert self.state.realm_count == len(heads)
        for path in self.paths:
            known = self.author.realms.get(path)
            if known is None:
                assert self.state.realm(path) is None
                with pytest.raises(UnknownRealm):
                    self.state.get(path, b"a")
                with pytest.raises(UnknownRealm):
                    count(self.state, path)
            else:
                self._check_realm(known, heads[path])

    def _check_realm(self, known: RealmModel, head: RealmHead) -> None:
        path = known.path
        assert head == self.state.realm(path)
        assert (head.version, head.head) == (known.version, known.head)
        assert [self.state.get(path, key) for key in KEYS] == [known.pairs.get(key) for key in KEYS]
        assert all_of(self.state.scan(path)) == known.between(b"", b"")
        assert all_of(self.state.scan(path, reverse=True)) == known.between(b"", b"", reverse=True)
        assert count(self.state, path) == len(known.pairs)
        assert count(self.state, path, b"a", b"c") == len(known.between(b"a", b"c"))

    @invariant()
    def every_change_is_still_there(self) -> None:
        """From whatever layer: no seam shows."""
        for path, known in self.author.realms.items():
            assert self.state.history(path, 1, count_max=EVERYTHING, bytes_max=EVERYTHING) == known.history
            assert self.state.history_first(path) == 1
            assert self.state.head_lsn(path) == known.history[-1].lsn

    @invariant()
    def g6_every_transaction_still_has_its_receipt(self) -> None:
        for path, client in itertools.product(self.paths, CLIENTS):
            known = self.author.realms.get(path) or RealmModel(path)
            last = known.last_number(client)
            assert self.state.last_number(path, client) == last
            assert self.state.client_row(path, client) == known.clients.get(client)
            for number in range(1, last + 1):
                assert self.state.receipt(path, client, number) == known.receipts.get((client, number))


class InOneProcess(StateMachine):
    """Checkpoints are written here: fast, for many examples."""

    opened = node_in_one_process


class WithCheckpointProcess(StateMachine):
    """Checkpoints are written as a server does it."""

    opened = node_with_checkpoint_process


TestState = InOneProcess.TestCase
TestState.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestStateWithCheckpointProcess = WithCheckpointProcess.TestCase
TestStateWithCheckpointProcess.settings = settings(max_examples=8, stateful_step_count=30, deadline=None)


# -- scans ---------------------------------------------------------------------------------------------------


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[Layers]:
    """An empty state."""
    Store.create(tmp_path / "store", CLUSTER, CheckpointRow(digest=START.digest))
    environment, store = open_both(tmp_path / "store")
    with store:
        yield Layers(environment, store)


def _key(number: int) -> bytes:
    return b"%05d" % number


def fill_three_layers(layers: Layers) -> dict[bytes, bytes]:
    """A realm whose pairs lie in the store, a frozen memtable and the active one; what it holds."""
    for size, value in ((2, b"in the store"), (3, b"frozen"), (5, b"active")):
        layers.commit("/a", *[Put(_key(number), value) for number in range(0, 3_000, size)])
        layers.commit("/a", DeleteRange(_key(100 * size), _key(100 * size + 50)), Delete(_key(size)))
        if size == 2:
            layers.checkpoint()
        elif size == 3:
            layers.freeze()
    return layers.author.realms["/a"].pairs


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_stays_as_it_was_opened_while_everything_changes(layers: Layers, reverse: bool) -> None:
    """G2: a scan read page by page shows one state, though transactions, deleted ranges, checkpoints and the end
    of the realm itself come between its pages.
    """
    expected = sorted(fill_three_layers(layers).items(), reverse=reverse)
    found: list[tuple[bytes, bytes]] = []
    with layers.state.scan("/a", reverse=reverse) as scan:
        for step in itertools.count():
            found_keys, found_values, at_end = scan.page(bytes_max=EVERYTHING, pairs_max=200)
            found += zip(found_keys, found_values, strict=True)
            if at_end:
                break
            layers.commit("/a", *[Put(_key(number), b"new %d" % step) for number in range(0, 3_000, 7)])
            layers.commit("/a", DeleteRange(_key(1_000), _key(2_000)), Put(_key(1_500), b"in the hole"))
            if step % 2:
                layers.checkpoint()
            if step == 5:
                layers.state.apply(layers.author.drop("/a"))
    assert found == expected


def test_pages_are_limited_in_pairs_and_bytes(layers: Layers) -> None:
    """A page ends with the pair that reaches a limit, and the scan's end is told with the last page."""
    layers.commit("/a", *[Put(_key(number), b"v" * 95) for number in range(10)])
    with layers.state.scan("/a") as scan:
        assert len(scan.page(bytes_max=250, pairs_max=100)[0]) == 3
        assert scan.page(bytes_max=EVERYTHING, pairs_max=5)[0] == [_key(number) for number in range(3, 8)]
        assert scan.page(bytes_max=EVERYTHING, pairs_max=5) == ([_key(8), _key(9)], [b"v" * 95] * 2, True)


def test_a_closed_scan_lets_its_snapshot_go(layers: Layers) -> None:
    """What a scan pins is free again when it is closed, read to its end or not: the store must not grow for ever."""
    fill_three_layers(layers)
    snapshot = layers.state.store.current
    scan = layers.state.scan("/a")
    scan.page(bytes_max=EVERYTHING, pairs_max=1)
    layers.checkpoint()
    assert snapshot.realm("/a") is not None  # pinned
    scan.close()
    with pytest.raises(RuntimeError, match="closed"):
        snapshot.acquire()


# -- receipts ------------------------------------------------------------------------------------------------


def test_g6_a_receipt_is_found_in_the_stores_history(layers: Layers) -> None:
    """G6: a transaction that only the store still knows is answered with its first receipt, a number passed over
    with none, and another client's number with none.
    """
    for number in (1, 2, 5):
        layers.commit("/a", Add(b"n", 1), number=number)
        layers.commit("/a", Add(b"n", 1), client=CLIENTS[1], number=10 * number)
    layers.checkpoint()
    receipts = layers.author.realms["/a"].receipts
    found = {n: layers.state.receipt("/a", CLIENTS[0], n) for n in range(1, 6)}
    assert found == {n: receipts.get((CLIENTS[0], n)) for n in range(1, 6)}
    assert layers.state.receipt("/a", CLIENTS[1], 5) is None
    assert layers.state.receipt("/a", b"3" * 16, 1) is None
    assert layers.state.receipt("/b", CLIENTS[0], 1) is None


@pytest.mark.parametrize("why", ["history was cut", "the search ends"])
def test_g6_a_receipt_too_old_to_be_known_is_told_from_one_that_never_was(
    layers: Layers, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """G6: where the history no longer says whether a number was applied, that is said, instead of a guess."""
    if why == "history was cut":
        monkeypatch.setattr(checkpoint, "HISTORY_VERSIONS_MAX", 4)
    else:
        monkeypatch.setattr(realm_history, "RECEIPT_SEARCH_VERSIONS", 3)
    for number in range(1, 11):
        layers.commit("/a", Add(b"n", 1), number=2 * number)
    layers.checkpoint()
    receipts = layers.author.realms["/a"].receipts
    assert layers.state.receipt("/a", CLIENTS[0], 20) == receipts[CLIENTS[0], 20]
    assert layers.state.receipt("/a", CLIENTS[0], 14) == receipts[CLIENTS[0], 14]
    assert layers.state.receipt("/a", CLIENTS[0], 15) is None
    assert layers.state.receipt("/a", CLIENTS[0], 2) is MISSING
    assert layers.state.receipt("/a", CLIENTS[0], 3) is MISSING


def test_a_realm_made_again_knows_nothing_of_its_predecessor(layers: Layers) -> None:
    """A dropped realm's pairs, versions and clients don't come back with a new realm of its name."""
    layers.commit("/a", Put(b"old", b"1"), number=7)
    layers.checkpoint()
    layers.state.apply(layers.author.drop("/a"))
    layers.commit("/a", Put(b"new", b"2"), number=1)
    for _ in range(2):
        assert layers.state.last_number("/a", CLIENTS[0]) == 1
        assert layers.state.receipt("/a", CLIENTS[0], 7) is None
        assert all_of(layers.state.scan("/a")) == [(b"new", b"2")]
        assert layers.state.realms()["/a"].version == 1
        layers.checkpoint()


def test_a_realm_made_again_in_memory_begins_with_nothing(layers: Layers) -> None:
    """While the old realm is still in a frozen memtable or the store, operations of the new one don't see it."""
    layers.commit("/a", Put(b"stored", b"1"), Put(b"n", b"5"))
    layers.checkpoint()
    layers.commit("/a", Put(b"frozen", b"1"), Put(b"m", b"5"))
    layers.freeze()
    layers.state.apply(layers.author.drop("/a"))
    layers.commit("/a", Add(b"n", 1), Add(b"m", 1), Update(b"stored", b"2"), Update(b"frozen", b"2"))
    for _ in range(2):
        assert all_of(layers.state.scan("/a")) == [(b"m", b"1"), (b"n", b"1")]
        assert count(layers.state, "/a") == 2
        layers.checkpoint()


def test_g9_a_count_lets_others_work_meanwhile(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: however many keys are in memory, entries are applied between two steps of a count, which is as of before."""
    monkeypatch.setattr(state, "_COUNTED_AT_ONCE", 2)
    layers.commit("/a", *[Put(_key(number), b"1") for number in range(5)])
    layers.checkpoint()
    layers.commit("/a", *[Put(_key(number), b"2") for number in range(3, 9)])
    steps = layers.state.counting("/a")
    next(steps)
    layers.commit("/a", *[Delete(_key(number)) for number in range(9)])
    layers.freeze()
    layers.checkpoint()
    next(steps)
    next(steps)
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value == 9
    assert count(layers.state, "/a") == 0


def test_counting_takes_the_newest_word_on_each_key(layers: Layers) -> None:
    """A key that is put, deleted and put again in different layers is counted once, or not at all."""
    layers.commit("/a", *[Put(key, b"1") for key in (b"a", b"b", b"c", b"d")])
    layers.checkpoint()
    layers.commit("/a", Delete(b"a"), Delete(b"b"), Put(b"c", b"2"), Put(b"e", b"2"), Put(b"f", b"2"))
    layers.freeze()
    layers.commit("/a", Put(b"a", b"3"), Delete(b"c"), Delete(b"e"), Put(b"f", b"3"), Delete(b"none"))
    for _ in range(2):
        assert all_of(layers.state.scan("/a")) == [(b"a", b"3"), (b"d", b"1"), (b"f", b"3")]
        assert count(layers.state, "/a") == 3
        layers.checkpoint()


# -- the memtable's size -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bytes_max", "operations_max"), [(9_000, 10**6), (10**9, 8)])
def test_g9_a_memtable_is_full_at_its_limits(
    layers: Layers, monkeypatch: pytest.MonkeyPatch, bytes_max: int, operations_max: int
) -> None:
    """G9: a memtable says that it is full when it reaches its bytes or its operations, and a new one is empty."""
    monkeypatch.setattr(memtable, "MEMTABLE_BYTES", bytes_max)
    monkeypatch.setattr(memtable, "MEMTABLE_OPERATIONS", operations_max)
    steps = 0
    while not layers.state.active.is_full:
        layers.commit("/a", Put(b"k", b"v" * 400), Put(b"l", b"v" * 400))
        steps += 1
    assert 2 <= steps <= 6
    assert layers.state.active.first_change_lsn == 1
    layers.freeze()
    assert not layers.state.active.is_full
    assert layers.state.active.first_change_lsn == 0


def test_a_marks_only_memtable_holds_no_change(layers: Layers) -> None:
    """Marks alone don't make a memtable one that is worth a checkpoint."""
    for record in (layers.author.epoch_start(), layers.author.digest_mark(), layers.author.drop("/nothing")):
        layers.state.apply(record)
    assert layers.state.active.first_change_lsn == 0
    assert Memtable().bytes == layers.state.active.bytes


# -- what does not follow --------------------------------------------------------------------------------------


def _record_of(layers: Layers, payload: bytes) -> Record:
    position = layers.state.applied
    lsn = Lsn(position.lsn + 1)
    _, digest = encode_record(position.digest, lsn, payload)
    return Record(lsn, digest, payload)


@pytest.mark.parametrize(
    "wrong", [{"version": 3}, {"version": 1}, {"previous": b"x" * 32}, {"previous": b""}]
)
def test_a_change_that_does_not_follow_is_corruption(layers: Layers, wrong: dict[str, object]) -> None:
    """A change that is not the next one of its realm's chain is refused, and the realm stays as it was."""
    layers.commit("/a", Put(b"k", b"v"))
    right = {"version": 2, "previous": layers.author.realms["/a"].head}
    change = log_pb2.Change(
        realm="/a",
        client=CLIENTS[0],
        number=9,
        operations=[log_pb2.Operation(kind=log_pb2.Operation.DELETE, key=b"k")],
        **{**right, **wrong},  # type: ignore[arg-type]
    ).SerializeToString()
    payload = entries.change_entry(1, change, entries.sign(KEY, entries.change_digest(change)))
    with pytest.raises(CorruptionError, match="entry 2 does not follow"):
        layers.state.apply(_record_of(layers, payload))
    assert layers.state.get("/a", b"k") == b"v"
    assert layers.state.realms()["/a"].version == 1


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "of a kind that this version does not know"),
        (log_pb2.Entry(time_us=5).SerializeToString(), "of a kind that this version does not know"),
        (b"\xff\xff", "can't be decoded"),
        (log_pb2.Entry(change=b"\xff\xff").SerializeToString(), "can't be decoded"),
        (log_pb2.Entry(change=b"").SerializeToString(), "of a kind that this version does not know"),
        (log_pb2.Entry(epoch_start=b"\xff\xff").SerializeToString(), "can't be decoded"),
    ],
)
def test_an_entry_that_is_not_understood_is_refused_never_skipped(
    layers: Layers, payload: bytes, why: str
) -> None:
    """An entry of a kind from the future, or none at all, stops the node: skipping it would lose what it says."""
    with pytest.raises(CorruptionError, match=why):
        layers.state.apply(_record_of(layers, payload))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (
            {"operations": [log_pb2.Operation(kind=log_pb2.Operation.PUT)]},
            "an operation on /a has a key of 0",
        ),
        (
            {"operations": [log_pb2.Operation(kind=log_pb2.Operation.ADD, key=b"k" * 481)]},
            "a key of 481 bytes",
        ),
        ({"operations": [log_pb2.Operation(kind=log_pb2.Operation.DELETE)]}, "a key of 0 bytes"),
        ({"operations": [log_pb2.Operation(kind=77, key=b"k")]}, "of kind 77"),  # type: ignore[arg-type]
        ({"client": b"c" * 505}, "an id of 505 bytes"),
        ({"realm": ""}, "entry 1 is of a realm whose path is of 0 bytes"),
        ({"realm": "/" + "r" * 255}, "of 256 bytes"),
    ],
)
def test_a_change_that_no_store_could_hold_is_corruption(
    layers: Layers, wrong: dict[str, object], why: str
) -> None:
    """What a primary should have refused is said to be wrong when it is applied, not by a checkpoint much later."""
    put = log_pb2.Operation(kind=log_pb2.Operation.PUT, key=b"k")
    right = {"realm": "/a", "version": 1, "client": CLIENTS[0], "number": 1, "operations": [put]}
    change = log_pb2.Change(**{**right, **wrong}).SerializeToString()  # type: ignore[arg-type]
    payload = entries.change_entry(1, change, entries.sign(KEY, entries.change_digest(change)))
    with pytest.raises(CorruptionError, match=why) as refused:
        layers.state.apply(_record_of(layers, payload))
    assert refused.value.remedy


def test_unknown_realms_are_named(layers: Layers) -> None:
    """Every read of a realm that is not there says so, with what brings one into being."""
    for read in (
        lambda: layers.state.get("/none", b"k"),
        lambda: layers.state.scan("/none"),
        lambda: count(layers.state, "/none"),
    ):
        with pytest.raises(UnknownRealm, match=r"no realm /none.*first transaction"):
            read()


def test_a_memtable_handed_over_in_many_parts_is_the_same_as_in_one(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the parts, put together they are the one job that large parts give."""
    for number in range(1, 40):
        layers.commit(f"/r{number % 3}", Put(b"k%02d" % number, b"v" * number), number=number)
    layers.commit("/r0", Delete(b"k03"), DeleteRange(b"k10", b"k20"), number=40)
    layers.freeze()
    [table] = layers.state.frozen

    def merged() -> tuple[int, list[list[object]]]:
        parts = list(table.parts())
        deltas = Job(parts).deltas
        return len(parts), [[getattr(delta, name) for name in delta.__slots__] for delta in deltas]

    count, whole = merged()
    assert count == 1
    monkeypatch.setattr(memtable, "PART_BYTES", 100)
    monkeypatch.setattr(memtable, "_CHUNK_BYTES", 50)
    count, pieces = merged()
    assert count > 40
    assert pieces == whole
    assert list(table.dismantle())
    assert not any(delta.values or delta.history for delta in table.realms.values() if delta)


def test_what_was_deleted_is_gone_from_the_store_too(layers: Layers) -> None:
    """G2: once the memtable that holds a deletion is in the store, the key does not come back, alone or in a range."""
    layers.commit("/a", *(Put(key, b"value") for key in (b"a", b"b", b"c", b"d")))
    layers.checkpoint()
    layers.commit("/a", Delete(b"a"))
    layers.commit("/a", DeleteRange(b"b", b"d"))
    layers.checkpoint()
    assert all_of(layers.state.scan("/a")) == [(b"d", b"value")]
    assert count(layers.state, "/a") == 1


def test_g6_a_client_s_last_number_is_known_from_the_store(layers: Layers) -> None:
    """G6: once the memtable that knew it is in the store, a retry is still told from what is new."""
    layers.commit("/a", Put(b"key", b"value"), number=7)
    layers.checkpoint()
    assert layers.state.last_number("/a", CLIENTS[0]) == 7
