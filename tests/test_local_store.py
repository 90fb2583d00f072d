"""A client's directory: what it holds, whatever happens to it."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import lmdb
import pytest
from local_helpers import CLUSTER, OTHER, PATH, START_US, Server, check_sound, held, open_realm, put, send
from store_helpers import fill_disk, small_disk

from understudy.client import local_rows, local_tail
from understudy.client.local_realm import LocalRealm
from understudy.client.local_store import LocalStore
from understudy.client.local_types import ForeignChange
from understudy.common.errors import (
    BadRealmPath,
    CorruptionError,
    DirectoryInUse,
    DiskFull,
    NewerFormat,
    NotADataDirectory,
    Overloaded,
    ProtocolError,
    StorageFailed,
    UnknownRealm,
    UsageError,
)
from understudy.common.locator import LOCATOR_POSITIONS_MAX
from understudy.common.operations import Add, DeleteRange, Put, to_protos
from understudy.common.store import Store
from understudy.v1 import local_pb2, replication_pb2
from understudy.v1.store_pb2 import CheckpointRow

ALL = {"count_max": 1 << 30, "bytes_max": 1 << 60}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path / "local", durability="relaxed") as opened:
        yield opened


@pytest.fixture
def realm(store: LocalStore) -> LocalRealm:
    return store.realm(PATH)


def _numbers(realm: LocalRealm) -> list[int]:
    return [change.number for change in realm.queued(0, **ALL)]


# -- own changes -------------------------------------------------------------------------------------------------


def test_own_changes_are_read_at_once_and_leave_the_queue_when_they_come_back(
    store: LocalStore, realm: LocalRealm
) -> None:
    """What was committed is read at once, and exactly once whether or not the server has sent it back (G6)."""
    server = Server()
    assert [realm.commit(to_protos([Add(b"n", 1)])) for _ in range(3)] == [1, 2, 3]
    assert held(realm) == {b"n": b"3"}
    assert send(realm, [server.change([Add(b"n", 10)])]) == [(1, False)]
    assert held(realm) == {b"n": b"13"}
    assert send(realm, [server.change([Add(b"n", 1)], client=store.client)]) == [(2, True)]
    assert held(realm) == {b"n": b"13"}
    assert _numbers(realm) == [2, 3]
    row = realm.row
    assert (row.confirmed, row.confirmed_us, row.queue_count, row.next_number) == (1, START_US + 1, 2, 4)
    check_sound(store, realm)


def test_another_clients_change_with_a_number_of_ours_is_not_ours(
    store: LocalStore, realm: LocalRealm
) -> None:
    """Numbers are each client's own: the same number of somebody else confirms nothing."""
    server = Server()
    realm.commit(to_protos(put(1)))
    mine = server.change(put(1), client=store.client, number=1)
    theirs = server.change(put(2), client=OTHER, number=1)
    assert send(realm, [mine, theirs]) == [(1, True), (2, False)]
    assert _numbers(realm) == []


def test_numbers_are_never_used_twice(tmp_path: Path) -> None:
    """A number stays used after the queue is empty, the directory was opened anew, and the realm forgotten."""
    directory, server = tmp_path / "local", Server()
    store, realm = open_realm(directory)
    for number in (1, 2, 3):
        assert realm.commit(to_protos(put(number))) == number
        send(realm, [server.change(put(number), client=store.client, number=number)])
    store.close()
    store, realm = open_realm(directory)
    assert (_numbers(realm), realm.row.next_number) == ([], 4)
    assert realm.commit(to_protos(put(4))) == 4
    store.close()
    store, realm = open_realm(directory)
    assert realm.commit(to_protos(put(5))) == 5
    store.forget(PATH)
    assert store.realm(PATH).commit(to_protos(put(6))) == 6
    assert store.realm("/another").commit(to_protos(put(1))) == 6
    store.close()


def test_the_queue_is_handed_out_in_windows(realm: LocalRealm) -> None:
    """Changes come oldest first, within count and bytes, and one that is larger than a window comes alone."""
    sizes = [10, 10, 5_000, 10]
    for size in sizes:
        realm.commit(to_protos([Put(b"k", bytes(size))]))
    assert [change.number for change in realm.queued(0, count_max=2, bytes_max=1 << 20)] == [1, 2]
    assert [change.number for change in realm.queued(1, count_max=9, bytes_max=1_000)] == [2]
    assert [change.number for change in realm.queued(2, count_max=9, bytes_max=1_000)] == [3]
    assert realm.queued(4, count_max=9, bytes_max=1_000) == []


def test_a_full_queue_refuses_changes_and_keeps_what_it_has(
    realm: LocalRealm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond its limit the queue takes nothing more, and says what helps."""
    monkeypatch.setattr(local_rows, "QUEUE_BYTES_MAX", 300)
    realm.commit(to_protos([Put(b"k", bytes(200))]))
    with pytest.raises(Overloaded, match="connect"):
        realm.commit(to_protos([Put(b"k", bytes(200))]))
    assert _numbers(realm) == [1]
    assert realm.commit(to_protos(put(2))) == 2


def test_a_change_that_was_applied_long_ago_leaves_the_queue(store: LocalStore, realm: LocalRealm) -> None:
    """What a server says it has applied goes, under the id that it was sent with, and nothing else."""
    for number in (1, 2, 3):
        realm.commit(to_protos(put(number)))
    realm.leave_queue(OTHER, [1])
    realm.leave_queue(store.client, [2, 99])
    assert _numbers(realm) == [1, 3]
    check_sound(store, realm)


def test_what_is_sent_is_noted_first(tmp_path: Path) -> None:
    """The highest number sent is remembered, and never falls."""
    store, realm = open_realm(tmp_path / "local", durability="relaxed")
    realm.commit(to_protos(put(1)))
    realm.note_sent(1)
    realm.note_sent(0)
    store.close()
    store, realm = open_realm(tmp_path / "local")
    assert realm.row.sent == 1
    store.close()


def test_what_is_committed_while_all_is_sent_at_once_is_noted_with_it(tmp_path: Path) -> None:
    """In one transaction that is on disk; a relaxed directory has to sync before it sends, and notes it then."""
    for durability, sent in (("durable", 2), ("relaxed", 0)):
        store, realm = open_realm(tmp_path / durability, durability=durability)
        realm.commit(to_protos(put(1)))
        assert realm.row.sent == 0
        realm.is_sending = True
        realm.commit(to_protos(put(2)))
        assert (realm.row.sent, realm.row.next_number, realm.row.queue_count) == (sent, 3, 2)
        check_sound(store, realm)
        store.close()
        store, realm = open_realm(tmp_path / durability, durability=durability)
        assert (realm.row.sent, _numbers(realm)) == (sent, [1, 2])
        store.close()


_META_BYTES = 2 * 4096  # LMDB's two pages that point to all others


def test_a_power_loss_undoes_what_was_received_last_and_no_own_change(tmp_path: Path) -> None:
    """G1, G6: what points to an applied change can be lost; then its own change is in the queue as before."""
    server = Server()
    store, realm = open_realm(tmp_path / "local")
    file = tmp_path / "local" / "data.mdb"
    send(realm, [server.change(put(1))])
    realm.commit(to_protos(put(2)))
    on_disk = file.read_bytes()[:_META_BYTES]
    own = server.change(put(2), client=store.client)
    assert send(realm, [own]) == [(2, True)]
    (tmp_path / "after").mkdir()
    (tmp_path / "after" / "data.mdb").write_bytes(on_disk + file.read_bytes()[_META_BYTES:])
    store.close()
    store, realm = open_realm(tmp_path / "after")
    assert (realm.row.copy.version, _numbers(realm), held(realm)) == (1, [1], server.pairs)
    assert send(realm, [own]) == [(2, True)]
    check_sound(store, realm)
    store.close()


class _NotingEnvironment:
    """An environment that counts how often it was synced."""

    def __init__(self, env: lmdb.Environment) -> None:
        self._env = env
        self.syncs = 0

    def sync(self, force: bool) -> None:
        self.syncs += 1
        self._env.sync(force)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)


def test_only_what_no_server_sends_again_is_synced_to_the_end(tmp_path: Path) -> None:
    """G1: an own change and what was noted as sent are on disk when the call returns."""
    server = _loadable()
    store, realm = open_realm(tmp_path / "local")
    flags = store.file.environment.env.flags()
    assert (flags["sync"], flags["metasync"], flags["writemap"]) == (True, False, False)
    noting = _NotingEnvironment(store.file.environment.env)
    store.file.environment = replace(store.file.environment, env=cast(lmdb.Environment, noting))
    steps: list[tuple[Callable[[], object], int]] = [
        (lambda: realm.commit(to_protos(put(1))), 1),
        (lambda: realm.note_sent(1), 1),
        (lambda: send(realm, [server.change(put(5))]), 0),
        (lambda: realm.set_safe(1), 0),
        (lambda: realm.begin_load(server.bound(), cluster=CLUSTER), 0),
        (lambda: realm.load_page(server.page(b"", 1), epoch=3), 0),
        (lambda: store.realm("/another"), 0),
        (lambda: realm.set_reset(local_pb2.ResetRecord(attempted="recover")), 1),
        (lambda: realm.set_reset(None), 1),
        (lambda: store.set_met(CLUSTER, 7, None), 1),
    ]
    for number, (step, wanted) in enumerate(steps):
        before = noting.syncs
        step()
        assert noting.syncs - before == wanted, number
    store.close()


def _loadable() -> Server:
    """A realm of several keys, of which nothing was sent."""
    return Server(pairs={b"%d" % number: b"" for number in range(9)})


# -- what a server sends -------------------------------------------------------------------------------------------


def test_a_change_that_does_not_follow_changes_nothing(store: LocalStore, realm: LocalRealm) -> None:
    """A gap, a change twice, another realm's, another history's, or rubbish: all refused, with all that came along."""
    server, other = Server(), Server(path="/other")
    first, second, third = (server.change(put(number)) for number in (1, 2, 3))
    send(realm, [first])
    forked = Server()
    forked.change(put(9))
    wrong = [[third], [first], [forked.change(put(2))], [second._replace(raw=b"\xff")], [second, second]]
    for changes in [*wrong, [other.change(put(1))]]:
        with pytest.raises(ProtocolError):
            send(realm, changes)
        assert (realm.row.copy.version, realm.row.copy.head) == (1, server.digests[1])
        assert held(realm) == {b"key 1": b"value 1"}
    assert send(realm, [second, third]) == [(2, False), (3, False)]
    check_sound(store, realm)


def test_somebody_else_with_our_id_is_noticed(store: LocalStore, realm: LocalRealm) -> None:
    """A change under our name that we did not make, or have yet to make, is refused, and nothing is lost."""
    server = Server()
    realm.commit(to_protos(put(1)))
    with pytest.raises(ForeignChange):
        send(realm, [server.change(put(2), client=store.client, number=1)])
    server = Server()
    with pytest.raises(ForeignChange):
        send(realm, [server.change(put(2), client=store.client, number=2)])
    assert (realm.row.copy.version, _numbers(realm)) == (0, [1])
    old, new = store.client, store.new_client()
    realm.reidentify(new, ForeignChange("", old, first=1, last=1))
    assert realm.clients() == [new]
    assert send(realm, [server.changes[0], server.change(put(3), client=old, number=1)])
    assert realm.commit(to_protos(put(4))) == 2
    mine = server.change(put(1), client=new, number=1)
    assert send(realm, [mine]) == [(3, True)]
    check_sound(store, realm)


def test_a_new_id_is_for_new_changes(store: LocalStore, realm: LocalRealm) -> None:
    """What was queued keeps its name when new changes get another id, and is still recognised."""
    server, old = Server(), store.client
    realm.commit(to_protos(put(1)))
    realm.note_sent(1)
    new = store.new_client()
    assert new != old
    realm.commit(to_protos(put(2)))
    assert realm.clients() == [new, old]
    assert [(one.number, one.client) for one in realm.queued(0, **ALL)] == [(1, old), (2, new)]
    assert (realm.row.sent, realm.row.confirmed) == (0, 0)
    assert send(realm, [server.change(put(1), client=old, number=1)]) == [(1, True)]
    assert (realm.row.confirmed, realm.clients()) == (0, [new])


def test_a_realm_without_a_first_change_is_known_by_what_the_server_said(store: LocalStore) -> None:
    """An empty copy takes path and cluster of the server's answer, so that the changes that follow fit."""
    realm, server = store.realm("/~/notes"), Server(path="/u1/notes")
    bound = server.bound()
    bound.realm_id = 0
    realm.note_bound(bound, cluster=b"c" * 16)
    assert send(realm, [server.change(put(1))]) == [(1, False)]
    realm.note_bound(server.bound(), cluster=b"d" * 16)
    copy = realm.row.copy
    assert (copy.path, copy.cluster, copy.realm_id, copy.version) == ("/u1/notes", b"c" * 16, 7, 1)


def test_contact_is_noted_and_seldom_written(tmp_path: Path) -> None:
    """The log's time as of the last message is known at once, and on disk within a minute of it."""
    store, realm = open_realm(tmp_path / "local")
    realm.touch(START_US)
    realm.touch(START_US + 1)
    realm.touch(START_US - 1)
    assert realm.row.contact_us == START_US + 1
    written = store.file.environment.env.info()["last_txnid"]
    realm.touch(START_US + 59_000_000)
    assert store.file.environment.env.info()["last_txnid"] == written
    realm.touch(START_US + 61_000_000)
    store.close()
    store, realm = open_realm(tmp_path / "local")
    assert realm.row.contact_us == START_US + 61_000_000
    store.close()


def test_the_locator_recedes_by_doubling(realm: LocalRealm) -> None:
    """Every position of a locator is genuine, and each at most about twice as far away as the one before."""
    server = Server()
    for size in [1] * 40 + [7] * 30 + [300, 1, 1, 2_000, 1, 1]:
        send(realm, [server.change(put(number)) for number in range(size)])
        positions = realm.locator()
        assert all(server.digests[one.version] == one.digest for one in positions)
        distances = [server.version - one.version for one in positions]
        assert distances[0] == 0
        assert distances[1:2] in ([], [1])
        assert all(0 < far <= 2 * near for near, far in pairwise(distances[1:]))
        assert positions[-1].version == 1
        assert len(positions) <= min(LOCATOR_POSITIONS_MAX, 2 + 2 * server.version.bit_length())
    assert Server().position() not in realm.locator()


# -- the tail --------------------------------------------------------------------------------------------------------


def test_the_tail_keeps_what_is_not_safe(store: LocalStore, realm: LocalRealm) -> None:
    """Raw changes above what is safe on a replica are kept as they came, with their HMACs (G7)."""
    server = Server()
    for number in range(10):
        send(realm, [server.change(put(number))], safe_version=2)
    assert realm.row.tail_first == 3
    assert realm.tail(3, bytes_max=1 << 20) == server.changes[2:]
    assert realm.tail(9, bytes_max=1 << 20) == server.changes[8:]
    assert realm.tail(2, bytes_max=1 << 20) == []
    assert realm.tail(3, bytes_max=1) == [server.changes[2]]
    realm.set_safe(7)
    realm.set_safe(5)
    assert (realm.row.tail_first, realm.row.safe_version) == (8, 7)
    check_sound(store, realm)
    realm.set_safe(10)
    assert (realm.row.tail_first, realm.row.tail_bytes) == (0, 0)
    send(realm, [server.change(put(11))])
    assert realm.row.tail_first == 11
    check_sound(store, realm)


def test_the_tail_is_bounded(store: LocalStore, realm: LocalRealm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where too much is not safe the oldest goes, which is counted until it is safe."""
    monkeypatch.setattr(local_tail, "TAIL_CHANGES_MAX", 5)
    server = Server()
    for number in range(4):
        send(realm, [server.change(put(number)), server.change(put(number))])
    assert (realm.row.tail_first, realm.row.tail_dropped) == (4, 3)
    check_sound(store, realm)
    realm.set_safe(2)
    assert realm.row.tail_dropped == 1
    monkeypatch.setattr(local_tail, "TAIL_BYTES_MAX", 1_000)
    send(realm, [server.change([Put(b"k", bytes(800))])])
    assert (realm.row.tail_first, realm.row.copy.version) == (9, 9)
    send(realm, [server.change([Put(b"k", bytes(1_900))])])
    assert (realm.row.tail_first, realm.row.tail_bytes, realm.row.tail_dropped) == (0, 0, 8)
    send(realm, [server.change(put(1))])
    assert realm.tail(11, bytes_max=1) == server.changes[10:]
    check_sound(store, realm)


# -- views -----------------------------------------------------------------------------------------------------------


def test_a_view_stays_at_its_moment(realm: LocalRealm) -> None:
    """A view shows copy and queue as they were when it was opened, whatever is committed or applied since (G2)."""
    server = Server()
    send(realm, [server.change([Put(b"a", b"1"), Put(b"b", b"2"), Put(b"c", b"3")])])
    realm.commit(to_protos([Add(b"a", 1), DeleteRange(b"c", b"")]))
    with realm.view() as view:
        scan = view.scan()
        assert next(scan) == (b"a", b"2")
        send(realm, [server.change([DeleteRange(b"", b"")])])
        realm.commit(to_protos([Put(b"b", b"new")]))
        client = realm.clients()[0]
        send(realm, [server.change([Add(b"a", 1), DeleteRange(b"c", b"")], client=client, number=1)])
        assert (view.get(b"a"), view.get(b"b"), view.get(b"c")) == (b"2", b"2", None)
        assert list(scan) == [(b"b", b"2")]
        assert (view.version, view.pending, view.count()) == (1, 1, 2)
        assert held(realm) == {b"a": b"1", b"b": b"new"}


def test_views_scan_within_bounds(realm: LocalRealm) -> None:
    """Start is included, end is not, and limit and reverse are as one expects."""
    server = Server()
    send(realm, [server.change([Put(b"%d" % number, b"copy") for number in range(0, 10, 2)])])
    realm.commit(to_protos([Put(b"%d" % number, b"own") for number in range(1, 10, 2)]))
    with realm.view() as view:
        assert [key for key, _ in view.scan(b"2", b"5")] == [b"2", b"3", b"4"]
        assert [key for key, _ in view.scan(b"2", b"5", reverse=True)] == [b"4", b"3", b"2"]
        assert [key for key, _ in view.scan(limit=2)] == [b"0", b"1"]
        assert [key for key, _ in view.scan(reverse=True, limit=1)] == [b"9"]
        assert view.count(b"8") == 2
        assert view.get(b"") is None
        assert view.get(b"k" * 600) is None


def test_a_closed_view_can_not_be_read(store: LocalStore, realm: LocalRealm) -> None:
    """Closing the store closes the views that are left; reading from one is a mistake that is said."""
    closed, left = realm.view(), realm.view()
    scan = left.scan()
    closed.close()
    store.close()
    for view in (closed, left):
        with pytest.raises(UsageError):
            view.get(b"k")
        with pytest.raises(UsageError):
            view.count()
    with pytest.raises(UsageError):
        next(scan)
    for use in (realm.view, store.paths, lambda: realm.commit(to_protos(put(1)))):
        with pytest.raises(UsageError):
            use()
    store.close()


def test_threads_see_whole_changes(store: LocalStore, realm: LocalRealm) -> None:
    """While one thread applies what another commits, no view ever shows a change twice, or half of one."""
    server, problems = Server(), []
    done = threading.Event()

    def read() -> None:
        last = 0
        while not done.is_set():
            with realm.view() as view:
                one, other = int(view.get(b"one") or 0), int(view.get(b"other") or 0)
                if one != other or one < last:
                    problems.append((one, other, last))
                last = one

    def confirm() -> None:
        while not (done.is_set() and realm.row.queue_count == 0):
            for change in realm.queued(0, count_max=3, bytes_max=1 << 20):
                operations = [Add(b"one", 1), Add(b"other", 1)]
                send(realm, [server.change(operations, client=change.client, number=change.number)])

    threads = [threading.Thread(target=read), threading.Thread(target=read), threading.Thread(target=confirm)]
    for thread in threads:
        thread.start()
    for _ in range(400):
        realm.commit(to_protos([Add(b"one", 1), Add(b"other", 1)]))
    done.set()
    for thread in threads:
        thread.join()
    assert not problems
    assert held(realm) == {b"one": b"400", b"other": b"400"}
    check_sound(store, realm)


def test_no_view_begins_between_file_and_memory(store: LocalStore, realm: LocalRealm) -> None:
    """From the commit until memory has followed, nobody else can open a view."""
    taken: list[bool] = []
    with store.file.writing() as writing:
        writing.then(lambda: _elsewhere(lambda: taken.append(store.lock.acquire(blocking=False))))
    assert taken == [False]


def _elsewhere(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


# -- directories -----------------------------------------------------------------------------------------------------


def test_a_directory_is_found_as_it_was_left(tmp_path: Path) -> None:
    """Copies, queues, ids, and whom we have met survive; each opening is known apart from the one before."""
    server = Server()
    store, realm = open_realm(tmp_path / "local")
    assert (store.previous_run, store.was_copied) == (b"", False)
    proof = replication_pb2.EpochProof(entry=b"signed")
    store.set_met(b"c" * 16, 4, proof)
    send(realm, [server.change(put(1))])
    realm.commit(to_protos(put(2)))
    before, rows, client, run = held(realm), realm.row, store.client, store.run
    store.realm("/another")
    store.close()
    store, realm = open_realm(tmp_path / "local")
    assert store.paths() == ["/another", PATH]
    assert (held(realm), realm.row, store.client, store.previous_run) == (before, rows, client, run)
    assert (store.met.cluster, store.met.epoch, store.met.proof) == (b"c" * 16, 4, proof)
    assert (store.was_copied, store.run != run) == (False, True)
    check_sound(store, realm)
    store.close()


def test_a_copied_directory_gets_an_id_of_its_own(tmp_path: Path) -> None:
    """Two copies of one directory never give the same name to two changes (G6)."""
    store, realm = open_realm(tmp_path / "local")
    realm.commit(to_protos(put(1)))
    realm.note_sent(1)
    store.close()
    shutil.copytree(tmp_path / "local", tmp_path / "copy")
    copied, its_realm = open_realm(tmp_path / "copy")
    assert copied.was_copied
    assert copied.client != store.client
    assert its_realm.clients() == [copied.client, store.client]
    assert (its_realm.row.sent, its_realm.row.next_number) == (0, 2)
    copied.close()
    for directory, expected in ((tmp_path / "local", store.client), (tmp_path / "copy", copied.client)):
        again, _ = open_realm(directory)
        assert (again.was_copied, again.client) == (False, expected)
        again.close()
    (tmp_path / "local").rename(tmp_path / "moved")
    moved, _ = open_realm(tmp_path / "moved")
    assert not moved.was_copied
    moved.close()


def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    """A second one is told which process has it, and it can be told from outside."""
    directory = tmp_path / "local"
    assert LocalStore.is_in_use(directory) is None
    with LocalStore.open(directory):
        assert LocalStore.is_in_use(directory) == os.getpid()
        with pytest.raises(DirectoryInUse, match="this very process"):
            LocalStore.open(directory)
        with pytest.raises(DirectoryInUse):
            LocalStore.open(directory, read_only=True)
    assert LocalStore.is_in_use(directory) is None
    lock = os.open(directory / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.write(lock, b"12345 boot durable")
    with pytest.raises(DirectoryInUse, match="12345"):
        LocalStore.open(directory)
    os.close(lock)


@pytest.mark.parametrize("what", ["file", "others", "server", "lmdb"])
def test_something_else_is_left_alone(tmp_path: Path, what: str) -> None:
    """A directory that holds something else is refused, and what it holds is not changed."""
    directory = tmp_path / "other"
    if what == "file":
        directory.write_text("text")
    elif what == "others":
        directory.mkdir()
        (directory / "photo.jpg").write_text("picture")
    elif what == "server":
        Store.create(directory, b"c" * 16, CheckpointRow())  # type: ignore[arg-type]
    else:
        with lmdb.open(str(directory), max_dbs=2) as env:
            env.open_db(b"mine")
    before = (directory / "data.mdb").read_bytes() if what in ("server", "lmdb") else b""
    for read_only in (False, True):
        with pytest.raises(NotADataDirectory):
            LocalStore.open(directory, read_only=read_only)
    if before:
        assert (directory / "data.mdb").read_bytes() == before


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """What a newer version has written is not touched by this one."""
    LocalStore.open(tmp_path / "local").close()
    with lmdb.open(str(tmp_path / "local"), max_dbs=8) as env, env.begin(write=True) as txn:
        txn.put(b"format", struct.pack("<I", 2), db=env.open_db(b"meta", txn=txn))
    with pytest.raises(NewerFormat):
        LocalStore.open(tmp_path / "local")


@pytest.mark.parametrize("damage", ["empty", "cut", "head", "row"])
def test_a_damaged_file_is_said_to_be_damaged(tmp_path: Path, damage: str) -> None:
    """A file that was cut off or overwritten is refused with what helps, and never taken for an empty one."""
    store, realm = open_realm(tmp_path / "local")
    for number in range(300):
        realm.commit(to_protos([Put(b"%d" % number, bytes(500))]))
    key = PATH.encode()
    if damage == "row":
        with store.file.writing() as writing:
            writing.txn.put(key, b"\xff\xff", db=writing.environment.realms)
    store.close()
    file = tmp_path / "local" / "data.mdb"
    data = file.read_bytes()
    changed = {"empty": b"", "cut": data[: len(data) // 2], "head": bytes(8192) + data[8192:], "row": data}
    file.write_bytes(changed[damage])
    for read_only in (False, True):
        with pytest.raises(CorruptionError, match="under another name"):
            _open(tmp_path / "local", read_only=read_only, reads=damage == "row")


def _open(directory: Path, *, read_only: bool, reads: bool) -> None:
    with LocalStore.open(directory, read_only=read_only) as store:
        if reads:
            store.realm(PATH)


def test_after_a_power_loss_a_relaxed_directory_is_checked(tmp_path: Path) -> None:
    """Where LMDB wrote without order and the machine stopped, damage is found before anything is read."""
    directory = tmp_path / "local"
    store, realm = open_realm(directory, durability="relaxed")
    for number in range(300):
        realm.commit(to_protos([Put(b"%d" % number, bytes(500))]))
    store.close()
    lock, file = directory / "lock", directory / "data.mdb"
    assert lock.read_bytes().strip() == b""
    lock.write_text("1 another-boot relaxed")
    store, realm = open_realm(directory)
    assert realm.row.queue_count == 300
    assert lock.read_text().split()[2] == "durable"
    store.close()
    data = bytearray(file.read_bytes())
    data[-4096 * 20 : -4096 * 10] = bytes(4096 * 10)
    file.write_bytes(data)
    lock.write_text("1 another-boot relaxed")
    for _ in range(2):  # and again until somebody mends it
        with pytest.raises(CorruptionError):
            LocalStore.open(directory)


def test_reading_changes_nothing(tmp_path: Path) -> None:
    """A directory opened for reading is not changed, can't be written to, and knows only what is there."""
    store, realm = open_realm(tmp_path / "local")
    realm.commit(to_protos(put(1)))
    store.close()
    file = tmp_path / "local" / "data.mdb"
    before = file.read_bytes()
    names = sorted(entry.name for entry in (tmp_path / "local").iterdir())
    with LocalStore.open(tmp_path / "local", read_only=True) as opened:
        assert held(opened.realm(PATH)) == {b"key 1": b"value 1"}
        assert (opened.client, opened.run, opened.was_copied) == (store.client, store.run, False)
        with pytest.raises(UnknownRealm):
            opened.realm("/another")
        with pytest.raises(UsageError, match="reading only"):
            opened.realm(PATH).commit(to_protos(put(2)))
        with pytest.raises(UsageError):
            opened.sweep()
    assert file.read_bytes() == before
    assert sorted(entry.name for entry in (tmp_path / "local").iterdir()) == names
    with pytest.raises(NotADataDirectory):
        LocalStore.open(tmp_path / "absent", read_only=True)
    assert not (tmp_path / "absent").exists()


def test_another_process_reads_what_is_in_use(tmp_path: Path) -> None:
    """While a directory is in use it can be looked into from outside, as of the last commit."""
    store, realm = open_realm(tmp_path / "local")
    realm.commit(to_protos(put(1)))
    program = (
        "import sys; from pathlib import Path; from understudy.client.local_store import LocalStore\n"
        "path = Path(sys.argv[1])\n"
        "with LocalStore.open(path, read_only=True) as store, store.realm(sys.argv[2]).view() as view:\n"
        "    print(LocalStore.is_in_use(path), dict(view.scan()))"
    )
    for number in (2, 3):
        realm.commit(to_protos(put(number)))
        seen = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "local", PATH],
            capture_output=True,
            text=True,
            check=True,
        )
        assert seen.stdout == f"{os.getpid()} {held(realm)}\n"
    check_sound(store, realm)
    store.close()


def test_forgetting_takes_everything_but_other_realms(store: LocalStore, realm: LocalRealm) -> None:
    """A forgotten realm leaves no row behind; who still holds it is told."""
    server, other = Server(), store.realm("/other")
    send(realm, [server.change(put(1))])
    realm.commit(to_protos(put(2)))
    other.commit(to_protos(put(3)))
    store.forget(PATH)
    assert store.paths() == ["/other"]
    assert not store.sweep()
    with store.file.reading() as txn:
        environment = store.file.environment
        rows = [txn.stat(db)["entries"] for db in (environment.data, environment.queue, environment.tail)]
    assert rows == [0, 1, 0]
    for use in (realm.view, lambda: realm.commit(to_protos(put(1)))):
        with pytest.raises(UnknownRealm):
            use()
    with pytest.raises(UnknownRealm):
        store.forget(PATH)
    assert held(store.realm(PATH)) == {}
    assert held(other) == {b"key 3": b"value 3"}


def test_only_paths_are_realms(store: LocalStore) -> None:
    """What is no realm path is refused, and a realm is made only where that is wanted."""
    with pytest.raises(BadRealmPath):
        store.realm("notes")
    with pytest.raises(UnknownRealm):
        store.realm("/notes", create=False)
    assert store.paths() == []
    assert store.realm("/notes") is store.realm("/notes", create=False)


def test_compaction_gives_space_back(tmp_path: Path) -> None:
    """The file gets smaller, nothing else changes, and the directory does not take itself for a copy."""
    directory, server = tmp_path / "local", Server()
    store, realm = open_realm(directory, durability="relaxed")
    send(realm, [server.change([Put(b"%d" % number, bytes(1_000)) for number in range(3_000)])])
    send(realm, [server.change([DeleteRange(b"1", b"")])])
    realm.commit(to_protos(put(1)))
    view = realm.view()
    with pytest.raises(UsageError, match="views"):
        store.compact()
    view.close()
    before, row = held(realm), realm.row
    large, small = store.compact()
    assert small < large / 2
    assert (held(realm), realm.row) == (before, row)
    realm.commit(to_protos(put(2)))
    check_sound(store, realm)
    client = store.client
    store.close()
    store, realm = open_realm(directory)
    assert (store.was_copied, store.client, realm.row.next_number) == (False, client, 3)
    assert sorted(entry.name for entry in directory.iterdir()) == ["data.mdb", "lock", "lock.mdb"]
    store.close()


def test_compaction_waits_for_readers_outside(tmp_path: Path) -> None:
    """While another process reads the directory, its file is not replaced."""
    store, realm = open_realm(tmp_path / "local")
    outside = os.open(tmp_path / "local", os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(outside, fcntl.LOCK_SH)
    with pytest.raises(DirectoryInUse):
        store.compact()
    os.close(outside)
    store.compact()
    assert realm.commit(to_protos(put(1))) == 1
    store.close()


# -- disks -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """What does not fit is refused and can be tried again; what was committed before is there (G1)."""
    with small_disk(tmp_path / "disk", size="3m") as disk:
        store, realm = open_realm(disk / "local")
        realm.commit(to_protos(put(0)))
        fill = fill_disk(disk)
        with pytest.raises(DiskFull):  # noqa: PT012
            while True:
                realm.commit(to_protos([Put(b"k", bytes(1 << 16))]))
        server = Server()
        large = server.change([Put(b"large", bytes(1 << 19))])
        with pytest.raises(DiskFull):
            send(realm, [large])
        numbers, before = _numbers(realm), held(realm)
        with pytest.raises(DiskFull):
            realm.copy_to(disk / "local" / "recovered" / "one")
        check_sound(store, realm)
        fill.unlink()
        assert realm.commit(to_protos([Put(b"k", b"small")])) == numbers[-1] + 1
        send(realm, [large])
        store.close()
        store, realm = open_realm(disk / "local")
        assert held(realm) == before | {b"k": b"small", b"large": bytes(1 << 19)}
        store.close()
        fill = fill_disk(disk)
        store, realm = open_realm(disk / "local")  # also to read what is there while nothing can be written
        assert held(realm) == before | {b"k": b"small", b"large": bytes(1 << 19)}
        assert list((disk / "local").glob("recovered/*")) == []
        check_sound(store, realm)
        store.close()


def test_after_an_error_of_the_disk_nothing_more_is_written(
    store: LocalStore, realm: LocalRealm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed commit changes nothing in memory, and the next one does not pretend that all is well (G1)."""
    realm.commit(to_protos(put(1)))

    def fail(*_: object) -> None:
        raise lmdb.DiskError("injected")

    monkeypatch.setattr(local_rows, "prefix", fail)
    with pytest.raises(StorageFailed):
        realm.commit(to_protos(put(2)))
    monkeypatch.undo()
    with pytest.raises(StorageFailed):
        realm.commit(to_protos(put(2)))
    with pytest.raises(StorageFailed):
        send(realm, [Server().change(put(3))])
    assert held(realm) == {b"key 1": b"value 1"}


# -- a copy of one realm ---------------------------------------------------------------------------------------------


def test_a_realm_can_be_copied_out(store: LocalStore, realm: LocalRealm, tmp_path: Path) -> None:
    """The copy is a directory with that realm alone, and is made once."""
    server, target = Server(), tmp_path / "local" / "recovered" / "notes"
    send(realm, [server.change([Put(b"%d" % number, b"x") for number in range(2_500)])])
    realm.commit(to_protos(put(1)))
    store.realm("/other").commit(to_protos(put(2)))
    before = held(realm)
    (target.parent / ".notes.new").mkdir(parents=True)  # a crash has left one
    realm.copy_to(target)
    realm.commit(to_protos(put(3)))
    realm.copy_to(target)
    assert [entry.name for entry in target.parent.iterdir()] == ["notes"]
    with LocalStore.open(target, read_only=True) as kept:
        its_realm = kept.realm(PATH)
        assert kept.paths() == [PATH]
        assert (held(its_realm), kept.client) == (before, store.client)
        assert [one.number for one in its_realm.queued(0, **ALL)] == [1]
        check_sound(kept, its_realm)
    with LocalStore.open(target) as writable:
        assert writable.was_copied
        assert writable.client != store.client


def test_a_reset_is_recorded(tmp_path: Path) -> None:
    """How far a reset has come is known after a restart."""
    store, realm = open_realm(tmp_path / "local")
    record = local_pb2.ResetRecord(attempted="recover", explanation="because")
    realm.set_reset(record)
    store.close()
    store, realm = open_realm(tmp_path / "local")
    assert realm.row.reset == record
    realm.set_reset(None)
    assert not realm.row.HasField("reset")
    store.close()
