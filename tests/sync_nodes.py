"""Primaries of a simulated world, one after another, the replicas that follow them, and the lines to their clients."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from committers import Server, policy
from state_helpers import CLUSTER, KEY, write_here
from store_helpers import open_both
from sync_labels import labels_of

from understudy.common.errors import ReceiptExpired, Unavailable
from understudy.common.locator import EpochSpan, span_of
from understudy.common.records import Record
from understudy.common.state import State
from understudy.common.store import Store
from understudy.common.store_expiry import CLIENT_KEPT_US
from understudy.common.types import START
from understudy.primary.homecoming import take_home
from understudy.primary.incoming_tails import TailRoom
from understudy.primary.sync_feed import Feed, SyncStream
from understudy.primary.sync_host import Pages
from understudy.primary.sync_session import SyncSession, TailHome
from understudy.v1 import data_pb2, log_pb2, sync_pb2
from understudy.v1.store_pb2 import CheckpointRow

if TYPE_CHECKING:
    from sync_devices import Device
    from sync_sim import World

_SETTLE_S_MAX = 2.0


class Line:
    """A connection: what is on its way up and down, and who still holds it."""

    def __init__(self, device: Device, node: Node) -> None:
        self.device = device
        self.node = node
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.is_held_above = True
        self.session = SyncSession(_Host(self))
        store = device.store
        self._stream = SyncStream(
            store.client, store.run, store.previous_run, cast(Any, self), "", store.met.secret
        )
        self._stream.session = self.session
        node.lines.append(self)
        is_only = node.feed.seat(self._stream)
        welcome = sync_pb2.SyncWelcome(cluster=CLUSTER, epoch=node.epochs[-1].epoch, new_id=not is_only)
        self._say(sync_pb2.SyncResponse(welcome=welcome))

    def cancel(self) -> None:
        """The server lets go; what it has sent may still arrive."""
        if self.is_held_above:
            self.is_held_above = False
            self.node.lines.remove(self)
            self.node.feed.leave(self._stream)
            self.session.close()
            self.up.clear()

    def follow(self, path: str) -> None:
        self.node.feed.follow(path, self._stream)

    def unfollow(self, path: str) -> None:
        self.node.feed.unfollow(path, self._stream)

    def take(self) -> None:
        """The server reads a message."""
        message = sync_pb2.SyncRequest.FromString(self.up.popleft())
        home = self.session.receive(message)
        if home is not None:
            self.node.homes.append((self, home, self.node.world.now_s))

    def give(self) -> bool:
        """The server sends a message, if there is something to be said."""
        message = self.session.next_message()
        if message is not None:
            self.node.check_shown(message)
            self._say(message)
        return message is not None

    def _say(self, message: sync_pb2.SyncResponse) -> None:
        self.down.append(message.SerializeToString())


class _Host:
    """The server as one line shows it."""

    client_kept_us = CLIENT_KEPT_US
    cluster: bytes = CLUSTER

    def __init__(self, line: Line) -> None:
        self._line = line
        self.tail_room = line.node.tail_room

    @property
    def state(self) -> State:
        return self._line.node.server.state

    @property
    def epochs(self) -> Sequence[EpochSpan]:
        return self._line.node.epochs

    @property
    def shown_lsn(self) -> int:
        return self._line.node.server.committer.shown_lsn

    @property
    def safe_lsn(self) -> int:
        return self._line.node.server.committer.safe_lsn

    def resolve(self, path: str) -> str:
        return path

    def may_write(self, path: str) -> bool:
        return True

    def forbids_recovery(self, path: str) -> bool:
        return False

    def size(self, path: str) -> tuple[int, int]:
        return 0, 0

    def scan(self, path: str, after: bytes) -> Pages:
        return self.state.scan(path, after + b"\0" if after else b"")

    def submit(self, client: bytes, transaction: data_pb2.Transaction) -> None:
        node = self._line.node
        if node.is_healing:
            raise Unavailable("this server takes only what comes home for now", remedy="try again later")
        committer = node.server.committer
        if committer.was_renewed(transaction.realm, client, transaction.number):
            raise ReceiptExpired("it has come home already, as a new change")
        committer.submit(client, transaction, lambda _: None)

    def follow(self, path: str) -> None:
        self._line.follow(path)

    def unfollow(self, path: str) -> None:
        self._line.unfollow(path)


class Node:
    """A primary, from the log that it was started with."""

    def __init__(self, world: World, log: Sequence[Record], *, heal_s: float = 0.0) -> None:
        self.world = world
        self.lines: list[Line] = []
        self.homes: list[tuple[Line, TailHome, float]] = []
        self.feed = Feed()
        self.tail_room = TailRoom()
        self.heal_until_s = world.now_s + heal_s
        folder = world.new_folder("node")
        Store.create(folder / "store", CLUSTER, CheckpointRow(digest=START.digest))
        self._environment, self._store = open_both(folder / "store")
        self.server = Server(self._store, policy(world.level), log=list(log))
        self.server.clock_us = world.clock_us
        self.server.committer.on_shown = self.feed.on_shown
        self.checkpoint()

    def end(self) -> None:
        """It is gone; nobody has been told."""
        for line in list(self.lines):
            line.cancel()
        self.homes.clear()
        self._store.close()

    @property
    def epochs(self) -> list[EpochSpan]:
        return [span_of(row.info) for row in self.server.state.epochs]

    @property
    def is_healing(self) -> bool:
        return self.world.now_s < self.heal_until_s

    @property
    def durable_lsn(self) -> int:
        return self.server.committer.durable_lsn

    def checkpoint(self) -> None:
        """What is frozen goes into the store."""
        state = self.server.state
        while state.frozen:
            write_here(self._environment, state.frozen[-1])
            state.checkpointed()

    def make_durable(self, lsn: int | None = None) -> None:
        """What was written up to there is on its disk."""
        self.server.write()
        end = len(self.server.log)
        if end > self.durable_lsn:
            self.server.durable(end if lsn is None else max(min(lsn, end), self.durable_lsn + 1))

    def bring_home(self) -> None:
        """Takes in the tails that have come, where nothing is in flight, or they have waited for long."""
        homes, self.homes = self.homes, []
        for line, home, since_s in homes:
            if not line.is_held_above:
                continue
            is_late = self.world.now_s - since_s >= _SETTLE_S_MAX
            if self.server.committer.is_settled(home.path) or is_late:
                self._take_home(line, home)
            else:
                self.homes.append((line, home, since_s))

    def _take_home(self, line: Line, home: TailHome) -> None:
        def taken(homecoming: sync_pb2.Homecoming) -> None:
            self.world.homecomings.append(homecoming)
            if homecoming.refused:
                changes = [log_pb2.Change.FromString(raw) for raw, _ in home.changes]
                self.world.must.difference_update(*(labels_of(home.path, one.operations) for one in changes))
            if line.is_held_above:
                line.session.on_tail_taken(home.ref, homecoming)

        self._note_overtaking(home)
        steps = take_home(
            home.path,
            home.changes,
            state=self.server.state,
            taker=self.server.committer,
            history_key=KEY,
            may_renew=home.may_renew,
            on_taken=taken,
        )
        deque(steps, maxlen=0)

    def _note_overtaking(self, home: TailHome) -> None:
        """What comes home under another name is seen twice by its own client until that has sent it again."""
        state = self.server.state
        numbers: dict[bytes, int] = {}
        for raw, _ in home.changes:
            change = log_pb2.Change.FromString(raw)
            last = numbers.get(change.client, state.last_number(home.path, change.client))
            if change.number > last + 1:
                for device in self.world.devices:
                    self.world.overtaken |= device.queued_of(home.path, change.client)
            numbers[change.client] = max(last, change.number)

    def check_shown(self, message: sync_pb2.SyncResponse) -> None:
        """G5: what is sent to anybody is as durable as was asked for, whatever the committer believes."""
        kind = message.WhichOneof("message")
        if kind not in ("changes", "page"):
            return
        lsn = message.changes.lsn if kind == "changes" else message.page.lsn
        assert lsn <= self.world.reached_lsn, f"entry {lsn} was shown, and {self.world.reached_lsn} is safe"
        if kind == "changes":
            self._check_safe(message.changes)

    def _check_safe(self, changes: sync_pb2.Changes) -> None:
        path = log_pb2.Change.FromString(changes.changes[0]).realm
        rows = self.server.state.history(path, changes.safe_version, count_max=1, bytes_max=1)
        if changes.safe_version and rows:
            assert rows[0].lsn <= max(one.durable for one in self.world.replicas)


class Replica:
    """How much of the primary's log it holds, and has applied."""

    def __init__(self, lsn: int) -> None:
        self.durable = self.applied = lsn
