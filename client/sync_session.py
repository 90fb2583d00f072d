"""A client's side of syncing: one directory's realms on one stream, connection after connection. Pure.

Events come in as method calls, actions and notices go out, in the order in which they are to be carried out; what the
server's messages mean for the copies is done at once, through the store. The shell that knows gRPC, clock and chance
is :mod:`~understudy.client.sync_thread`.

A :class:`ProtocolError` out of any of them, or an error of the store, leaves every copy as it was: drop the connection
and say :meth:`SyncSession.lost`.
"""

from __future__ import annotations

from collections.abc import Callable

from understudy.client.realm_session import RealmSession
from understudy.client.sync_messages import Connection, Message, Receiver
from understudy.client.sync_port import Action, NewId, StorePort
from understudy.common.errors import ProtocolError
from understudy.v1 import sync_pb2


class SyncSession:
    """All realms of a directory that are open."""

    def __init__(self, store: StorePort) -> None:
        self._store = store
        self._realms: dict[str, RealmSession] = {}
        # When each realm has something to do by itself. Nearly none ever has: asking all, behind every event of any of
        # them, is what many realms would cost most.
        self._ticks_s: dict[str, float] = {}
        self._connection: Connection | None = None

    # -- the connection ------------------------------------------------------------------------------------------

    def connected(self, welcome: sync_pb2.SyncWelcome) -> list[Action]:
        """A server has taken our hello."""
        connection = self._connection = Connection(cluster=welcome.cluster)
        actions: list[Action] = []
        if welcome.new_id:
            # What is queued keeps the id it was made under: whoever shares that id may hold the same changes, and
            # each must be applied once (G6). Where they are others under the same numbers, that shows as they come.
            actions.append(NewId(client=self._store.new_client()))
        return [*actions, *self._all(lambda realm: realm.bind(connection))]

    def received(self, response: sync_pb2.SyncResponse, *, now_s: float) -> list[Action]:
        """A message has come.

        Raises:
            ProtocolError: it can't be, here and now.
        """
        kind = response.WhichOneof("message")
        if self._connection is None or kind is None or kind == "welcome":
            raise ProtocolError(f"the server sent {kind or 'a message of a kind that is not known here'}")
        message: Message = getattr(response, kind)
        realm = self._connection.refs.get(message.ref)
        if realm is not None:
            return self._noted(realm, realm.on_message(message, now_s=now_s))
        if not 0 < message.ref <= self._connection.last_ref:
            raise ProtocolError(f"the server sent {kind} for binding {message.ref}, which there never was")
        return []  # it was on its way when we let go of the binding

    def written(self, size: int) -> list[Action]:
        """So many bytes that were handed out have gone."""
        if self._connection is None or not self._connection.written(size):
            return []
        return self._all(RealmSession.pump)

    def lost(self) -> None:
        """The connection is gone; the copies and what is queued are not."""
        self._connection = None
        self._ticks_s.clear()
        for realm in self._realms.values():
            realm.lost()

    # -- realms --------------------------------------------------------------------------------------------------

    def opened(self, path: str) -> list[Action]:
        """A realm is to be synced from here on."""
        realm = self._realms[path] = RealmSession(path, self._store)
        return self._noted(realm, realm.bind(self._connection)) if self._connection is not None else []

    def closed(self, path: str) -> list[Action]:
        """And no longer."""
        self._ticks_s.pop(path, None)
        return self._realms.pop(path).unbind()

    def local_change(self, path: str) -> list[Action]:
        """Something was queued."""
        realm = self._realms.get(path)
        return self._noted(realm, realm.pump()) if realm is not None else []

    def refresh(self, path: str) -> tuple[int, list[Action]]:
        """Asks for the server's head as of now: :class:`HeadKnown` of this ticket, or of a later one, will tell."""
        realm = self._realms[path]
        actions = self._noted(realm, realm.refresh())
        return realm.asked, actions

    def load_fresh(self, path: str) -> list[Action]:
        """A reset wants the server's state beside the copy: :class:`Loaded` with ``fresh`` will tell."""
        realm = self._realms[path]
        return self._noted(realm, realm.load_fresh())

    def resume(self, path: str) -> list[Action]:
        """A reset is over, or given up."""
        realm = self._realms[path]
        return self._noted(realm, realm.resume())

    def stop(self, path: str) -> list[Action]:
        """A reset has failed."""
        realm = self._realms[path]
        return self._noted(realm, realm.stop())

    def is_up_to_date(self, path: str) -> bool:
        """Whether the copy is where the server was when it spoke last."""
        return self._realms[path].is_up_to_date

    def server_version(self, path: str) -> int:
        """The server's version, as it was told last; 0: not yet."""
        return self._realms[path].head_version

    # -- time ----------------------------------------------------------------------------------------------------

    @property
    def next_tick_s(self) -> float | None:
        """When :meth:`tick` has something to do; None: never, as it stands."""
        return min(self._ticks_s.values(), default=None)

    def tick(self, *, now_s: float) -> list[Action]:
        """Time has passed."""
        return self._all(lambda realm: realm.tick(now_s=now_s))

    def _all(self, do: Callable[[RealmSession], list[Action]]) -> list[Action]:
        return [action for realm in self._realms.values() for action in self._noted(realm, do(realm))]

    def _noted(self, realm: Receiver, actions: list[Action]) -> list[Action]:
        """The actions of a realm; when it has to do something next may have changed with them."""
        at_s = realm.next_tick_s
        if at_s is None:
            self._ticks_s.pop(realm.path, None)
        else:
            self._ticks_s[realm.path] = at_s
        return actions
