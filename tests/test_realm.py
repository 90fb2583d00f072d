"""Synced realms against real servers: read and written offline, kept in step, each change applied once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from harness import DEADLINE_S, Process, Processes, wait_until
from nodes import GarbageServer, assert_left_alone, pairs, put, status, wait_until_caught_up

from understudy.client import (
    Add,
    Change,
    ClientReset,
    DirectoryInUse,
    OutcomeUnknown,
    PeerUnreachable,
    Put,
    Realm,
    UnderstudyError,
    UnknownRealm,
    UsageError,
    connect,
)
from understudy.client.local_store import LocalStore
from understudy.client.realm_state import ConnectionState
from understudy.common import portal
from understudy.common.errors import BadOperation, ProtocolError
from understudy.v1 import sync_pb2, sync_pb2_grpc

NOBODY = "127.0.0.1:1"  # nothing listens there


@pytest.fixture
def primary(processes: Processes, tmp_path: Path) -> Process:
    return processes.primary(tmp_path / "primary")


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Realm]:
    """A realm without a server."""
    with Realm.open("/realm", server=None, directory=tmp_path / "local") as realm:
        yield realm


def _open(server: str, directory: Path, path: str = "/realm") -> Realm:
    return Realm.open(path, server=server, directory=directory, local_durability="relaxed")


def _up_to_date(realm: Realm) -> dict[bytes, bytes]:
    realm.wait_for_download(DEADLINE_S)
    return dict(realm.scan())


def test_a_realm_that_could_not_connect_does_not_try_again_once_it_is_closed(tmp_path: Path) -> None:
    """Also while the realm and its error are kept: nothing goes on in the background."""
    with GarbageServer() as refused, GarbageServer() as clock:
        realm = _open(refused.address, tmp_path / "local")
        kept = wait_until(lambda: realm.state.error)
        realm.close()
        assert_left_alone(refused, clock)
        assert kept


# -- local -----------------------------------------------------------------------------------------------------


def test_what_is_committed_is_read_at_once_and_after_reopening(tmp_path: Path) -> None:
    """A realm works without any server, and is there again when it is opened again."""
    with Realm.open("/realm", server=None, directory=tmp_path / "local") as realm:
        with realm.transaction() as tx:
            tx.put(b"a", b"1")
            tx.add(b"n", 2)
        assert realm.commit([Put(b"b", b""), Add(b"n", 3)]) == tx.number + 1
        assert realm.get(b"n") == b"5"
    with Realm.open("/realm", server=None, directory=tmp_path / "local") as realm:
        assert list(realm.scan(start=b"b", reverse=True)) == [(b"n", b"5"), (b"b", b"")]
        assert realm.count() == 3
        assert realm.state.pending_changes == 2


def test_a_block_that_fails_commits_nothing(local: Realm) -> None:
    """A transaction is there whole or not at all, and has a number only once it is."""
    with contextlib.suppress(ZeroDivisionError), local.transaction() as tx:
        tx.put(b"key", b"")
        raise ZeroDivisionError
    assert not local.count()
    with pytest.raises(BadOperation, match="no number"):
        _ = tx.number


def test_a_view_stays_as_it_was(local: Realm) -> None:
    """Later commits are not seen through it."""
    local.commit([Put(b"a", b"")])
    with local.view() as view:
        local.commit([Put(b"b", b"")])
        assert dict(view.scan()) == {b"a": b""}
    assert local.count() == 2


def test_without_a_server_nothing_can_be_waited_for(local: Realm) -> None:
    """Whoever waits for a server that was never named is told so at once."""
    for wait in (local.wait_for_upload, local.wait_for_download):
        with pytest.raises(UsageError, match="without a server"):
            wait(DEADLINE_S)


def test_a_closed_realm_says_so(tmp_path: Path) -> None:
    """Closing twice does nothing, everything else is refused."""
    realm = Realm.open("/realm", server=None, directory=tmp_path / "local")
    realm.close()
    realm.close()
    with pytest.raises(UsageError, match="closed"):
        realm.get(b"key")


def test_realms_of_a_directory_share_it_until_the_last_is_closed(tmp_path: Path) -> None:
    """The same file serves all of them; other settings for it are refused; then it is free again."""
    directory = tmp_path / "local"
    first = Realm.open("/first", server=None, directory=directory)
    second = Realm.open("/second", server=None, directory=directory)
    third = Realm.open("/first", server=None, directory=directory)
    third.commit([Put(b"key", b"")])
    assert first.count() == 1
    with pytest.raises(UsageError, match="another server"):
        Realm.open("/third", server=NOBODY, directory=directory)
    with pytest.raises(UsageError, match="another local_durability"):
        Realm.open("/third", server=None, directory=directory, local_durability="relaxed")
    with pytest.raises(UsageError, match="another on_reset"):
        Realm.open("/first", server=None, directory=directory, on_reset="manual")
    first.close()
    second.close()
    assert third.count() == 1
    with pytest.raises(DirectoryInUse):
        LocalStore.open(directory)
    third.close()
    LocalStore.open(directory).close()


def test_a_name_that_leads_elsewhere_by_now_is_another_directory(tmp_path: Path) -> None:
    """Where it led when another realm was opened counts for nothing."""
    (tmp_path / "link").symlink_to(tmp_path / "one")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(Realm.open(path, server=None, directory=tmp_path / "link"))
            for path in ("/a", "/b", "/c")
        ]
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to(tmp_path / "two")
        other = stack.enter_context(Realm.open("/a", server=None, directory=tmp_path / "link"))
        opened[0].commit([Put(b"key", b"")])
        assert other.get(b"key") is None


def test_a_read_only_realm_is_looked_at_only(tmp_path: Path) -> None:
    """Nothing is written, made or synced through it."""
    directory = tmp_path / "local"
    with Realm.open("/realm", server=None, directory=directory) as realm:
        realm.commit([Put(b"key", b"value")])
    with Realm.open("/realm", server=None, directory=directory, read_only=True) as realm:
        assert realm.get(b"key") == b"value"
        with pytest.raises(UsageError, match="read only"):
            realm.commit([Put(b"key", b"")])
        with pytest.raises(UnknownRealm):
            Realm.open("/other", server=None, directory=directory, read_only=True)
    with pytest.raises(UsageError, match="can't be synced"):
        Realm.open("/realm", server=NOBODY, directory=directory, read_only=True)


def test_space_that_is_free_is_given_back(local: Realm) -> None:
    """What was committed is still there."""
    for number in range(20):
        local.commit([Put(b"key", bytes(100_000 + number))])
    before, after = local.compact()
    assert after <= before
    assert local.get(b"key") == bytes(100_019)


# -- synced ----------------------------------------------------------------------------------------------------


def test_two_devices_see_each_others_changes(primary: Process, tmp_path: Path) -> None:
    """What one has uploaded, the other downloads, and the server has both."""
    with _open(primary.address, tmp_path / "a") as a, _open(primary.address, tmp_path / "b") as b:
        a.commit([Put(b"a", b"1"), Add(b"n", 1)])
        b.commit([Put(b"b", b"1"), Add(b"n", 1)])
        a.wait_for_upload(DEADLINE_S)
        b.wait_for_upload(DEADLINE_S)
        expected = {b"a": b"1", b"b": b"1", b"n": b"2"}
        assert _up_to_date(a) == _up_to_date(b) == pairs(primary.address, "/realm") == expected
        assert a.state.connection is ConnectionState.ONLINE
        assert a.state.address == primary.address
        assert a.state.version == a.state.server_version == 2


def test_a_realm_that_has_much_in_it_is_loaded(primary: Process, tmp_path: Path) -> None:
    """An empty copy comes up to the server, and follows from there."""
    for start in range(0, 6_000, 1_000):
        put(primary.address, "/realm", *((b"%06d" % key, bytes(100)) for key in range(start, start + 1_000)))
    changes: list[Change] = []
    with Realm.open(
        "/realm", server=primary.address, directory=tmp_path / "a", on_change=changes.append
    ) as realm:
        realm.wait_for_download(DEADLINE_S)
        assert realm.count() == 6_000
        put(primary.address, "/realm", (b"new", b""))
        assert len(_up_to_date(realm)) == 6_001
    assert [change.version for change in changes] == [6, 7]
    assert changes[0].ranges == ((b"", b""),)
    assert changes[1].keys == (b"new",)


def test_what_was_written_offline_is_uploaded_once_there_is_a_server(
    processes: Processes, tmp_path: Path
) -> None:
    """G6: changes of several openings, made without any connection, are applied once each, in order."""
    primary = processes.primary(tmp_path / "primary")
    address = primary.address
    with _open(address, tmp_path / "a") as realm:
        realm.commit([Put(b"first", b""), Add(b"n", 1)])
        realm.wait_for_upload(DEADLINE_S)
    primary.kill()
    for _ in range(3):
        with _open(address, tmp_path / "a") as realm:
            realm.commit([Add(b"n", 1)])
            assert realm.get(b"first") == b""
    with _open(address, tmp_path / "a") as realm:
        processes.primary(tmp_path / "primary", "--listen", address)
        realm.wait_for_upload(DEADLINE_S)
        assert realm.get(b"n") == b"4"
    assert pairs(address, "/realm") == {b"first": b"", b"n": b"4"}


def test_each_change_is_applied_once_though_the_server_is_killed_again_and_again(
    processes: Processes, tmp_path: Path
) -> None:
    """G6: whatever was on its way when the server died counts once."""
    primary = processes.primary(tmp_path / "primary")
    address = primary.address
    with _open(address, tmp_path / "a") as realm:
        for _ in range(3):
            for _ in range(500):
                realm.commit([Add(b"n", 1)])
            wait_until(lambda: realm.state.pending_changes < 500)
            primary.kill()
            realm.commit([Add(b"n", 1)])
            primary = processes.primary(tmp_path / "primary", "--listen", address)
        realm.wait_for_upload(DEADLINE_S)
        assert realm.get(b"n") == b"1503"
    assert pairs(address, "/realm") == {b"n": b"1503"}


def test_a_device_follows_its_realms_to_the_promoted_server(processes: Processes, tmp_path: Path) -> None:
    """G7: of several addresses it finds the primary, and what was on its way is applied there, once."""
    primary = processes.primary(tmp_path / "primary")
    replica = processes.replica(tmp_path / "replica", primary.address)
    errors: list[UnderstudyError] = []
    with _open(f"{primary.address},{replica.address}", tmp_path / "a") as realm:
        realm.on_error(errors.append)
        realm.commit([Add(b"n", 1)])
        realm.wait_for_upload(DEADLINE_S)
        wait_until_caught_up(primary.address, replica.address)
        primary.kill()
        realm.commit([Add(b"n", 1)])
        processes.run("promote", tmp_path / "replica")
        processes.primary(tmp_path / "replica", "--listen", replica.address)
        realm.wait_for_upload(DEADLINE_S)
        assert realm.state.address == replica.address
        assert realm.get(b"n") == b"2"
    assert not errors
    assert pairs(replica.address, "/realm") == {b"n": b"2"}
    with LocalStore.open(tmp_path / "a") as store:
        assert store.met.epoch == status(replica.address).epoch == 2


def test_without_a_connection_waiting_ends_at_its_deadline(tmp_path: Path) -> None:
    """Nothing is lost by that, the state says why, and being offline is no error to be told of."""
    errors: list[UnderstudyError] = []
    with Realm.open("/realm", server=NOBODY, directory=tmp_path / "a", on_error=errors.append) as realm:
        realm.commit([Put(b"key", b"")])
        wait_until(lambda: isinstance(realm.state.error, PeerUnreachable))
        with pytest.raises(OutcomeUnknown, match="not reachable"):
            realm.wait_for_upload(0.1)
        with pytest.raises(PeerUnreachable, match="not reachable"):
            realm.wait_for_download(0.1)
        assert isinstance(realm.state.error, PeerUnreachable)
        assert realm.state.connection is not ConnectionState.ONLINE
        assert realm.state.pending_changes == 1
    assert not errors


def test_a_realm_that_is_closed_while_somebody_waits_ends_the_waiting(tmp_path: Path) -> None:
    """Nobody waits for a thread that is gone."""
    realm = Realm.open("/realm", server=NOBODY, directory=tmp_path / "a")
    another = Realm.open("/realm", server=NOBODY, directory=tmp_path / "a")
    realm.commit([Put(b"key", b"")])
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            realm.wait_for_upload(None)
        except UsageError as error:
            ended.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    realm.close()
    waiter.join(DEADLINE_S)
    another.close()
    assert len(ended) == 1


class _WrongServer(sync_pb2_grpc.SyncServicer):
    """Takes everybody, and speaks of bindings that never were."""

    def __init__(self) -> None:
        self.hellos: list[sync_pb2.SyncHello] = []

    async def Sync(self, _: object, context: Any) -> None:  # type: ignore[override]
        self.hellos.append((await context.read()).hello)
        welcome = sync_pb2.SyncWelcome(cluster=b"c" * 16, epoch=len(self.hellos))
        await context.write(sync_pb2.SyncResponse(welcome=welcome))
        await context.write(sync_pb2.SyncResponse(bound=sync_pb2.RealmBound(ref=99)))
        await context.read()
        await context.read()

    async def Salvage(self, requests: object, context: Any) -> sync_pb2.SalvageResponse:  # type: ignore[override]
        return sync_pb2.SalvageResponse()


@contextlib.contextmanager
def _serving(service: sync_pb2_grpc.SyncServicer) -> Iterator[str]:
    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        sync_pb2_grpc.add_SyncServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = portal.call(start())
    try:
        yield f"127.0.0.1:{port}"
    finally:
        portal.call(server.stop(0))


def test_a_server_that_breaks_the_protocol_is_left_and_tried_again(tmp_path: Path) -> None:
    """G3: nothing of it is believed, the application is told once, and later tries show the reign that was met."""
    errors: list[UnderstudyError] = []
    service = _WrongServer()
    with (
        _serving(service) as address,
        Realm.open("/realm", server=address, directory=tmp_path / "a", on_error=errors.append) as realm,
    ):
        realm.commit([Put(b"key", b"value")])
        wait_until(lambda: len(service.hellos) >= 3)
        wait_until(lambda: isinstance(realm.state.error, ProtocolError))
        assert realm.get(b"key") == b"value"
    assert [type(error) for error in errors] == [ProtocolError]
    assert [hello.epoch for hello in service.hellos[:3]] == [0, 1, 2]
    assert len({hello.client for hello in service.hellos}) == 1


# -- callbacks -------------------------------------------------------------------------------------------------


def test_callbacks_hear_of_own_and_other_changes_until_they_are_taken_back(
    primary: Process, tmp_path: Path
) -> None:
    """Each change that comes is told once, with what it touched and whose it was."""
    with _open(primary.address, tmp_path / "a") as realm:
        realm.wait_for_download(DEADLINE_S)
        changes: list[Change] = []
        unsubscribe = realm.on_change(changes.append)
        with realm.transaction() as tx:
            tx.put(b"mine", b"")
            tx.delete_range(b"x", b"z")
        realm.wait_for_upload(DEADLINE_S)
        put(primary.address, "/realm", (b"theirs", b""))
        realm.wait_for_download(DEADLINE_S)
        unsubscribe()
        unsubscribe()
        put(primary.address, "/realm", (b"later", b""))
        assert b"later" in _up_to_date(realm)
    own, other = changes
    assert (own.is_own, own.number, own.keys, own.ranges) == (True, tx.number, (b"mine",), ((b"x", b"z"),))
    assert (other.is_own, other.version, other.keys) == (False, 2, (b"theirs",))
    assert own.client != other.client


def test_a_callback_that_fails_is_told_of_and_stops_nothing(primary: Process, tmp_path: Path) -> None:
    """Its error goes to on_error, and the next change is told and applied like any other."""
    errors: list[UnderstudyError] = []

    def fail(change: Change) -> None:
        raise ZeroDivisionError(change.version)

    with _open(primary.address, tmp_path / "a") as realm:
        realm.on_error(errors.append)
        realm.on_change(fail)
        for _ in range(2):
            realm.commit([Put(b"key", b"")])
            realm.wait_for_upload(DEADLINE_S)
    assert ["ZeroDivisionError" in str(error) for error in errors] == [True, True]


def test_what_would_wait_for_the_callbacks_own_thread_is_refused_there(
    primary: Process, tmp_path: Path
) -> None:
    """A callback may read and commit; it can't wait, open or close, and nothing hangs."""
    refused: list[str] = []
    done = threading.Event()

    with _open(primary.address, tmp_path / "a") as realm:
        realm.wait_for_download(DEADLINE_S)

        def callback(change: Change) -> None:
            if done.is_set():
                return
            assert realm.get(change.keys[0]) is not None
            realm.commit([Put(b"answer", b"")])
            for call in (
                realm.wait_for_upload,
                realm.wait_for_download,
                realm.close,
                lambda: _open(primary.address, tmp_path / "a", "/other"),
            ):
                try:
                    call()
                except UsageError as error:
                    refused.append(error.message)
            done.set()

        realm.on_change(callback)
        put(primary.address, "/realm", (b"question", b""))
        assert done.wait(DEADLINE_S)
        realm.wait_for_upload(DEADLINE_S)
        assert len(refused) == 4
    assert pairs(primary.address, "/realm") == {b"question": b"", b"answer": b""}


# -- reset -----------------------------------------------------------------------------------------------------


def test_where_a_reset_is_left_to_the_application_nothing_is_touched_and_others_go_on(
    processes: Processes, tmp_path: Path
) -> None:
    """G4: a realm that was dropped on the server stays here with its queue, and whoever waits is told why."""
    primary = processes.primary(tmp_path / "primary")
    errors: list[UnderstudyError] = []
    directory = tmp_path / "a"
    with (
        Realm.open("/realm", server=primary.address, directory=directory, on_reset="manual") as realm,
        Realm.open("/other", server=primary.address, directory=directory, on_reset="manual") as other,
    ):
        realm.on_error(errors.append)
        realm.commit([Put(b"key", b"value")])
        realm.wait_for_upload(DEADLINE_S)
        with connect(primary.address) as server:
            server.drop_realm("/realm")
        realm.commit([Put(b"mine", b"")])
        with pytest.raises(ClientReset) as raised:
            realm.wait_for_download(DEADLINE_S)
        with pytest.raises(ClientReset):
            realm.wait_for_upload(DEADLINE_S)
        assert raised.value.reason in ("REALM_GONE", "REALM_RECREATED")
        assert raised.value.realm == "/realm"
        assert [type(error) for error in errors] == [ClientReset]
        assert dict(realm.scan()) == {b"key": b"value", b"mine": b""}
        assert realm.state.reset is not None
        assert realm.state.reset.attempted == ""
        primary.kill()
        processes.primary(tmp_path / "primary", "--listen", primary.address)
        other.commit([Put(b"key", b"")])
        other.wait_for_upload(DEADLINE_S)
        with pytest.raises(ClientReset):
            realm.wait_for_upload(DEADLINE_S)
        assert len(errors) == 1


def test_what_a_reset_recovers_is_waited_for_like_any_upload(primary: Process, tmp_path: Path) -> None:
    """What was queued when the copy had to be given up is on the server when the waiting ends."""
    with _open(primary.address, tmp_path / "a") as realm:
        realm.commit([Put(b"old", b"")])
        realm.wait_for_upload(DEADLINE_S)
        with connect(primary.address) as server:
            server.drop_realm("/realm")
        realm.commit([Put(b"mine", b"")])
        realm.wait_for_upload(DEADLINE_S)
        assert pairs(primary.address, "/realm") == dict(realm.scan()) == {b"mine": b""}
        wait_until(lambda: realm.state.reset is None)
