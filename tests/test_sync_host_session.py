"""The server's side of a sync, without a network: what it answers a bind, and what it sends, and what it never does."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from committers import ANN, BOB, Server, checkpoint, policy, prune
from state_helpers import CLUSTER, KEY
from store_helpers import make_store, open_both
from sync_model import ModelClient

from understudy.common.errors import DiskFull, NotPermitted, ProtocolError, UnderstudyError
from understudy.common.locator import EpochSpan
from understudy.common.operations import Add, Delete, DeleteRange, Operation, Put, to_protos
from understudy.common.state import State
from understudy.common.store import Store
from understudy.common.store_layout import Environment
from understudy.common.types import START, Durability, Epoch, Lsn, is_system_realm
from understudy.primary import incoming_tails, sync_load, sync_session
from understudy.primary.homecoming import take_home
from understudy.primary.incoming_tails import TAIL_S_MAX, TailRoom
from understudy.primary.sync_host import Pages
from understudy.primary.sync_session import SyncSession, TailHome
from understudy.v1 import data_pb2, sync_pb2

LOCAL, REPLICA, _ = Durability
STREAM, LOAD, HEAL, RESET = (
    sync_pb2.SYNC_STREAM,
    sync_pb2.SYNC_LOAD,
    sync_pb2.SYNC_HEAL,
    sync_pb2.SYNC_RESET,
)
CID = b"c" * 16
EPOCH_1 = EpochSpan(epoch=Epoch(1), first_lsn=Lsn(1), previous=START.digest)


class CountedPages:
    """A scan that is counted while it is open."""

    def __init__(self, pages: Pages, open_pages: set[CountedPages]) -> None:
        self._pages = pages
        self._open = open_pages
        open_pages.add(self)

    def page(self, *, bytes_max: int, pairs_max: int) -> tuple[list[bytes], list[bytes], bool]:
        return self._pages.page(bytes_max=bytes_max, pairs_max=pairs_max)

    def close(self) -> None:
        self._open.remove(self)
        self._pages.close()


class ServerHost:
    """A server without a network, as one client may see it."""

    def __init__(self, server: Server, tail_room: TailRoom | None = None) -> None:
        self.server = server
        self.tail_room = tail_room or TailRoom()
        self.cluster: bytes = CLUSTER
        self.epochs: Sequence[EpochSpan] = [EPOCH_1]
        self.client_kept_us = 1_000_000
        self.followed: set[str] = set()
        self.scans: set[CountedPages] = set()
        self.forbidden: set[str] = set()
        self.read_only: set[str] = set()
        self.refusal: UnderstudyError | None = None

    @property
    def state(self) -> State:
        return self.server.state

    @property
    def shown_lsn(self) -> int:
        return self.server.committer.shown_lsn

    @property
    def safe_lsn(self) -> int:
        return self.server.committer.safe_lsn

    def resolve(self, path: str) -> str:
        if is_system_realm(path) or path in self.forbidden:
            raise NotPermitted(f"not {path}")
        return path

    def may_write(self, path: str) -> bool:
        return path not in self.read_only

    def forbids_recovery(self, path: str) -> bool:
        return path == "/once"

    def size(self, path: str) -> tuple[int, int]:
        return 7, 700

    def scan(self, path: str, after: bytes) -> Pages:
        return CountedPages(self.state.scan(path, after + b"\0" if after else b""), self.scans)

    def submit(self, client: bytes, transaction: data_pb2.Transaction) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.server.committer.submit(client, transaction, lambda receipt: None)

    def follow(self, path: str) -> None:
        self.followed.add(path)

    def unfollow(self, path: str) -> None:
        self.followed.remove(path)


class Joined:
    """A server and one client of it, joined without a network."""

    def __init__(
        self, server: Server, client: ModelClient | None = None, tail_room: TailRoom | None = None
    ) -> None:
        self.server = server
        self.client = client or ModelClient(ANN)
        self.client.cluster = self.client.cluster or CLUSTER
        self.host = ServerHost(server, tail_room)
        self.session = SyncSession(self.host)
        self.home: TailHome | None = None
        server.committer.on_shown = self.on_shown

    def on_shown(self, path: str) -> None:
        if path in self.host.followed:
            self.session.on_shown(path)

    def say(self, message: sync_pb2.SyncRequest) -> None:
        """The client says something."""
        self.home = self.session.receive(message) or self.home

    def hear(self) -> sync_pb2.SyncResponse | None:
        """The next message, if there is one, also taken in by the client."""
        message = self.session.next_message()
        if message is not None:
            self.client.receive(message)
        return message

    def listen(self) -> list[str]:
        """All that there is to hear now: the kinds of messages."""
        kinds: list[str] = []
        while (message := self.hear()) is not None:
            kinds.append(message.WhichOneof("message") or "")
        return kinds

    def bind(self) -> sync_pb2.RealmBound:
        """Binds, and listens until nothing more comes."""
        count = len(self.client.answers)
        self.say(self.client.bind())
        self.listen()
        return self.client.answers[count]

    def bring_home(self) -> None:
        """The tail that has come is taken in, durably."""
        home = self.home
        assert home is not None
        self.home = None
        steps = take_home(
            home.path,
            home.changes,
            state=self.server.state,
            taker=self.server.committer,
            history_key=KEY,
            may_renew=home.may_renew,
            on_taken=lambda taken: self.session.on_tail_taken(home.ref, taken),
        )
        deque(steps, maxlen=0)
        self.server.write()
        if self.server.log:
            self.server.durable()
        self.listen()

    def check(self, path: str = "/a") -> None:
        """The client's copy is the server's state."""
        assert self.client.copy.frontier is None
        assert self.client.copy.pairs == pairs_of(self.server, path)
        head = self.server.state.realm(path)
        assert head is not None
        assert (self.client.copy.version, self.client.copy.head) == (head.version, head.head)


def pairs_of(server: Server, path: str = "/a") -> dict[bytes, bytes]:
    with server.state.scan(path) as scan:
        keys, values, at_end = scan.page(bytes_max=1 << 30, pairs_max=1 << 30)
    assert at_end
    return dict(zip(keys, values, strict=True))


def put(server: Server, *keys: bytes, client: bytes = BOB, path: str = "/a", value: bytes = b"v") -> None:
    """One transaction a key, all durable."""
    for number, key in enumerate(keys, server.state.last_number(path, client) + 1):
        server.submit(number, path, client=client, operations=to_protos([Put(key, value)]))
    server.durable()


def filled(store: Store, count: int = 10, level: Durability = LOCAL) -> Server:
    """A server whose realm /a has so many keys, made by as many changes."""
    server = Server(store, policy(level))
    put(server, *(b"%03d" % at for at in range(count)))
    return server


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Environment, Store]]:
    """An empty store, open for checkpoints and for reading."""
    environment, store = open_both(make_store(tmp_path))
    with store:
        yield environment, store


@pytest.fixture
def store(both: tuple[Environment, Store]) -> Store:
    """An empty store."""
    return both[1]


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two keys a page, two pages a scan."""
    monkeypatch.setattr(sync_load, "PAGE_PAIRS", 2)
    monkeypatch.setattr(sync_load, "PAGES_A_SCAN", 2)


# -- streaming -----------------------------------------------------------------------------------------------


def test_a_copy_gets_what_follows_it_in_order(store: Store) -> None:
    """From the version that it names on, all changes and nothing else, at once and as they come."""
    server = filled(store, 10)
    joined = Joined(server)
    joined.bind()
    joined.session.close()
    put(server, b"new 1", b"new 2")
    again = Joined(server, joined.client)
    bound = again.bind()
    assert (bound.decision, bound.head.version) == (STREAM, 12)
    again.check()
    put(server, b"new 3")
    assert again.listen() == ["changes"]
    again.check()
    assert again.listen() == []


def test_what_is_sent_at_once_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: a client that is far behind gets many messages, each within the limits."""
    monkeypatch.setattr(sync_session, "CHANGES_MAX", 3)
    server = filled(store, 1)
    joined = Joined(server)
    joined.bind()
    put(server, *(b"%d" % at for at in range(10)))
    assert joined.listen() == ["changes"] * 4
    joined.check()


def test_a_realm_that_does_not_exist_yet_is_waited_for(store: Store) -> None:
    """Its first change is the first that is heard of it, whoever makes it."""
    server = Server(store, policy(LOCAL))
    joined = Joined(server)
    bound = joined.bind()
    assert (bound.decision, bound.realm_id, bound.head.version) == (STREAM, 0, 0)
    joined.say(joined.client.upload(1))
    server.durable()
    assert joined.listen() == ["changes"]
    joined.check()
    assert joined.client.confirmed == 1


def test_the_streams_of_many_realms_take_turns(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: a realm with much to say does not keep the others waiting."""
    monkeypatch.setattr(sync_session, "CHANGES_MAX", 2)
    server = filled(store, 20)
    put(server, b"k", path="/b")
    joined = Joined(server)
    joined.client.cluster = b""
    for ref, path in ((1, "/a"), (2, "/b")):
        joined.say(
            sync_pb2.SyncRequest(bind=sync_pb2.BindRealm(ref=ref, path=path, clients=[ANN], realm_id=0))
        )
    put(server, b"k2", path="/b")
    heard = []
    while (message := joined.session.next_message()) is not None:
        if message.HasField("page"):
            heard.append(message.page.ref)
    assert set(heard[:2]) == {1, 2}


# -- G5: nothing that could still be lost ------------------------------------------------------------------------


def copy_of(server: Server, version: int) -> ModelClient:
    """A client that was at that version, and knows nothing of the keys."""
    client = ModelClient(CID)
    client.cluster = CLUSTER
    client.copy.go_to(version, server.state.digest_at("/a", version) or b"")
    return client


def test_g5_changes_are_told_once_they_are_on_a_replica(store: Store) -> None:
    """G5: at level replica other clients hear of a change when it can no longer be lost."""
    server = Server(store, policy(REPLICA))
    joined = Joined(server)
    joined.bind()
    server.submit(1, client=BOB)
    server.submit(2, client=BOB)
    server.durable()
    joined.session.poll()
    assert joined.listen() == []
    server.replicas(1)
    assert joined.listen() == ["changes"]
    assert joined.client.copy.version == 1
    server.replicas(2)
    joined.listen()
    joined.check()


def test_g5_nor_after_a_restart_is_anything_told_too_early(store: Store) -> None:
    """G5: what a restarted server has applied may be nowhere else: neither changes nor state are sent before it is."""
    before = filled(store, 5)
    server = Server(store, policy(REPLICA), log=before.log)
    assert len(pairs_of(server)) == 5
    loading, streaming = Joined(server), Joined(server, copy_of(before, 2))
    server.committer.on_shown = lambda path: None
    for reached, streamed, loaded in ((0, 2, 0), (4, 4, 0), (5, 5, 5)):
        server.replicas(reached)
        for joined, version in ((streaming, streamed), (loading, loaded)):
            if not joined.client.answers:
                joined.bind()
            joined.session.poll()
            joined.listen()
            assert joined.client.copy.version == version
            assert joined.client.incoming is None or not joined.client.incoming.pairs
    loading.check()


@pytest.mark.usefixtures("small_pages")
def test_g5_a_scan_of_a_load_waits_for_its_version(store: Store) -> None:
    """G5: a load that goes on with another scan does not carry what is not to be shown yet."""
    before = filled(store, 10)
    server = Server(store, policy(REPLICA), log=before.log)
    server.replicas(10)
    joined = Joined(server)
    joined.say(joined.client.bind())
    for _ in range(3):  # the answer, and all pages of the first scan
        joined.hear()
    put(server, b"0001", b"zzz")
    server.replicas(12)
    # A restart: what was applied may be nowhere else again.
    restarted = Server(store, policy(REPLICA), log=server.log)
    restarted.replicas(11)
    again = Joined(restarted, joined.client)
    again.bind()
    incoming = again.client.incoming
    assert incoming is not None
    assert incoming.version <= 11
    assert incoming.frontier == b"003"
    restarted.replicas(12)
    again.session.poll()
    again.listen()
    again.check()


# -- loading -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pages")
def test_g2_a_load_is_exactly_the_state_whatever_is_written_meanwhile(store: Store, seed: int) -> None:
    """G2: pages of many scans, with the changes made between them, are the state at the last version."""
    rng = random.Random(seed)
    server = filled(store, 30)
    joined = Joined(server)
    joined.say(joined.client.bind())
    number = 100
    while joined.client.incoming is not None or not joined.client.answers:
        if joined.hear() is None:
            break
        if rng.random() < 0.6:
            number += 1
            server.submit(number, client=BOB, operations=to_protos(_some(rng)))
            server.durable()
    joined.listen()
    joined.check()
    assert joined.host.scans == set()


def _some(rng: random.Random) -> list[Operation]:
    def key() -> bytes:
        return b"%03d" % rng.randrange(40)

    made: list[Callable[[], Operation]] = [
        lambda: Put(key(), b"%d" % rng.randrange(100)),
        lambda: Delete(key()),
        lambda: Add(key(), rng.randrange(5)),
        lambda: DeleteRange(*sorted((key(), key() + b"x"))),
        lambda: DeleteRange(key(), b"") if rng.random() < 0.2 else Put(key(), b"again"),
    ]
    return [rng.choice(made)() for _ in range(rng.randint(1, 3))]


def test_an_empty_realm_is_loaded_too(store: Store) -> None:
    """All its keys were deleted: one page without any, and its version."""
    server = filled(store, 1)
    server.submit(50, client=BOB, operations=to_protos([DeleteRange(b"", b"")]))
    server.durable()
    joined = Joined(server)
    assert joined.bind().decision == LOAD
    joined.check()
    assert joined.client.copy.pairs == {}


def test_a_load_says_what_there_is_and_who_asks(store: Store) -> None:
    """How much is to come, up to which number the client's changes are in it, and what it may do."""
    server = filled(store, 3)
    server.submit(4, client=ANN)
    server.durable()
    joined = Joined(server)
    joined.host.read_only.add("/a")
    bound = joined.bind()
    assert (bound.entries, bound.bytes, *bound.last_numbers) == (7, 700, 4)
    assert (bound.may_write, bound.recovery_forbidden) == (False, False)
    assert joined.client.confirmed == 4


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("heard", [2, 3, 4, 6])
def test_a_load_that_was_broken_off_goes_on_where_it_was(store: Store, heard: int) -> None:
    """What was loaded stays: only what follows comes, after the changes made meanwhile."""
    server = filled(store, 20)
    joined = Joined(server)
    joined.say(joined.client.bind())
    for _ in range(heard):
        joined.hear()
    incoming = joined.client.incoming
    assert incoming is not None
    loaded = len(incoming.pairs)
    assert loaded
    joined.session.close()
    assert joined.host.scans == set()
    put(server, b"000", b"0155", b"zzz", value=b"meanwhile")
    again = Joined(server, joined.client)
    again.say(again.client.bind())
    assert again.hear() is not None
    assert again.client.answers[-1].resumed
    assert again.client.incoming is incoming
    kinds = again.listen()
    assert kinds[0] == "changes"
    assert kinds.count("page") <= (20 + 2 - loaded) // 2 + 1
    again.check()


@pytest.mark.usefixtures("small_pages")
def test_a_load_whose_last_page_was_lost_on_the_way_ends_with_an_empty_one(store: Store) -> None:
    """A client that holds everything up to the highest key that can be is told so."""
    server = filled(store, 6)
    joined = Joined(server)
    joined.bind()
    client = joined.client
    client.incoming, client.copy = client.copy, type(client.copy)()
    client.incoming.frontier = b"\xff" * 480
    again = Joined(server, client)
    bound = again.bind()
    assert (bound.decision, bound.resumed) == (LOAD, True)
    again.check()


@pytest.mark.parametrize("spoil", ["digest", "frontier", "version"])
def test_g3_a_load_of_another_history_begins_anew(store: Store, spoil: str) -> None:
    """G3: what was begun is gone on with only where it is on this realm's history."""
    server = filled(store, 6)
    joined = Joined(server)
    message = joined.client.bind()
    bind = message.bind
    bind.incoming.version, bind.incoming.digest = 3, server.state.digest_at("/a", 3) or b""
    bind.frontier = b"002"
    if spoil == "digest":
        bind.incoming.digest = bytes(32)
    elif spoil == "frontier":
        bind.frontier = b""
    else:
        bind.incoming.version = 99
    joined.say(message)
    joined.listen()
    assert [(one.decision, one.resumed) for one in joined.client.answers] == [(LOAD, False)]
    joined.check()


def test_a_client_too_slow_for_what_is_kept_loads_anew(both: tuple[Environment, Store]) -> None:
    """History was pruned under it: it gets the state instead, on the same binding."""
    server = filled(both[1], 5)
    joined = Joined(server)
    joined.bind()
    put(server, *(b"later %d" % at for at in range(5)))
    checkpoint(server, both[0])
    prune(*both, "/a", 8)
    assert joined.listen()[:2] == ["bound", "page"]
    joined.check()
    assert [one.decision for one in joined.client.answers] == [LOAD, LOAD]
    put(server, b"and on")
    assert joined.listen() == ["changes"]
    joined.check()


@pytest.mark.usefixtures("small_pages")
def test_a_load_too_slow_for_what_is_kept_begins_anew(both: tuple[Environment, Store]) -> None:
    """The changes between two of its scans are gone: what was loaded is of no use, and nothing stays pinned."""
    server = filled(both[1], 12)
    joined = Joined(server)
    joined.say(joined.client.bind())
    for _ in range(3):  # the answer and a whole scan
        joined.hear()
    put(server, *(b"later %d" % at for at in range(5)))
    checkpoint(server, both[0])
    prune(*both, "/a", 15)
    joined.listen()
    assert [(one.decision, one.resumed) for one in joined.client.answers] == [(LOAD, False)] * 2
    joined.check()
    assert joined.host.scans == set()


# -- what is pinned ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("how", ["unbind", "close", "fail", "drop"])
def test_g9_nothing_stays_pinned(store: Store, how: str) -> None:
    """G9: whichever way a load ends, its scan is closed."""
    server = filled(store, 12)
    joined = Joined(server)
    joined.say(joined.client.bind())
    joined.hear()
    joined.hear()
    assert len(joined.host.scans) == 1
    if how == "unbind":
        joined.say(joined.client.unbind())
    elif how == "close":
        joined.session.close()
    elif how == "fail":
        joined.host.forbidden.add("/a")
        joined.listen()
        assert [one.code for one in joined.client.failed] == ["NotPermitted"]
    else:
        server.committer.drop_realm("/a", lambda receipt: None)
        server.durable()
        joined.listen()
        assert joined.client.answers[-1].reason == sync_pb2.REALM_GONE
    assert joined.host.scans == set()
    if how != "drop":
        assert joined.host.followed == set()
    joined.session.close()
    assert joined.host.followed == set()


@pytest.mark.usefixtures("small_pages")
def test_g9_a_client_that_does_not_read_pins_nothing_for_long(store: Store) -> None:
    """G9: its scan is closed after a while, and another opened when it reads again."""
    server = filled(store, 12)
    joined = Joined(server)
    joined.say(joined.client.bind())
    joined.hear()
    joined.hear()
    for _ in range(sync_load.UNREAD_POLLS_MAX):
        joined.session.poll()
    assert len(joined.host.scans) == 1
    joined.session.poll()
    assert joined.host.scans == set()
    put(server, b"0001", b"zzz")
    joined.listen()
    joined.check()
    assert joined.host.scans == set()


@pytest.mark.parametrize("meanwhile", ["nothing", "a commit", "pruned", "dropped"])
def test_g9_the_changes_of_the_last_page_are_read_in_steps(
    both: tuple[Environment, Store], monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """G9: others have a turn in between, whatever they do with it, and another realm of the client waits its turn."""
    monkeypatch.setattr(sync_load, "CHANGES_AT_ONCE", 3)
    server = filled(both[1], 10)
    put(server, b"other", path="/b")
    checkpoint(server, both[0])
    joined = Joined(server)
    for ref, path in ((1, "/a"), (2, "/b")):
        bind = sync_pb2.BindRealm(ref=ref, path=path, clients=[ANN])
        joined.say(sync_pb2.SyncRequest(bind=bind))
    session = joined.session
    assert [one.WhichOneof("message") for one in (session.next_message(), session.next_message()) if one] == [
        "bound",
        "bound",
    ]
    for _ in range(2):
        assert session.next_message() is None
        assert session.is_busy
    if meanwhile == "a commit":
        put(server, b"new")
    elif meanwhile == "pruned":
        prune(*both, "/a", 8)
    elif meanwhile == "dropped":
        server.committer.drop_realm("/a", lambda receipt: None)
        server.durable()
    following = []
    while (message := session.next_message()) is not None or session.is_busy:
        following += [message] if message is not None else []
    if meanwhile == "dropped":
        assert following[0].bound.reason == sync_pb2.REALM_GONE
        return
    page = following[0].page
    assert (page.ref, page.last, page.position.version) == (1, True, 10)
    assert len(page.changes) == len(page.hmacs) // 32 == (0 if meanwhile == "pruned" else 10)
    assert following[1].page.ref == 2
    assert [one.changes.head_version for one in following[2:]] == ([11] if meanwhile == "a commit" else [])


# -- dropped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
def test_a_realm_that_is_dropped_under_a_client_is_a_reset(store: Store, again: bool) -> None:
    """It is told so once, with the reason, and gets nothing of another realm under the name."""
    server = filled(store, 3)
    joined = Joined(server)
    joined.bind()
    server.committer.drop_realm("/a", lambda receipt: None)
    server.durable()
    if again:
        put(server, b"another")
    assert joined.listen() == ["bound"]
    bound = joined.client.answers[-1]
    assert (bound.decision, bound.reason) == (
        RESET,
        sync_pb2.REALM_RECREATED if again else sync_pb2.REALM_GONE,
    )
    put(server, b"and on")
    joined.session.poll()
    assert joined.listen() == []
    assert joined.client.copy.version == 3
    # As is who comes back after it was dropped.
    later = Joined(server, joined.client)
    assert (later.bind().decision, later.client.answers[-1].reason) == (RESET, sync_pb2.REALM_RECREATED)
    assert later.client.answers[-1].tail_from == 0


@pytest.mark.parametrize("again", [False, True])
def test_a_drop_is_survived_by_a_look_around(store: Store, again: bool) -> None:
    """Between the drop and the word of it, time passes: nothing is said of what is safe of a realm that is gone."""
    server = filled(store, 3)
    joined = Joined(server)
    joined.bind()
    server.committer.drop_realm("/a", lambda receipt: None)
    server.durable()
    if again:
        put(server, b"1", b"2", b"3")
    server.replicas(50)
    joined.session.poll()
    assert joined.listen() == ["bound"]


def test_a_dropped_realm_does_not_come_back_by_what_was_on_its_way(store: Store) -> None:
    """An upload that crosses with the drop is not taken for the beginning of a new realm."""
    server = filled(store, 3)
    joined = Joined(server)
    joined.bind()
    server.committer.drop_realm("/a", lambda receipt: None)
    server.durable()
    joined.say(joined.client.upload(1))  # it does not know yet
    assert joined.listen() == ["bound"]
    joined.say(joined.client.upload(2))  # it must not, having been told
    server.write()
    assert server.state.realm("/a") is None
    assert server.kinds()[-1] == "realm_dropped"
    assert joined.client.refusals == []


# -- safe ----------------------------------------------------------------------------------------------------


def test_what_is_safe_is_told_with_changes_and_without(store: Store) -> None:
    """The highest version that is on enough replicas, at any level, and never one that is not."""
    server = filled(store, 4)
    joined = Joined(server)
    joined.bind()
    assert joined.client.safe_version == 0
    server.replicas(3)
    joined.session.poll()
    assert joined.listen() == ["safe"]
    assert joined.client.safe_version == 3
    joined.session.poll()
    assert joined.listen() == []
    put(server, b"more")
    server.replicas(4)
    joined.listen()
    assert joined.client.safe_version == 3
    joined.session.poll()
    assert joined.listen() == ["safe"]
    assert joined.client.safe_version == 4
    server.replicas(5)
    put(server, b"and more")
    joined.session.poll()
    joined.listen()
    assert joined.client.safe_version == 5


def test_what_is_no_longer_kept_is_not_safe_for_that(both: tuple[Environment, Store]) -> None:
    """Without a replica, history goes all the same: the client's tail is all that there may be elsewhere."""
    server = filled(both[1], 8)
    joined = Joined(server)
    joined.bind()
    checkpoint(server, both[0])
    prune(*both, "/a", 6)
    joined.session.poll()
    joined.listen()
    assert joined.client.safe_version == 0
    server.replicas(3)  # an LSN of what is no longer kept: nobody can tell
    joined.session.poll()
    joined.listen()
    assert joined.client.safe_version == 0
    server.replicas(7)
    joined.session.poll()
    joined.listen()
    assert joined.client.safe_version == 7


# -- uploads -------------------------------------------------------------------------------------------------


def test_g6_uploads_come_back_as_changes_and_once(store: Store) -> None:
    """G6: what a client has sent comes back in the server's order; what it sends again does not."""
    server = filled(store, 2)
    joined = Joined(server)
    joined.bind()
    joined.say(joined.client.upload(1, 2))
    joined.say(joined.client.upload(1, 2, 3))
    server.durable()
    joined.say(joined.client.upload(2, 3))
    server.durable()
    joined.listen()
    joined.check()
    assert joined.client.copy.version == 5
    assert (joined.client.confirmed, joined.client.refusals) == (3, [])


def test_an_upload_is_for_the_realm_that_was_bound(store: Store) -> None:
    """G10: whatever realm a transaction names itself."""
    server = filled(store, 1)
    joined = Joined(server)
    joined.bind()
    for path in ("/b", "/__system"):
        message = joined.client.upload(1 if path == "/b" else 2)
        message.upload.transactions[0].realm = path
        joined.say(message)
    server.durable()
    joined.listen()
    joined.check()
    assert list(server.state.realms()) == ["/a"]


def test_what_is_refused_is_told_with_number_code_and_remedy(store: Store) -> None:
    """The client hears which of its transactions were not taken, and why."""
    server = filled(store, 1)
    joined = Joined(server)
    joined.bind()
    message = joined.client.upload(1, operations=[Put(b"k", b"v")])
    message.upload.transactions[0].operations[0].key = b""
    joined.say(message)
    assert joined.listen() == ["refusals"]
    [refusal] = joined.client.refusals
    assert (refusal.number, refusal.code) == (1, "BadKey")
    assert refusal.message
    assert refusal.remedy


def test_g6_what_was_sent_behind_a_refused_transaction_does_not_overtake_it(store: Store) -> None:
    """G6: numbers rise, so what is refused for now could never be applied if a later one were."""
    server = filled(store, 1)
    joined = Joined(server)
    joined.bind()
    joined.host.refusal = DiskFull("no space left")
    joined.say(joined.client.upload(1, 2))
    joined.host.refusal = None
    joined.say(joined.client.upload(3, 4))  # it was under way
    server.write()
    joined.listen()
    assert [one.number for one in joined.client.refusals] == [1, 2, 3, 4]
    assert {one.code for one in joined.client.refusals[1:]} == {"Unavailable"}
    joined.say(joined.client.upload(1, 2, 3, 4))
    server.durable()
    joined.listen()
    joined.check()
    assert (joined.client.confirmed, len(joined.client.refusals)) == (4, 4)


def test_g6_what_came_in_by_another_way_holds_nothing_up(store: Store) -> None:
    """G6: a refused transaction that a copy of the directory has sent meanwhile is there, so the next may follow."""
    server = filled(store, 1)
    joined = Joined(server)
    joined.bind()
    joined.host.refusal = DiskFull("no space left")
    joined.say(joined.client.upload(1))
    joined.host.refusal = None
    server.submit(1)
    server.durable()
    joined.say(joined.client.upload(2))
    server.durable()
    joined.listen()
    assert [one.number for one in joined.client.refusals] == [1]
    assert joined.client.confirmed == 2


def test_g6_a_transaction_that_was_applied_long_ago_holds_nothing_up(
    both: tuple[Environment, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """G6: of it no more is known than that it must not be done again; the next one may."""
    monkeypatch.setattr("understudy.common.realm_history.RECEIPT_SEARCH_VERSIONS", 0)
    server = Server(both[1], policy(LOCAL))
    for number in (1, 2, 3):
        server.submit(number)
    checkpoint(server, both[0])
    joined = Joined(server)
    joined.bind()
    joined.say(joined.client.upload(1, 4))
    server.durable()
    joined.listen()
    assert [(one.number, one.code) for one in joined.client.refusals] == [(1, "ReceiptExpired")]
    assert joined.client.confirmed == 4
    assert joined.client.copy.version == 4


def test_an_upload_of_a_binding_that_is_no_more_is_passed_over(store: Store) -> None:
    """It was under way: that is nobody's mistake, and it is not taken either."""
    server = filled(store, 1)
    joined = Joined(server)
    joined.bind()
    joined.say(joined.client.unbind())
    joined.say(joined.client.upload(1))
    assert joined.listen() == []
    assert server.committer.take_batch() == b""


# -- tails ---------------------------------------------------------------------------------------------------


def ahead(store: Store, *, having: int = 3, count: int = 8) -> Joined:
    """A client of a server that has lost what the client still holds."""
    old = Server(store, policy(LOCAL))
    early = Joined(old)
    early.bind()
    put(old, *(b"%03d" % at for at in range(count)))
    early.listen()
    early.bind()  # and knows the realm's id
    new = Server(store, policy(LOCAL), log=old.log[:having])
    joined = Joined(new, early.client)
    joined.host.epochs = [
        EPOCH_1,
        EpochSpan(epoch=Epoch(2), first_lsn=Lsn(having + 1), previous=START.digest),
    ]
    return joined


@pytest.mark.parametrize("having", [0, 3, 7])
def test_g3_a_server_that_knows_less_is_healed_by_the_tail(store: Store, having: int) -> None:
    """G3: the answer asks for it, another one follows, and the copy is on the server's history again."""
    joined = ahead(store, having=having)
    bound = joined.bind()
    assert (bound.decision, bound.reason) == (HEAL, sync_pb2.RESET_UNSPECIFIED)
    assert 1 <= bound.tail_from <= having + 1
    joined.say(joined.client.send_tail())
    joined.bring_home()
    assert [home.appended for home in joined.client.homecomings] == [8 - having]
    assert joined.client.answers[-1].decision == STREAM
    joined.check()
    put(joined.server, b"and on")
    joined.listen()
    joined.check()


def test_a_tail_may_come_in_pieces(store: Store) -> None:
    """Nothing is done before its last piece."""
    joined = ahead(store)
    joined.bind()
    whole = joined.client.send_tail().tail
    for at in range(len(whole.changes)):
        piece = sync_pb2.Tail(
            ref=whole.ref,
            changes=[whole.changes[at]],
            hmacs=whole.hmacs[32 * at : 32 * at + 32],
            last=at == len(whole.changes) - 1,
        )
        assert joined.home is None
        joined.say(sync_pb2.SyncRequest(tail=piece))
    joined.bring_home()
    joined.check()


def test_a_fork_that_hides_between_two_positions_of_a_locator_comes_home_whole(store: Store) -> None:
    """Where the server has gone on unseen, all that is not common comes home, not only what is past its head."""
    joined = ahead(store, having=4, count=20)
    put(joined.server, b"other", client=CID)  # version 5, of which the client's locator has none
    message = joined.client.bind()
    del message.bind.locator[-1]  # 20, 19, 18, 16, 12
    joined.say(message)
    joined.listen()
    bound = joined.client.answers[-1]
    assert bound.decision == HEAL
    joined.say(joined.client.send_tail())
    joined.bring_home()
    assert [(home.known, home.renewed) for home in joined.client.homecomings] == [(4, 16)]
    bound = joined.client.answers[-1]
    assert (bound.decision, bound.reason, bound.tail_from) == (RESET, sync_pb2.OTHER_HISTORY, 0)
    assert len(pairs_of(joined.server)) == 21


def test_a_tail_that_does_not_help_is_not_asked_for_again(store: Store) -> None:
    """What can't be taken leaves the server behind: a reset, and not the same question for ever."""
    joined = ahead(store)
    joined.client.tail = [(raw, bytes(32)) for raw, _ in joined.client.tail]
    joined.bind()
    joined.say(joined.client.send_tail())
    joined.bring_home()
    assert [home.refused for home in joined.client.homecomings] == [8]
    bound = joined.client.answers[-1]
    assert (bound.decision, bound.reason, bound.tail_from) == (RESET, sync_pb2.SERVER_BEHIND, 0)


def test_a_reset_wants_the_tail_where_it_may_come_home_as_new_changes(store: Store) -> None:
    """A history that has forked: what the client holds of it is asked for from the last common version on."""
    joined = ahead(store)
    put(joined.server, *(b"other %d" % at for at in range(9)), client=CID)
    bound = joined.bind()
    assert (bound.decision, bound.reason) == (RESET, sync_pb2.OTHER_HISTORY)
    assert bound.common.version <= 3
    assert bound.tail_from == bound.common.version + 1
    joined.say(joined.client.send_tail())
    joined.bring_home()
    assert [home.renewed for home in joined.client.homecomings] == [5]
    assert joined.client.answers[-1] is bound  # it is told what came of it, and nothing else


@pytest.mark.parametrize("case", ["read only", "no tail", "foreign", "recreated", "on history"])
def test_a_tail_is_not_asked_for_where_it_may_not_come_home(store: Store, case: str) -> None:
    """Not from who may not write, of another cluster, or of another realm; nor where there is none, or no need."""
    joined = ahead(store)
    if case == "read only":
        put(joined.server, *(b"other %d" % at for at in range(9)), client=CID)
        joined.host.read_only.add("/a")
    elif case == "no tail":
        joined.client.tail_first = 0
    elif case == "foreign":
        joined.client.cluster = b"x" * 16
    elif case == "recreated":
        joined.server.committer.drop_realm("/a", lambda receipt: None)
        put(joined.server, b"another", client=CID)
        joined.host.epochs = [EPOCH_1]
    else:
        joined = Joined(filled(store, 3))
        joined.bind()
    joined.bind()
    assert joined.client.answers[-1].tail_from == 0
    whole = sync_pb2.Tail(ref=joined.client.ref, changes=[b"x"], hmacs=bytes(32), last=True)
    with pytest.raises(ProtocolError, match="nobody has asked for"):
        joined.say(sync_pb2.SyncRequest(tail=whole))


def test_g9_a_tail_that_does_not_end_gives_its_room_back(store: Store) -> None:
    """G9: who stops in the midst of a tail keeps room that others need for so long, and then no stream."""
    joined = ahead(store)
    joined.bind()
    joined.session.check_time(1.0)
    whole = joined.client.send_tail().tail
    piece = sync_pb2.Tail(ref=whole.ref, changes=[whole.changes[0]], hmacs=whole.hmacs[:32])
    joined.say(sync_pb2.SyncRequest(tail=piece))
    for now_s in (1_000.0, 1_000.0 + TAIL_S_MAX):
        joined.session.check_time(now_s)
    with pytest.raises(ProtocolError, match="not come to its end"):
        joined.session.check_time(1_000.1 + TAIL_S_MAX)
    assert joined.host.tail_room.bytes
    joined.session.close()
    assert not joined.host.tail_room.bytes


def test_a_tail_is_asked_for_once(store: Store) -> None:
    """When the last piece has come, no other is awaited."""
    joined = ahead(store)
    joined.bind()
    joined.say(joined.client.send_tail())
    with pytest.raises(ProtocolError, match="nobody has asked for"):
        joined.say(joined.client.send_tail())


def test_g9_a_tail_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: neither more changes nor more bytes than a client may keep."""
    for limit, value in (("TAIL_CHANGES_MAX", 4), ("TAIL_BYTES_MAX", 100)):
        with monkeypatch.context() as patch:
            patch.setattr(incoming_tails, limit, value)
            joined = ahead(store)
            joined.bind()
            with pytest.raises(ProtocolError, match="a tail of more than"):
                joined.say(joined.client.send_tail(last=False))


def test_g9_tails_of_all_clients_together_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: who finds no room is told to come again, and there is room as soon as another's tail was taken in."""
    one = ahead(store)
    size = sum(len(raw) + incoming_tails._CHANGE_BYTES for raw, _ in one.client.tail)
    monkeypatch.setattr(incoming_tails, "ROOM_BYTES_MAX", size + 1)
    room = one.host.tail_room
    other = Joined(one.server, ahead(store).client, room)
    other.host.epochs = one.host.epochs
    for joined in (one, other):
        assert joined.bind().decision == HEAL
        joined.say(joined.client.send_tail())
        joined.listen()
    assert other.home is None
    assert [failed.code for failed in other.client.failed] == ["Overloaded"]
    one.bring_home()  # until then it is held, whole
    assert (one.client.answers[-1].decision, room.bytes) == (STREAM, 0)
    again = Joined(ahead(store).server, other.client, room)
    again.host.epochs = one.host.epochs
    assert again.bind().decision == HEAL
    again.say(again.client.send_tail())
    again.bring_home()
    assert (again.client.answers[-1].decision, room.bytes) == (STREAM, 0)


@pytest.mark.parametrize("how", ["unbound", "connection lost", "connection lost while it is taken in"])
def test_g9_a_tail_that_is_given_up_leaves_its_room(store: Store, how: str) -> None:
    """G9: whatever ends a tail, what was kept for it is there for others."""
    joined = ahead(store)
    joined.bind()
    joined.say(joined.client.send_tail(last=how.endswith("in")))
    assert joined.host.tail_room.bytes > sum(len(raw) for raw, _ in joined.client.tail[3:])
    if how == "unbound":
        joined.say(joined.client.unbind())
    else:
        joined.session.close()
    assert joined.host.tail_room.bytes == 0


def test_g9_few_tails_are_on_their_way_at_one_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: where many realms are to be healed, most wait for their answer, and each gets it."""
    monkeypatch.setattr(incoming_tails, "TAILS_MAX", 2)
    old = Server(store, policy(LOCAL))
    clients = [ModelClient(ANN, f"/realm-{at}") for at in range(5)]
    session = Joined(old)
    for ref, client in enumerate(clients, 1):
        client.cluster = CLUSTER
        session.client = client
        session.say(client.bind(ref=2 * ref - 1))
        session.listen()
        put(old, b"key", path=client.path)
        session.listen()
        session.say(client.bind(ref=2 * ref))
        session.listen()
    joined = Joined(Server(store, policy(LOCAL)), _Everybody(clients))
    joined.host.epochs = [EPOCH_1, EpochSpan(epoch=Epoch(2), first_lsn=Lsn(1), previous=START.digest)]
    for ref, client in enumerate(clients, 1):
        joined.say(client.bind(ref=ref))
    joined.listen()
    joined.say(clients.pop().unbind())  # it has waited in vain
    assert len(joined.session._undecided) == 2
    healed: set[str] = set()
    while len(healed) < 4:
        asked = [client for client in clients if client.answers[-1].decision == HEAL]
        assert len(asked) == min(2, 4 - len(healed))
        joined.say(asked[0].send_tail())
        joined.bring_home()
        assert asked[0].answers[-1].decision == STREAM
        healed.add(asked[0].path)
    assert sorted(joined.server.state.realms()) == sorted(healed)


class _Everybody(ModelClient):
    """All that share a stream: each knows which messages are its own."""

    def __init__(self, clients: Sequence[ModelClient]) -> None:
        super().__init__(ANN)
        self._clients = clients

    def receive(self, message: sync_pb2.SyncResponse) -> None:
        for client in self._clients:
            client.receive(message)


# -- bounds and violations -------------------------------------------------------------------------------------


def test_g9_bindings_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: one more than allowed is refused in words, and has its place once another has gone."""
    monkeypatch.setattr(sync_session, "BINDINGS_MAX", 2)
    joined = Joined(filled(store, 1))
    for _ in range(3):
        joined.say(joined.client.bind())
        joined.listen()
    assert [one.code for one in joined.client.failed] == ["Overloaded"]
    joined.say(sync_pb2.SyncRequest(unbind=sync_pb2.UnbindRealm(ref=1)))
    joined.say(joined.client.bind())
    assert "bound" in joined.listen()


def test_g9_who_does_not_read_is_not_listened_to(store: Store) -> None:
    """G9: answers that wait are few; there is room again when they are read."""
    joined = Joined(filled(store, 1))
    asked = 0
    while joined.session.has_room:
        joined.client.path = "/__system"
        joined.say(joined.client.bind())
        asked += 1
    assert asked == sync_session.ANSWERS_MAX
    joined.hear()
    assert joined.session.has_room


def test_a_realm_that_may_not_be_read_is_refused_in_words(store: Store) -> None:
    """G10: before anything of it is said, and when the permission goes, too; other realms go on."""
    server = filled(store, 1)
    joined = Joined(server)
    joined.client.path = "/__system"
    joined.say(joined.client.bind())
    joined.listen()
    assert [one.code for one in joined.client.failed] == ["NotPermitted"]
    joined.client.path = "/a"
    joined.bind()
    joined.host.forbidden.add("/a")
    put(server, b"secret")
    assert joined.listen() == ["failed"]
    assert joined.client.copy.version == 1
    assert joined.host.followed == set()
    put(server, b"secret 2")
    assert joined.listen() == []


def _bind(**fields: object) -> sync_pb2.SyncRequest:
    bind = sync_pb2.BindRealm(ref=1, path="/a", clients=[ANN])
    bind.MergeFrom(sync_pb2.BindRealm(**fields))  # type: ignore[arg-type]
    return sync_pb2.SyncRequest(bind=bind)


def _position(version: int, size: int = 32) -> sync_pb2.RealmPosition:
    return sync_pb2.RealmPosition(version=version, digest=bytes(size))


VIOLATIONS = {
    "nothing": sync_pb2.SyncRequest(),
    "a second hello": sync_pb2.SyncRequest(hello=sync_pb2.SyncHello()),
    "no client": sync_pb2.SyncRequest(bind=sync_pb2.BindRealm(ref=1, path="/a")),
    "a client id of 15 bytes": _bind(clients=[b"a" * 15]),
    "too many client ids": _bind(clients=[b"%016d" % at for at in range(16)]),
    "a locator that is too long": _bind(locator=[_position(1_000 - at) for at in range(66)]),
    "a locator that rises": _bind(locator=[_position(1), _position(2)]),
    "a locator that stands still": _bind(locator=[_position(2), _position(2)]),
    "a locator with version 0": _bind(locator=[_position(2), _position(0)]),
    "a digest of 31 bytes": _bind(locator=[_position(2, 31)]),
    "a digest of a state of 33 bytes": _bind(incoming=_position(2, 33)),
    "a frontier that no key can be": _bind(frontier=bytes(481)),
    "ref 0": sync_pb2.SyncRequest(bind=sync_pb2.BindRealm(ref=0, path="/a", clients=[ANN])),
}


@pytest.mark.parametrize("message", VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_g10_what_must_not_be_sent_ends_the_stream(store: Store, message: sync_pb2.SyncRequest) -> None:
    """G10: a message that no client of this version makes is a protocol error, and nothing is done for it."""
    joined = Joined(filled(store, 1))
    with pytest.raises(ProtocolError):
        joined.say(message)
    assert joined.host.followed == set()


def test_g10_a_binding_is_named_once(store: Store) -> None:
    """G10: refs rise, so that a late message is never taken for one about another binding."""
    joined = Joined(filled(store, 1))
    joined.say(joined.client.bind(ref=5))
    for ref in (5, 4):
        with pytest.raises(ProtocolError, match="comes after 5"):
            joined.say(joined.client.bind(ref=ref))


def test_g10_an_upload_is_under_an_id_that_the_bind_has_named(store: Store) -> None:
    """G10: no other id of the same client, nor anybody else's."""
    server = filled(store, 1)
    joined = Joined(server)
    joined.bind()
    message = joined.client.upload(1)
    message.upload.client = BOB
    with pytest.raises(ProtocolError, match="an id that its bind does not name"):
        joined.say(message)
    assert server.committer.take_batch() == b""


def test_g10_columns_of_a_tail_are_of_one_length(store: Store) -> None:
    """G10: each change has its HMAC."""
    joined = ahead(store)
    joined.bind()
    message = joined.client.send_tail()
    message.tail.hmacs += b"x"
    with pytest.raises(ProtocolError, match="columns"):
        joined.say(message)


def test_numbers_beyond_what_the_server_knows_are_a_reset(store: Store) -> None:
    """On this history, and yet more was confirmed to it than is known here: it is told so, with the numbers."""
    server = filled(store, 3)
    server.submit(4, client=ANN)
    server.durable()
    joined = Joined(server)
    joined.bind()
    joined.client.confirmed = joined.client.sent = 9
    bound = joined.bind()
    assert (bound.decision, bound.reason, *bound.last_numbers) == (RESET, sync_pb2.NUMBERS_BEYOND, 4)
    assert "/a" in bound.explanation


def test_every_answer_names_the_realm_and_the_reign(store: Store) -> None:
    """Where it stands, since when it is, and in which epoch the server reigns."""
    server = filled(store, 3)
    joined = Joined(server)
    bound = joined.bind()
    head = server.state.realm("/a")
    assert head is not None
    assert (bound.path, bound.realm_id, bound.epoch) == ("/a", head.id, 1)
    assert (bound.head.version, bound.head.digest) == (head.version, head.head)
