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
from understudy.primary.in_flight import Done, Head, InFlight, Pending, SignedChange
from understudy.primary.renewed import RENEWED_NUMBER, renewed_name
from understudy.v1 import data_pb2, log_pb2

# Made, not yet committed: a bound on memory, and on what a failover can leave unacknowledged.
PENDING_BYTES_MAX = 16 << 20
PENDING_ENTRIES_MAX = 50_000
# A memtable with changes in it is written out after this long even when it is small, to keep recovery short.
CHECKPOINT_AGE_S = 60.0
# And with so many operations earlier: under load, checkpoints that are small take disk and processor from commits for
# tens of milliseconds, not for a second.
BUSY_CHECKPOINT_AGE_S = 5.0
BUSY_OPERATIONS = 2_000
# A degraded server returns to its level when its replicas are as close as this: under load none is ever quite at
# the head, and what is missing is waited for.
CAUGHT_UP_ENTRIES = 1_000

_LEVELS = frozenset((0, *Durability))  # 0: the server's own

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
        self._pending: deque[Pending] = deque()
        self._answering: dict[Durability, deque[Pending]] = {level: deque() for level in Durability}
        self._batch: list[bytes] = []
        self._in_flight = InFlight(applier.state)
        # Whether changes were renewed on this history, as far as it can tell: after a failover, they may have been.
        self._renews = len(applier.state.epochs) > 1
        self._replica_durable: Lsn = Lsn(0)
        self._replica_applied: Lsn = Lsn(0)
        self._alone_since_s: float | None = None
        self._freezing = False
        self._active_since_s: float | None = None
        self._unshown: deque[tuple[Lsn, str]] = deque()
        # Called with the path of a realm of which other clients may be told a change.
        self.on_shown: Callable[[str], None] = lambda path: None

    # -- taking in -----------------------------------------------------------------------------------------

    @property
    def committed_lsn(self) -> Lsn:
        """The last entry that reads show."""
        return self._applier.state.applied.lsn

    @property
    def shown_lsn(self) -> Lsn:
        """Up to here clients may be told what others have changed (G5): what a failover to a replica can't lose.

        What is on a replica is that, whether it is applied there yet or not.
        """
        return self._reached(min(self._policy.durability, Durability.REPLICA))

    @property
    def safe_lsn(self) -> Lsn:
        """Up to here entries are known to be on enough replicas, whatever the level."""
        return min(self._replica_durable, self.committed_lsn)

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
        path = transaction.realm
        if path not in self._in_flight or is_system_realm(path):
            _check_path(path)
        self.submit_own(client, transaction, done)

    def submit_own(self, client: bytes, transaction: data_pb2.Transaction, done: Done) -> None:
        """As :meth:`submit`, also on the system's own realms; the path must have been checked."""
        if isinstance(self.refusal, Fenced):
            raise self.refusal
        path, number = transaction.realm, transaction.number
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
        in_flight = self._in_flight.of(path, client)
        if in_flight:
            known = in_flight.get(number)
            if known is not None:
                known.done.append(done)
                return True
            if number > next(reversed(in_flight)):
                return self._answer_renewed(path, client, number, level, done)
        elif number > self._applier.state.last_number(path, client):
            return self._answer_renewed(path, client, number, level, done)
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

    def _answer_renewed(self, path: str, client: bytes, number: int, level: Durability, done: Done) -> bool:
        """The same for one that has come home under another name, while its client was still waiting for an answer."""
        if not self._renews or not self.was_renewed(path, client, number):
            return False
        name = renewed_name(client, number)
        return self._answer_again(path, name, RENEWED_NUMBER, level, done)

    def was_renewed(self, path: str, client: bytes, number: int) -> bool:
        """Whether this change of a client is here, or in flight, under the name of one that was renewed."""
        return self._in_flight.last_number(path, renewed_name(client, number)) > 0

    def is_in_flight(self, path: str, client: bytes, number: int) -> bool:
        """Whether this change of a client was taken in, and is not applied yet."""
        return number in self._in_flight.of(path, client)

    def submit_renewed(self, transaction: data_pb2.Transaction, origin: bytes, done: Done) -> None:
        """Takes in a change that this history has lost, as a new one.

        It keeps client and number where that leaves no earlier number of its client out, which may yet come; else it
        gets a name of its own. What was renewed already, or is in flight, is answered with its receipt.

        Raises:
            as :meth:`submit`.
        """
        path, number = transaction.realm, transaction.number
        is_in_flight = self.is_in_flight(path, origin, number)
        if is_in_flight or number == self._in_flight.last_number(path, origin) + 1:
            self.submit(origin, transaction, done)
            return
        self._renews = True
        transaction.number = RENEWED_NUMBER
        self.submit(renewed_name(origin, number), transaction, done)

    def _await_level(self, receipt: Receipt, level: Durability, done: Done) -> None:
        # Applied, but after a restart perhaps not yet on a replica: it must not be acknowledged for less.
        if receipt.lsn <= self._reached(level):
            done(receipt)
            return
        waiting = Pending(Record(receipt.lsn, receipt.digest, b""), receipt, level, None, b"", 0, [done])
        queue = self._answering[level]
        at = next((index for index, one in enumerate(queue) if one.record.lsn > receipt.lsn), len(queue))
        queue.insert(at, waiting)

    def _append_change(
        self, path: str, client: bytes, transaction: data_pb2.Transaction, level: Durability, done: Done
    ) -> None:
        head = self._in_flight.head(path)
        change = log_pb2.Change(
            realm=path,
            version=head.version + 1,
            previous=head.digest,
            client=client,
            number=transaction.number,
            operations=transaction.operations,
        ).SerializeToString()
        digest = entries.change_digest(change)
        signed = SignedChange(change, digest, entries.sign(self._key, digest))
        self._append_signed(path, head, signed, client, transaction.number, level, done)

    def submit_again(self, change: log_pb2.Change, signed: SignedChange, done: Done) -> None:
        """Appends a change that this history has lost, as it was; it must be the next of its realm.

        Args:
            change: what ``signed`` holds; its HMAC has been checked.
            signed: the very bytes.
            done: called when it has reached the server's durability.

        Raises:
            BadOperation: it does not follow from what is there.
            Fenced, DiskFull: no writes now.
        """
        if self.refusal is not None:
            raise self.refusal
        path, client, number = change.realm, change.client, change.number
        head = self._in_flight.head(path)
        if (change.version, change.previous) != (head.version + 1, head.digest):
            raise BadOperation(
                f"version {change.version} of {path} does not follow version {head.version} of this server"
            )
        if number <= self._in_flight.last_number(path, client):
            raise BadOperation(f"transaction {number} on {path} comes after one with a higher number")
        self._append_signed(path, head, signed, client, number, self._policy.durability, done)

    def _append_signed(
        self,
        path: str,
        head: Head,
        signed: SignedChange,
        client: bytes,
        number: int,
        level: Durability,
        done: Done,
    ) -> None:
        record = self._append(entries.change_entry(self._now_us(), signed.change, signed.hmac))
        receipt = Receipt(path, head.version + 1, record.lsn, record.digest)
        pending = Pending(record, receipt, level, path, client, number, [done])
        self._pending.append(pending)
        self._in_flight.add(path, head, signed.digest, pending)

    def head(self, path: str) -> tuple[int, bytes]:
        """Version and digest of a realm's last change, applied or in flight; 0 and empty where there is none."""
        head = self._in_flight.head(path)
        return head.version, head.digest

    def is_settled(self, path: str) -> bool:
        """Whether all that was taken in for this realm is applied."""
        return path not in self._in_flight

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
        self._pending.append(Pending(record, receipt, level, path, b"", 0, [done] if done else []))
        return record.lsn

    def drop_realm(self, path: str, done: Done) -> None:
        """Drops a realm; a transaction after this one begins a new realm of that name.

        Raises:
            BadRealmPath, NotPermitted: not a realm that may be dropped.
            Fenced, DiskFull: no writes now.
        """
        _check_path(path)
        self.submit_mark(lambda time_us: entries.drop_entry(time_us, path), done, path=path)
        self._in_flight.drop(path)

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
        else:
            is_busy = self._applier.state.active.operations >= BUSY_OPERATIONS
            if now_s - self._active_since_s >= (BUSY_CHECKPOINT_AGE_S if is_busy else CHECKPOINT_AGE_S):
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
        shown = self.shown_lsn
        while self._unshown and self._unshown[0][0] <= shown:
            self.on_shown(self._unshown.popleft()[1])
        if self._applier.state.active.is_full and not self._applier.is_behind:
            self.freeze()

    def _commit(self, pending: Pending) -> None:
        record = pending.record
        entry = self._applier.apply(record)
        self.pending_bytes -= record.encoded_bytes
        if entry.HasField("freeze"):
            self._freezing = False
        if pending.path is not None:
            self._in_flight.land(pending.path, pending)
            self._unshown.append((record.lsn, pending.path))
        # Its bytes are in the memtable now: what is left is to answer, which can take as long as a replica is away.
        pending.record = Record(record.lsn, record.digest, b"")
        self._answering[pending.level].append(pending)

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
        self._unshown.clear()

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
