"""Client reset against real servers: why one is needed, what each mode keeps, and that nothing gets lost on the way."""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from dying_client import KILLED, DyingClients
from harness import DEADLINE_S, Processes, plain_environment, wait_until
from nodes import Pair, pairs, put
from reset_helpers import (
    BASE,
    QUEUED,
    READ_HERE,
    RECOVERED,
    THEIRS,
    Restored,
    change_row,
    kept_in,
    needs_reset,
    queue,
    read_kept,
    read_local,
    recreate,
    row_of,
    seed,
    settled,
)
from store_helpers import fill_disk, small_disk
from sync_helpers import CLUSTER, Device, History

from understudy.client import (
    Add,
    ClientReset,
    DiskFull,
    Dropped,
    LocalView,
    Put,
    Realm,
    Recovery,
    UnderstudyError,
    Update,
    UsageError,
    connect,
    local_tail,
)
from understudy.client.realm import ResetMode
from understudy.common import portal
from understudy.v1 import local_pb2, sync_pb2, sync_pb2_grpc


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(Path(tmp_path_factory.mktemp("shared")))
    yield started
    started.close()


@pytest.fixture(scope="module")
def address(shared: Processes, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a primary that all tests share which leave it as it is, each with a realm of its own."""
    return shared.primary(tmp_path_factory.mktemp("shared-primary") / "data").address


@pytest.fixture
def path(request: pytest.FixtureRequest) -> str:
    """The test's own realm."""
    name = "".join(character if character.isalnum() else "_" for character in request.node.name)
    return f"/{name[:100]}"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "local"


class Heard:
    """What the callbacks of a reset were shown."""

    def __init__(self) -> None:
        self.before: list[dict[bytes, bytes]] = []
        self.after: list[tuple[dict[bytes, bytes], dict[bytes, bytes]]] = []
        self.recovered: list[Recovery] = []
        self.errors: list[UnderstudyError] = []

    def before_reset(self, view: LocalView) -> None:
        self.before.append(dict(view.scan()))

    def after_reset(self, view: LocalView, fresh: LocalView, recovered: Recovery) -> None:
        self.after.append((dict(view.scan()), dict(fresh.scan())))
        self.recovered.append(recovered)

    def open(self, server: str, directory: Path, path: str = "/realm", mode: ResetMode = "recover") -> Realm:
        return Realm.open(
            path,
            server=server,
            directory=directory,
            on_reset=mode,
            before_reset=self.before_reset,
            after_reset=self.after_reset,
            on_error=self.errors.append,
            local_durability="relaxed",
        )

    @property
    def dropped(self) -> list[tuple[bytes, Dropped]]:
        [recovered] = self.recovered
        return [(one.operation.key, one.reason) for change in recovered.changes for one in change.dropped]


# -- why -------------------------------------------------------------------------------------------------------


def _reason(server: str, directory: Path, path: str = "/realm") -> ClientReset:
    """Why the server does not take the copy, by the mode that leaves everything as it is."""
    before = read_local(directory, path), kept_in(directory)
    with Realm.open(path, server=server, directory=directory, on_reset="manual") as realm:
        with pytest.raises(ClientReset) as raised:
            realm.wait_for_download(DEADLINE_S)
        assert realm.state.reset is not None
        assert realm.state.reset.reason == raised.value.reason
    assert (read_local(directory, path), kept_in(directory)) == before
    assert row_of(directory, path).reset.attempted == ""
    return raised.value


def test_a_dropped_realm(address: str, local: Path, path: str) -> None:
    """The realm is begun again with what was in the queue, and with nothing of the old one."""
    seed(address, local, path)
    queue(local, path)
    with connect(address) as server:
        server.drop_realm(path)
    assert _reason(address, local, path).reason == "REALM_GONE"
    with (heard := Heard()).open(address, local, path) as realm:
        assert settled(realm) == pairs(address, path) == {b"mine": b"1", b"count": b"1"}
    assert heard.dropped == [(b"doomed", Dropped.KEY_DELETED), (b"base", Dropped.KEY_DELETED)]
    assert heard.after == [(READ_HERE, {})]


def test_a_realm_begun_anew(address: str, local: Path, path: str) -> None:
    """What was in the queue is made again on top of the other realm's state."""
    needs_reset(address, local, path)
    assert _reason(address, local, path).reason == "REALM_RECREATED"
    with (heard := Heard()).open(address, local, path) as realm:
        assert settled(realm) == pairs(address, path) == RECOVERED
        assert realm.state.pending_changes == 0
    assert heard.before == [READ_HERE]
    assert heard.after == [(READ_HERE, THEIRS)]
    assert heard.dropped == [(b"doomed", Dropped.KEY_DELETED)]
    assert [len(change.applied) for change in heard.recovered[0].changes] == [1, 1, 1]
    assert not heard.errors


def test_a_copy_of_another_cluster(address: str, processes: Processes, tmp_path: Path, path: str) -> None:
    """The realm of the same name on another server takes the copy's place, with the queue on top."""
    other = processes.primary(tmp_path / "other").address
    local = tmp_path / "local"
    seed(address, local, path)
    queue(local, path)
    put(other, path, *THEIRS.items())
    assert _reason(other, local, path).reason == "FOREIGN_CLUSTER_COPY"
    with Heard().open(other, local, path) as realm:
        assert settled(realm) == pairs(other, path) == RECOVERED
    assert pairs(address, path) == BASE


def test_another_history(processes: Processes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """G6: confirmed changes that an old backup has lost come home as new ones, others' too, and nothing twice."""
    primary, local = Restored(processes, tmp_path), tmp_path / "local"
    seed(primary.address, local)
    primary.back_up()
    with Realm.open("/realm", server=primary.address, directory=local) as realm:
        realm.commit([Add(b"count", 1), Put(b"confirmed", b"1")])
        realm.wait_for_upload(DEADLINE_S)
        put(primary.address, "/realm", (b"another's", b"1"))
        realm.wait_for_download(DEADLINE_S)
    queue(local)
    primary.restore()
    put(primary.address, "/realm", *THEIRS.items())
    caplog.set_level("INFO")
    found = _reason(primary.address, local)
    assert (found.reason, found.common_version) == ("OTHER_HISTORY", 1)
    assert re.search("client_reset_tail.*renewed=2 known=0 refused=0", caplog.text)
    came_home = THEIRS | {b"doomed": b"1", b"count": b"101", b"confirmed": b"1", b"another's": b"1"}
    assert pairs(primary.address, "/realm") == came_home
    with (heard := Heard()).open(primary.address, local) as realm:
        expected = came_home | {b"base": b"2", b"doomed": b"2", b"count": b"102", b"mine": b"1"}
        assert settled(realm) == pairs(primary.address, "/realm") == expected
    assert heard.dropped == []


def test_g6_several_devices_bring_home_the_same_changes_at_once(processes: Processes, tmp_path: Path) -> None:
    """G6: each of the confirmed changes that all of them hold, and each queued one, counts once."""
    primary = Restored(processes, tmp_path)
    devices = [tmp_path / f"device{number}" for number in range(3)]
    seed(primary.address, devices[0])
    primary.back_up()
    with contextlib.ExitStack() as stack:
        realms = [stack.enter_context(Heard().open(primary.address, device)) for device in devices]
        for _ in range(5):
            for realm in realms:
                realm.commit([Add(b"count", 1)])
                realm.wait_for_upload(DEADLINE_S)
        for realm in realms:
            realm.wait_for_download(DEADLINE_S)
            assert realm.get(b"count") == b"25"
    for device in devices:
        with Realm.open("/realm", server=None, directory=device) as realm:
            for _ in range(2):
                realm.commit([Add(b"count", 1)])
    primary.restore()
    put(primary.address, "/realm", *THEIRS.items())
    with contextlib.ExitStack() as stack:
        realms = [stack.enter_context(Heard().open(primary.address, device)) for device in devices]
        for realm in realms:
            settled(realm)
        expected = THEIRS | {b"doomed": b"1", b"count": str(100 + 15 + 6).encode()}
        assert pairs(primary.address, "/realm") == expected
        assert [settled(realm) for realm in realms] == [expected] * 3


def test_a_server_behind(processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tail does not reach back to what the server has, what is left of it comes home as new changes."""
    monkeypatch.setattr(local_tail, "TAIL_CHANGES_MAX", 1)
    primary, local = Restored(processes, tmp_path), tmp_path / "local"
    seed(primary.address, local)
    primary.back_up()
    with Realm.open("/realm", server=primary.address, directory=local) as realm:
        for number in range(3):
            realm.commit([Put(b"confirmed", b"%d" % number)])
        realm.wait_for_upload(DEADLINE_S)
        assert realm.state.tail_dropped > 0
    queue(local)
    primary.restore()
    found = _reason(primary.address, local)
    assert (found.reason, found.common_version) == ("SERVER_BEHIND", 1)
    with (heard := Heard()).open(primary.address, local) as realm:
        expected = READ_HERE | {b"confirmed": b"2"}
        assert settled(realm) == pairs(primary.address, "/realm") == expected
    assert not heard.dropped
    [kept] = kept_in(local)
    assert read_kept(kept) == (expected, 3)


def test_g3_a_server_behind_is_healed_without_a_reset(processes: Processes, tmp_path: Path) -> None:
    """An old backup gets back what it has lost, as it was, and neither callback is called."""
    primary, local = Restored(processes, tmp_path), tmp_path / "local"
    seed(primary.address, local)
    primary.back_up()
    with Realm.open("/realm", server=primary.address, directory=local) as realm:
        realm.commit([Add(b"count", 1)])
        realm.wait_for_upload(DEADLINE_S)
    queue(local)
    primary.restore()
    with (heard := Heard()).open(primary.address, local) as realm:
        assert settled(realm) == pairs(primary.address, "/realm")
        assert realm.get(b"count") == b"12"
    assert not heard.before
    assert not kept_in(local)


def test_numbers_beyond_what_the_server_knows(address: str, local: Path, path: str) -> None:
    """The server says that it had confirmed more than it knows of; what is queued is made again."""
    seed(address, local, path)

    def confirm_more(row: local_pb2.LocalRealm) -> None:
        row.confirmed = row.sent = 50
        row.next_number = 51

    change_row(local, confirm_more, path)
    queue(local, path)
    assert _reason(address, local, path).reason == "NUMBERS_BEYOND"
    with (heard := Heard()).open(address, local, path) as realm:
        assert settled(realm) == pairs(address, path) == READ_HERE
    assert not heard.dropped


def test_a_client_that_the_server_should_know(address: str, local: Path, path: str) -> None:
    """A client with confirmed changes of which nobody knows anything starts anew, and its queue with it."""
    put(address, path, *BASE.items())
    with Realm.open(path, server=address, directory=local) as realm:
        realm.wait_for_download(DEADLINE_S)

    def confirm_some(row: local_pb2.LocalRealm) -> None:
        row.confirmed = row.sent = 3
        row.next_number = 4
        row.confirmed_us = row.contact_us

    change_row(local, confirm_some, path)
    queue(local, path)
    assert _reason(address, local, path).reason == "CLIENT_UNKNOWN"
    with (heard := Heard()).open(address, local, path) as realm:
        assert settled(realm) == pairs(address, path) == READ_HERE
    assert not heard.dropped


def test_a_client_that_was_away_too_long(address: str, local: Path, path: str) -> None:
    """G6: what was sent and never answered is not made again but reported; what was never sent is."""
    put(address, path, *BASE.items())
    queue(local, path)

    def sent_long_ago(row: local_pb2.LocalRealm) -> None:
        row.sent = 2
        row.contact_us = 1

    change_row(local, sent_long_ago, path)
    for _ in range(2):  # it stays so, however often it has been turned away
        assert _reason(address, local, path).reason == "CLIENT_EXPIRED"
        with (
            Realm.open(path, server=address, directory=local, after_reset=lambda *_: 1 / 0) as realm,
            pytest.raises(ClientReset, match="ZeroDivisionError"),
        ):
            realm.wait_for_download(DEADLINE_S)
    with (heard := Heard()).open(address, local, path) as realm:
        assert settled(realm) == pairs(address, path) == BASE | {b"base": b"2"}
    assert [reason for _, reason in heard.dropped] == [Dropped.PERHAPS_APPLIED] * 3
    [kept] = kept_in(local)
    assert read_kept(kept, path)[1] == 3


def test_g5_a_failover_at_durability_replica_needs_no_reset(processes: Processes, tmp_path: Path) -> None:
    """G5: what a client was sent is on the replica, so that the promoted one takes the copy as it is."""
    pair, local = Pair(processes, tmp_path, "--durability", "replica"), tmp_path / "local"
    with (heard := Heard()).open(pair.addresses, local) as realm:
        realm.commit([Put(b"key", b"1")])
        realm.wait_for_upload(DEADLINE_S)
        promoted = pair.fail_over()
        realm.commit([Put(b"key", b"2")])
        realm.wait_for_upload(DEADLINE_S)
    assert not heard.before
    assert pairs(promoted.address, "/realm") == {b"key": b"2"}


# -- modes -----------------------------------------------------------------------------------------------------

MODES: list[tuple[ResetMode, dict[bytes, bytes]]] = [
    ("recover", RECOVERED),
    ("recover_or_discard", RECOVERED),
    ("discard", THEIRS),
]


@pytest.mark.parametrize(("mode", "expected"), MODES)
def test_each_mode_keeps_what_it_says(
    address: str, local: Path, path: str, mode: ResetMode, expected: dict[bytes, bytes]
) -> None:
    """Whatever becomes of the queue, the old copy can be opened as it was, with the queue in it."""
    needs_reset(address, local, path)
    with (heard := Heard()).open(address, local, path, mode) as realm:
        assert settled(realm) == pairs(address, path) == expected
    [kept] = kept_in(local)
    assert kept.name.startswith(f"{path[1:]}-")
    assert read_kept(kept, path) == (READ_HERE, len(QUEUED))
    if mode == "discard":
        assert {reason for _, reason in heard.dropped} == {Dropped.DISCARDED}
        assert heard.recovered[0].applied == 0
    # It is over: the next opening finds nothing to do.
    with (again := Heard()).open(address, local, path, mode) as realm:
        assert settled(realm) == expected
    assert not again.before
    assert kept_in(local) == [kept]


def test_manual_touches_nothing_and_can_be_decided_later(address: str, local: Path, path: str) -> None:
    """G4: the realm stays readable and writable as it was, and the next mode finds all of it."""
    needs_reset(address, local, path)
    with Heard().open(address, local, path, "manual") as realm:
        for wait in (realm.wait_for_download, realm.wait_for_upload):
            with pytest.raises(ClientReset) as raised:
                wait(DEADLINE_S)
        assert raised.value.path == str(local)
        realm.commit([Put(b"later", b"1")])
        assert dict(realm.scan()) == READ_HERE | {b"later": b"1"}
    assert not kept_in(local)
    with Heard().open(address, local, path) as realm:
        assert settled(realm) == RECOVERED | {b"later": b"1"}


def test_a_server_that_forbids_recovery(processes: Processes, address: str, local: Path, path: str) -> None:
    """To recover is an error then and leaves everything as it was; recover_or_discard discards."""
    needs_reset(address, local, path)
    forbid = ("grant", "policy", path, "--recovery", "forbidden", "--server", address)
    processes.run(*forbid)
    with Heard().open(address, local, path, "recover") as realm:
        with pytest.raises(ClientReset, match="forbids"):
            realm.wait_for_download(DEADLINE_S)
        assert dict(realm.scan()) == READ_HERE
    assert not kept_in(local)
    with (heard := Heard()).open(address, local, path, "recover_or_discard") as realm:
        assert settled(realm) == THEIRS
    assert {reason for _, reason in heard.dropped} == {Dropped.DISCARDED}
    assert len(kept_in(local)) == 1


def test_other_realms_of_the_directory_go_on(address: str, local: Path, path: str) -> None:
    """One is reset, one is left to the application, and one has nothing to do with either."""
    names = [path + suffix for suffix in ("a", "b", "c")]
    for name in names:
        seed(address, local, name)
    queue(local, names[0])
    for name in names[:2]:
        recreate(address, name)
    heard = Heard()
    with (
        heard.open(address, local, names[0]) as reset,
        heard.open(address, local, names[1], "manual") as left,
        heard.open(address, local, names[2]) as other,
    ):
        other.commit([Put(b"other", b"1")])
        assert settled(other) == BASE | {b"other": b"1"}
        assert settled(reset) == RECOVERED
        with pytest.raises(ClientReset):
            left.wait_for_download(DEADLINE_S)
        put(address, names[2], (b"theirs", b"1"))
        assert settled(other) == BASE | {b"other": b"1", b"theirs": b"1"}
        assert dict(left.scan()) == BASE
    assert len(kept_in(local)) == 1


def test_where_nothing_can_be_recovered_it_is_over_all_the_same(address: str, local: Path, path: str) -> None:
    """No loops: a queue of which nothing is left needs no second reset."""
    seed(address, local, path)
    with Realm.open(path, server=None, directory=local) as realm:
        realm.commit([Update(b"doomed", b"2")])
    recreate(address, path)
    for expected in (1, 1):
        with Heard().open(address, local, path) as realm:
            assert settled(realm) == pairs(address, path) == THEIRS
        assert len(kept_in(local)) == expected


def test_g6_a_kept_copy_that_is_synced_makes_nothing_twice(address: str, local: Path, path: str) -> None:
    """G6: whoever opens one with a server, instead of only looking at it, sends what was recovered a second time."""
    needs_reset(address, local, path)
    with Heard().open(address, local, path) as realm:
        assert settled(realm) == RECOVERED
    [kept] = kept_in(local)
    with (heard := Heard()).open(address, kept, path) as realm:
        assert settled(realm) == pairs(address, path) == RECOVERED
        realm.commit([Add(b"count", 1)])
        realm.wait_for_upload(DEADLINE_S)
    assert {reason for _, reason in heard.dropped} == {Dropped.APPLIED}
    assert pairs(address, path) == RECOVERED | {b"count": b"102"}


# -- callbacks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError("not now"), SystemExit(1)], ids=["error", "exit"])
@pytest.mark.parametrize("which", ["before_reset", "after_reset"])
def test_an_error_in_a_callback_leaves_everything_as_it_was(
    address: str, local: Path, path: str, which: str, error: BaseException
) -> None:
    """Copy, queue and recovered/ are as they were, whoever waits is told why, and another opening goes on."""
    needs_reset(address, local, path)

    def fail(*_: object) -> None:
        raise error

    errors: list[UnderstudyError] = []
    callbacks = {which: fail}
    with Realm.open(
        path,
        server=address,
        directory=local,
        on_error=errors.append,
        **callbacks,  # type: ignore[arg-type]
    ) as realm:
        with pytest.raises(ClientReset, match=f"{which} failed: {type(error).__name__}"):
            realm.wait_for_download(DEADLINE_S)
        assert dict(realm.scan()) == READ_HERE
        assert realm.state.pending_changes == len(QUEUED)
        assert [type(error) for error in errors] == [ClientReset]
    row = row_of(local, path)
    assert (row.reset.attempted, row.incoming.id) == ("", 0)
    assert not kept_in(local)
    assert pairs(address, path) == THEIRS
    with Heard().open(address, local, path) as realm:
        assert settled(realm) == RECOVERED


def test_callbacks_may_read_and_commit_and_their_views_end_with_them(
    address: str, local: Path, path: str
) -> None:
    """What a callback commits is uploaded like everything else; it can't wait, and can't keep a view."""
    needs_reset(address, local, path)
    views: list[LocalView] = []
    refused: list[UsageError] = []

    def before(view: LocalView) -> None:
        views.append(view)
        realm.commit([Put(b"before", b"1")])
        try:
            realm.wait_for_download(DEADLINE_S)
        except UsageError as error:
            refused.append(error)

    def after(view: LocalView, fresh: LocalView, _: Recovery) -> None:
        views.extend([view, fresh])
        realm.commit([Put(b"after", b"1"), Update(b"doomed", b"3")])

    is_open = threading.Event()

    def wait_and(callback: object) -> object:
        def call(*arguments: object) -> None:
            assert is_open.wait(DEADLINE_S)
            callback(*arguments)  # type: ignore[operator]

        return call

    with Realm.open(
        path,
        server=address,
        directory=local,
        before_reset=wait_and(before),  # type: ignore[arg-type]
        after_reset=wait_and(after),  # type: ignore[arg-type]
    ) as realm:
        is_open.set()
        assert settled(realm) == pairs(address, path) == RECOVERED | {b"before": b"1", b"after": b"1"}
        assert len(refused) == 1
        for view in views:
            with pytest.raises(UsageError):
                view.get(b"base")


@pytest.mark.parametrize("mode", ["recover", "discard"])
def test_changes_made_during_the_reset_are_not_lost(
    address: str, local: Path, path: str, mode: ResetMode
) -> None:
    """Also where the queue is discarded: what is in no kept copy is uploaded, once each."""
    needs_reset(address, local, path)
    with (heard := Heard()).open(address, local, path, mode) as realm:
        commits = 0
        while not heard.after or commits < 100:
            realm.commit([Add(b"during", 1)])
            commits += 1
        expected = RECOVERED if mode == "recover" else THEIRS
        found = settled(realm)
        made = int(found.pop(b"during"))
        assert found == expected
        [kept] = kept_in(local)
        in_kept = int(read_kept(kept, path)[0].get(b"during", b"0"))
        assert made == commits if mode == "recover" else commits - in_kept <= made <= commits
        assert pairs(address, path) == dict(realm.scan())


# -- killed ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dying() -> Iterator[DyingClients]:
    with DyingClients(plain_environment()) as clients:
        yield clients


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("mode", "expected"), [("recover", RECOVERED), ("discard", THEIRS)])
def test_killed_at_any_step_the_reset_goes_on_at_the_next_opening(
    address: str, tmp_path: Path, path: str, dying: DyingClients, mode: str, expected: dict[bytes, bytes]
) -> None:
    """G6: also where it is killed once more; nothing is lost, nothing made twice, and one copy was kept."""
    for step in itertools.count(1):
        local, realm_path = tmp_path / f"{step}", f"{path}/{step}"
        needs_reset(address, local, realm_path)
        code = dying.reset(local, realm_path, address, mode, step=step)
        if code == 0:
            break
        assert code == KILLED
        for again in kept_in(local):
            if not again.name.startswith("."):
                assert read_kept(again, realm_path) == (READ_HERE, len(QUEUED))
        assert dying.reset(local, realm_path, address, mode, step=step % 3 + 1) in (KILLED, 0)
        assert dying.reset(local, realm_path, address, mode) == 0
        assert pairs(address, realm_path) == read_local(local, realm_path) == expected
        [kept] = kept_in(local)
        assert read_kept(kept, realm_path) == (READ_HERE, len(QUEUED))
        row = row_of(local, realm_path)
        assert not row.HasField("reset")
        assert not row.incoming.id
    assert step > 8


@pytest.mark.parametrize("step", range(1, 7))
def test_another_mode_than_the_one_that_was_cut_off_begins_anew(
    address: str, local: Path, path: str, dying: DyingClients, step: int
) -> None:
    """Whoever decides otherwise before the reset has done anything gets what they say now."""
    needs_reset(address, local, path)
    assert dying.reset(local, path, address, "recover", step=step) == KILLED
    assert row_of(local, path).reset.attempted == ("recover" if step > 1 else "")
    with Heard().open(address, local, path, "manual") as realm, pytest.raises(ClientReset):
        realm.wait_for_download(DEADLINE_S)
    assert read_local(local, path) == READ_HERE
    assert not kept_in(local)
    assert dying.reset(local, path, address, "recover", step=step) == KILLED
    with Heard().open(address, local, path, "discard") as realm:
        assert settled(realm) == THEIRS
    [kept] = kept_in(local)
    assert read_kept(kept, path) == (READ_HERE, len(QUEUED))


def test_what_is_committed_between_a_kill_and_the_next_opening_is_kept(
    address: str, local: Path, path: str, dying: DyingClients
) -> None:
    """A discard that goes on takes only what is in the copy that it has kept."""
    needs_reset(address, local, path)
    assert dying.reset(local, path, address, "discard", step=6) == KILLED
    with Realm.open(path, server=None, directory=local) as realm:
        realm.commit([Put(b"offline", b"1")])
    with Heard().open(address, local, path, "discard") as realm:
        assert settled(realm) == pairs(address, path) == THEIRS | {b"offline": b"1"}


# -- again and again -------------------------------------------------------------------------------------------


class Recreating(Heard):
    """Has the realm dropped and begun anew once the new state was loaded, the first so many times."""

    def __init__(self, address: str, path: str, times: int) -> None:
        super().__init__()
        self._address, self._path, self._times = address, path, times

    def after_reset(self, view: LocalView, fresh: LocalView, recovered: Recovery) -> None:
        super().after_reset(view, fresh, recovered)
        if len(self.after) <= self._times:
            recreate(self._address, self._path)


@pytest.mark.parametrize(
    ("mode", "times", "why"),
    [
        ("recover", 1, "a reset that recovered the queue has just led to this one"),
        ("discard", 1, "a reset that discarded the queue has just led to this one"),
        ("recover_or_discard", 2, "a reset that discarded the queue has just led to this one"),
    ],
)
def test_a_reset_that_leads_to_another_is_not_repeated(
    address: str, local: Path, path: str, mode: ResetMode, times: int, why: str
) -> None:
    """No loops: it ends with an error, at the next opening too, until somebody decides otherwise by hand."""
    needs_reset(address, local, path)
    with (heard := Recreating(address, path, times)).open(address, local, path, mode) as realm:
        wait_until(lambda: isinstance(realm.state.error, ClientReset))
        with pytest.raises(ClientReset, match=why):
            realm.wait_for_download(DEADLINE_S)
        found = dict(realm.scan())
    assert len(heard.after) == times
    with (again := Heard()).open(address, local, path, mode) as realm:
        with pytest.raises(ClientReset, match=why):
            realm.wait_for_download(DEADLINE_S)
        assert dict(realm.scan()) == found
    assert not again.before
    assert len(kept_in(local)) == times
    assert (READ_HERE, len(QUEUED)) in [read_kept(kept, path) for kept in kept_in(local)]


def test_where_recovery_leads_to_another_reset_the_queue_is_discarded(
    address: str, local: Path, path: str
) -> None:
    """In recover_or_discard the second attempt is the last, and both copies are kept."""
    needs_reset(address, local, path)
    with (heard := Recreating(address, path, 1)).open(address, local, path, "recover_or_discard") as realm:
        assert settled(realm) == pairs(address, path) == THEIRS
    assert [bool(recovered.applied) for recovered in heard.recovered] == [True, False]
    assert sorted(read_kept(kept, path)[1] for kept in kept_in(local)) == [len(QUEUED), len(QUEUED)]
    recreate(address, path)  # weeks later: a reset that has come to its end is no reason against another one
    with (later := Heard()).open(address, local, path, "recover_or_discard") as realm:
        assert settled(realm) == THEIRS
    assert len(later.after) == 1


# -- servers that are not what they should be ------------------------------------------------------------------


class Fake(sync_pb2_grpc.SyncServicer):
    """Answers each bind with what a test says, and ends the stream where that is None."""

    def __init__(self, answer: Callable[[sync_pb2.BindRealm], list[sync_pb2.SyncResponse | None]]) -> None:
        self._answer = answer
        self.binds: list[sync_pb2.BindRealm] = []
        self.uploads = 0
        self.streams = 0

    async def Sync(self, _: object, context: Any) -> None:  # type: ignore[override]
        await context.read()
        self.streams += 1
        await context.write(
            sync_pb2.SyncResponse(welcome=sync_pb2.SyncWelcome(cluster=CLUSTER, epoch=self.streams))
        )
        while isinstance(request := await context.read(), sync_pb2.SyncRequest):
            self.uploads += request.HasField("upload")
            if not request.HasField("bind"):
                continue
            self.binds.append(request.bind)
            for response in self._answer(request.bind):
                if response is None:
                    return
                await context.write(response)

    async def Salvage(self, requests: object, context: Any) -> sync_pb2.SalvageResponse:  # type: ignore[override]
        return sync_pb2.SalvageResponse()


@contextlib.contextmanager
def _serving(service: Fake) -> Iterator[str]:
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


@pytest.fixture
def history() -> History:
    """What a fake server has."""
    made = History()
    made.write(*(Put(key, value) for key, value in THEIRS.items()))
    return made


def _queued(local: Path) -> Path:
    """A copy with a queue, of a realm of which the fake server knows nothing."""
    store = Device(local)
    theirs = History()
    theirs.write(*(Put(key, value) for key, value in BASE.items()))
    store.stream(theirs)
    store.close()
    queue(local)
    return local


def test_a_server_that_always_wants_a_reset_is_not_asked_for_ever(local: Path, history: History) -> None:
    """No loops: one attempt of each kind, whatever becomes of the connection, and everything stays as it was."""

    def answer(bind: sync_pb2.BindRealm) -> list[sync_pb2.SyncResponse | None]:
        reset = history.bound(bind, sync_pb2.SYNC_RESET, reason=sync_pb2.OTHER_HISTORY)
        return [reset] if len(fake.binds) < 3 else [reset, None]

    fake, heard = Fake(answer), Heard()
    with _serving(fake) as address, heard.open(address, _queued(local), mode="recover_or_discard") as realm:
        wait_until(lambda: fake.streams >= 4)
        with pytest.raises(ClientReset, match="discarded"):
            realm.wait_for_download(DEADLINE_S)
        realm.commit([Put(b"later", b"1")])
        assert dict(realm.scan()) == READ_HERE | {b"later": b"1"}
    assert [bool(bind.locator) for bind in fake.binds[:5]] == [True, False, False, True, True]
    assert len(heard.before) == 2
    assert not heard.after
    assert not kept_in(local)


def test_a_server_that_comes_to_its_senses(local: Path, history: History) -> None:
    """What was tried counts only until the server takes the copy, or the realm is opened again."""
    resets = [1, 2, 3, 5, 6, 7, 8, 9, 10]  # the fourth bind is taken

    def answer(bind: sync_pb2.BindRealm) -> list[sync_pb2.SyncResponse | None]:
        if bind.path == "/other":
            return []
        binds = [bind for bind in fake.binds if bind.path == "/realm"]
        if len(binds) not in resets:
            history.raws, was = theirs.raws, history.raws
            taken = history.bound(bind)
            history.raws = was
            return [taken]
        reset = history.bound(bind, sync_pb2.SYNC_RESET, reason=sync_pb2.OTHER_HISTORY)
        return [reset, None] if len(binds) == 3 else [reset]

    theirs = History()
    theirs.write(*(Put(key, value) for key, value in BASE.items()))
    fake, heard = Fake(answer), Heard()
    mode: ResetMode = "recover_or_discard"
    with _serving(fake) as address, heard.open(address, _queued(local), "/other", mode):
        with heard.open(address, local, mode=mode) as realm:
            wait_until(lambda: fake.uploads)
            assert len(heard.before) == 2
            with pytest.raises(ClientReset):
                realm.wait_for_download(DEADLINE_S)
            assert len(heard.before) == 4
        with heard.open(address, local, mode=mode) as realm:
            with pytest.raises(ClientReset):
                realm.wait_for_download(DEADLINE_S)
            assert len(heard.before) == 6
            assert dict(realm.scan()) == READ_HERE


def test_a_fresh_state_that_was_cut_off_goes_on(local: Path, history: History) -> None:
    """What has come is not asked for again on the next connection, and after_reset sees all of it, once."""
    theirs = sorted(THEIRS.items())

    def answer(bind: sync_pb2.BindRealm) -> list[sync_pb2.SyncResponse | None]:
        if bind.locator:
            if len([one for one in fake.binds if not one.locator]) < 2:
                return [history.bound(bind, sync_pb2.SYNC_RESET, reason=sync_pb2.OTHER_HISTORY)]
            return [history.bound(bind)]
        if not bind.frontier:
            return [history.bound(bind, sync_pb2.SYNC_LOAD), history.page(bind, theirs[:1], 1), None]
        return [
            history.bound(bind, sync_pb2.SYNC_LOAD, resumed=True),
            history.page(bind, theirs[1:], 1, last=True),
        ]

    fake, heard = Fake(answer), Heard()
    with _serving(fake) as address, heard.open(address, _queued(local)) as realm:
        realm.wait_for_download(DEADLINE_S)
        assert dict(realm.scan()) == RECOVERED
    assert [bind.frontier for bind in fake.binds if not bind.locator] == [b"", theirs[0][0]]
    assert heard.after == [(READ_HERE, THEIRS)]
    assert len(heard.before) == 1


@pytest.mark.parametrize("mode", ["recover", "recover_or_discard"])
def test_a_server_that_changes_its_mind_while_the_state_is_loaded(
    local: Path, history: History, mode: ResetMode
) -> None:
    """A second reset before the first has done anything: an error, or a discard, and the copy that was kept serves."""
    reset, load = sync_pb2.SYNC_RESET, sync_pb2.SYNC_LOAD

    def answer(bind: sync_pb2.BindRealm) -> list[sync_pb2.SyncResponse | None]:
        if len(fake.binds) == 1:
            return [history.bound(bind, reset, reason=sync_pb2.OTHER_HISTORY)]
        if len(fake.binds) == 2:
            page = history.page(bind, [(b"base", b"theirs")], 1)
            return [history.bound(bind, load), page, history.bound(bind, reset, reason=sync_pb2.REALM_GONE)]
        if bind.locator:
            return [history.bound(bind)]
        return [history.bound(bind, load), history.page(bind, sorted(THEIRS.items()), 1, last=True)]

    fake, heard = Fake(answer), Heard()
    with _serving(fake) as address, heard.open(address, _queued(local), mode=mode) as realm:
        if mode == "recover":
            with pytest.raises(ClientReset, match="recovered the queue") as raised:
                realm.wait_for_download(DEADLINE_S)
            assert raised.value.reason == "REALM_GONE"
            assert dict(realm.scan()) == READ_HERE
            assert not kept_in(local)
        else:
            realm.wait_for_download(DEADLINE_S)
            assert dict(realm.scan()) == THEIRS
            [kept] = kept_in(local)
    if mode != "recover":
        assert read_kept(kept) == (READ_HERE, len(QUEUED))


def test_a_realm_that_is_closed_while_the_state_is_loaded(local: Path, history: History) -> None:
    """The reset goes on when it is opened again, with what was committed meanwhile, also in the same process."""
    theirs = sorted(THEIRS.items())

    def answer(bind: sync_pb2.BindRealm) -> list[sync_pb2.SyncResponse | None]:
        if bind.path == "/other":
            return []
        if bind.locator:
            return [history.bound(bind, sync_pb2.SYNC_RESET, reason=sync_pb2.OTHER_HISTORY)]
        if not bind.frontier:
            return [history.bound(bind, sync_pb2.SYNC_LOAD), history.page(bind, theirs[:1], 1)]
        return [
            history.bound(bind, sync_pb2.SYNC_LOAD, resumed=True),
            history.page(bind, theirs[1:], 1, last=True),
        ]

    fake, heard = Fake(answer), Heard()
    with _serving(fake) as address, heard.open(address, _queued(local), "/other"):
        with heard.open(address, local) as realm:
            wait_until(lambda: realm.state.loading is not None and realm.state.loading.entries)
            realm.commit([Put(b"meanwhile", b"1")])
        with heard.open(address, local) as realm:
            wait_until(lambda: heard.after)
            wait_until(lambda: dict(realm.scan()) == RECOVERED | {b"meanwhile": b"1"})
    [kept] = kept_in(local)
    assert read_kept(kept) == (READ_HERE, len(QUEUED))


def test_a_reset_is_not_over_before_everything_is_uploaded(local: Path, history: History) -> None:
    """No loops: another one is the second as long as what was recovered has not come back."""

    def answer(bind: sync_pb2.BindRealm) -> list[sync_pb2.SyncResponse | None]:
        if not bind.locator:
            page = history.page(bind, sorted(THEIRS.items()), 1, last=True)
            return [history.bound(bind, sync_pb2.SYNC_LOAD), page]
        if len(fake.binds) == 3:
            return [history.bound(bind)]
        return [history.bound(bind, sync_pb2.SYNC_RESET, reason=sync_pb2.OTHER_HISTORY)]

    fake = Fake(answer)
    with _serving(fake) as address, Heard().open(address, _queued(local)) as realm:
        wait_until(lambda: len(fake.binds) == 3 and fake.uploads)
        with pytest.raises(ClientReset, match="recovered the queue has just led to this one"):
            realm.wait_for_download(DEADLINE_S)
        assert dict(realm.scan()) == RECOVERED
    assert len(kept_in(local)) == 1


def test_a_reason_that_only_a_newer_server_knows(local: Path, history: History) -> None:
    """It is a reason like any other, named by its number."""

    def answer(bind: sync_pb2.BindRealm) -> list[sync_pb2.SyncResponse | None]:
        if bind.locator:
            return [history.bound(bind, sync_pb2.SYNC_RESET, reason=99)]  # type: ignore[arg-type]
        return [
            history.bound(bind, sync_pb2.SYNC_LOAD),
            history.page(bind, sorted(THEIRS.items()), 1, last=True),
        ]

    fake = Fake(answer)
    with _serving(fake) as address:
        with Heard().open(address, _queued(local), mode="manual") as realm:
            with pytest.raises(ClientReset) as raised:
                realm.wait_for_download(DEADLINE_S)
            assert realm.state.reset is not None
            assert realm.state.reset.reason == raised.value.reason == "RESET_REASON_99"
        with (heard := Heard()).open(address, local) as realm:
            wait_until(lambda: heard.after)
            wait_until(lambda: dict(realm.scan()) == RECOVERED)


# -- disks -----------------------------------------------------------------------------------------------------


def test_without_room_for_the_copy_nothing_is_given_up(address: str, tmp_path: Path, path: str) -> None:
    """A full disk stops the reset before it has done anything; with room again it is done."""
    with small_disk(tmp_path / "disk", size="4m") as disk:
        local = disk / "local"
        needs_reset(address, local, path)
        fill = fill_disk(disk)
        with (heard := Heard()).open(address, local, path) as realm:
            wait_until(lambda: heard.errors)
            assert isinstance(heard.errors[0], (ClientReset, DiskFull))
            assert dict(realm.scan()) == READ_HERE
        assert not heard.before
        assert not kept_in(local)
        fill.unlink()
        with heard.open(address, local, path) as realm:
            assert settled(realm) == pairs(address, path) == RECOVERED
        assert len(kept_in(local)) == 1


def test_without_room_for_the_state_the_reset_waits_for_it(address: str, tmp_path: Path, path: str) -> None:
    """A disk that gets full on the way loses nothing; with room again the reset goes on by itself."""
    with small_disk(tmp_path / "disk", size="6m") as disk:
        local, fills = disk / "local", []
        needs_reset(address, local, path)
        put(address, path, (b"large", bytes(1 << 19)))
        errors: list[UnderstudyError] = []
        with Realm.open(
            path,
            server=address,
            directory=local,
            before_reset=lambda _: fills.append(fill_disk(disk)),
            on_error=errors.append,
        ) as realm:
            wait_until(lambda: errors)
            assert isinstance(errors[0], DiskFull)
            assert dict(realm.scan()) == READ_HERE
            fills[0].unlink()
            assert settled(realm) == pairs(address, path) == RECOVERED | {b"large": bytes(1 << 19)}
        [kept] = kept_in(local)
        assert read_kept(kept, path) == (READ_HERE, len(QUEUED))


def test_a_place_for_copies_that_can_not_be_written_to(address: str, local: Path, path: str) -> None:
    """Where recovered/ is no directory, the reset does not begin, and says so."""
    needs_reset(address, local, path)
    (local / "recovered").write_bytes(b"")
    with Heard().open(address, local, path) as realm:
        with pytest.raises(ClientReset, match="could not be kept"):
            realm.wait_for_download(DEADLINE_S)
        assert dict(realm.scan()) == READ_HERE
    (local / "recovered").unlink()
    with Heard().open(address, local, path) as realm:
        assert settled(realm) == RECOVERED


def test_a_long_path_fits_into_the_copys_name(address: str, local: Path) -> None:
    """A realm's path may be longer than what file systems leave room for."""
    path = "/" + "/".join("s" * 60 for _ in range(4))
    needs_reset(address, local, path)
    with Heard().open(address, local, path) as realm:
        assert settled(realm) == RECOVERED
    [kept] = kept_in(local)
    assert read_kept(kept, path) == (READ_HERE, len(QUEUED))
