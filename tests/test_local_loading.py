"""States that are loaded beside a copy, and a local realm as a whole, against plain dictionaries."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import plain_environment, wait_until
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from local_helpers import (
    CLUSTER,
    OTHER,
    PATH,
    REALM_ID,
    Server,
    check_sound,
    held,
    last_page,
    open_realm,
    pairs_of,
    put,
    send,
)
from state_helpers import after_operation

from understudy.client.local_layout import LAST_KEY
from understudy.client.local_load import is_complete
from understudy.client.local_realm import LocalRealm
from understudy.client.local_store import LocalStore
from understudy.client.local_types import ForeignChange, Received
from understudy.common.errors import ProtocolError, UsageError
from understudy.common.operations import Add, Delete, DeleteRange, Operation, Put, Update, to_protos
from understudy.common.types import new_id
from understudy.v1 import local_pb2, log_pb2, sync_pb2


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path / "local", durability="relaxed") as opened:
        yield opened


@pytest.fixture
def realm(store: LocalStore) -> LocalRealm:
    return store.realm(PATH)


def _server(keys: int) -> Server:
    server = Server()
    server.change([Put(b"%03d" % number, b"old") for number in range(keys)])
    return server


def _load(realm: LocalRealm, server: Server, *, keys: int = 3) -> None:
    """All pages from where the state stands."""
    while not is_complete(realm.row.incoming):
        realm.load_page(server.page(realm.row.incoming.frontier, keys), epoch=3)


def _incoming(realm: LocalRealm) -> dict[bytes, bytes]:
    with realm.incoming_view() as view:
        return pairs_of(view)


def test_a_loaded_state_takes_the_copys_place_at_once(store: LocalStore, realm: LocalRealm) -> None:
    """Until the last page is in, reads see the old copy; then the new one, with what is still queued on top."""
    old, server = Server(), _server(10)
    send(realm, [old.change([Put(b"gone", b"1")])])
    realm.commit(to_protos([Put(b"000", b"own")]))
    realm.commit(to_protos([Put(b"own", b"2")]))
    server.change([Put(b"000", b"own")], client=store.client)
    realm.begin_load(server.bound(), cluster=CLUSTER)
    copy = realm.row.incoming
    assert (copy.expected_entries, copy.path, copy.realm_id, copy.loading) == (10, PATH, REALM_ID, True)
    before = {b"gone": b"1", b"000": b"own", b"own": b"2"}
    while not is_complete(realm.row.incoming):
        assert held(realm) == before
        with pytest.raises(UsageError):
            realm.finish_load(server.page(realm.row.incoming.frontier, 1), {}, epoch=3)
        realm.load_page(server.page(realm.row.incoming.frontier, 4), epoch=3)
        check_sound(store, realm)
    assert held(realm) == before
    assert _incoming(realm) == server.pairs
    with realm.view() as view:
        realm.finish_load(last_page(realm), server.last_numbers, epoch=3)
        assert dict(view.scan()) == before
    assert held(realm) == server.pairs | {b"own": b"2"}
    row = realm.row
    assert ([one.number for one in realm.queued(0, count_max=9, bytes_max=999)], row.confirmed) == ([2], 1)
    assert (row.incoming.id, row.copy.loading, row.copy.frontier, row.tail_first) == (0, False, b"", 0)
    assert realm.locator() == [server.position()]
    assert send(realm, [server.change(put(1))]) == [(3, False)]
    check_sound(store, realm)


def test_changes_between_pages_reach_only_what_is_loaded(store: LocalStore, realm: LocalRealm) -> None:
    """A change that comes between pages is applied to the keys that are there; the other pages have it already."""
    server = _server(9)
    realm.begin_load(server.bound(), cluster=CLUSTER)
    realm.load_page(server.page(b"", 4), epoch=3)
    operations: list[Operation] = [
        Put(b"0025", b"between"),
        Put(b"003", b"at the frontier"),
        Put(b"0030", b"just behind"),
        Add(b"n", 1),
        DeleteRange(b"002", b"005"),
        Delete(b"008"),
        Update(b"001", b"new"),
        DeleteRange(b"007", b""),
        Put(b"002", b"back"),
    ]
    assert send(realm, [server.change(operations)]) == [(2, False)]
    assert _incoming(realm) == {key: value for key, value in server.pairs.items() if key <= b"003"}
    check_sound(store, realm)
    _load(realm, server)
    send(realm, [server.change([DeleteRange(b"004", b""), Put(b"zzz", b"last")])])
    realm.finish_load(last_page(realm), {}, epoch=3)
    assert held(realm) == server.pairs
    check_sound(store, realm)


def test_an_interrupted_load_goes_on(tmp_path: Path) -> None:
    """After a restart the state stands where the last page left it, and goes on from there, or begins anew."""
    server = _server(9)
    store, realm = open_realm(tmp_path / "local")
    realm.begin_load(server.bound(), cluster=CLUSTER)
    realm.load_page(server.page(b"", 4), epoch=3)
    store.close()
    store, realm = open_realm(tmp_path / "local")
    assert realm.row.incoming.frontier == b"003"
    incoming = realm.row.incoming
    assert sync_pb2.RealmPosition(version=incoming.version, digest=incoming.head) == server.position()
    assert realm.locator() == []
    send(realm, [server.change([Put(b"001", b"new"), Put(b"008", b"new")])])
    _load(realm, server)
    store.close()
    store, realm = open_realm(tmp_path / "local")
    assert (is_complete(realm.row.incoming), realm.row.incoming.frontier) == (True, LAST_KEY)
    realm.finish_load(server.page(realm.row.incoming.frontier, 4), {}, epoch=3)  # an empty one
    assert held(realm) == server.pairs
    realm.begin_load(server.bound(), cluster=CLUSTER)
    realm.load_page(server.page(b"", 4), epoch=3)
    server.change(put(1))
    realm.begin_load(server.bound(), cluster=CLUSTER)
    assert _incoming(realm) == {}
    _load(realm, server)
    realm.finish_load(last_page(realm), {}, epoch=3)
    assert held(realm) == server.pairs
    check_sound(store, realm)
    store.close()


def test_pages_that_do_not_fit_are_refused(realm: LocalRealm) -> None:
    """A page of another version or realm, out of order, or malformed changes nothing."""
    server = _server(9)
    with pytest.raises(ProtocolError):
        realm.load_page(server.page(b"", 3), epoch=3)
    realm.begin_load(server.bound(), cluster=CLUSTER)
    realm.load_page(server.page(b"", 3), epoch=3)
    good = server.page(b"002", 3)

    def changed(**fields: Any) -> sync_pb2.StatePage:
        page = sync_pb2.StatePage()
        page.CopyFrom(good)
        for name in fields:
            page.ClearField(name)  # type: ignore[arg-type]
        page.MergeFrom(sync_pb2.StatePage(**fields))
        return page

    wrong = [
        server.page(b"", 3),
        changed(keys=[b"005", b"004", b"003"]),
        changed(keys=[b"003", b"003", b"004"]),
        changed(keys=[b"003", b"004"]),
        changed(keys=[b"003", b"004", b"x" * 481]),
        changed(position=sync_pb2.RealmPosition(version=1, digest=b"other")),
        changed(position=sync_pb2.RealmPosition(version=2, digest=server.head)),
    ]
    before = realm.row
    for page in wrong:
        with pytest.raises(ProtocolError):
            realm.load_page(page, epoch=3)
        assert realm.row == before
    _load(realm, server)
    assert _incoming(realm) == server.pairs


def test_own_changes_stay_readable_while_a_state_is_loaded(store: LocalStore, realm: LocalRealm) -> None:
    """An own change that comes back meanwhile leaves the queue only with the swap, so that it is never out of sight."""
    server = _server(6)
    realm.commit(to_protos([Put(b"own", b"1")]))
    realm.begin_load(server.bound(), cluster=CLUSTER)
    realm.load_page(server.page(b"", 3), epoch=3)
    assert send(realm, [server.change([Put(b"own", b"1")], client=store.client)]) == [(2, False)]
    assert held(realm) == {b"own": b"1"}
    with pytest.raises(ForeignChange):
        send(realm, [server.change([Put(b"x", b"1")], client=store.client)])
    server = _server(6)
    server.change([Put(b"own", b"1")], client=store.client)
    realm.begin_load(server.bound(), cluster=CLUSTER)
    _load(realm, server)
    realm.finish_load(last_page(realm), server.last_numbers, epoch=3)
    assert (held(realm), realm.row.queue_count) == (server.pairs, 0)


def test_a_state_with_changes_of_ours_that_we_never_made_is_not_taken(
    store: LocalStore, realm: LocalRealm
) -> None:
    """Where the server knows more of our numbers than we gave, queued changes are not taken for those (G6)."""
    server = _server(3)
    realm.commit(to_protos(put(1)))
    realm.begin_load(server.bound(), cluster=CLUSTER)
    _load(realm, server)
    numbers = {store.client: 2}
    with pytest.raises(ForeignChange):
        realm.finish_load(last_page(realm), numbers, epoch=3)
    assert (realm.row.copy.version, realm.row.queue_count) == (0, 1)
    old = store.client
    realm.reidentify(store.new_client(), ForeignChange("", old, first=1, last=2))
    realm.finish_load(last_page(realm), numbers, epoch=3)
    assert held(realm) == server.pairs | {b"key 1": b"value 1"}


def _tail(realm: LocalRealm) -> list[Received]:
    return realm.tail(realm.row.tail_first, bytes_max=1 << 20)


def test_the_changes_that_come_with_the_last_page_are_the_tail(store: LocalStore, realm: LocalRealm) -> None:
    """They take the place of the old copy's, are offered with it, and are positions that a server may know."""
    old, server = Server(), _server(3)
    send(realm, [old.change(put(1))])
    for number in range(6):
        server.change(put(number))
    realm.begin_load(server.bound(), cluster=CLUSTER)
    _load(realm, server)
    assert _tail(realm) == old.changes
    realm.finish_load(last_page(realm, server.changes[3:]), {}, epoch=3)
    assert (realm.row.tail_first, _tail(realm)) == (4, server.changes[3:])
    assert [one.version for one in realm.locator()] == [7, 6, 5, 3]
    assert all(one.digest == server.digests[one.version] for one in realm.locator())
    send(realm, [server.change(put(7))], safe_version=5)
    assert (realm.row.tail_first, _tail(realm)) == (6, server.changes[5:])
    check_sound(store, realm)


def test_positions_that_a_load_has_passed_before_are_not_named_twice(realm: LocalRealm) -> None:
    """Changes that came between pages come with the last page again."""
    server = _server(9)
    realm.begin_load(server.bound(), cluster=CLUSTER)
    realm.load_page(server.page(b"", 4), epoch=3)
    for number in range(4):
        send(realm, [server.change(put(number))])
    _load(realm, server)
    realm.finish_load(last_page(realm, server.changes[2:]), {}, epoch=3)
    versions = [one.version for one in realm.locator()]
    assert versions == sorted(set(versions), reverse=True)
    assert all(one.digest == server.digests[one.version] for one in realm.locator())


def test_changes_that_do_not_lead_to_the_loaded_state_are_refused(realm: LocalRealm) -> None:
    """A gap, another head, another realm, or what no change can be: nothing of the page is taken."""
    server, other = _server(3), Server(path="/other")
    for number in range(3):
        server.change(put(number))
        other.change(put(number))
    other.change(put(4))
    realm.begin_load(server.bound(), cluster=CLUSTER)
    _load(realm, server)
    none = log_pb2.Change(realm=PATH).SerializeToString()
    beginning = log_pb2.Change(realm=PATH, version=4, previous=b"short").SerializeToString()
    wrong = [
        server.changes[:3],
        [server.changes[1], server.changes[3]],
        other.changes,
        [server.changes[3]._replace(raw=b"\xff")],
        [server.changes[3]._replace(raw=none)],
        [server.changes[3]._replace(raw=beginning)],
        [server.changes[3]._replace(hmac=b"short")],
    ]
    for changes in wrong:
        with pytest.raises(ProtocolError):
            realm.finish_load(last_page(realm, changes), {}, epoch=3)
        assert (realm.row.copy.version, realm.row.incoming.version, realm.row.tail_first) == (0, 4, 0)
    realm.finish_load(last_page(realm, server.changes[3:]), {}, epoch=3)
    assert realm.row.tail_first == 4


def test_a_reset_keeps_the_changes_that_came_with_the_state(store: LocalStore, realm: LocalRealm) -> None:
    """Also above what was safe of the old history; and none where others have come behind them."""
    old = Server()
    send(realm, [old.change(put(number)) for number in range(9)], safe_version=9)
    record = local_pb2.ResetRecord(attempted="recover", swapped=True)
    for behind, first in ((0, 2), (1, 0)):
        server = _server(3)
        server.change(put(1))
        realm.begin_load(server.bound(), cluster=CLUSTER)
        _load(realm, server)
        realm.load_page(last_page(realm, server.changes[1:]), epoch=3)
        send(realm, [server.change(put(2)) for _ in range(behind)])
        realm.swap_reset([], record, replaced_to=0)
        assert (realm.row.copy.version, realm.row.tail_first) == (2 + behind, first)
        check_sound(store, realm)


def test_replaced_copies_are_swept_bit_by_bit(store: LocalStore, realm: LocalRealm) -> None:
    """Rows of copies that nobody reads any more go in portions, also those of a load that was given up."""
    server = _server(25)
    for _ in range(2):
        realm.begin_load(server.bound(), cluster=CLUSTER)
        _load(realm, server, keys=10)
        realm.finish_load(last_page(realm), {}, epoch=3)
    realm.begin_load(server.bound(), cluster=CLUSTER)
    realm.load_page(server.page(b"", 5), epoch=3)
    realm.drop_incoming()
    with realm.view() as view:
        sweeps = 1
        while store.sweep(rows_max=10):
            sweeps += 1
        assert sweeps == 4
        assert dict(view.scan()) == server.pairs
    with store.file.reading() as txn:
        assert txn.stat(store.file.environment.data)["entries"] == 25
    assert held(realm) == server.pairs
    check_sound(store, realm)


def test_a_reset_waits_and_then_replaces_copy_and_queue_at_once(store: LocalStore, realm: LocalRealm) -> None:
    """While a reset is under way a loaded state waits; the swap keeps what was made after the queue was judged."""
    old, server = Server(), _server(3)
    send(realm, [old.change(put(1))], safe_version=0)
    for number in (1, 2, 3):
        realm.commit(to_protos(put(number)))
    realm.note_sent(2)
    record = local_pb2.ResetRecord(attempted="recover")
    realm.set_reset(record)
    realm.begin_load(server.bound(), cluster=CLUSTER)
    _load(realm, server)
    realm.finish_load(last_page(realm), {}, epoch=3)
    assert realm.row.copy.version == 1
    send(realm, [server.change([Put(b"zzz", b"while it waits")])])
    realm.commit(to_protos(put(4)))
    record.swapped = True
    with pytest.raises(UsageError, match="already"):
        realm.swap_reset([(4, store.client, to_protos(put(2)))], record, replaced_to=3)
    with realm.view() as view:
        realm.swap_reset([(2, store.client, to_protos([Put(b"two", b"2")]))], record, replaced_to=3)
        assert view.count() == 4
    assert held(realm) == server.pairs | {b"two": b"2", b"key 4": b"value 4"}
    assert [one.number for one in realm.queued(0, count_max=9, bytes_max=999)] == [2, 4]
    row = realm.row
    assert (row.sent, row.confirmed, row.tail_first, row.next_number, row.reset) == (0, 0, 0, 5, record)
    check_sound(store, realm)
    realm.commit(to_protos(put(5)))
    assert send(realm, [server.change([Put(b"two", b"2")], client=store.client, number=2)]) == [(3, True)]
    check_sound(store, realm)


# -- as a whole ------------------------------------------------------------------------------------------------------

_KEYS = st.sampled_from([b"a", b"b", b"bb", b"c", b"d"])
_VALUES = st.sampled_from([b"", b"1", b"x"])
_BOUNDS = st.sampled_from([(b"", b""), (b"a", b"bb"), (b"b", b"c"), (b"c", b""), (b"", b"b")])
_OPERATIONS = st.lists(
    st.one_of(
        st.builds(Put, _KEYS, _VALUES),
        st.builds(Update, _KEYS, _VALUES),
        st.builds(Delete, _KEYS),
        _BOUNDS.map(lambda pair: DeleteRange(*pair)),
        st.builds(Add, _KEYS, st.sampled_from([1, -2])),
    ),
    min_size=1,
    max_size=3,
)
_folders = itertools.count()


class RealmMachine(RuleBasedStateMachine):
    """A realm that commits, receives, loads, and is opened anew, with a server that has all it was sent in order."""

    folder: Path

    @initialize()
    def begin(self) -> None:
        self.directory = self.folder / str(next(_folders))
        self.server = Server()
        self.waiting: list[tuple[bytes, int, list[Operation]]] = []  # committed, and not yet at the server
        self.base: dict[bytes, bytes] = {}  # the copy's
        self.unconfirmed: list[tuple[bytes, int, list[Operation]]] = []
        self.views: list[tuple[Any, dict[bytes, bytes]]] = []
        self.store, self.realm = open_realm(self.directory, durability="relaxed")

    def teardown(self) -> None:
        self.store.close()

    def _expected(self) -> dict[bytes, bytes]:
        pairs = self.base
        for _, _, operations in self.unconfirmed:
            for operation in operations:
                pairs = after_operation(pairs, operation)
        return pairs

    @rule(operations=_OPERATIONS)
    def commit(self, operations: list[Operation]) -> None:
        number = self.realm.commit(to_protos(operations))
        change = (self.store.client, number, operations)
        self.waiting.append(change)
        self.unconfirmed.append(change)

    @rule(operations=_OPERATIONS)
    def other_writes(self, operations: list[Operation]) -> None:
        self.server.change(operations, client=OTHER)

    @precondition(lambda self: self.waiting)
    @rule()
    def upload(self) -> None:
        client, number, operations = self.waiting.pop(0)
        self.realm.note_sent(number)
        self.server.change(operations, client=client, number=number)

    @rule(count=st.integers(1, 4), safe=st.integers(0, 10))
    def receive(self, count: int, safe: int) -> None:
        row = self.realm.row
        incoming = bool(row.incoming.id)
        version = (row.incoming if incoming else row.copy).version
        if incoming and not row.incoming.frontier:
            return  # a server sends a page first
        changes = self.server.changes[version : version + count]
        if not changes:
            return
        applied = self.realm.apply(changes, lsn=1, epoch=1, time_us=1, safe_version=safe)
        if incoming:
            return
        for one in applied:
            name = (one.client, one.number)
            assert one.own == (name in [change[:2] for change in self.unconfirmed])
            self.unconfirmed = [change for change in self.unconfirmed if change[:2] != name]
        self.base = self._state(version + len(changes))

    def _state(self, version: int) -> dict[bytes, bytes]:
        pairs: dict[bytes, bytes] = {}
        for operations in self.server.history[:version]:
            for operation in operations:
                pairs = after_operation(pairs, operation)
        return pairs

    @rule()
    def begin_load(self) -> None:
        self.realm.begin_load(self.server.bound(), cluster=CLUSTER)

    @precondition(lambda self: self.realm.row.incoming.id and not is_complete(self.realm.row.incoming))
    @rule(keys=st.integers(1, 3))
    def load(self, keys: int) -> None:
        row = self.realm.row.incoming
        if row.frontier and row.version != self.server.version:
            changes = self.server.changes[row.version :]
            self.realm.apply(changes, lsn=1, epoch=1, time_us=1, safe_version=0)
        self.realm.load_page(self.server.page(self.realm.row.incoming.frontier, keys), epoch=1)

    @precondition(lambda self: is_complete(self.realm.row.incoming))
    @rule(kept=st.integers(0, 3))
    def finish(self, kept: int) -> None:
        version = self.realm.row.incoming.version
        last = self.server.last_numbers_at(version)
        self.realm.finish_load(
            last_page(self.realm, self.server.changes[max(version - kept, 0) : version]), last, epoch=1
        )
        self.base = self._state(version)
        self.unconfirmed = [one for one in self.unconfirmed if one[1] > last.get(one[0], 0)]

    @rule()
    def sweep(self) -> None:
        self.store.sweep(2)

    @rule()
    def new_client(self) -> None:
        self.store.new_client()

    @rule()
    def look(self) -> None:
        self.views.append((self.realm.view(), self._expected()))

    @rule(compacts=st.booleans())
    def open_again(self, compacts: bool) -> None:
        for view, expected in self.views:
            assert pairs_of(view) == expected
            view.close()
        self.views.clear()
        if compacts:
            self.store.compact()
            return
        self.store.close()
        self.store, self.realm = open_realm(self.directory, durability="relaxed")

    @invariant()
    def reads_are_right(self) -> None:
        assert held(self.realm) == self._expected()
        for view, expected in self.views:
            assert dict(view.scan()) == expected
        with self.realm.incoming_view() as view:
            row = self.realm.row.incoming
            loaded = {key: value for key, value in self._state(row.version).items() if key <= row.frontier}
            assert pairs_of(view) == (loaded if row.id else {})
        check_sound(self.store, self.realm)


def test_a_local_realm_is_what_server_and_queue_make_of_it(tmp_path: Path) -> None:
    """Whatever comes in whatever order, reads are the copy's state with the queue replayed, at one moment (G1, G2)."""
    machine: Any = type("Machine", (RealmMachine,), {"folder": tmp_path})
    machine.TestCase.settings = settings(
        max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine.TestCase().runTest()


# -- kill -9 ---------------------------------------------------------------------------------------------------------


def _busy(directory: Path, journal: Path) -> None:
    """Commits, receives and loads for ever, and writes down what is certain before it goes on."""
    store, realm = open_realm(directory)
    realm.drop_incoming()  # this server does not go on with a state that was being loaded
    with open(journal, "a", buffering=1) as file:
        for step in itertools.count():
            number = realm.commit(to_protos([Put(b"%04d" % (step % 50), b"%d" % step), Add(b"n", 1)]))
            file.write(f"committed {number}\n")
            _serve(store, realm, step)
            version = realm.row.copy.version
            file.write(f"version {version}\n")


def _serve(store: LocalStore, realm: LocalRealm, step: int) -> None:
    """A server that has had everything that is in the queue, and all of the copy."""
    server = Server(version=realm.row.copy.version, head=realm.row.copy.head)
    with realm.view() as view:
        pairs = dict(view.scan())
    changes = []
    if step % 3 == 0:
        for one in realm.queued(0, count_max=2, bytes_max=1 << 20):
            realm.note_sent(one.number)
            operations = [
                Put(op.key, op.value) if op.kind == 1 else Add(op.key, op.amount) for op in one.operations
            ]
            changes.append(server.change(operations, client=one.client, number=one.number))
        send(realm, changes)
    if step % 7 == 0:
        numbers = {store.client: realm.row.next_number - 1}
        server.pairs, server.version, server.head = pairs, server.version + 1, new_id() * 2
        realm.begin_load(server.bound(), cluster=CLUSTER)
        _load(realm, server, keys=10)
        realm.finish_load(last_page(realm), numbers, epoch=3)
        store.sweep(20)


def _run_and_kill(directory: Path, journal: Path, *, steps: int) -> None:
    journal.write_text("")
    environment = plain_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, __file__, str(directory), str(journal)], env=environment)
    try:
        wait_until(lambda: len(journal.read_text().splitlines()) > steps or process.poll() is not None)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def test_a_killed_process_leaves_a_sound_directory(tmp_path: Path) -> None:
    """After kill -9 at any moment every commit that returned is there once, and copy and queue fit (G1, G6)."""
    directory, journal = tmp_path / "local", tmp_path / "journal"
    committed = version = 0
    for round_number in range(6):
        _run_and_kill(directory, journal, steps=10 + 17 * round_number)
        for line in journal.read_text().splitlines():
            word, _, value = line.partition(" ")
            if word == "committed" and value:
                assert int(value) > committed
                committed = int(value)
            elif value:
                version = int(value)
        store, realm = open_realm(directory)
        assert not store.was_copied
        assert realm.row.next_number in (committed + 1, committed + 2)
        assert realm.row.copy.version >= version
        # Each change adds one, whether it is in the copy or in the queue.
        assert int(held(realm)[b"n"]) == realm.row.next_number - 1
        check_sound(store, realm)
        committed = realm.row.next_number - 1
        store.close()


if __name__ == "__main__":
    _busy(Path(sys.argv[1]), Path(sys.argv[2]))
