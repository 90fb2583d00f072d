"""Schedules: cron expressions in a time zone, missed times, clocks that jump, and the nights of summer time."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Iterator
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.backup.schedule import Schedule
from understudy.common.errors import UsageError

# The first has no summer time; Cairo and Santiago change at midnight, Troll by two hours, Apia skipped a day.
ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/Santiago",
    "Africa/Cairo",
    "Antarctica/Troll",
    "Pacific/Apia",
    "Asia/Kathmandu",
]
EXPRESSIONS = [
    "30 2 * * *", "0 * * * *", "*/15 * * * *", "* * * * *", "0 0 * * *", "5 0-3 * * *", "*/10 2 * * *", "0 */6 * * *",
    "0 3 * * MON", "0 4 1 * *", "0 0 1,15 * SUN", "59 23 L * *", "0 12 29 2 *", "30 1,2 * 3,10 *", "0 2 * * 7",
]  # fmt: skip

schedules = st.builds(Schedule.parse, st.sampled_from(EXPRESSIONS), st.sampled_from(ZONES))
# 2011 to 2040; some right on a minute, where planned times are.
moments = st.one_of(
    st.floats(min_value=1.3e9, max_value=2.2e9),
    st.integers(21_700_000, 36_600_000).map(lambda minute: minute * 60.0),
)


def seconds(text: str, zone: str = "UTC", *, fold: int = 0) -> float:
    """Seconds since 1970 of a wall clock's time; ``fold`` 1 is the second of two that are equal."""
    return datetime.datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()


def planned(schedule: Schedule, begin_s: float, end_s: float) -> Iterator[float]:
    """All planned times later than ``begin_s``, up to ``end_s``."""
    moment_s = schedule.next_after(begin_s)
    while moment_s <= end_s:
        yield moment_s
        moment_s = schedule.next_after(moment_s)


def wall_clock(schedule: Schedule, begin: str, end: str) -> list[str]:
    """Planned times between two of the wall clock, as it shows them."""
    zone = ZoneInfo(schedule.zone)
    times = planned(schedule, seconds(begin, schedule.zone), seconds(end, schedule.zone))
    return [f"{datetime.datetime.fromtimestamp(each, zone):%dT%H:%M%z}" for each in times]


# -- planned times -----------------------------------------------------------------------------------------


@given(schedules, moments)
def test_each_planned_time_is_later_than_the_last(schedule: Schedule, moment_s: float) -> None:
    """Whatever the zone does, the next planned time is a whole minute, and strictly later."""
    for next_s in itertools.islice(planned(schedule, moment_s, math.inf), 5):
        assert next_s > moment_s
        assert next_s % 60 == 0
        moment_s = next_s


@given(schedules, moments, st.floats(min_value=0, max_value=1, exclude_max=True))
def test_the_next_time_is_the_same_until_it_has_come(
    schedule: Schedule, moment_s: float, part: float
) -> None:
    """No planned time lies between a moment and the next one after it, wherever one asks."""
    next_s = schedule.next_after(moment_s)
    between_s = min(moment_s + (next_s - moment_s) * part, math.nextafter(next_s, 0))
    assert schedule.next_after(between_s) == next_s


@given(moments)
def test_a_moment_just_before_a_planned_time_is_not_taken_for_it(moment_s: float) -> None:
    """Less than a microsecond before it, the planned time is still to come."""
    schedule = Schedule.parse("* * * * *")
    next_s = schedule.next_after(moment_s)
    assert schedule.next_after(math.nextafter(next_s, 0)) == next_s
    assert schedule.next_after(next_s) == next_s + 60


def test_the_zone_is_the_one_that_was_given() -> None:
    """02:30 is another moment in Kathmandu than in UTC."""
    begin_s = seconds("2026-11-20T12:00")
    assert Schedule.parse("30 2 * * *").next_after(begin_s) == seconds("2026-11-21T02:30")
    there = Schedule.parse("30 2 * * *", "Asia/Kathmandu")
    assert there.next_after(begin_s) == seconds("2026-11-20T20:45")


# -- summer time -------------------------------------------------------------------------------------------

BERLIN, NEW_YORK = "Europe/Berlin", "America/New_York"


@pytest.mark.parametrize(
    ("zone", "begin", "end", "times"),
    [
        (BERLIN, "2026-03-28T12:00", "2026-03-30T12:00", ["29T03:00+0200", "30T02:30+0200"]),
        (BERLIN, "2026-10-24T12:00", "2026-10-26T12:00", ["25T02:30+0200", "26T02:30+0100"]),
        (NEW_YORK, "2026-03-07T12:00", "2026-03-09T12:00", ["08T03:00-0400", "09T02:30-0400"]),
        (NEW_YORK, "2026-10-31T12:00", "2026-11-02T12:00", ["01T02:30-0500", "02T02:30-0500"]),
    ],
)
def test_a_nightly_run_comes_once_in_every_night(zone: str, begin: str, end: str, times: list[str]) -> None:
    """02:30 comes once in the night that does not have it, and once in the night that has it twice."""
    assert wall_clock(Schedule.parse("30 2 * * *", zone), begin, end) == times


def test_the_hour_that_new_york_has_twice_is_planned_once() -> None:
    """There it is 01:30 that comes twice; a nightly run takes the first."""
    schedule = Schedule.parse("30 1 * * *", NEW_YORK)
    times = wall_clock(schedule, "2026-10-31T12:00", "2026-11-02T12:00")
    assert times == ["01T01:30-0400", "02T01:30-0500"]
    in_the_second = seconds("2026-11-01T01:10", NEW_YORK, fold=1)
    assert schedule.next_after(in_the_second) == seconds("2026-11-02T01:30", NEW_YORK)


@pytest.mark.parametrize(
    ("zone", "begin", "end", "hours"),
    [
        (BERLIN, "2026-03-28T23:30", "2026-03-29T23:30", 23),
        (BERLIN, "2026-10-24T23:30", "2026-10-25T23:30", 25),
        (NEW_YORK, "2026-03-07T23:30", "2026-03-08T23:30", 23),
        (NEW_YORK, "2026-10-31T23:30", "2026-11-01T23:30", 25),
    ],
)
def test_hourly_runs_come_every_real_hour(zone: str, begin: str, end: str, hours: int) -> None:
    """A day of 23 hours has 23 of them, one of 25 has 25, an hour apart."""
    schedule = Schedule.parse("0 * * * *", zone)
    times = list(planned(schedule, seconds(begin, zone), seconds(end, zone)))
    assert len(times) == hours
    assert {later - earlier for earlier, later in itertools.pairwise(times)} == {3600}


# -- what is due -------------------------------------------------------------------------------------------


@given(schedules, moments, st.floats(min_value=0, max_value=1e8))
def test_a_run_is_due_from_the_next_planned_time_on(
    schedule: Schedule, last_s: float, later_s: float
) -> None:
    """Not before it, and always from then on, until there was a run."""
    next_s = schedule.next_after(last_s)
    assert not schedule.is_due(last_s=last_s, now_s=last_s)
    assert not schedule.is_due(last_s=last_s, now_s=math.nextafter(next_s, 0))
    assert schedule.is_due(last_s=last_s, now_s=next_s)
    assert schedule.is_due(last_s=last_s, now_s=next_s + later_s)


@given(schedules, moments, st.floats(min_value=0, max_value=1e9))
def test_one_run_makes_up_for_all_that_were_missed(schedule: Schedule, last_s: float, away_s: float) -> None:
    """Off for long, or with a clock set forward, one run is owed, and none more once it has begun."""
    now_s = schedule.next_after(last_s) + away_s
    assert schedule.is_due(last_s=last_s, now_s=now_s)
    assert not schedule.is_due(last_s=now_s, now_s=now_s)


@given(schedules, moments, st.floats(min_value=-1e8, max_value=1e8))
def test_a_run_that_has_begun_is_never_due_at_once_again(
    schedule: Schedule, now_s: float, ago_s: float
) -> None:
    """Whatever was known of the last run, one that begins now is the last, and ends what was owed."""
    if schedule.is_due(last_s=now_s - ago_s, now_s=now_s):
        assert not schedule.is_due(last_s=now_s, now_s=now_s)


def test_a_clock_set_back_by_hours_does_not_stop_runs() -> None:
    """Where planned times would be missed until the clock has caught up, one run comes at once, then as planned."""
    schedule = Schedule.parse("0 * * * *")
    last_s = seconds("2026-11-21T18:00")
    now_s = seconds("2026-11-21T12:20")
    assert schedule.is_due(last_s=last_s, now_s=now_s)
    assert not schedule.is_due(last_s=now_s, now_s=seconds("2026-11-21T12:59"))
    assert schedule.is_due(last_s=now_s, now_s=seconds("2026-11-21T13:00"))


@pytest.mark.parametrize("back_s", [0.5, 20, 59])
def test_a_clock_put_right_by_seconds_brings_no_second_run(back_s: float) -> None:
    """A run at 02:30, a clock that then shows 02:29: neither then nor when it is 02:30 again is another due."""
    schedule = Schedule.parse("30 2 * * *")
    last_s = seconds("2026-11-21T02:30") + 0.2
    assert not schedule.is_due(last_s=last_s, now_s=last_s - back_s)
    assert not schedule.is_due(last_s=last_s, now_s=last_s)


def test_a_clock_set_back_between_two_planned_times_brings_no_run() -> None:
    """Where waiting misses nothing, there is no run before its time."""
    schedule = Schedule.parse("30 2 * * *")
    last_s = seconds("2026-11-21T14:00")
    assert not schedule.is_due(last_s=last_s, now_s=seconds("2026-11-21T09:00"))
    assert schedule.is_due(last_s=last_s, now_s=seconds("2026-11-22T02:30"))


# -- what can't be read ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("", "0 fields"),
        ("30 2 * *", "4 fields"),
        ("0 30 2 * * *", "6 fields"),
        ("@daily", "1 fields"),
        ("60 2 * * *", "bad minute"),
        ("30 24 * * *", "bad hour"),
        ("30 2 0 * *", "bad day-of-month"),
        ("30 2 * 13 *", "bad month"),
        ("30 2 * * MOO", "bad day-of-week"),
        ("*/0 2 * * *", "bad minute"),
        ("9" * 10_000 + " 2 * * *", "can't be read"),
        ("0 0 30 2 *", "bad day-of-month"),
    ],
)
def test_an_expression_that_is_none_is_refused_with_an_example(expression: str, why: str) -> None:
    """What is wrong is named, and the remedy shows how it is done."""
    with pytest.raises(UsageError, match=why) as caught:
        Schedule.parse(expression)
    assert "30 2 * * *" in caught.value.remedy


@pytest.mark.parametrize(
    "zone", ["", "Mars/Olympus", "Europe", "../../etc/passwd", "/etc/localtime", "a\0b", "x" * 999]
)
def test_a_zone_that_is_none_is_refused_with_an_example(zone: str) -> None:
    """Unknown names, folders of zones and paths are none."""
    with pytest.raises(UsageError, match="no time zone") as caught:
        Schedule.parse("30 2 * * *", zone)
    assert "Europe/Berlin" in caught.value.remedy


def test_spaces_do_not_matter() -> None:
    """Schedules that mean the same are equal."""
    assert Schedule.parse("  30   2 * * * ") == Schedule.parse("30 2 * * *", "UTC")
