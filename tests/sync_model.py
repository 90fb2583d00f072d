"""The simplest client that syncs: keeps copies in dictionaries, believes nothing, and can be read like a book."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256

from state_helpers import after_operation

from understudy.common.operations import DeleteRange, Operation, from_proto, to_protos
from understudy.v1 import data_pb2, log_pb2, sync_pb2


@dataclass
class Copy:
    """A state at a version. ``frontier``: the last key that is here while it is being loaded; None once it is whole."""

    pairs: dict[bytes, bytes] = field(default_factory=dict)
    version: int = 0
    head: bytes = b""
    frontier: bytes | None = None
    digests: dict[int, bytes] = field(default_factory=dict)
    realm_id: int = 0
    epoch: int = 0
    lsn: int = 0

    def apply(self, raw: bytes) -> log_pb2.Change:
        """The next change, as far as the copy reaches."""
        change = log_pb2.Change.FromString(raw)
        assert (change.version, change.previous) == (self.version + 1, self.head)
        for operation in map(from_proto, change.operations):
            clipped = operation if self.frontier is None else _clipped(operation, self.frontier)
            if clipped is not None:
                self.pairs = after_operation(self.pairs, clipped)
        self.go_to(change.version, sha256(raw).digest())
        return change

    def add_page(self, page: sync_pb2.StatePage) -> None:
        """More of the state, behind what is here."""
        if self.version:
            assert (page.position.version, page.position.digest) == (self.version, self.head)
        assert list(page.keys) == sorted(set(page.keys))
        assert not page.keys or not self.pairs or page.keys[0] > (self.frontier or b"")
        assert len(page.keys) == len(page.values)
        self.go_to(page.position.version, page.position.digest)
        self.pairs |= dict(zip(page.keys, page.values, strict=True))
        self.frontier = None if page.last else page.keys[-1] if page.keys else self.frontier or b""
        self.realm_id, self.lsn = page.realm_id, page.lsn

    def go_to(self, version: int, digest: bytes) -> None:
        """Notes where the copy stands."""
        self.version, self.head = version, digest
        self.digests[version] = digest

    def locator(self) -> list[sync_pb2.RealmPosition]:
        """The head, then versions at doubling distances, as far as they were seen."""
        versions = [self.version, *(self.version - (1 << at) for at in range(20))]
        return [
            sync_pb2.RealmPosition(version=version, digest=self.digests[version])
            for version in versions
            if version > 0 and version in self.digests
        ]


SECRET = b"s" * 16  # of all directories


def _clipped(operation: Operation, frontier: bytes) -> Operation | None:
    """What an operation does to keys up to the frontier."""
    if not isinstance(operation, DeleteRange):
        return operation if operation.key <= frontier else None
    if operation.start > frontier:
        return None
    beyond = frontier + b"\0"
    return DeleteRange(operation.start, min(operation.end or beyond, beyond))


class ModelClient:
    """A directory with one realm in it."""

    def __init__(self, client: bytes, path: str = "/a") -> None:
        self.client = client
        self.path = path
        self.copy = Copy()
        self.incoming: Copy | None = None
        self.cluster = b""
        self.epoch = 0
        self.confirmed = 0
        self.sent = 0
        self.time_us = 0
        self.confirmed_us = 0
        self.safe_version = 0
        self.tail: list[tuple[bytes, bytes]] = []  # from version `tail_first` on
        self.tail_first = 0
        self.answers: list[sync_pb2.RealmBound] = []
        self.refusals: list[data_pb2.Refusal] = []
        self.homecomings: list[sync_pb2.Homecoming] = []
        self.failed: list[sync_pb2.RealmFailed] = []
        self.ref = 0

    # -- what it says ------------------------------------------------------------------------------------------

    def hello(self, *, run: bytes = b"r" * 16, previous_run: bytes = b"") -> sync_pb2.SyncRequest:
        """The first message of a stream."""
        hello = sync_pb2.SyncHello(
            protocol_version=1,
            client=self.client,
            secret=SECRET,
            run=run,
            previous_run=previous_run,
            cluster=self.cluster,
        )
        return sync_pb2.SyncRequest(hello=hello)

    def bind(self, *, ref: int | None = None) -> sync_pb2.SyncRequest:
        """As the copy is."""
        self.ref = self.ref + 1 if ref is None else ref
        copy = self.copy
        bind = sync_pb2.BindRealm(
            ref=self.ref,
            path=self.path,
            cluster=self.cluster if copy.version else b"",
            realm_id=copy.realm_id,
            locator=copy.locator(),
            epoch=copy.epoch,
            lsn=copy.lsn,
            clients=[self.client],
            confirmed=self.confirmed,
            sent=self.sent,
            confirmed_us=self.confirmed_us,
            contact_us=self.time_us,
            tail_first=self.tail_first,
        )
        if self.incoming is not None and self.incoming.version:
            bind.incoming.version, bind.incoming.digest = self.incoming.version, self.incoming.head
            bind.frontier = self.incoming.frontier or b""
        return sync_pb2.SyncRequest(bind=bind)

    def unbind(self) -> sync_pb2.SyncRequest:
        """No more of it."""
        return sync_pb2.SyncRequest(unbind=sync_pb2.UnbindRealm(ref=self.ref))

    def upload(self, *numbers: int, operations: list[Operation] | None = None) -> sync_pb2.SyncRequest:
        """Transactions of these numbers, each of which puts its number unless ``operations`` are given."""
        self.sent = max(self.sent, *numbers)
        return sync_pb2.SyncRequest(
            upload=sync_pb2.Upload(
                ref=self.ref,
                client=self.client,
                transactions=[
                    data_pb2.Transaction(
                        number=number,
                        operations=[
                            log_pb2.Operation(
                                kind=log_pb2.Operation.PUT,
                                key=self.client[:1] + b"%06d" % number,
                                value=b"%d" % number,
                            )
                        ]
                        if operations is None
                        else to_protos(operations),
                    )
                    for number in numbers
                ],
            )
        )

    def send_tail(self, *, last: bool = True) -> sync_pb2.SyncRequest:
        """What is asked for."""
        kept = self.tail[self.answers[-1].tail_from - self.tail_first :]
        tail = sync_pb2.Tail(
            ref=self.ref,
            changes=[raw for raw, _ in kept],
            hmacs=b"".join(mac for _, mac in kept),
            last=last,
        )
        return sync_pb2.SyncRequest(tail=tail)

    # -- what it hears -----------------------------------------------------------------------------------------

    def receive(self, message: sync_pb2.SyncResponse) -> None:
        """Takes in what the server says."""
        kind = message.WhichOneof("message")
        body = getattr(message, kind or "")
        if kind == "welcome":
            self.cluster, self.epoch = body.cluster, body.epoch
            return
        if body.ref != self.ref:
            return  # of a binding that is no more
        if kind == "bound":
            self._on_bound(body)
        elif kind == "changes":
            self._on_changes(body)
        elif kind == "page":
            self._on_page(body)
        elif kind == "safe":
            assert body.safe_version <= self.copy.version
            self.safe_version = max(self.safe_version, body.safe_version)
        elif kind == "refusals":
            assert body.client == self.client
            self.refusals += body.refusals
        elif kind == "tail_taken":
            self.homecomings.append(body.homecoming)
        else:
            assert kind == "failed"
            self.failed.append(body)

    def _on_bound(self, bound: sync_pb2.RealmBound) -> None:
        self.answers.append(bound)
        self.time_us = bound.time_us
        if bound.decision == sync_pb2.SYNC_LOAD:
            if not bound.resumed:
                self.incoming = Copy(frontier=b"")
            assert self.incoming is not None
        elif bound.decision == sync_pb2.SYNC_STREAM:
            self.incoming = None
            self.copy.realm_id, self.copy.epoch = bound.realm_id, bound.epoch
            self.copy.lsn = bound.lsn

    def _on_changes(self, changes: sync_pb2.Changes) -> None:
        into = self.copy if self.incoming is None else self.incoming
        assert len(changes.hmacs) == 32 * len(changes.changes) > 0
        macs = (changes.hmacs[at : at + 32] for at in range(0, len(changes.hmacs), 32))
        for raw, mac in zip(changes.changes, macs, strict=True):
            change = into.apply(raw)
            if self.incoming is None:
                self.tail_first = self.tail_first or change.version
                self.tail.append((raw, mac))
                self._note(change, changes.time_us)
        into.lsn, into.epoch = changes.lsn, self.answers[-1].epoch
        self.safe_version = max(self.safe_version, changes.safe_version)
        assert changes.head_version >= into.version

    def _note(self, change: log_pb2.Change, time_us: int) -> None:
        if change.client == self.client:
            self.confirmed, self.confirmed_us = change.number, time_us
        self.time_us = time_us

    def _on_page(self, page: sync_pb2.StatePage) -> None:
        assert self.incoming is not None
        self.incoming.add_page(page)
        if page.last:
            self.copy, self.incoming = self.incoming, None
            self.copy.epoch = self.answers[-1].epoch
            self.confirmed = max(self.confirmed, page.last_numbers[0])
            self.confirmed_us = self.time_us = page.time_us
            self._keep_last(page)

    def _keep_last(self, page: sync_pb2.StatePage) -> None:
        """What came with the last page leads up to it."""
        assert len(page.hmacs) == 32 * len(page.changes)
        macs = (page.hmacs[at : at + 32] for at in range(0, len(page.hmacs), 32))
        self.tail = list(zip(page.changes, macs, strict=True))
        self.tail_first = self.copy.version + 1 - len(self.tail) if self.tail else 0
        for version, (raw, _) in enumerate(self.tail, self.tail_first):
            change = log_pb2.Change.FromString(raw)
            assert (change.version, change.realm) == (version, self.path)
            self.copy.digests[version] = sha256(raw).digest()
        assert self.copy.digests.get(self.copy.version) == self.copy.head
