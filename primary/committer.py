"""From transactions to acknowledgements: numbering, chaining, committing, answering.

A pure machine over the applied state: no I/O, no clock but the one passed in. Its shell writes what
:meth:`Committer.take_batch` gives, and reports what became durable here and on replicas; the machine then applies
entries in LSN order and calls ``done`` of each transaction when its durability is reached, never before (G1).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from understudy.common import entries
from understudy.common.errors import (
    BadOperation,
    DiskFull,
    Fenced,
    NotPermitted,
    ReceiptExpired,
    TransactionTooLarge,
    UnderstudyError,
)
from understudy.common.memtable import Missing, Receipt
from understudy.common.operations import check_operations
from understudy.common.records import PAYLOAD_BYTES_MAX, Record, encode_record
from understudy.common.state import State
from understudy.common.types import (
    Durability,
    Epoch,
    Lsn,
    Position,
    check_realm_path,
    is_system_realm,
)
from understudy.v1 import data_pb2, log_pb2

# Made, not yet committed: a bound on memory, and on what a failover can leave unacknowledged.
PENDING_BYTES_MAX = 16 << 20
PENDING_ENTRIES_MAX = 50_000
# A memtable with changes in it is written out after this long even when it is small, to keep recovery short.
CHECKPOINT_AGE_S = 60.0
# A degraded server returns to its level when its replicas are as close as this: under load none is ever quite at
# the head, and what is missing is waited for.
CAUGHT_UP_ENTRIES = 1_000

_LEVELS = frozenset((0, *Durability))  # 0: the server's own

Done = Callable[[Receipt], None]
Clock = Callable[[], int]  # microseconds since 1970


class Applier(Protocol):
    """What entries are applied to."""

    state: State

    @property
    def is_behind(self) -> bool:
        """Whether nothing more should be applied for now."""

    def apply(self, record: Record, entry: log_pb2.Entry | None = None) -> log_pb2.Entry:
        """Applies the next entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitPolicy:
    """When transactions are acknowledged."""

    durability: Durability = Durability.LOCAL
    sync_replicas: int = 1
    degrade_after_s: float | None = None  # None: wait for replicas as long as it takes


@dataclass(slots=True)
class _Pending:
    record: Record
    receipt: Receipt
    level: Durability
    path: str | None  # of the realm whose head it changes
    client: bytes
    number: int
    done: list[Done]


@dataclass(slots=True)
class _Head:
    """A realm's end of chain, ahead of what is applied. ``in_flight`` counts the changes not yet applied."""

    version: int
    digest: bytes
    in_flight: int


class Committer:
    """The commit pipeline of a primary.

    Invariant: ``committed_lsn <= durable_lsn <= position.lsn``; entries above ``committed_lsn`` are pending, in
    LSN order and without gaps.
    """

    def __init__(
        self, applier: Applier, *, policy: CommitPolicy, history_key: bytes, clock_us: Clock
    ) -> None:
        self._applier = applier
        self._policy = policy
        self._key = history_key
        self._clock_us = clock_us
        self._time_us = applier.state.time_us
        self.position = applier.state.applied
        self.durable_lsn = applier.state.applied.lsn
        self.pending_bytes = 0
        self.degraded = False
        self.refusal: UnderstudyError | None = None
        self._pending: deque[_Pending] = deque()
        self._answering: dict[Durability, deque[_Pending]] = {level: deque() for level in Durability}
        self._batch: list[bytes] = []
        self._heads: dict[str, _Head] = {}
        self._in_flight: dict[tuple[str, bytes], dict[int, _Pending]] = {}
        self._replica_durable: Lsn = Lsn(0)
        self._replica_applied: Lsn = Lsn(0)
        self._alone_since_s: float | None = None
        self._freezing = False
        self._active_since_s: float | None = None

    # -- taking in -----------------------------------------------------------------------------------------

    @property
    def committed_lsn(self) -> Lsn:
        """The last entry that reads show."""
        return self._applier.state.applied.lsn

    @property
    def has_room(self) -> bool:
        """Whether more transactions should be taken in now."""
        entries_held = len(self._pending) + sum(map(len, self._answering.values()))
        return self.pending_bytes < PENDING_BYTES_MAX and entries_held < PENDING_ENTRIES_MAX

    def submit(self, client: bytes, transaction: data_pb2.Transaction, done: Done) -> None:
        """Takes one transaction in; ``done`` is called with its receipt once it is as durable as it must be.

        A number that this client has used on this realm before is answered with its first receipt (G6).

        Raises:
            UsageError: it must not enter the log.
            Fenced, DiskFull: no writes now.
            ReceiptExpired: it was applied too long ago to say more.
        """
        if isinstance(self.refusal, Fenced):
            raise self.refusal
        path, number = transaction.realm, transaction.number
        if path not in self._heads:
            _check_path(path)
        if number < 1:
            raise BadOperation("a transaction needs a number from 1 on")
        if transaction.durability not in _LEVELS:
            raise BadOperation(f"unknown durability {transaction.durability}", remedy="upgrade this server")
        level = Durability(max(transaction.durability, self._policy.durability))
        if self._answer_again(path, client, number, level, done):
            return
        # Only now: a refusal says that this number was not, and will not be, applied.
        if self.refusal is not None:
            raise self.refusal
        check_operations(transaction.operations)
        self._append_change(path, client, transaction, level, done)

    def _answer_again(self, path: str, client: bytes, number: int, level: Durability, done: Done) -> bool:
        """Whether the transaction is known already; if so, ``done`` is or will be called."""
        in_flight = self._in_flight.get((path, client))
        if in_flight:
            known = in_flight.get(number)
            if known is not None:
                known.done.append(done)
                return True
            if number > next(reversed(in_flight)):
                return False
        elif number > self._applier.state.last_number(path, client):
            return False
        receipt = self._applier.state.receipt(path, client, number)
        if isinstance(receipt, Missing):
            raise ReceiptExpired(
                f"transaction {number} on {path} was answered too long ago for its receipt to be known; "
                "it was not applied again"
            )
        if receipt is None:
            raise BadOperation(
                f"transaction {number} on {path} comes after one with a higher number",
                remedy="a client numbers its transactions in the order of sending",
            )
        self._await_level(receipt, level, done)
        return True

    def _await_level(self, receipt: Receipt, level: Durability, done: Done) -> None:
        # Applied, but after a restart perhaps not yet on a replica: it must not be acknowledged for less.
        if receipt.lsn <= self._reached(level):
            done(receipt)
            return
        waiting = _Pending(Record(receipt.lsn, receipt.digest, b""), receipt, level, None, b"", 0, [done])
        queue = self._answering[level]
        at = next((index for index, one in enumerate(queue) if one.record.lsn > receipt.lsn), len(queue))
        queue.insert(at, waiting)

    def _append_change(
        self, path: str, client: bytes, transaction: data_pb2.Transaction, level: Durability, done: Done
    ) -> None:
        head = self._heads.get(path)
        if head is None:
            applied = self._applier.state.realm(path)
            head = _Head(applied.version, applied.head, 0) if applied else _Head(0, b"", 0)
        change = log_pb2.Change(
            realm=path,
            version=head.version + 1,
            previous=head.digest,
            client=client,
            number=transaction.number,
            operations=transaction.operations,
        ).SerializeToString()
        digest = entries.change_digest(change)
        payload = entries.change_entry(self._now_us(), change, entries.sign(self._key, digest))
        record = self._append(payload)
        self._heads[path] = head
        head.version += 1
        head.digest = digest
        head.in_flight += 1
        receipt = Receipt(path, head.version, record.lsn, record.digest)
        pending = _Pending(record, receipt, level, path, client, transaction.number, [done])
        self._pending.append(pending)
        self._in_flight.setdefault((path, client), {})[transaction.number] = pending

    def submit_mark(
        self, make_payload: Callable[[int], bytes], done: Done | None = None, *, path: str | None = None
    ) -> Lsn:
        """Appends an entry that is no change; ``make_payload`` gets the entry's time, ``path`` is the realm it ends.

        Raises:
            Fenced, DiskFull: no writes now.
        """
        if self.refusal is not None:
            raise self.refusal
        record = self._append(make_payload(self._now_us()))
        receipt = Receipt("", 0, record.lsn, record.digest)
        level = self._policy.durability
        self._pending.append(_Pending(record, receipt, level, path, b"", 0, [done] if done else []))
        return record.lsn

    def drop_realm(self, path: str, done: Done) -> None:
        """Drops a realm; a transaction after this one begins a new realm of that name.

        Raises:
            BadRealmPath, NotPermitted: not a realm that may be dropped.
            Fenced, DiskFull: no writes now.
        """
        _check_path(path)
        self.submit_mark(lambda time_us: entries.drop_entry(time_us, path), done, path=path)
        head = self._heads.setdefault(path, _Head(0, b"", 0))
        head.version, head.digest = 0, b""
        head.in_flight += 1

    def _append(self, payload: bytes) -> Record:
        if len(payload) > PAYLOAD_BYTES_MAX:  # no reader would take it for an entry
            raise TransactionTooLarge(
                f"an entry of {len(payload):,} bytes", remedy=f"at most {PAYLOAD_BYTES_MAX:,} are allowed"
            )
        lsn = Lsn(self.position.lsn + 1)
        data, digest = encode_record(self.position.digest, lsn, payload)
        self.position = Position(lsn, digest)
        self._batch.append(data)
        self.pending_bytes += len(data)
        return Record(lsn, digest, payload)

    def _now_us(self) -> int:
        # The clock may jump back; the log's time must not.
        self._time_us = max(self._time_us, self._clock_us())
        return self._time_us

    def take_batch(self) -> bytes:
        """The records made since the last call, to be written in this order up to :attr:`position`."""
        batch = b"".join(self._batch)
        self._batch.clear()
        return batch

    # -- progress ------------------------------------------------------------------------------------------

    def on_durable(self, position: Position) -> None:
        """Everything up to ``position`` is durable here."""
        self.durable_lsn = position.lsn
        self.advance()

    def on_replicas(self, progress: Sequence[tuple[Lsn, Lsn]], *, connected: int, now_s: float) -> None:
        """How far the replicas are: (durable, applied) of each, and how many are connected."""
        needed = self._policy.sync_replicas
        if len(progress) >= needed:
            durable = sorted((durable for durable, _ in progress), reverse=True)[needed - 1]
            applied = sorted((applied for _, applied in progress), reverse=True)[needed - 1]
            self._replica_durable = max(self._replica_durable, durable)
            self._replica_applied = max(self._replica_applied, applied)
        if connected >= needed:
            self._alone_since_s = None
            if self.degraded and self._replica_durable + CAUGHT_UP_ENTRIES >= self.committed_lsn:
                self.degraded = False
        elif self._alone_since_s is None:
            self._alone_since_s = now_s
        self.advance()

    def on_tick(self, now_s: float) -> None:
        """Time has passed: degrade where that is the policy, and freeze a memtable that has become old."""
        after = self._policy.degrade_after_s
        alone = self._alone_since_s
        if after is not None and alone is not None and now_s - alone >= after:
            self.degraded = True
        if not self._applier.state.active.first_change_lsn:
            self._active_since_s = None
        elif self._active_since_s is None:
            self._active_since_s = now_s
        elif now_s - self._active_since_s >= CHECKPOINT_AGE_S:
            self.freeze()
        self.advance()

    def freeze(self) -> None:
        """Sets a freeze mark, unless one is on its way."""
        if not self._freezing and self.refusal is None:
            self._freezing = True
            self._active_since_s = None
            self.submit_mark(entries.freeze_entry)

    def _reached(self, level: Durability) -> Lsn:
        """Up to which LSN a transaction of this level may be acknowledged."""
        if level is Durability.LOCAL or (self.degraded and level <= self._policy.durability):
            return self.committed_lsn
        replicas = self._replica_durable if level is Durability.REPLICA else self._replica_applied
        return min(self.committed_lsn, replicas)

    def _committable(self) -> Lsn:
        if self._policy.durability is Durability.LOCAL or self.degraded:
            return self.durable_lsn
        return min(self.durable_lsn, self._replica_durable)

    def advance(self) -> None:
        """Applies what is committed and answers what has reached its durability."""
        committable = self._committable()
        while self._pending and self._pending[0].record.lsn <= committable and not self._applier.is_behind:
            self._commit(self._pending.popleft())
        for level, queue in self._answering.items():
            reached = self._reached(level)
            while queue and queue[0].record.lsn <= reached:
                pending = queue.popleft()
                for done in pending.done:
                    done(pending.receipt)
        if self._applier.state.active.is_full and not self._applier.is_behind:
            self.freeze()

    def _commit(self, pending: _Pending) -> None:
        record = pending.record
        entry = self._applier.apply(record)
        self.pending_bytes -= record.encoded_bytes
        if entry.HasField("freeze"):
            self._freezing = False
        if pending.path is not None:
            self._land(pending, pending.path)
        # Its bytes are in the memtable now: what is left is to answer, which can take as long as a replica is away.
        pending.record = Record(record.lsn, record.digest, b"")
        self._answering[pending.level].append(pending)

    def _land(self, pending: _Pending, path: str) -> None:
        """Forgets what was remembered of a change only while it was in flight."""
        head = self._heads[path]
        head.in_flight -= 1
        if not head.in_flight:
            del self._heads[path]
        owner = (path, pending.client)
        in_flight = self._in_flight.get(owner)
        if in_flight is not None:
            in_flight.pop(pending.number, None)
            if not in_flight:
                del self._in_flight[owner]

    # -- refusing ------------------------------------------------------------------------------------------

    def fence(self, epoch: Epoch | None) -> None:
        """Takes nothing more in and acknowledges nothing more, for good (G7).

        Args:
            epoch: the one that has begun elsewhere; None if an operator says so.
        """
        self.refusal = Fenced(
            "this server was fenced by an operator"
            if epoch is None
            else f"this server is fenced: epoch {epoch} has begun elsewhere",
            remedy="write to the new primary; bring this one back with `understudy rewind DIR --to HOST:PORT`",
        )
        for queue in self._answering.values():
            queue.clear()
        self._pending.clear()

    def on_disk_full(self, full: bool, where: str) -> None:
        """Refuses new transactions while there is no space; what was taken in waits for it."""
        if isinstance(self.refusal, Fenced):
            return
        self.refusal = (
            DiskFull(f"no space left in {where}", remedy="free some space; writes go on by themselves then")
            if full
            else None
        )


def _check_path(path: str) -> None:
    check_realm_path(path)
    if is_system_realm(path):
        raise NotPermitted(f"realm {path} is the system's own")
