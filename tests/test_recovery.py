"""What becomes of the queue when a copy is given up: each operation by its rule, each transaction whole."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from state_helpers import after_operation

from understudy.client.local_types import Queued
from understudy.client.recovery import Dropped, Known, RecoveryPlan, plan_recovery
from understudy.common.operations import (
    Add,
    Delete,
    DeleteRange,
    Operation,
    Put,
    Update,
    from_proto,
    to_protos,
)

ME, BEFORE = b"m" * 16, b"b" * 16
FRESH = {b"note": b"theirs", b"count": b"5", b"text": b"no number", b"full": str(2**63 - 1).encode()}
NOTHING = Known(last_numbers={}, unsure_to=0)


def _queued(number: int, *operations: Operation, client: bytes = ME) -> Queued:
    return Queued(number, client, to_protos(operations), 1)


def _plan(
    *queue: Queued, known: Known = NOTHING, fresh: dict[bytes, bytes] = FRESH, discard_to: int = 0
) -> RecoveryPlan:
    return plan_recovery(queue, fresh.get, known, discard_to=discard_to)


def _replayed(plan: RecoveryPlan, fresh: dict[bytes, bytes] = FRESH) -> dict[bytes, bytes]:
    for _, _, operations in plan.queue:
        for operation in operations:
            fresh = after_operation(fresh, from_proto(operation))
    return fresh


def _reasons(plan: RecoveryPlan) -> list[Dropped]:
    return [dropped.reason for change in plan.report.changes for dropped in change.dropped]


# -- each operation --------------------------------------------------------------------------------------------

RULES: list[tuple[Operation, Dropped | None, bytes | None, str]] = [
    (Put(b"note", b"mine"), None, b"mine", "a put sets"),
    (Put(b"gone", b"mine"), None, b"mine", "a put sets, also what the server has deleted"),
    (Update(b"note", b"mine"), None, b"mine", "an update sets where the key is"),
    (Update(b"gone", b"mine"), Dropped.KEY_DELETED, None, "nothing rises from the dead"),
    (Delete(b"note"), None, None, "a delete deletes"),
    (Delete(b"gone"), Dropped.NOTHING_TO_DELETE, None, "there is nothing to do"),
    (Add(b"count", 2), None, b"7", "a counter adds to what is there"),
    (Add(b"count", 0), None, b"5", "also nothing"),
    (Add(b"gone", 2), None, b"2", "a counter begins at nothing"),
    (Add(b"gone", 0), None, b"0", "also with nothing"),
    (Add(b"text", 2), Dropped.NOT_A_COUNTER, b"no number", "text is no counter"),
    (Add(b"full", 1), Dropped.NOT_A_COUNTER, FRESH[b"full"], "a sum has 64 bits"),
    (Add(b"full", -1), None, str(2**63 - 2).encode(), "downwards there is room"),
]


@pytest.mark.parametrize(("operation", "reason", "value", "why"), RULES)
def test_each_operation_is_judged_by_its_rule(
    operation: Put | Update | Delete | Add, reason: Dropped | None, value: bytes | None, why: str
) -> None:
    """As if it were made just now: applied, or dropped with the reason."""
    plan = _plan(_queued(3, operation))
    assert _reasons(plan) == ([] if reason is None else [reason]), why
    assert _replayed(plan).get(operation.key) == value, why
    assert (plan.report.applied, plan.report.dropped) == ((1, 0) if reason is None else (0, 1))


def test_a_deleted_range_takes_what_is_in_it_now() -> None:
    """Also keys that somebody else has put there meanwhile; what is outside stays."""
    plan = _plan(_queued(1, DeleteRange(b"count", b"note")))
    assert _replayed(plan) == {b"note": b"theirs", b"text": b"no number"}
    assert not plan.report.dropped


def test_operations_are_judged_behind_those_before_them() -> None:
    """What an own change has made or deleted counts like what the server has."""
    plan = _plan(
        _queued(1, Put(b"new", b"1"), Update(b"new", b"2")),
        _queued(2, Delete(b"note"), Update(b"note", b"mine")),
        _queued(3, DeleteRange(b"", b""), Add(b"count", 1), Delete(b"text")),
    )
    assert _reasons(plan) == [Dropped.KEY_DELETED, Dropped.NOTHING_TO_DELETE]
    assert _replayed(plan) == {b"count": b"1"}


def test_a_dropped_operation_is_not_built_upon() -> None:
    """An update that was dropped makes no key for those behind it."""
    plan = _plan(_queued(1, Update(b"gone", b"1")), _queued(2, Update(b"gone", b"2"), Delete(b"gone")))
    assert _reasons(plan) == [Dropped.KEY_DELETED, Dropped.KEY_DELETED, Dropped.NOTHING_TO_DELETE]
    assert plan.queue == []
    assert plan.last_number == 2


# -- transactions ----------------------------------------------------------------------------------------------


def test_transactions_stay_transactions() -> None:
    """Numbers, ids and boundaries are as they were; one of which nothing is left goes."""
    plan = _plan(
        _queued(4, Put(b"a", b""), Update(b"gone", b""), Put(b"b", b""), client=BEFORE),
        _queued(5, Update(b"gone", b"")),
        _queued(9, Put(b"c", b"")),
    )
    assert [(number, client) for number, client, _ in plan.queue] == [(4, BEFORE), (9, ME)]
    assert [[from_proto(one) for one in operations] for _, _, operations in plan.queue] == [
        [Put(b"a", b""), Put(b"b", b"")],
        [Put(b"c", b"")],
    ]
    assert [change.number for change in plan.report.changes] == [4, 5, 9]
    assert plan.report.changes[0].applied == (Put(b"a", b""), Put(b"b", b""))
    assert plan.report.changes[0].dropped[0].operation == Update(b"gone", b"")
    assert plan.last_number == 9


def test_an_empty_queue_stays_empty() -> None:
    """There is nothing to report then."""
    plan = _plan()
    assert (plan.queue, plan.last_number, plan.report.changes) == ([], 0, ())


def test_g6_what_the_server_had_applied_is_not_made_again() -> None:
    """G6: by client and number; another id's numbers say nothing of ours, and the rest is judged without them."""
    known = Known(last_numbers={ME: 6, BEFORE: 2}, unsure_to=0)
    plan = _plan(
        _queued(5, Put(b"new", b"1"), client=BEFORE),
        _queued(6, Add(b"count", 1), Add(b"count", 1)),
        _queued(7, Add(b"count", 1)),
        known=known,
    )
    assert _reasons(plan) == [Dropped.APPLIED, Dropped.APPLIED]
    assert [number for number, _, _ in plan.queue] == [5, 7]


def test_g6_what_was_sent_to_a_server_that_has_forgotten_us_is_not_made_again() -> None:
    """G6: nobody can tell whether it was applied, so it is reported instead; what was never sent is made."""
    known = Known(last_numbers={ME: 2}, unsure_to=4)
    plan = _plan(*(_queued(number, Add(b"count", 1)) for number in range(2, 7)), known=known)
    assert _reasons(plan) == [Dropped.APPLIED, Dropped.PERHAPS_APPLIED, Dropped.PERHAPS_APPLIED]
    assert [number for number, _, _ in plan.queue] == [5, 6]


def test_discarding_stops_at_what_was_kept() -> None:
    """What is in no copy, because it was made later, is recovered all the same."""
    plan = _plan(*(_queued(number, Put(b"k%d" % number, b"")) for number in range(1, 5)), discard_to=3)
    assert _reasons(plan) == [Dropped.DISCARDED] * 3
    assert [number for number, _, _ in plan.queue] == [4]
    assert plan.last_number == 4


def test_what_was_applied_is_reported_as_that_also_where_the_rest_is_discarded() -> None:
    """Whoever reads the account must not make it again."""
    plan = _plan(
        *(_queued(number, Put(b"k", b"")) for number in (1, 2)),
        known=Known(last_numbers={ME: 1}, unsure_to=2),
        discard_to=2,
    )
    assert _reasons(plan) == [Dropped.APPLIED, Dropped.DISCARDED]


# -- all of them together --------------------------------------------------------------------------------------

_KEYS = st.sampled_from([b"a", b"b", b"c", b"d"])
_VALUES = st.sampled_from(
    [b"", b"0", b"7", b"-1", b"text", b"01", str(2**63 - 1).encode(), str(2**63).encode()]
)
_OPERATIONS = st.one_of(
    st.builds(Put, _KEYS, _VALUES),
    st.builds(Update, _KEYS, _VALUES),
    st.builds(Delete, _KEYS),
    st.builds(Add, _KEYS, st.integers(-3, 3)),
    st.tuples(_KEYS, _KEYS).filter(lambda pair: pair[0] < pair[1]).map(lambda pair: DeleteRange(*pair)),
)
_CHANGES = st.lists(st.tuples(st.sampled_from([ME, BEFORE]), st.lists(_OPERATIONS, min_size=1, max_size=4)))
_KNOWN = st.builds(
    Known,
    last_numbers=st.dictionaries(st.sampled_from([ME, BEFORE]), st.integers(0, 8)),
    unsure_to=st.integers(0, 8),
)


@given(
    fresh=st.dictionaries(_KEYS, _VALUES),
    changes=_CHANGES,
    known=_KNOWN,
    discard_to=st.sampled_from([0, 0, 3, 99]),
)
def test_what_is_dropped_one_by_one_would_have_changed_nothing(
    fresh: dict[bytes, bytes], changes: list[tuple[bytes, Sequence[Operation]]], known: Known, discard_to: int
) -> None:
    """The new queue makes of the fresh state exactly what the old one would, without transactions dropped whole."""
    queue = [_queued(at, *operations, client=client) for at, (client, operations) in enumerate(changes, 1)]
    plan = _plan(*queue, known=known, fresh=fresh, discard_to=discard_to)
    expected = dict(fresh)
    for number, (client, operations) in enumerate(changes, 1):
        change = plan.report.changes[number - 1]
        assert change.number == number
        assert sorted(map(repr, [*change.applied, *(one.operation for one in change.dropped)])) == sorted(
            map(repr, operations)
        )
        is_whole = number <= max(known.last_numbers.get(client, 0), known.unsure_to, discard_to)
        assert not (is_whole and change.applied)
        for operation in operations if not is_whole else ():
            after = after_operation(expected, operation)
            if operation in (one.operation for one in change.dropped) and operation not in change.applied:
                assert after == expected
            expected = after
    assert _replayed(plan, fresh) == expected
    assert plan.last_number == len(changes)
    assert plan.queue == [
        (change.number, changes[change.number - 1][0], to_protos(change.applied))
        for change in plan.report.changes
        if change.applied
    ]
