"""Changes that a server has lost come home: as they were where that is possible, and none of them twice."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pytest
from committers import ANN, BOB, Server, policy, prune
from state_helpers import KEY, Author, Layers
from store_helpers import make_store, open_both

from understudy.common import entries, realm_history
from understudy.common.errors import BadOperation, DiskFull
from understudy.common.operations import Add, Put
from understudy.common.state import State
from understudy.common.store import Store
from understudy.common.store_layout import Environment
from understudy.common.types import Durability, Epoch, Position
from understudy.primary import homecoming
from understudy.primary.homecoming import add_up, runs_of, take_home
from understudy.primary.in_flight import Done, SignedChange
from understudy.v1 import data_pb2, log_pb2, sync_pb2

CID = b"c" * 16
LOCAL, REPLICA, _ = Durability
Tail = list[tuple[bytes, bytes]]


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Environment, Store]]:
    """An empty store, open for checkpoints and for reading."""
    environment, store = open_both(make_store(tmp_path))
    with store:
        yield environment, store


@pytest.fixture
def store(both: tuple[Environment, Store]) -> Store:
    """An empty store; most tests here never write a checkpoint, so that several servers can share it."""
    return both[1]


def old_primary(store: Store) -> Server:
    """It has taken eight changes of /a, by two clients in turn: versions 1 to 8, numbers 1 to 4 of each."""
    server = Server(store, policy(LOCAL))
    for number in (1, 2, 3, 4):
        server.submit(number, client=ANN)
        server.submit(number, client=BOB)
    server.durable()
    return server


def promoted(old: Server, *, having: int, level: Durability = LOCAL) -> Server:
    """A server that had only so many of the old one's entries when it was promoted."""
    return Server(old.state.store, policy(level), log=old.log[:having])


def tail_of(server: Server, first: int, last: int = 8, path: str = "/a") -> Tail:
    """The raw changes of these versions."""
    rows = server.state.history(path, first, count_max=last + 1 - first, bytes_max=1 << 30)
    assert rows is not None
    return [(row.change, row.hmac) for row in rows]


class Halting:
    """Takes in what a server takes in, until something happens."""

    def __init__(self, server: Server, after: int, error: DiskFull | None) -> None:
        self._server = server
        self._left = after
        self._error = error

    def _step(self) -> None:
        if not self._left:
            if self._error is not None:
                raise self._error
            self._server.committer.fence(Epoch(2))
        self._left -= 1

    def head(self, path: str) -> tuple[int, bytes]:
        return self._server.committer.head(path)

    def is_in_flight(self, path: str, client: bytes, number: int) -> bool:
        return self._server.committer.is_in_flight(path, client, number)

    def was_renewed(self, path: str, client: bytes, number: int) -> bool:
        return self._server.committer.was_renewed(path, client, number)

    def submit_renewed(self, transaction: data_pb2.Transaction, origin: bytes, done: Done) -> None:
        self._step()
        self._server.committer.submit_renewed(transaction, origin, done)

    def submit_again(self, change: log_pb2.Change, signed: SignedChange, done: Done) -> None:
        self._step()
        self._server.committer.submit_again(change, signed, done)


def bring(
    server: Server,
    tail: Tail,
    *,
    path: str = "/a",
    may_renew: bool = True,
    state: State | None = None,
    taker: Halting | None = None,
) -> list[sync_pb2.Homecoming]:
    """Has the server take a tail in; what came of it, once that is known."""
    found: list[sync_pb2.Homecoming] = []
    deque(coming(server, tail, found, path, may_renew=may_renew, state=state, taker=taker), maxlen=0)
    return found


def coming(
    server: Server,
    tail: Tail,
    found: list[sync_pb2.Homecoming],
    path: str = "/a",
    *,
    may_renew: bool = True,
    state: State | None = None,
    taker: Halting | None = None,
) -> Generator[None, None, None]:
    """Has the server take a tail in, step by step; what came of it goes to ``found``."""
    return take_home(
        path,
        tail,
        state=state or server.state,
        taker=taker or server.committer,
        history_key=KEY,
        may_renew=may_renew,
        on_taken=found.append,
    )


def brought(server: Server, tail: Tail, *, may_renew: bool = True) -> tuple[int, int, int, int]:
    """Has the server take a tail in, durably: appended, renewed, known, refused."""
    found = bring(server, tail, may_renew=may_renew)
    server.write()
    if server.log:
        server.durable()
    [home] = found
    return home.appended, home.renewed, home.known, home.refused


def history_of(server: Server, first: int = 1, path: str = "/a") -> list[tuple[int, bytes, bytes]]:
    """Version, bytes and HMAC of each change."""
    rows = server.state.history(path, first, count_max=1_000, bytes_max=1 << 30)
    return [(row.version, row.change, row.hmac) for row in rows or []]


# -- as they were --------------------------------------------------------------------------------------------


def test_g10_who_may_only_read_does_not_bring_a_realm_back(store: Store) -> None:
    """G10: a realm that is not here may have been dropped; its changes are taken from those who may write to it."""
    old = old_primary(store)
    new = promoted(old, having=0)
    assert brought(new, tail_of(old, 1), may_renew=False) == (0, 0, 0, 8)
    assert new.state.realm("/a") is None
    assert brought(new, tail_of(old, 1), may_renew=True) == (8, 0, 0, 0)


def test_g3_changes_come_home_as_they_were(store: Store) -> None:
    """G3: versions, bytes and HMACs are what they were, so that every other copy of the realm agrees."""
    old = old_primary(store)
    new = promoted(old, having=3)
    assert brought(new, tail_of(old, 4)) == (5, 0, 0, 0)
    assert history_of(new) == history_of(old)
    assert new.state.realm("/a") == old.state.realm("/a")
    for version in range(9):
        assert new.state.digest_at("/a", version) == old.state.digest_at("/a", version)
    assert new.count == 8


def test_g6_a_change_that_came_home_is_not_applied_again(store: Store) -> None:
    """G6: the client that made it, and retries it, is answered with the version that it has."""
    old = old_primary(store)
    new = promoted(old, having=3)
    brought(new, tail_of(old, 4))
    new.submit(4, client=BOB)
    new.durable()
    [(_, _, receipt)] = new.answers
    assert (receipt.version, new.count) == (8, 8)
    new.submit(5, client=BOB)  # and goes on
    new.durable()
    assert new.count == 9


def test_g1_a_tail_is_taken_when_all_of_it_is_durable(store: Store) -> None:
    """G1: word of a tail is given once its last change has reached the server's level, not before."""
    old = old_primary(store)
    new = promoted(old, having=3, level=REPLICA)
    found = bring(new, tail_of(old, 4))
    new.write()
    new.durable()
    assert (found, new.count) == ([], 3)
    new.replicas(7)
    assert (found, new.count) == ([], 7)
    new.replicas(8)
    assert [home.appended for home in found] == [5]
    assert new.count == 8


@pytest.mark.parametrize("order", list(itertools.permutations([(4, 5), (2, 8), (4, 6)])))
def test_of_several_tails_the_longest_tells_and_the_others_agree(
    store: Store, order: Sequence[tuple[int, int]]
) -> None:
    """Whichever comes first, what one brings the next need not, and the realm is what it was."""
    old = old_primary(store)
    new = promoted(old, having=3)
    came = [brought(new, tail_of(old, first, last)) for first, last in order]
    assert sum(appended for appended, _, _, _ in came) == 5
    assert sum(renewed + refused for _, renewed, _, refused in came) == 0
    assert history_of(new) == history_of(old)
    assert new.count == 8


def test_what_is_there_already_is_passed_over(store: Store) -> None:
    """A tail that overlaps what the server has is taken from there on; one that is all there does nothing."""
    old = old_primary(store)
    new = promoted(old, having=5)
    assert brought(new, tail_of(old, 2)) == (3, 0, 4, 0)
    before = new.committer.position
    assert brought(new, tail_of(old, 2)) == (0, 0, 7, 0)
    assert brought(new, []) == (0, 0, 0, 0)
    assert new.committer.position == before


def test_a_realm_that_was_lost_whole_comes_home_whole(store: Store) -> None:
    """From its first version on: the realm has another id then, and its old digests."""
    old = old_primary(store)
    new = Server(store, policy(LOCAL))
    new.submit(1, "/b")  # so that LSNs differ
    new.durable()
    assert brought(new, tail_of(old, 1)) == (8, 0, 0, 0)
    assert history_of(new) == history_of(old)
    ours, theirs = new.state.realm("/a"), old.state.realm("/a")
    assert ours is not None
    assert theirs is not None
    assert ours.id != theirs.id
    assert ours.head == theirs.head


def test_who_may_not_write_may_still_bring_home_what_was_taken_before(store: Store) -> None:
    """Nothing new enters by it: the server had taken in every byte of it."""
    old = old_primary(store)
    new = promoted(old, having=3)
    assert brought(new, tail_of(old, 4), may_renew=False) == (5, 0, 0, 0)


# -- renewed -------------------------------------------------------------------------------------------------


def gone_on(old: Server, *, client: bytes = CID, number: int = 1) -> Server:
    """A promoted server that has three of eight changes, and then one of its own."""
    new = promoted(old, having=3)
    new.submit(number, client=client)
    new.durable()
    return new


def test_g6_where_the_realm_has_gone_on_changes_are_renewed_once(store: Store) -> None:
    """G6: what forked off comes home as new changes behind those made since, and a second time not at all."""
    old = old_primary(store)
    new = gone_on(old)
    assert brought(new, tail_of(old, 2)) == (0, 5, 2, 0)
    assert new.count == 9
    assert brought(new, tail_of(old, 2)) == (0, 0, 7, 0)
    assert brought(new, tail_of(old, 4, 6)) == (0, 0, 3, 0)
    assert new.count == 9
    made = [log_pb2.Change.FromString(change) for _, change, _ in history_of(new, 5)]
    assert [(one.client, one.number) for one in made] == [(BOB, 2), (ANN, 3), (BOB, 3), (ANN, 4), (BOB, 4)]


def test_g6_a_change_that_its_client_sent_again_is_not_renewed(store: Store) -> None:
    """G6: number and client tell that it is there already, whoever brought it."""
    old = old_primary(store)
    new = gone_on(
        old, client=ANN, number=3
    )  # ANN had no answer to what made version 5, and has sent it again
    assert brought(new, tail_of(old, 4)) == (0, 4, 1, 0)
    assert new.count == 8
    # Where it was the first to be lost, the very same change was made again, and the rest follows as it was.
    new = gone_on(old, client=BOB, number=2)
    assert brought(new, tail_of(old, 4)) == (4, 0, 1, 0)
    assert history_of(new) == history_of(old)


def test_g6_a_renewed_change_does_not_overtake_those_that_its_client_still_sends(store: Store) -> None:
    """G6: a tail that begins late leaves numbers out: they are still taken, and what came home is not done twice."""
    old = old_primary(store)
    new = gone_on(old)
    count = new.count
    assert brought(new, tail_of(old, 7, 7)) == (0, 1, 0, 0)  # ANN's 4; the server has seen 2
    assert new.state.last_number("/a", ANN) == 2
    for number in (3, 4):  # neither was answered before the failover
        new.submit(number, client=ANN)
    new.durable()
    assert new.count == count + 2
    assert {number for _, number, _ in new.answers[-2:]} == {3, 4}
    assert new.state.last_number("/a", ANN) == 3


def test_g6_a_change_whose_client_has_gone_on_is_renewed_under_another_id(store: Store) -> None:
    """G6: numbers must rise, so what has one below its client's latest comes under an id made of both, and once."""
    old = old_primary(store)
    new = gone_on(old, client=ANN, number=9)
    assert brought(new, tail_of(old, 4)) == (0, 5, 0, 0)
    assert new.count == 9
    assert brought(new, tail_of(old, 4)) == (0, 0, 5, 0)
    assert new.count == 9
    made = [log_pb2.Change.FromString(change) for _, change, _ in history_of(new, 5)]
    renewed = [one for one in made if one.client not in (ANN, BOB)]
    assert [one.number for one in renewed] == [1, 1]  # ANN's 3 and 4
    assert len({one.client for one in renewed}) == 2
    new.submit(10, client=ANN)  # who goes on undisturbed
    new.durable()
    assert new.count == 10


def test_who_may_not_write_renews_nothing(store: Store) -> None:
    """A new change of a realm takes the permission to make one."""
    old = old_primary(store)
    new = gone_on(old)
    before = new.committer.position
    assert brought(new, tail_of(old, 2), may_renew=False) == (0, 0, 2, 5)
    assert new.committer.position == before


# -- what is refused -----------------------------------------------------------------------------------------


def signed(change: log_pb2.Change) -> tuple[bytes, bytes]:
    """As a server of the cluster would have made it."""
    raw = change.SerializeToString()
    return raw, entries.sign(KEY, entries.change_digest(raw))


def _forged(tail: Tail) -> Tail:
    raw, _ = tail[2]
    tail[2] = raw, entries.sign(b"another key", entries.change_digest(raw))
    return tail


def _altered(tail: Tail) -> Tail:
    raw, mac = tail[2]
    tail[2] = raw.replace(b"n", b"m", 1), mac
    return tail


def _reordered(tail: Tail) -> Tail:
    tail[1], tail[2] = tail[2], tail[1]
    return tail


def _gap(tail: Tail) -> Tail:
    del tail[2]
    return tail


def _twice(tail: Tail) -> Tail:
    tail.insert(2, tail[2])
    return tail


def _garbage(tail: Tail) -> Tail:
    raw = b"\xff\xff\xff"
    tail[2] = raw, entries.sign(KEY, entries.change_digest(raw))
    return tail


def _of_another_realm(tail: Tail) -> Tail:
    change = log_pb2.Change.FromString(tail[0][0])
    change.realm = "/b"
    return [signed(change)]


def _of_a_later_version(tail: Tail) -> Tail:
    change = log_pb2.Change.FromString(tail[0][0])
    change.operations[0].kind = 99  # type: ignore[assignment]
    return [signed(change)]


def _with_a_bad_key(tail: Tail) -> Tail:
    change = log_pb2.Change.FromString(tail[0][0])
    change.operations[0].key = bytes(1_000)
    return [signed(change)]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_forged, "change 2 of /a was not made by a server of this cluster"),
        (_altered, "change 2 of /a was not made by a server of this cluster"),
        (_reordered, "does not follow the one before it"),
        (_gap, "does not follow the one before it"),
        (_twice, "does not follow the one before it"),
        (_garbage, "change 2 can't be decoded"),
        (_of_another_realm, "change 0 is of realm /b"),
        (_of_a_later_version, "change 0 can't be applied by this version"),
        (_with_a_bad_key, "change 0 can't be applied by this version"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_g10_a_tail_that_is_not_genuine_is_refused_whole(store: Store, spoil: object, why: str) -> None:
    """G10: of a tail in which anything is not as a server of this cluster made it, nothing is taken."""
    assert callable(spoil)
    old = old_primary(store)
    for new in (promoted(old, having=3), gone_on(old)):
        tail = spoil(tail_of(old, 4))
        before = new.committer.position
        [home] = bring(new, tail)
        assert (home.appended, home.renewed, home.known, home.refused) == (0, 0, 0, len(tail))
        assert why in home.problems[0]
        assert new.committer.position == before


@pytest.mark.parametrize("path", ["/__system", "/x/__hidden"])
def test_g10_nothing_comes_home_into_the_systems_own_realms(store: Store, path: str) -> None:
    """G10: not even what this very cluster has signed: what became of permissions since must not be undone."""
    author = Author()
    author.change(path, [Put(b"k", b"v")])
    row = author.realms[path].history[0]
    server = Server(store, policy(LOCAL))
    [home] = bring(server, [(row.change, row.hmac)], path=path)
    assert (home.refused, server.committer.position.lsn) == (1, 0)
    assert "the system's own" in home.problems[0]


def test_a_realm_that_can_not_be_is_refused(store: Store) -> None:
    """What no transaction could have made is refused like anything else, and does not end what it came with."""
    raw, mac = signed(log_pb2.Change(realm="nowhere", version=1, client=ANN, number=1))
    server = Server(store, policy(LOCAL))
    [home] = bring(server, [(raw, mac)], path="nowhere")
    assert (home.refused, server.committer.position.lsn) == (1, 0)
    assert "bad realm path 'nowhere'" in home.problems[0]


def test_numbers_that_fall_are_refused(store: Store) -> None:
    """A server numbers a client's changes upwards: where they fall, no more is taken as it was."""
    author = Author()
    for number in (5, 3, 6):
        author.change("/a", [Add(b"n", 1)], client=ANN, number=number)
    rows = author.realms["/a"].history
    server = Server(store, policy(LOCAL))
    assert brought(server, [(row.change, row.hmac) for row in rows]) == (1, 0, 0, 2)
    server = Server(store, policy(LOCAL))
    server.submit(7, client=CID)
    server.durable()
    assert brought(server, [(row.change, row.hmac) for row in rows]) == (0, 3, 0, 0)
    assert server.count == 4


# -- when it must end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_gone_on", [False, True])
def test_on_a_full_disk_what_was_taken_counts_and_the_rest_is_refused(
    store: Store, has_gone_on: bool
) -> None:
    """Two of five were taken in: the client hears of both numbers once the two are durable, and can come again."""
    old = old_primary(store)
    new = gone_on(old) if has_gone_on else promoted(old, having=3)
    count = new.count
    found = bring(new, tail_of(old, 4), taker=Halting(new, 2, DiskFull("no space left in /data")))
    assert found == []
    new.durable()
    [home] = found
    assert (home.appended + home.renewed, home.refused) == (2, 3)
    assert "no space left" in home.problems[0]
    assert new.count == count + 2
    again = brought(new, tail_of(old, 4))
    assert again == ((0, 3, 2, 0) if has_gone_on else (3, 0, 2, 0))
    assert new.count == count + 5


def test_g7_a_server_that_is_fenced_meanwhile_says_nothing(store: Store) -> None:
    """G7: nothing that was taken in before is acknowledged any more: it may be nowhere."""
    old = old_primary(store)
    new = promoted(old, having=3)
    found = bring(new, tail_of(old, 4), taker=Halting(new, 2, None))
    new.write()
    new.durable()
    assert (found, new.count) == ([], 3)
    [home] = bring(new, tail_of(old, 4))  # and takes nothing more
    assert (home.appended, home.refused) == (0, 5)


# -- step by step --------------------------------------------------------------------------------------------


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One change a step."""
    monkeypatch.setattr(homecoming, "STEP_BYTES", 1)


def until_taken(steps: Generator[None, None, None], server: Server, position: Position) -> None:
    """Goes on until something is taken in behind a position."""
    for _ in steps:
        if server.committer.position != position:
            return


def test_g9_a_long_tail_is_taken_in_steps(store: Store) -> None:
    """G9: neither checking a tail nor taking it in keeps everybody else waiting until the last change."""
    author = Author()
    for number in range(1, 1_001):
        author.change("/a", [Add(b"n", 1)], number=number)
    tail = [(row.change, row.hmac) for row in author.realms["/a"].history]
    new = Server(store, policy(LOCAL))
    found: list[sync_pb2.Homecoming] = []
    taken = [new.committer.position.lsn for _ in coming(new, tail, found)]
    ahead = [after - before for before, after in itertools.pairwise([*taken, new.committer.position.lsn])]
    assert max(ahead) <= 256
    assert taken.count(0) >= 3  # steps in which it was checked
    new.durable()
    assert [home.appended for home in found] == [1_000]


@pytest.mark.usefixtures("small_steps")
def test_g10_nothing_is_taken_before_all_of_it_is_genuine(store: Store) -> None:
    """G10: a forged last change spoils the tail, in however many steps it is looked at."""
    old = old_primary(store)
    new = promoted(old, having=3)
    before = new.committer.position
    tail = tail_of(old, 4)
    tail[-1] = tail[-1][0], bytes(32)
    [home] = bring(new, tail)
    assert (home.refused, new.committer.position) == (5, before)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("has_gone_on", [False, True])
@pytest.mark.parametrize("lengths", [(8, 8), (6, 8), (8, 6)])
def test_g6_two_who_bring_the_same_at_the_same_time_bring_it_once(
    store: Store, lengths: tuple[int, int], has_gone_on: bool
) -> None:
    """G6: tails that are taken in turn by turn end in one copy of each change, as it was where that is possible."""
    old = old_primary(store)
    new = gone_on(old) if has_gone_on else promoted(old, having=3)
    found: list[sync_pb2.Homecoming] = []
    turns = [coming(new, tail_of(old, 4, last), found) for last in lengths]
    for _ in itertools.zip_longest(*turns):
        pass
    new.durable()
    assert sum(home.appended + home.renewed for home in found) == 5
    assert sum(home.refused for home in found) == 0
    assert sum(home.known for home in found) == sum(lengths) - 6 - 5
    assert new.count == (9 if has_gone_on else 8)
    if not has_gone_on:
        assert history_of(new) == history_of(old)


@pytest.mark.parametrize("lengths", [(8, 8), (6, 8), (8, 6)])
def test_g6_what_is_still_in_flight_is_not_brought_twice(store: Store, lengths: tuple[int, int]) -> None:
    """G6, G1: with no replica to make the first tail safe, the second waits for the same changes with it."""
    old = old_primary(store)
    new = promoted(old, having=3, level=REPLICA)
    found = [bring(new, tail_of(old, 4, last)) for last in lengths]
    new.write()
    new.durable()
    assert found == [[], []]
    new.replicas(len(new.log))
    assert sum(homes[0].appended for homes in found) == 5
    assert sum(homes[0].renewed + homes[0].refused for homes in found) == 0
    assert history_of(new) == history_of(old)


@pytest.mark.usefixtures("small_steps")
def test_g6_a_realm_that_goes_on_meanwhile_gets_the_rest_as_new_changes(store: Store) -> None:
    """G6: a transaction between two steps forks the history there; nothing of the rest is lost, or done twice."""
    old = old_primary(store)
    new = promoted(old, having=3)
    found: list[sync_pb2.Homecoming] = []
    steps = coming(new, tail_of(old, 4), found)
    until_taken(steps, new, new.committer.position)
    new.submit(1, client=CID)
    deque(steps, maxlen=0)
    new.durable()
    [home] = found
    assert (home.appended, home.renewed, home.refused) == (1, 4, 0)
    assert new.count == 9
    assert brought(new, tail_of(old, 4)) == (0, 0, 5, 0)


@pytest.mark.usefixtures("small_steps")
def test_g6_what_its_client_sends_meanwhile_is_not_renewed(store: Store) -> None:
    """G6: a number that was new when receipts were looked up may have been applied by the time it is its turn."""
    old = old_primary(store)
    new = gone_on(old)
    found: list[sync_pb2.Homecoming] = []
    steps = coming(new, tail_of(old, 4), found)
    until_taken(steps, new, new.committer.position)  # BOB's 2
    for number in (3, 4):
        new.submit(number, client=ANN)
    new.durable()
    new.submit(3, client=BOB)  # this one is still in flight
    deque(steps, maxlen=0)
    new.durable()
    [home] = found
    assert (home.renewed, home.known, home.refused) == (2, 3, 0)
    assert new.count == 9


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(("begun_again", "is_applied"), [(0, True), (20, True), (0, False), (2, False)])
def test_a_realm_that_is_dropped_meanwhile_is_not_brought_back(
    store: Store, begun_again: int, is_applied: bool
) -> None:
    """What was left to be taken in is refused, whether somebody has begun the realm again or not."""
    old = old_primary(store)
    new = promoted(old, having=3)
    found: list[sync_pb2.Homecoming] = []
    steps = coming(new, tail_of(old, 4), found)
    until_taken(steps, new, new.committer.position)
    new.committer.drop_realm("/a", lambda _: None)
    for number in range(begun_again):
        new.submit(number + 1, client=CID)
    if is_applied:
        new.durable()
    deque(steps, maxlen=0)
    new.durable()
    [home] = found
    assert (home.appended, home.refused) == (1, 4)
    assert "dropped meanwhile" in home.problems[0]
    assert new.count == begun_again


@pytest.mark.usefixtures("small_steps")
def test_g7_a_server_that_is_fenced_between_steps_takes_nothing_more(store: Store) -> None:
    """G7: neither is anything appended behind the fence, nor is what was before it acknowledged."""
    old = old_primary(store)
    new = promoted(old, having=3)
    found: list[sync_pb2.Homecoming] = []
    steps = coming(new, tail_of(old, 4), found)
    until_taken(steps, new, new.committer.position)
    position = new.committer.position
    new.committer.fence(Epoch(2))
    deque(steps, maxlen=0)
    new.durable()
    assert (found, new.committer.position) == ([], position)


@pytest.mark.usefixtures("small_steps")
def test_who_goes_away_leaves_what_was_taken_and_no_more(store: Store) -> None:
    """A tail that is broken off counts as far as it was taken in, and the next one goes on from there."""
    old = old_primary(store)
    new = promoted(old, having=3)
    found: list[sync_pb2.Homecoming] = []
    steps = coming(new, tail_of(old, 4), found)
    until_taken(steps, new, new.committer.position)
    steps.close()
    new.durable()
    assert [(home.appended, home.refused) for home in found] == [(1, 0)]
    assert brought(new, tail_of(old, 4)) == (4, 0, 1, 0)
    assert history_of(new) == history_of(old)


# -- with only a part of the past ------------------------------------------------------------------------------


def pruned_server(
    both: tuple[Environment, Store], *, changes: int, upto: int, own: int = 0
) -> tuple[Server, Tail]:
    """A server that has so many changes of two clients in turn, then ``own`` of BOB's; the oldest are gone.

    Returns:
        The server, and the tail of a client that has eight of those changes.
    """
    author = Author()
    for at in range(8):
        author.change("/a", [Add(b"n", 1)], client=(ANN, BOB)[at % 2], number=at // 2 + 1)
    tail = [(row.change, row.hmac) for row in author.realms["/a"].history]
    layers = Layers(*both)
    for at in range(changes):
        layers.commit("/a", Add(b"n", 1), client=(ANN, BOB)[at % 2], number=at // 2 + 1)
    for at in range(own):
        layers.commit("/a", Add(b"n", 1), client=BOB, number=20 + at)
    layers.checkpoint()
    prune(*both, "/a", upto)
    return Server(both[1], policy(LOCAL)), tail


def test_what_goes_before_a_known_change_is_known_without_being_kept(
    both: tuple[Environment, Store],
) -> None:
    """Each change names the one before it, so a tail that reaches back behind our history is not refused for that."""
    server, tail = pruned_server(both, changes=6, upto=4)
    assert server.state.digest_at("/a", 3) is None
    assert brought(server, tail) == (2, 0, 6, 0)
    assert server.count == 8


def test_g6_what_is_too_old_to_tell_is_not_done_again(both: tuple[Environment, Store]) -> None:
    """G6: where history no longer says whether a change was on it, the change is refused."""
    server, tail = pruned_server(both, changes=3, upto=9, own=7)
    [home] = bring(server, tail)
    assert (home.appended, home.renewed, home.known, home.refused) == (0, 0, 0, 8)
    assert "older than what is kept" in home.problems[0]
    assert server.count == 10


def test_g6_what_no_receipt_is_left_of_is_not_done_again(
    both: tuple[Environment, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """G6: where the client's numbers no longer tell, what may have been applied is refused."""
    monkeypatch.setattr(realm_history, "RECEIPT_SEARCH_VERSIONS", 2)
    server, tail = pruned_server(both, changes=3, upto=0, own=4)
    [home] = bring(server, tail[3:])  # BOB's 2, and he is at 23
    assert (home.renewed, home.known, home.refused) == (0, 0, 5)
    assert "too old to tell" in home.problems[0]


# -- counting ------------------------------------------------------------------------------------------------


def test_problems_are_told_up_to_a_limit() -> None:
    """Figures add up; of what went wrong, the first few are enough."""
    total = sync_pb2.Homecoming()
    for at in range(15):
        more = sync_pb2.Homecoming(appended=1, renewed=2, known=3, refused=4, problems=[str(at)])
        add_up(total, more)
    assert (total.appended, total.renewed, total.known, total.refused) == (15, 30, 45, 60)
    assert list(total.problems) == [str(at) for at in range(10)]


# -- an export, as runs --------------------------------------------------------------------------------------


def test_an_export_comes_as_runs_of_one_realm_each() -> None:
    """Realms in the order in which they appear, each with its changes in order."""
    author = Author()
    for path in ("/a", "/b", "/a", "/b", "/a"):
        author.change(path, [Put(b"k", path.encode())])
    rows = {path: author.realms[path].history for path in ("/a", "/b")}
    mixed = [rows["/a"][0], rows["/b"][0], rows["/a"][1], rows["/b"][1], rows["/a"][2]]
    runs = list(runs_of((row.change, row.hmac) for row in mixed))
    assert runs == [(path, [(row.change, row.hmac) for row in rows[path]]) for path in ("/a", "/b")]


def test_a_realm_dropped_and_made_again_comes_as_two_runs() -> None:
    """The second begins with version 1: what belongs to different realms of one name is not mixed."""
    author = Author()
    changes: Tail = []
    for count in (3, 1, 2):
        for _ in range(count):
            author.change("/a", [Put(b"k", b"v")])
        changes += [(row.change, row.hmac) for row in author.realms["/a"].history]
        author.drop("/a")
    runs = list(runs_of(changes))
    assert [path for path, _ in runs] == ["/a"] * 3
    assert [run for _, run in runs] == [changes[:3], changes[3:4], changes[4:]]


def test_an_export_that_is_none_is_refused() -> None:
    """What can't be decoded was made by no server."""
    with pytest.raises(BadOperation, match="change 1"):
        list(runs_of([(b"", bytes(32)), (b"\xff\xff", bytes(32))]))
    assert list(runs_of([])) == []
