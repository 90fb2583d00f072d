"""What becomes of the queue when a copy is given up: which changes are made again on the fresh state. Pure.

Each operation is judged as if it were made just now, behind those before it: a put sets, an update is dropped where
the server has deleted the key, a delete of what is gone has nothing to do, a counter adds. What is left of a
transaction stays one transaction.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from understudy.client.local_types import Queued
from understudy.client.overlay import Overlay
from understudy.common.operations import ADD, DELETE, UPDATE, Operation, added, from_proto
from understudy.v1 import log_pb2

Lookup = Callable[[bytes], bytes | None]


class Dropped(enum.Enum):
    """Why an operation was not made again."""

    KEY_DELETED = "the server has deleted the key that it would update"
    NOTHING_TO_DELETE = "the key is gone already"
    NOT_A_COUNTER = "the value there is no counter, or the sum has no 64 bits"
    APPLIED = "the server had applied it"
    PERHAPS_APPLIED = "the server may have applied it, and can't tell any more"
    DISCARDED = "the reset discards what was not confirmed"


@dataclass(frozen=True, slots=True)
class DroppedOperation:
    """An operation that was not made again, and why."""

    operation: Operation
    reason: Dropped


@dataclass(frozen=True, slots=True)
class RecoveredChange:
    """One transaction of the queue: what of it was made again, in one transaction, and what was not."""

    number: int
    applied: tuple[Operation, ...]
    dropped: tuple[DroppedOperation, ...]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a reset made of the queue, in the order in which it was made."""

    changes: tuple[RecoveredChange, ...]

    @property
    def applied(self) -> int:
        """How many operations were made again."""
        return sum(len(change.applied) for change in self.changes)

    @property
    def dropped(self) -> int:
        """How many were not."""
        return sum(len(change.dropped) for change in self.changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """The queue as it shall be, and the account of it."""

    queue: list[tuple[int, bytes, list[log_pb2.Operation]]]  # number, client id, operations
    last_number: int  # the last one that was judged: what was queued since stays as it is
    report: Recovery


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the server knows of our changes, as of the fresh state."""

    last_numbers: Mapping[bytes, int]
    # Sent up to this number, and the server does not remember us: these may have been applied. 0: it remembers.
    unsure_to: int


def plan_recovery(queue: Iterable[Queued], fresh: Lookup, known: Known, *, discard_to: int) -> RecoveryPlan:
    """Judges every change of the queue.

    Args:
        queue: in order.
        fresh: the value at a key of the fresh state.
        known: what must not be made twice.
        discard_to: up to this number nothing is made again; 0: everything is.
    """
    judge = _Judge(fresh)
    queued: list[tuple[int, bytes, list[log_pb2.Operation]]] = []
    changes: list[RecoveredChange] = []
    for change in queue:
        whole = _dropped_whole(change, known, discard_to)
        if whole is not None:
            dropped = [DroppedOperation(from_proto(one), whole) for one in change.operations]
            changes.append(RecoveredChange(change.number, (), tuple(dropped)))
            continue
        kept, dropped = judge.judge(change)
        if kept:
            queued.append((change.number, change.client, kept))
        changes.append(RecoveredChange(change.number, tuple(map(from_proto, kept)), tuple(dropped)))
    last_number = changes[-1].number if changes else 0
    return RecoveryPlan(queue=queued, last_number=last_number, report=Recovery(tuple(changes)))


def _dropped_whole(change: Queued, known: Known, discard_to: int) -> Dropped | None:
    if change.number <= known.last_numbers.get(change.client, 0):
        return Dropped.APPLIED
    if change.number <= discard_to:
        return Dropped.DISCARDED
    return Dropped.PERHAPS_APPLIED if change.number <= known.unsure_to else None


class _Judge:
    """Sees each operation on top of all that were kept before it."""

    def __init__(self, fresh: Lookup) -> None:
        self._fresh = fresh
        self._overlay = Overlay()
        self._steps = 0

    def judge(self, change: Queued) -> tuple[list[log_pb2.Operation], list[DroppedOperation]]:
        kept: list[log_pb2.Operation] = []
        dropped: list[DroppedOperation] = []
        for operation in change.operations:
            reason = self._reason(operation)
            if reason is None:
                self._steps += 1
                self._overlay.add(self._steps, [operation])
                kept.append(operation)
            else:
                dropped.append(DroppedOperation(from_proto(operation), reason))
        return kept, dropped

    def _reason(self, operation: log_pb2.Operation) -> Dropped | None:
        kind = operation.kind
        if kind not in (UPDATE, DELETE, ADD):
            return None
        value = self._overlay.value(operation.key, self._fresh(operation.key))
        if kind == ADD:
            return (
                Dropped.NOT_A_COUNTER
                if operation.amount and added(value, operation.amount) == value
                else None
            )
        if value is not None:
            return None
        return Dropped.KEY_DELETED if kind == UPDATE else Dropped.NOTHING_TO_DELETE
