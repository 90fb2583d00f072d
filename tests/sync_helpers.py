"""A realm's history as a server would send it, by hand, for tests of a client's side of syncing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from understudy.client.local_store import LocalRealm, LocalStore
from understudy.client.sync_port import Action, Send
from understudy.client.sync_session import SyncSession
from understudy.common.operations import Operation, Put, to_protos
from understudy.v1 import data_pb2, log_pb2, sync_pb2

CLUSTER = b"c" * 16
OTHER_CLIENT = b"o" * 16
HMAC = b"h" * 32
REALM_ID = 7


class History:
    """One realm on a server. Its changes' LSNs are their versions; nothing else happens there."""

    def __init__(self, path: str = "/realm") -> None:
        self.path = path
        self.raws: list[bytes] = []
        self.numbers: dict[bytes, int] = {}

    @property
    def version(self) -> int:
        return len(self.raws)

    def digest(self, version: int) -> bytes:
        return hashlib.sha256(self.raws[version - 1]).digest() if version else b""

    def position(self, version: int) -> sync_pb2.RealmPosition:
        return sync_pb2.RealmPosition(version=version, digest=self.digest(version))

    def write(self, *operations: Operation, client: bytes = OTHER_CLIENT, number: int = 0) -> None:
        """Somebody's change, by default another client's next one."""
        self.take(to_protos(operations), client, number or self.numbers.get(client, 0) + 1)

    def take(self, operations: Iterable[log_pb2.Operation], client: bytes, number: int) -> None:
        self.numbers[client] = number
        change = log_pb2.Change(
            realm=self.path,
            version=self.version + 1,
            previous=self.digest(self.version),
            client=client,
            number=number,
            operations=operations,
        )
        self.raws.append(change.SerializeToString())

    def take_upload(self, upload: sync_pb2.Upload) -> None:
        for transaction in upload.transactions:
            self.take(transaction.operations, upload.client, transaction.number)

    # -- what it says ----------------------------------------------------------------------------------------------

    def bound(
        self,
        bind: sync_pb2.BindRealm,
        decision: sync_pb2.SyncDecision.ValueType = sync_pb2.SYNC_STREAM,
        *,
        tail_from: int = 0,
        reason: sync_pb2.ResetReason.ValueType = sync_pb2.RESET_UNSPECIFIED,
        resumed: bool = False,
        may_write: bool = True,
    ) -> sync_pb2.SyncResponse:
        bound = sync_pb2.RealmBound(
            ref=bind.ref,
            decision=decision,
            reason=reason,
            path=self.path,
            realm_id=REALM_ID if self.raws else 0,
            head=self.position(self.version),
            last_numbers=[self.numbers.get(client, 0) for client in bind.clients],
            tail_from=tail_from,
            resumed=resumed,
            may_write=may_write,
            epoch=1,
            time_us=1,
        )
        return sync_pb2.SyncResponse(bound=bound)

    def changes(self, ref: int, first: int, last: int | None = None) -> sync_pb2.SyncResponse:
        """Versions ``first`` to ``last``."""
        last = self.version if last is None else last
        raws = self.raws[first - 1 : last]
        return sync_pb2.SyncResponse(
            changes=sync_pb2.Changes(
                ref=ref,
                changes=raws,
                hmacs=HMAC * len(raws),
                lsn=last,
                time_us=last,
                head_version=self.version,
            )
        )

    def page(
        self,
        bind: sync_pb2.BindRealm,
        pairs: Sequence[tuple[bytes, bytes]],
        version: int,
        *,
        last: bool = False,
    ) -> sync_pb2.SyncResponse:
        return sync_pb2.SyncResponse(
            page=sync_pb2.StatePage(
                ref=bind.ref,
                position=self.position(version),
                realm_id=REALM_ID,
                lsn=version,
                keys=[key for key, _ in pairs],
                values=[value for _, value in pairs],
                last=last,
                last_numbers=[self.numbers.get(client, 0) for client in bind.clients],
                time_us=1,
            )
        )


class Device:
    """A client's directory and its session, and what the session has sent."""

    def __init__(self, folder: Path) -> None:
        self.store = LocalStore.open(folder, durability="relaxed")
        self.session = SyncSession(self.store)
        self.now_s = 0.0

    def close(self) -> None:
        self.store.close()

    def realm(self, path: str = "/realm") -> LocalRealm:
        return self.store.realm(path)

    def pairs(self, path: str = "/realm") -> dict[bytes, bytes]:
        with self.realm(path).view() as view:
            return dict(view.scan())

    def put(self, key: bytes, value: bytes = b"", path: str = "/realm") -> int:
        """Queues a change, and does not tell the session."""
        return self.realm(path).commit(to_protos([Put(key, value)]))

    def connect(self, *, new_id: bool = False) -> list[Action]:
        return self.session.connected(sync_pb2.SyncWelcome(cluster=CLUSTER, epoch=1, new_id=new_id))

    def receive(self, response: sync_pb2.SyncResponse) -> list[Action]:
        return self.session.received(response, now_s=self.now_s)

    def bind(self, path: str = "/realm") -> sync_pb2.BindRealm:
        """Opens a realm and connects; returns what the session says of it."""
        self.session.opened(path)
        return bind_of(self.connect())

    def stream(self, history: History) -> sync_pb2.BindRealm:
        """The same, and the server streams all that it has."""
        bind = self.bind(history.path)
        self.receive(history.bound(bind))
        if history.version:
            self.receive(history.changes(bind.ref, 1))
        return bind


def requests(actions: Iterable[Action], kind: str) -> list[sync_pb2.SyncRequest]:
    """What is to be sent, of that kind."""
    return [
        action.request
        for action in actions
        if isinstance(action, Send) and action.request.WhichOneof("message") == kind
    ]


def bind_of(actions: Iterable[Action]) -> sync_pb2.BindRealm:
    """The one bind among them."""
    (request,) = requests(actions, "bind")
    return request.bind


def uploads_of(actions: Iterable[Action]) -> list[sync_pb2.Upload]:
    return [request.upload for request in requests(actions, "upload")]


def tails_of(actions: Iterable[Action]) -> list[sync_pb2.Tail]:
    return [request.tail for request in requests(actions, "tail")]


def numbers_of(uploads: Iterable[sync_pb2.Upload]) -> list[int]:
    """The numbers of the changes, in the order in which they were sent."""
    return [transaction.number for upload in uploads for transaction in upload.transactions]


def refused(ref: int, client: bytes, number: int, code: str) -> sync_pb2.SyncResponse:
    refusal = data_pb2.Refusal(number=number, code=code, message="not this one")
    return sync_pb2.SyncResponse(refusals=sync_pb2.Refusals(ref=ref, client=client, refusals=[refusal]))
