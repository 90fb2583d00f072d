"""The checker of client histories finds each thing that can be wrong with one, and nothing in a good one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crash.history import Applied, Kind, Outcome, Read, Write, check

_CLIENT = b"c"


def _write(version: int, start_s: float, end_s: float) -> Write:
    return Write(
        label=b"t%d" % version,
        started_s=start_s,
        ended_s=end_s,
        outcome=Outcome.ACKNOWLEDGED,
        version=version,
        lsn=10 * version,
    )


def _applied(version: int) -> Applied:
    label = b"t%d" % version
    return Applied(
        lsn=10 * version,
        version=version,
        client=_CLIENT,
        number=version,
        label=label,
        puts={b"last": label},
        adds={b"count": 1},
    )


def _read(version: int, start_s: float, end_s: float, *, session: str = "s", is_local: bool = False) -> Read:
    values: dict[bytes, bytes | None] = {b"last": None, b"count": None}
    if version:
        values = {b"last": b"t%d" % version, b"count": b"%d" % version}
    return Read(session=session, started_s=start_s, ended_s=end_s, values=values, is_local=is_local)


# t1 lasted from 1 to 2; t2 and t3 overlap; t4 came after all of them.
WRITES = [_write(1, 1, 2), _write(2, 3, 6), _write(3, 4, 5), _write(4, 7, 8)]
LOG = [_applied(version) for version in range(1, 5)]
READS = [_read(0, 0, 1.5), _read(1, 1.5, 2.5), _read(2, 3, 4.5), _read(3, 4.5, 7.5), _read(4, 8, 9)]


def _kinds(writes: list[Write], reads: list[Read], log: list[Applied]) -> set[Kind]:
    return {violation.kind for violation in check(writes, reads, log)}


def test_a_good_history_has_no_violation() -> None:
    """Overlapping transactions may take effect in any order, and reads may see anything that overlaps them."""
    assert check(WRITES, READS, LOG) == []


@pytest.mark.parametrize("outcome", [Outcome.UNKNOWN, Outcome.REFUSED])
def test_what_was_not_acknowledged_need_not_be_there(outcome: Outcome) -> None:
    """A transaction of unknown outcome, or one that was refused, may be missing."""
    assert check([*WRITES[:3], replace(WRITES[3], outcome=outcome)], READS[:4], LOG[:3]) == []


def test_what_is_unknown_may_take_effect_late() -> None:
    """A transaction of unknown outcome may come after others that were sent when its client had given up."""
    first = replace(WRITES[0], label=b"t4", outcome=Outcome.UNKNOWN, version=0, lsn=0)
    late = [_write(version, version * 3, version * 3 + 1) for version in (1, 2, 3)]
    assert check([first, *late], [], LOG) == []


def test_what_is_acknowledged_without_a_receipt_must_be_there() -> None:
    """A synced client gets no version; its transactions are looked for all the same."""
    writes = [replace(write, version=0, lsn=0) for write in WRITES]
    assert check(writes, READS, LOG) == []
    assert _kinds(writes, [], LOG[:3]) == {Kind.LOST}


def test_a_lost_transaction_is_found() -> None:
    """G1: one that was acknowledged and is not in the log."""
    assert _kinds(WRITES, [], LOG[:3]) == {Kind.LOST}


def test_a_transaction_that_was_applied_twice_is_found() -> None:
    """G6: one label at two versions, whatever became of it."""
    again = replace(LOG[3], lsn=50, version=5, number=5)
    assert _kinds(WRITES, [], [*LOG, again]) == {Kind.TWICE, Kind.RECEIPT}
    unknown = replace(WRITES[3], outcome=Outcome.UNKNOWN, version=0, lsn=0)
    assert _kinds([*WRITES[:3], unknown], [], [*LOG, again]) == {Kind.TWICE}


def test_a_transaction_that_nobody_sent_is_found() -> None:
    """G2: nothing is in the log but what was sent."""
    assert _kinds(WRITES[:3], [], LOG) == {Kind.NOT_SENT}


def test_a_refused_transaction_that_took_effect_is_found() -> None:
    """Refused means not applied."""
    refused = replace(WRITES[3], outcome=Outcome.REFUSED, version=0, lsn=0)
    assert _kinds([*WRITES[:3], refused], [], LOG) == {Kind.REFUSED}


@pytest.mark.parametrize("wrong", [replace(WRITES[3], version=3), replace(WRITES[3], lsn=41)])
def test_a_receipt_that_names_another_place_is_found(wrong: Write) -> None:
    """A receipt says version and LSN as they are in the log."""
    assert _kinds([*WRITES[:3], wrong], [], LOG) == {Kind.RECEIPT}


def test_an_order_that_real_time_forbids_is_found() -> None:
    """What was acknowledged before another was sent comes before it, be that one acknowledged or not."""
    early = _write(1, 7, 8)
    for outcome in (Outcome.ACKNOWLEDGED, Outcome.UNKNOWN):
        assert _kinds([replace(early, outcome=outcome), *WRITES[1:3]], [], LOG[:3]) == {Kind.ORDER}


def test_numbers_that_go_back_are_found() -> None:
    """G6: a client's numbers rise, so that a retry can be told."""
    assert _kinds(WRITES, [], [LOG[0], replace(LOG[1], number=5), *LOG[2:]]) == {Kind.NUMBER}


def test_a_gap_between_versions_is_found() -> None:
    """Each change raises the realm's version by one."""
    assert Kind.GAP in _kinds(WRITES, [], [LOG[0], *LOG[2:]])


@pytest.mark.parametrize(
    "reads",
    [
        pytest.param([_read(1, 6.5, 7)], id="does not show what was acknowledged"),
        pytest.param([_read(4, 5, 6)], id="shows what was not sent yet"),
        pytest.param([_read(3, 4, 4.2), _read(2, 4.3, 4.4, session="r")], id="goes back behind another"),
        pytest.param([replace(_read(2, 5, 6), values={b"count": b"2", b"last": b"t3"})], id="mixes states"),
        pytest.param([replace(_read(2, 5, 6), values={b"count": None})], id="misses a key"),
    ],
)
def test_a_read_that_agrees_with_no_state_is_found(reads: list[Read]) -> None:
    """G2, G5: a read shows one state, not older than what anybody was told before, nor newer than what was sent."""
    assert _kinds(WRITES, reads, LOG) == {Kind.READ}


def test_a_copy_may_be_behind_but_not_go_back() -> None:
    """A local copy shows states in order; it need not show the latest, and others owe it nothing."""
    behind = [_read(1, 8, 9, is_local=True), _read(3, 9, 10, is_local=True)]
    assert check(WRITES, [*READS, *behind], LOG) == []
    back = [_read(3, 8, 9, is_local=True), _read(1, 9, 10, is_local=True)]
    assert _kinds(WRITES, back, LOG) == {Kind.READ}
    assert check(WRITES, [back[0], replace(back[1], session="another")], LOG) == []
    assert _kinds(WRITES, [_read(4, 5, 6, is_local=True)], LOG) == {Kind.READ}


@given(
    moments=st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12
    ),
    looks=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 5), st.integers(0, 5)), max_size=12),
)
def test_whatever_happens_at_single_moments_is_a_good_history(
    moments: list[tuple[int, int, int]], looks: list[tuple[int, int, int]]
) -> None:
    """What takes effect, or is read, at one moment between its beginning and its end is never found wrong."""
    moments.sort()
    writes = [
        _write(version, at - before, at + after + 0.25)
        for version, (at, before, after) in enumerate(moments, start=1)
    ]
    log = [_applied(version) for version in range(1, len(moments) + 1)]
    reads = [
        _read(sum(at <= moment for at, _, _ in moments), moment + 0.25 - before, moment + 0.5 + after)
        for moment, before, after in looks
    ]
    assert check(writes, reads, log) == []
