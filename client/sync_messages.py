"""Messages of a sync stream: how a copy is described, and what a server's message must be like. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from understudy.client.local_types import Received
from understudy.client.sync_port import Action, RealmPort, Send
from understudy.common.entries import with_hmacs
from understudy.common.errors import ProtocolError
from understudy.v1 import sync_pb2

# Handed out and not yet written to the connection, of all realms together: a bound on memory.
UNWRITTEN_BYTES_MAX = 8 << 20

Message = (
    sync_pb2.RealmBound
    | sync_pb2.Changes
    | sync_pb2.StatePage
    | sync_pb2.Refusals
    | sync_pb2.Safe
    | sync_pb2.TailTaken
    | sync_pb2.RealmFailed
)


class Receiver(Protocol):
    """Whom messages for a binding concern."""

    @property
    def path(self) -> str: ...

    @property
    def next_tick_s(self) -> float | None: ...

    def on_message(self, message: Message, *, now_s: float) -> list[Action]: ...


@dataclass(slots=True)
class Connection:
    """What the realms of one connection share."""

    cluster: bytes
    refs: dict[int, Receiver] = field(default_factory=dict)  # of the bindings that are in use
    last_ref: int = 0
    has_room: bool = True  # for more than a few small messages
    _unwritten_bytes: int = 0

    def new_ref(self, realm: Receiver) -> int:
        """A ref that was never used on this connection."""
        self.last_ref += 1
        self.refs[self.last_ref] = realm
        return self.last_ref

    def send(self, request: sync_pb2.SyncRequest) -> Send:
        """Hands a request out."""
        size = request.ByteSize()
        self._unwritten_bytes += size
        self.has_room = self.has_room and self._unwritten_bytes < UNWRITTEN_BYTES_MAX
        return Send(request=request, size=size)

    def written(self, size: int) -> bool:
        """So many bytes have gone; whether there is room again where there was none."""
        self._unwritten_bytes -= size
        if self.has_room or self._unwritten_bytes > UNWRITTEN_BYTES_MAX // 2:
            return False
        self.has_room = True
        return True


# -- what we say -------------------------------------------------------------------------------------------------


def describe_copy(bind: sync_pb2.BindRealm, realm: RealmPort) -> None:
    """Adds which copy we hold, and what is kept of its last changes."""
    copy = realm.row.copy
    bind.cluster, bind.realm_id, bind.epoch, bind.lsn = copy.cluster, copy.realm_id, copy.epoch, copy.lsn
    bind.locator.extend(realm.locator())
    bind.tail_first = realm.row.tail_first


def describe_incoming(bind: sync_pb2.BindRealm, realm: RealmPort) -> None:
    """Adds how far a state has come that was being loaded, if anything of one has."""
    incoming = realm.row.incoming
    if incoming.frontier and incoming.version:  # nothing is no position to go on from
        bind.incoming.version, bind.incoming.digest = incoming.version, incoming.head
        bind.frontier = incoming.frontier


def describe_own(bind: sync_pb2.BindRealm, realm: RealmPort) -> None:
    """Adds what we know of our own changes."""
    row = realm.row
    bind.confirmed, bind.sent, bind.confirmed_us = row.confirmed, row.sent, row.confirmed_us
    bind.contact_us = row.contact_us


# -- what we hear ------------------------------------------------------------------------------------------------


def last_numbers(numbers: Sequence[int], clients: Sequence[bytes]) -> dict[bytes, int]:
    """The highest number applied of each client that the bind named.

    Raises:
        ProtocolError: there are more or fewer.
    """
    if len(numbers) != len(clients):
        raise ProtocolError(f"the server named {len(numbers)} last numbers for {len(clients)} clients")
    return dict(zip(clients, numbers, strict=True))


def received_changes(changes: sync_pb2.Changes) -> list[Received]:
    """The changes of a message.

    Raises:
        ProtocolError: there are more or fewer HMACs than changes.
    """
    return [Received(raw, hmac) for raw, hmac in with_hmacs(changes.changes, changes.hmacs)]


def check_head(bound: sync_pb2.RealmBound, realm: RealmPort) -> None:
    """Refuses to follow a server from beyond its own head.

    Raises:
        ProtocolError.
    """
    version = realm.row.copy.version
    if bound.head.version < version:
        raise ProtocolError(
            f"the server would stream {realm.path} from version {version} though it is at {bound.head.version}"
        )
