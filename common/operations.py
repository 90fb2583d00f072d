"""Operations: what an application builds, how they are checked, and what a counter is.

A counter is a value of decimal text, ``-?[1-9][0-9]*`` or ``0``, within 64 bits signed. An ``add`` to anything
else, or beyond that range, leaves the value alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from understudy.common.errors import BadOperation, TransactionTooLarge
from understudy.common.types import KEY_BYTES_MAX, OPERATIONS_MAX, TRANSACTION_BYTES_MAX, check_key
from understudy.v1 import log_pb2

PUT = log_pb2.Operation.PUT
UPDATE = log_pb2.Operation.UPDATE
DELETE = log_pb2.Operation.DELETE
DELETE_RANGE = log_pb2.Operation.DELETE_RANGE
ADD = log_pb2.Operation.ADD

KIND_NAMES = {
    PUT: "put",
    UPDATE: "update",
    DELETE: "delete",
    DELETE_RANGE: "delete_range",
    ADD: "add",
}

_COUNTER_MIN, _COUNTER_MAX = -(1 << 63), (1 << 63) - 1
_COUNTER_BYTES_MAX = 20
_REMEDY = "keys and values are bytes, amounts are whole numbers of 64 bits, signed"
OPERATION_OVERHEAD_BYTES = 16  # what an operation costs beside key and value


@dataclass(frozen=True, slots=True)
class Put:
    """Sets ``key`` to ``value``."""

    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Update:
    """Sets ``key`` to ``value`` where the key exists; otherwise does nothing."""

    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Delete:
    """Removes ``key``; nothing happens where it does not exist."""

    key: bytes


@dataclass(frozen=True, slots=True)
class DeleteRange:
    """Removes every key from ``start`` (included) to ``end`` (excluded); empty means without bound."""

    start: bytes
    end: bytes


@dataclass(frozen=True, slots=True)
class Add:
    """Adds ``amount`` to the counter at ``key``, a whole number as decimal text; a missing key counts as 0.

    It has no effect where the value is no counter, or the sum would not fit into 64 bits, signed.
    """

    key: bytes
    amount: int


Operation = Put | Update | Delete | DeleteRange | Add


def operation_bytes(operation: Operation) -> int:
    """What an operation counts for in a transaction."""
    match operation:
        case Put(key, value) | Update(key, value):
            return len(key) + len(value) + OPERATION_OVERHEAD_BYTES
        case DeleteRange(start, end):
            return len(start) + len(end) + OPERATION_OVERHEAD_BYTES
        case Delete(key) | Add(key):
            return len(key) + OPERATION_OVERHEAD_BYTES


def to_proto(operation: Operation) -> log_pb2.Operation:
    """The operation as it goes over the wire.

    Raises:
        BadOperation: it is none of the five, or a field has the wrong type.
    """
    try:
        match operation:
            case Put(bytes(key), bytes(value)):
                return log_pb2.Operation(kind=PUT, key=key, value=value)
            case Update(bytes(key), bytes(value)):
                return log_pb2.Operation(kind=UPDATE, key=key, value=value)
            case Delete(bytes(key)):
                return log_pb2.Operation(kind=DELETE, key=key)
            case DeleteRange(bytes(start), bytes(end)):
                return log_pb2.Operation(kind=DELETE_RANGE, key=start, end=end)
            case Add(bytes(key), int(amount)):
                return log_pb2.Operation(kind=ADD, key=key, amount=amount)
    except (TypeError, ValueError) as error:
        raise BadOperation(f"bad operation {operation!r:.200}: {error}", remedy=_REMEDY) from error
    # protobuf would take None for a value and make it an empty one.
    raise BadOperation(f"not an operation, or a field of the wrong type: {operation!r:.200}", remedy=_REMEDY)


def from_proto(operation: log_pb2.Operation) -> Operation:
    """The inverse of :func:`to_proto`, of an operation that was checked."""
    kind, key = operation.kind, operation.key
    if kind == PUT:
        return Put(key, operation.value)
    if kind == UPDATE:
        return Update(key, operation.value)
    if kind == DELETE:
        return Delete(key)
    if kind == DELETE_RANGE:
        return DeleteRange(key, operation.end)
    return Add(key, operation.amount)


def to_protos(operations: Iterable[Operation]) -> list[log_pb2.Operation]:
    """All operations as they go over the wire, checked.

    Raises:
        BadOperation, BadKey, TransactionTooLarge: see :func:`check_operations`.
    """
    if not isinstance(operations, Iterable):
        raise BadOperation(
            f"not a list of operations: {operations!r:.200}",
            remedy="give a list, for example [Put(key, value)]",
        )
    protos = [to_proto(operation) for operation in operations]
    check_operations(protos)
    return protos


def check_operations(operations: Sequence[log_pb2.Operation]) -> None:
    """Refuses a transaction that must not enter the log.

    Raises:
        BadOperation: it is empty, or has an unknown kind.
        BadKey: a key is empty or too long.
        TransactionTooLarge: too many operations or bytes.
    """
    if not operations:
        raise BadOperation(
            "a transaction needs at least one operation",
            remedy="begin one only where there is something to do",
        )
    if len(operations) > OPERATIONS_MAX:
        raise TransactionTooLarge(
            f"a transaction of {len(operations)} operations", remedy=f"at most {OPERATIONS_MAX:,} are allowed"
        )
    size = 0
    for operation in operations:
        kind, key = operation.kind, operation.key
        if kind == DELETE_RANGE:
            _check_range(key, operation.end)
        elif not (PUT <= kind <= ADD):
            raise BadOperation(f"unknown operation kind {kind}", remedy="upgrade this server")
        elif not 1 <= len(key) <= KEY_BYTES_MAX:
            check_key(key)
        size += len(key) + len(operation.value) + len(operation.end) + OPERATION_OVERHEAD_BYTES
    if size > TRANSACTION_BYTES_MAX:
        raise TransactionTooLarge(
            f"a transaction of {size:,} bytes",
            remedy=f"at most {TRANSACTION_BYTES_MAX:,} are allowed; split it",
        )


def _check_range(start: bytes, end: bytes) -> None:
    for bound in (start, end):
        if bound:
            check_key(bound)
    if end and start >= end:
        raise BadOperation(f"empty range: {start[:40]!r} is not before {end[:40]!r}")


def added(value: bytes | None, amount: int) -> bytes | None:
    """The value after an ``add``: ``value`` itself where it is no counter or would leave 64 bits."""
    if value is None:
        return b"%d" % amount
    if len(value) > _COUNTER_BYTES_MAX:
        return value
    try:
        count = int(value)
    except ValueError:
        return value
    # " 1", "+1", "01", "1_0" are text, not counters; so is 2^63, though a sum with it could fit.
    if b"%d" % count != value or not _COUNTER_MIN <= count <= _COUNTER_MAX:
        return value
    total = count + amount
    return b"%d" % total if _COUNTER_MIN <= total <= _COUNTER_MAX else value
