"""Operations: counters, limits, and what must not enter the log."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from understudy.common import operations
from understudy.common.errors import BadKey, BadOperation, TransactionTooLarge
from understudy.common.operations import (
    ADD,
    DELETE,
    DELETE_RANGE,
    KIND_NAMES,
    OPERATION_OVERHEAD_BYTES,
    PUT,
    UPDATE,
    Add,
    Delete,
    DeleteRange,
    Operation,
    Put,
    Update,
    added,
    check_operations,
    operation_bytes,
    to_proto,
    to_protos,
)
from understudy.common.transaction import TransactionBuilder
from understudy.common.types import KEY_BYTES_MAX, OPERATIONS_MAX, TRANSACTION_BYTES_MAX
from understudy.v1 import log_pb2

MIN, MAX = -(2**63), 2**63 - 1
NO_COUNTERS = [
    b"", b" 1", b"1 ", b"1\n", b"+1", b"01", b"00", b"-0", b"-", b"--1", b"1_0", b"0x1", b"1.0", b"1e3", b"inf",
    b"\xff", b"\x00", "\u0661".encode(), str(MAX + 1).encode(), str(MIN - 1).encode(), b"9" * 5000, b"-01", b"apple",
]  # fmt: skip

counters = st.integers(min_value=MIN, max_value=MAX)


# -- counters ----------------------------------------------------------------------------------------------


@given(counters, counters)
@example(MAX, 1)
@example(MIN, -1)
@example(MAX, MIN)
@example(0, 0)
def test_adding_to_a_counter_gives_the_sum_or_leaves_it_alone(count: int, amount: int) -> None:
    """A counter becomes the sum where that has 64 bits, and stays as it is where it has not."""
    total = count + amount
    assert added(b"%d" % count, amount) == (b"%d" % total if MIN <= total <= MAX else b"%d" % count)


@given(counters)
def test_a_missing_key_counts_as_zero(amount: int) -> None:
    """Adding to a key that does not exist makes it, also where the amount is 0."""
    assert added(None, amount) == b"%d" % amount


@pytest.mark.parametrize("value", NO_COUNTERS, ids=lambda value: repr(value[:20]))
@pytest.mark.parametrize("amount", [0, 1, -1])
def test_a_value_that_is_no_counter_is_left_alone(value: bytes, amount: int) -> None:
    """Only the one way to write a number is a counter; everything else that Python reads as one is not."""
    assert added(value, amount) == value


@given(st.binary(max_size=25), counters)
def test_adding_never_fails(value: bytes, amount: int) -> None:
    """No value can make an add fail: it would fail on every node, for ever."""
    result = added(value, amount)
    assert result == value or b"%d" % int(value) == value


# -- what an application builds --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "fields"),
    [
        (Put(b"k", b"v"), {"kind": PUT, "key": b"k", "value": b"v"}),
        (Update(b"k", b""), {"kind": UPDATE, "key": b"k"}),
        (Delete(b"k"), {"kind": DELETE, "key": b"k"}),
        (DeleteRange(b"a", b"b"), {"kind": DELETE_RANGE, "key": b"a", "end": b"b"}),
        (DeleteRange(b"", b""), {"kind": DELETE_RANGE}),
        (Add(b"k", MIN), {"kind": ADD, "key": b"k", "amount": MIN}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_operation_has_its_message(operation: Operation, fields: dict[str, Any]) -> None:
    """Each of the five operations becomes the message of its kind, with its fields and no others."""
    assert to_protos([operation]) == [log_pb2.Operation(**fields)]
    assert KIND_NAMES[fields["kind"]]


@pytest.mark.parametrize(
    "operation",
    [
        Put("text", b"v"),  # type: ignore[arg-type]
        Put(b"k", "text"),  # type: ignore[arg-type]
        Put(b"k", None),  # type: ignore[arg-type]
        Put(None, b"v"),  # type: ignore[arg-type]
        Add(b"k", None),  # type: ignore[arg-type]
        DeleteRange(b"a", None),  # type: ignore[arg-type]
        Delete(7),  # type: ignore[arg-type]
        Add(b"k", 1.5),  # type: ignore[arg-type]
        Add(b"k", MAX + 1),
        Add(b"k", MIN - 1),
        DeleteRange("a", b""),  # type: ignore[arg-type]
        ("put", b"k", b"v"),
        None,
    ],
    ids=repr,
)
def test_what_is_no_operation_is_refused(operation: Any) -> None:
    """A field of the wrong type, an amount beyond 64 bits, or something else altogether is a bad operation."""
    with pytest.raises(BadOperation):
        to_proto(operation)


def test_a_builder_collects_operations_in_order_and_has_no_receipt_before_the_commit() -> None:
    """A transaction holds what was called, in that order; its receipt is there only once it is committed."""
    builder = TransactionBuilder()
    builder.put(b"a", b"1")
    builder.update(b"b", b"2")
    builder.delete(b"c")
    builder.delete_range(b"d", b"e")
    builder.delete_range()
    builder.add(b"f", -3)
    assert builder.end() == [
        Put(b"a", b"1"),
        Update(b"b", b"2"),
        Delete(b"c"),
        DeleteRange(b"d", b"e"),
        DeleteRange(b"", b""),
        Add(b"f", -3),
    ]
    with pytest.raises(BadOperation, match="not committed"):
        _ = builder.receipt
    with pytest.raises(BadOperation, match="too late"):
        builder.put(b"g", b"7")


# -- what may enter the log --------------------------------------------------------------------------------


def test_an_empty_transaction_is_refused() -> None:
    """A transaction does something."""
    with pytest.raises(BadOperation, match="at least one"):
        check_operations([])


@pytest.mark.parametrize("kind", [0, 6, 99])
def test_an_operation_of_a_kind_not_known_is_refused(kind: int) -> None:
    """What this version can't apply must not enter the log, where every node would have to."""
    with pytest.raises(BadOperation, match=f"unknown operation kind {kind}"):
        check_operations([log_pb2.Operation(kind=kind, key=b"k")])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [PUT, UPDATE, DELETE, ADD])
@pytest.mark.parametrize("length", [0, KEY_BYTES_MAX + 1])
def test_a_bad_key_is_refused_in_every_operation(kind: log_pb2.Operation.Kind.ValueType, length: int) -> None:
    """An empty or too long key is refused wherever a key is needed."""
    with pytest.raises(BadKey):
        check_operations([log_pb2.Operation(kind=kind, key=b"k" * length)])


@pytest.mark.parametrize(
    ("start", "end", "error"),
    [
        (b"b", b"a", BadOperation),
        (b"a", b"a", BadOperation),
        (b"k" * (KEY_BYTES_MAX + 1), b"", BadKey),
        (b"", b"k" * (KEY_BYTES_MAX + 1), BadKey),
    ],
)
def test_a_range_that_is_empty_or_has_a_bad_bound_is_refused(
    start: bytes, end: bytes, error: type[Exception]
) -> None:
    """A range must hold something, and its bounds be keys."""
    with pytest.raises(error):
        to_protos([DeleteRange(start, end)])


@pytest.mark.parametrize(("start", "end"), [(b"", b""), (b"a", b""), (b"", b"a"), (b"a", b"a\0")])
def test_a_range_may_be_without_bounds(start: bytes, end: bytes) -> None:
    """Either bound may be missing."""
    assert len(to_protos([DeleteRange(start, end)])) == 1


def test_a_transaction_has_a_limit_on_operations() -> None:
    """As many operations as allowed pass, one more does not, and the error says the limit."""
    operation = log_pb2.Operation(kind=DELETE, key=b"k")
    check_operations([operation] * OPERATIONS_MAX)
    with pytest.raises(TransactionTooLarge, match=r"100001 operations.*100,000"):
        check_operations([operation] * (OPERATIONS_MAX + 1))


def test_a_transaction_has_a_limit_on_bytes() -> None:
    """A transaction of just 16 MiB passes, one byte more does not, in one operation or in several."""
    room = TRANSACTION_BYTES_MAX - OPERATION_OVERHEAD_BYTES - 1
    fitting = Put(b"k", bytes(room))
    to_protos([fitting])
    with pytest.raises(TransactionTooLarge, match="split it"):
        to_protos([Put(b"k", bytes(room + 1))])
    with pytest.raises(TransactionTooLarge, match="split it"):
        to_protos([fitting, Delete(b"x")])


def test_every_kind_of_the_wire_is_known() -> None:
    """A kind that is added to log.proto must be added to what is checked and named."""
    assert set(KIND_NAMES) == set(log_pb2.Operation.Kind.values()) - {0}
    assert len(log_pb2.Operation.Kind.values()) - 1 == len(operations.Operation.__args__)


@pytest.mark.parametrize(
    "operation",
    [
        Put(b"key", b"value"),
        Update(b"key", b"value"),
        Delete(b"key"),
        DeleteRange(b"a", b"bc"),
        Add(b"key", 1),
    ],
)
def test_an_operation_counts_before_it_is_encoded_as_after(operation: Operation) -> None:
    """What collects transactions and what checks them agree about an operation's bytes."""
    proto = to_proto(operation)
    content = len(proto.key) + len(proto.value) + len(proto.end)
    assert operation_bytes(operation) == content + OPERATION_OVERHEAD_BYTES
