"""One realm's binding on a sync stream: what we say of the local copy, and for how long that counts. Pure."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping

from understudy.client.local_types import ForeignChange
from understudy.client.sync_messages import (
    Connection,
    Message,
    describe_copy,
    describe_incoming,
    describe_own,
)
from understudy.client.sync_port import Action, NewId, StorePort
from understudy.client.uploading import TailSender, Uploader
from understudy.common.backoff import Backoff
from understudy.common.errors import ProtocolError
from understudy.v1 import sync_pb2

REBIND_S = (1.0, 60.0)


class Phase(enum.Enum):
    """What a realm waits for."""

    UNBOUND = enum.auto()  # the next try to bind it
    BINDING = enum.auto()  # an answer
    STREAMING = enum.auto()  # changes
    LOADING = enum.auto()  # pages, and changes between them
    HEALING = enum.auto()  # another answer, when the tail has come home
    PARTING = enum.auto()  # word of the tail, before the copy is given up
    STOPPED = enum.auto()  # somebody's decision


class RealmBinding(ABC):
    """A realm that is open; bound at most once at a time."""

    def __init__(self, path: str, store: StorePort) -> None:
        self.phase = Phase.UNBOUND
        self.retry_at_s: float | None = None  # when to bind again
        self.head_version = 0  # the server's, as last told
        self.asked = 0  # ticket of the last refresh that was asked for
        self.path = path
        self._store = store
        self._realm = store.realm(path)
        self._connection: Connection | None = None
        self._backoff = Backoff(first_s=REBIND_S[0], last_s=REBIND_S[1])
        self._fresh = False  # a reset has asked for the state, beside the copy
        self._begin()

    def _begin(self) -> None:
        """What belongs to one binding."""
        self._realm.is_sending = False
        self._ref = 0
        self._clients: list[bytes] = []
        self._resumable = False  # the server may go on with a state that was being loaded
        self._ticket = 0  # the refreshes that the binding's answer will serve
        self._bound = sync_pb2.RealmBound()
        self._tail: TailSender | None = None
        self._tail_taken: sync_pb2.Homecoming | None = None
        self._uploader: Uploader | None = None
        self._caught_up = False  # the copy is where the server was when it spoke last

    # -- binding -------------------------------------------------------------------------------------------------

    def bind(self, connection: Connection) -> list[Action]:
        """Says which copy we have. What was bound before is unbound."""
        actions = self.unbind()
        self._begin()
        self._connection, self.phase, self.retry_at_s = connection, Phase.BINDING, None
        self._ref, self._ticket = connection.new_ref(self), self.asked
        return [*actions, connection.send(sync_pb2.SyncRequest(bind=self._describe()))]

    def _describe(self) -> sync_pb2.BindRealm:
        realm = self._realm
        self._clients = realm.clients()
        bind = sync_pb2.BindRealm(ref=self._ref, path=self.path, clients=self._clients)
        if not self._fresh:  # else as somebody who has nothing, and has never sent anything
            describe_copy(bind, realm)
            describe_own(bind, realm)
        describe_incoming(bind, realm)
        self._resumable = bind.HasField("incoming")
        return bind

    def unbind(self) -> list[Action]:
        """Lets go of the binding, if there is one."""
        self._realm.is_sending = False
        connection, ref = self._connection, self._ref
        self.phase = Phase.UNBOUND
        if connection is None or ref not in connection.refs:
            return []
        del connection.refs[ref]
        return [connection.send(sync_pb2.SyncRequest(unbind=sync_pb2.UnbindRealm(ref=ref)))]

    def lost(self) -> None:
        """The connection is gone, and with it all that was bound.

        Also where a state was loaded for a reset: the next server may take the copy, or lack what this one had of it.
        """
        self._begin()
        self._fresh = False
        self._connection, self.phase, self.retry_at_s = None, Phase.UNBOUND, None

    def _rebind(self) -> list[Action]:
        return self.bind(self._connection) if self._connection is not None else []

    def load_fresh(self) -> list[Action]:
        """A reset wants the server's state beside the copy; ends in :class:`Loaded`."""
        self._fresh = True
        return self._rebind()

    def resume(self) -> list[Action]:
        """The reset is over, or was given up: binds with the copy as it is now."""
        self._fresh = False
        return self._rebind()

    def stop(self) -> list[Action]:
        """The reset has failed: nothing until the next connection."""
        self._fresh = False
        actions = self.unbind()
        self.phase = Phase.STOPPED
        return actions

    def refresh(self) -> list[Action]:
        """Asks for the server's head as of now; the ticket is :attr:`asked`."""
        self.asked += 1
        return self._rebind() if self.phase is Phase.STREAMING else []

    @property
    @abstractmethod
    def next_tick_s(self) -> float | None:
        """When it has something to do by itself."""

    @abstractmethod
    def on_message(self, message: Message, *, now_s: float) -> list[Action]:
        """A message for this binding has come."""

    def _expect(self, message: Message, *phases: Phase) -> None:
        if self.phase not in phases:
            kind = type(message).__name__
            raise ProtocolError(
                f"the server sent {kind} for {self.path} while it was {self.phase.name.lower()}"
            )

    # -- who we are ----------------------------------------------------------------------------------------------

    @property
    def _cluster(self) -> bytes:
        assert self._connection is not None
        return self._connection.cluster

    def _shared_id(self, numbers: Mapping[bytes, int]) -> ForeignChange | None:
        """Where the server has more changes of our present id than we have ever made: that."""
        client = self._clients[0]
        if numbers[client] < self._realm.row.next_number:
            return None
        return ForeignChange("the server knows more of our changes than we do", client, first=0, last=0)

    def _take_new_id(self, foreign: ForeignChange) -> list[Action]:
        """Somebody else uses an id of ours: new changes get another one, and so does what the server has others of."""
        present = self._realm.clients()[0]
        client = self._store.new_client() if present == foreign.client or self._realm.row.sent else present
        self._realm.reidentify(client, foreign)
        return [NewId(client=client)] if client != present else []
