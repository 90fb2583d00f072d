"""A client of a simulated world: its directory, and the shell that syncs it, on nobody's thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sync_labels import LABEL, Label, labels_of
from sync_nodes import Line

from understudy.client.local_store import LocalStore
from understudy.client.open_realm import OpenRealm, ResetPolicy
from understudy.client.reset import CopyResetter
from understudy.client.sync_port import Action, HeadKnown, Loaded, RealmError, ResetRequired, Send
from understudy.client.sync_session import SyncSession
from understudy.common.errors import ClientReset
from understudy.common.operations import Add, Operation, to_protos
from understudy.v1 import log_pb2, sync_pb2

if TYPE_CHECKING:
    from sync_sim import World


class Killed(BaseException):
    """The client's process has come to its end."""


class Device:
    """A client's directory and what syncs it: does in one thread what ``SyncThread`` does in its own."""

    def __init__(self, world: World, name: str, directory: Path, *, mode: str) -> None:
        self.world = world
        self.name = name
        self.directory = directory
        self.mode = mode
        self.is_online = True
        self.resets: list[tuple[str, str]] = []  # realm and reason of each that was begun
        self.required: list[sync_pb2.RealmBound] = []
        self.steps_to_live: int | None = None  # local transactions until it is killed
        self.start()

    # -- its process -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """The application opens its realms."""
        self.line: Line | None = None
        self.is_running = True
        self.steps_to_live = None
        self.store = LocalStore.open(self.directory, durability="relaxed")
        self.session = SyncSession(self.store)
        self.resetter = CopyResetter(self.directory)
        self.realms: dict[str, OpenRealm] = {}
        for path in self.world.paths:
            self.open(path, self.mode)

    def open(self, path: str, mode: str) -> None:
        """The application opens a realm."""
        realm = self.realms[path] = OpenRealm(self.store.realm(path), ResetPolicy(mode=mode))
        self.resetter.opened(realm)
        self.do(self.session.opened(path))

    def reopen(self, path: str, mode: str) -> None:
        """The application closes a realm, and opens it with another mode."""
        self.do(self.session.closed(path))
        self.open(path, mode)

    def forget(self, path: str) -> None:
        """The application gives its local copy up, and opens the realm again."""
        self.do(self.session.closed(path))
        self.store.forget(path)
        self.open(path, self.mode)

    def stop(self) -> None:
        """The process ends; the server may hear of it later."""
        self.is_running = False
        self.line = None
        self.steps_to_live = None
        self.store.close()

    def lose(self) -> None:
        """The connection breaks."""
        self.line = None
        self.session.lost()

    def guarded(self, step: Callable[[], None]) -> None:
        """Takes a step that the process may not survive."""
        try:
            step()
        except Killed:
            self.stop()

    # -- what it does ----------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """A connection to the present primary."""
        self.line = Line(self, self.world.node)

    def commit(self, path: str, *operations: Operation) -> Label:
        """A change of the application's, which adds its label to what it does."""
        label = self.world.new_label()
        self.realms[path].realm.commit(to_protos([*operations, Add(label, 1)]))
        if self not in self.world.twins:
            self.world.must.add((path, label))
        self.do(self.session.local_change(path))
        return path, label

    def take(self) -> None:
        """A message arrives."""
        line = self.line
        assert line is not None
        before = self.held()
        self._take(line)
        # A primary that is gone can still add to what is held here, or say that it is safe: on another replica.
        self.world.must |= self.held() - before
        if not line.is_held_above:
            self.world.must -= before - self.held()

    def _take(self, line: Line) -> None:
        response = sync_pb2.SyncResponse.FromString(line.down.popleft())
        if response.WhichOneof("message") == "welcome":
            self.store.set_met(response.welcome.cluster, response.welcome.epoch)
            self.do(self.session.connected(response.welcome))
        else:
            self.do(self.session.received(response, now_s=self.world.now_s))

    def written(self) -> None:
        """The first of what was sent has gone."""
        assert self.line is not None
        self.do(self.session.written(len(self.line.up[0])))

    def do(self, actions: Sequence[Action]) -> None:
        """Carries out what the session says."""
        for action in actions:
            if isinstance(action, Send) and self.line is not None and self.line.is_held_above:
                self.line.up.append(action.request.SerializeToString())
        for action in actions:
            self._do_one(action)

    def _do_one(self, action: Action) -> None:
        match action:
            case HeadKnown():
                self.realms[action.path].bound(action.ticket, action.version)
            case Loaded(fresh=True):
                is_done = self.resetter.loaded(self.realms[action.path], action)
                self.do((self.session.resume if is_done else self.session.stop)(action.path))
            case ResetRequired():
                self._on_reset(action)
            case RealmError():
                # Two that share an id, or what comes home before its time, can hold uploads up until the next binding.
                assert self.world.may_refuse, f"{self.name}: {action.error}"
                self.realms[action.path].error = action.error
        path = getattr(action, "path", None)
        if path is not None:
            self.resetter.progressed(self.realms[path], is_up_to_date=self.session.is_up_to_date(path))

    def _on_reset(self, required: ResetRequired) -> None:
        realm = self.realms[required.path]
        self.required.append(required.bound)
        kept = realm.realm.row.reset.kept
        is_begun = self.resetter.required(realm, required)
        if is_begun and realm.realm.row.reset.kept != kept:  # else one goes on that was begun before
            self.resets.append((required.path, sync_pb2.ResetReason.Name(required.bound.reason)))
            if realm.realm.row.reset.attempted == "discard":
                self.world.must -= self.queued(required.path)
        self.do((self.session.load_fresh if is_begun else self.session.stop)(required.path))

    # -- what it holds -----------------------------------------------------------------------------------------------

    def queued(self, path: str) -> set[Label]:
        """Labels of its changes that are not confirmed."""
        queue = self.realms[path].realm.queued(0, count_max=1 << 30, bytes_max=1 << 60)
        return {label for change in queue for label in labels_of(path, change.operations)}

    def queued_of(self, path: str, client: bytes) -> set[Label]:
        """Labels of those in its queue that were made under an id."""
        queue = self.realms[path].realm.queued(0, count_max=1 << 30, bytes_max=1 << 60)
        meant = [change for change in queue if change.client == client]
        return {label for change in meant for label in labels_of(path, change.operations)}

    def tail(self, path: str) -> list[log_pb2.Change]:
        """The raw changes that it has still to offer."""
        realm = self.realms[path].realm
        kept = realm.tail(realm.row.tail_first, bytes_max=1 << 60)
        return [log_pb2.Change.FromString(received.raw) for received in kept]

    def held(self) -> set[Label]:
        """Labels of all that it still has to give, by itself or for others."""
        return {
            label
            for path in self.world.paths
            for label in self.queued(path).union(
                *(labels_of(path, change.operations) for change in self.tail(path))
            )
        }

    def pairs(self, path: str) -> dict[bytes, bytes]:
        """What the application reads."""
        with self.realms[path].realm.view() as view:
            return dict(view.scan())

    def check_view(self, path: str) -> None:
        """G6, as the application sees it: nothing is ever there twice."""
        counts = {key: value for key, value in self.pairs(path).items() if key.startswith(LABEL)}
        twice = [key for key in counts if counts[key] != b"1" and (path, key) not in self.world.overtaken]
        has_copies = any(" (of " in device.name for device in self.world.devices)  # see World.check
        assert not twice or has_copies, f"{self.name} sees {twice} of {path} more than once"

    def reset_error(self, path: str) -> ClientReset | None:
        """Why its copy is not synced."""
        return self.realms[path].reset
