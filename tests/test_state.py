"""The state behind all reads, against dictionaries: memtables over a real store, with real checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from state_helpers import CLUSTER, KEY, Author, RealmModel
from store_helpers import open_both

from understudy.common import checkpoint, entries, memtable, state
from understudy.common.checkpoint import apply_checkpoint
from understudy.common.checkpoint_process import Checkpointer
from understudy.common.errors import CorruptionError, UnknownRealm
from understudy.common.memtable import MISSING, Memtable
from understudy.common.operations import Add, Delete, DeleteRange, Operation, Put, Update
from understudy.common.records import Record, encode_record
from understudy.common.scan import Scan
from understudy.common.state import RealmHead, State
from understudy.common.store import Store
from understudy.common.store_layout import Environment
from understudy.common.types import START, Lsn
from understudy.v1 import log_pb2
from understudy.v1.store_pb2 import CheckpointRow

CLIENTS = [b"1" * 16, b"2" * 16]
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


# -- against a model -----------------------------------------------------------------------------------------


class Node:
    """Store and checkpoint process, shared by all examples: each works on realms of its own."""

    def __init__(self, folder: Path) -> None:
        Store.create(folder / "store", CLUSTER, CheckpointRow(digest=START.digest))
        self.store = Store.open(folder / "store", cluster=CLUSTER)
        self.checkpointer = Checkpointer()
        self.checkpointer.start(folder / "store", None)
        self.author = Author()
        self.records: list[Record] = []  # since the last checkpoint
        self.state = State(self.store)
        self.examples = itertools.count()

    def apply(self, record: Record) -> None:
        self.records.append(record)
        self.state.apply(record)

    def restart(self) -> None:
        """As an engine opens: the store's checkpoint, and the log behind it."""
        self.state = State(self.store)
        self.records = [record for record in self.records if record.lsn > self.state.applied.lsn]
        for record in self.records:
            self.state.apply(record)

    def close(self) -> None:
        self.checkpointer.close()
        self.store.close()


class StateMachine(RuleBasedStateMachine):
    """Random transactions, drops, marks, checkpoints, scans and restarts."""

    node: Node

    def __init__(self) -> None:
        super().__init__()
        prefix = next(self.node.examples)
        self.paths = [f"/{prefix}/{name}" for name in "abc"]
        self.scans: list[tuple[Scan, Iterator[tuple[bytes, bytes]]]] = []
        self.unnoticed = 0  # checkpoints that are in the store and not yet known to the state

    @property
    def author(self) -> Author:
        return self.node.author

    @property
    def state(self) -> State:
        return self.node.state

    def teardown(self) -> None:
        for scan, _ in self.scans:
            scan.close()
        for path in self.paths:
            self.node.apply(self.author.drop(path))
        while self.state.frozen:
            self.checkpoint()

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

    @rule(realm=st.integers(0, 2))
    def drop(self, realm: int) -> None:
        self.node.apply(self.author.drop(self.paths[realm]))

    @precondition(lambda self: len(self.state.frozen) < 3)
    @rule()
    def freeze(self) -> None:
        self.node.apply(self.author.freeze())

    @rule()
    def other_marks(self) -> None:
        self.node.apply(self.author.digest_mark())
        self.node.apply(self.author.epoch_start())

    @precondition(lambda self: self.state.frozen and not self.unnoticed)
    @rule()
    def write_checkpoint(self) -> None:
        """In the store, while entries go on being applied."""
        self.node.checkpointer.run(self.state.frozen[-1].job())
        self.unnoticed += 1

    @precondition(lambda self: self.state.frozen)
    @rule()
    def checkpoint(self) -> None:
        if not self.unnoticed:
            self.node.checkpointer.run(self.state.frozen[-1].job())
        self.unnoticed = 0
        lsn = self.state.frozen[-1].position.lsn
        self.state.checkpointed()
        assert self.node.store.current.checkpoint.lsn == lsn
        self.node.records = [record for record in self.node.records if record.lsn > lsn]

    @rule()
    def restart(self) -> None:
        self.unnoticed = 0
        self.node.store.refresh()
        self.node.restart()

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
                    self.state.count(path)
            else:
                self._check_realm(known, heads[path])

    def _check_realm(self, known: RealmModel, head: RealmHead) -> None:
        path = known.path
        assert head == self.state.realm(path)
        assert (head.version, head.head) == (known.version, known.head)
        assert [self.state.get(path, key) for key in KEYS] == [known.pairs.get(key) for key in KEYS]
        assert all_of(self.state.scan(path)) == known.between(b"", b"")
        assert all_of(self.state.scan(path, reverse=True)) == known.between(b"", b"", reverse=True)
        assert self.state.count(path) == len(known.pairs)
        assert self.state.count(path, b"a", b"c") == len(known.between(b"a", b"c"))

    @invariant()
    def g6_every_transaction_still_has_its_receipt(self) -> None:
        for path, client in itertools.product(self.paths, CLIENTS):
            known = self.author.realms.get(path) or RealmModel(path)
            last = known.last_number(client)
            assert self.state.last_number(path, client) == last
            for number in range(1, last + 1):
                assert self.state.receipt(path, client, number) == known.receipts.get((client, number))


class TestState(StateMachine.TestCase):
    """The machine as a test; one store for all its examples."""

    settings = settings(max_examples=40, stateful_step_count=30, deadline=None)

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.TemporaryDirectory()
        StateMachine.node = Node(Path(cls.folder.name))

    @classmethod
    def tearDownClass(cls) -> None:
        StateMachine.node.close()
        cls.folder.cleanup()
