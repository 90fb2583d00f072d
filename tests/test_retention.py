"""Which backups are kept: periods as people expect them, and never fewer than can restore."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.backup.retention import Candidate, Retention, split
from understudy.common.errors import UsageError
from understudy.common.types import Epoch, Lsn

HOUR_S, DAY_S = 3600.0, 86400.0
NOW_S = datetime.datetime(2026, 11, 21, 18, 30, tzinfo=datetime.UTC).timestamp()


def candidate(
    name: str, made_s: float, lsn: int = 1, *, epoch: int = 1, restorable: bool = True
) -> Candidate:
    """One of a quiet server, if no LSN is given."""
    return Candidate(name=name, made_s=made_s, rank=(Epoch(epoch), Lsn(lsn)), restorable=restorable)


def backup(made: str, *, restorable: bool = True, zone: str = "UTC", fold: int = 0) -> Candidate:
    """One that is called by the time at which it was made, and holds what was written until then."""
    moment = datetime.datetime.fromisoformat(made).replace(tzinfo=ZoneInfo(zone), fold=fold)
    made_s = moment.timestamp()
    return candidate(made + "'" * fold, made_s, int(made_s), restorable=restorable)


def hourly_backups(count: int) -> list[Candidate]:
    """One each hour, the newest half an hour before now."""
    times = [NOW_S - HOUR_S / 2 - number * HOUR_S for number in range(count)]
    return [candidate(f"{time:.0f}", time, int(time)) for time in times]


def kept_times(backups: Sequence[Candidate], retention: Retention) -> list[str]:
    """When the backups that stay were made, UTC, the newest first."""
    kept = [each for each, _ in split(backups, retention, now_s=NOW_S).kept]
    return [f"{datetime.datetime.fromtimestamp(each.made_s, datetime.UTC):%Y-%m-%dT%H}" for each in kept]


def names(backups: Sequence[Candidate]) -> list[str]:
    return [each.name for each in backups]


# -- rules -------------------------------------------------------------------------------------------------


def test_without_numbers_everything_is_kept() -> None:
    """Who asks for nothing loses nothing, neither old nor damaged."""
    backups = [backup("2026-11-20"), backup("1999-01-01"), backup("2026-11-19", restorable=False)]
    result = split(backups, Retention(minimum=1), now_s=NOW_S)
    assert result.removable == []
    assert len(result.kept) == 3


@pytest.mark.parametrize(
    ("retention", "times"),
    [
        (Retention(last=3), ["2026-11-21T18", "2026-11-21T17", "2026-11-21T16"]),
        (Retention(hourly=2), ["2026-11-21T18", "2026-11-21T17"]),
        (Retention(daily=3), ["2026-11-21T18", "2026-11-20T23", "2026-11-19T23"]),
        (Retention(weekly=3), ["2026-11-21T18", "2026-11-15T23", "2026-11-08T23"]),
        (Retention(monthly=3), ["2026-11-21T18", "2026-10-31T23", "2026-09-30T23"]),
        (
            Retention(last=2, daily=2, monthly=2),
            ["2026-11-21T18", "2026-11-21T17", "2026-11-20T23", "2026-10-31T23"],
        ),
    ],
)
def test_the_newest_of_each_period_is_kept(retention: Retention, times: list[str]) -> None:
    """Of the newest hours, days, ISO weeks and months; what several rules keep counts for each of them."""
    assert kept_times(hourly_backups(2000), retention) == times


def test_periods_without_a_backup_do_not_count() -> None:
    """Three days are the newest three that have a backup, not the last three of the calendar."""
    backups = [backup("2026-11-20"), backup("2026-06-01"), backup("2025-01-01"), backup("2024-01-01")]
    assert kept_times(backups, Retention(daily=3)) == ["2026-11-20T00", "2026-06-01T00", "2025-01-01T00"]


def test_a_damaged_backup_does_not_stand_for_its_day() -> None:
    """The newest restorable backup of the day does, and the damaged one may go."""
    backups = [
        backup("2026-11-20T12:00", restorable=False),
        backup("2026-11-20T06:00"),
        backup("2026-11-21T06:00"),
    ]
    result = split(backups, Retention(daily=7), now_s=NOW_S)
    assert names([each for each, _ in result.kept]) == ["2026-11-21T06:00", "2026-11-20T06:00"]
    assert names(result.removable) == ["2026-11-20T12:00"]


def test_days_are_those_of_the_zone() -> None:
    """23:30 and 00:30 UTC are two days there and one in New York."""
    backups = [backup("2026-11-20T00:30"), backup("2026-11-19T23:30"), backup("2026-11-18T12:00")]
    assert kept_times(backups, Retention(daily=2)) == ["2026-11-20T00", "2026-11-19T23"]
    new_york = Retention(daily=2, zone="America/New_York")
    assert kept_times(backups, new_york) == ["2026-11-20T00", "2026-11-18T12"]


def test_the_oldest_stays_until_there_are_as_many_periods_as_asked_for() -> None:
    """A second backup on the first day does not take away the way back to between the two."""
    days = [backup(f"2026-11-{day}T{hour}:00") for day in (17, 18, 19) for hour in ("02", "12")]
    assert kept_times(days[:2], Retention(daily=2)) == ["2026-11-17T12", "2026-11-17T02"]
    assert kept_times(days[:4], Retention(daily=2)) == ["2026-11-18T12", "2026-11-17T12"]
    assert kept_times(days, Retention(daily=4)) == [
        "2026-11-19T12", "2026-11-18T12", "2026-11-17T12", "2026-11-17T02",
    ]  # fmt: skip


def test_an_hour_that_comes_twice_is_two() -> None:
    """In the night in which summer time ends, hourly backups are kept of both."""
    twice = [backup("2026-10-25T02:30", zone="Europe/Berlin", fold=fold) for fold in (0, 1)]
    result = split(twice, Retention(hourly=2, zone="Europe/Berlin"), now_s=NOW_S)
    assert [why for _, why in result.kept] == [
        ("hourly 2026-10-25 02:00+0100",),
        ("hourly 2026-10-25 02:00+0200",),
    ]


def test_each_backup_is_kept_for_reasons_that_are_named() -> None:
    """Every rule that keeps it says so."""
    (newest, why), (_, why_older) = split(
        [backup("2026-11-20T12:00"), backup("2026-11-19T12:00")],
        Retention(last=1, hourly=1, daily=2, weekly=1, monthly=1),
        now_s=NOW_S,
    ).kept
    assert newest.name == "2026-11-20T12:00"
    assert why == (
        "last",
        "hourly 2026-11-20 12:00+0000",
        "daily 2026-11-20",
        "weekly 2026-W47",
        "monthly 2026-11",
    )
    assert why_older == ("daily 2026-11-19",)


@pytest.mark.parametrize("field", ["last", "hourly", "daily", "weekly", "monthly", "minimum"])
def test_negative_numbers_are_refused(field: str) -> None:
    """None of the numbers can be below 0."""
    with pytest.raises(UsageError):
        Retention(**{field: -1})


def test_an_unknown_zone_is_refused() -> None:
    """It shows when the retention is made, not when backups are removed."""
    with pytest.raises(UsageError, match="Mars"):
        Retention(zone="Mars/Olympus")


# -- what stays whatever the rules say ---------------------------------------------------------------------


def test_a_minimum_is_filled_up_with_the_newest() -> None:
    """Where the rules keep fewer, the newest of the others stay, and no more than that."""
    backups = hourly_backups(10)
    result = split(backups, Retention(daily=1, minimum=3), now_s=NOW_S)
    assert [each for each, _ in result.kept] == backups[:3]
    assert [why for _, why in result.kept][1:] == [("minimum",), ("minimum",)]
    assert len(split(backups, Retention(last=5, minimum=3), now_s=NOW_S).kept) == 5


def test_nothing_is_removed_where_nothing_can_be_restored() -> None:
    """Damaged backups are better than none."""
    backups = [backup("2026-11-20", restorable=False), backup("2026-11-19", restorable=False)]
    assert split(backups, Retention(last=1), now_s=NOW_S).removable == []


def test_a_damaged_backup_stays_until_a_newer_one_is_restorable() -> None:
    """What is newer than the newest restorable backup holds what is nowhere else, or is still being made."""
    damaged, older = backup("2026-11-20", restorable=False), backup("2026-11-19")
    assert split([damaged, older], Retention(last=1), now_s=NOW_S).removable == []
    newer = backup("2026-11-21")
    assert split([damaged, older, newer], Retention(last=2), now_s=NOW_S).removable == [damaged]


def test_a_backup_from_the_future_is_kept_and_does_not_count() -> None:
    """A clock that was wrong can make no backup look older or newer than those it replaces."""
    future = [backup("2031-01-01"), backup("2030-01-01", restorable=False)]
    past = [backup("2026-11-20"), backup("2026-11-19", restorable=False), backup("2026-11-18")]
    result = split([*past, *future], Retention(last=1, minimum=2), now_s=NOW_S)
    assert [each for each, _ in result.kept] == [*future, past[0], past[2]]
    assert result.removable == [past[1]]


# -- whatever happens --------------------------------------------------------------------------------------

counts = st.integers(0, 4)
retentions = st.builds(
    Retention,
    last=counts,
    hourly=counts,
    daily=counts,
    weekly=counts,
    monthly=counts,
    minimum=counts,
    zone=st.sampled_from(["UTC", "Europe/Berlin", "America/New_York"]),
)
# A step: how far the clock moves, back at times, then a backup, damage to one, or a removal of what may go.
steps = st.lists(
    st.tuples(
        st.one_of(st.floats(-2 * DAY_S, 40 * DAY_S), st.sampled_from([0.0, 1.0, HOUR_S])),
        st.sampled_from(["add", "add", "cut off", "damage", "prune"]),
        st.integers(0, 1000),
        retentions,
    ),
    max_size=40,
)


def restorable(backups: Sequence[Candidate]) -> list[Candidate]:
    return [each for each in backups if each.restorable]


@given(steps)
def test_a_restorable_backup_remains_whatever_happens(
    story: list[tuple[float, str, int, Retention]],
) -> None:
    """G8: a removal leaves as many restorable backups as asked and the newest, whatever the clock did meanwhile."""
    backups: list[Candidate] = []
    now_s = NOW_S
    for number, (pause_s, step, choice, retention) in enumerate(story):
        now_s += pause_s
        if step in ("add", "cut off"):
            backups.append(candidate(str(number), now_s, number, restorable=step == "add"))
        elif step == "damage" and backups:
            damaged = backups[choice % len(backups)]
            backups = [each for each in backups if each != damaged]
            backups.append(replace(damaged, restorable=False))
        elif step == "prune":
            left = check_prune(backups, retention, now_s)
            backups = left


def check_prune(backups: list[Candidate], retention: Retention, now_s: float) -> list[Candidate]:
    """What is left; with all that is promised of it."""
    result = split(backups, retention, now_s=now_s)
    left = [each for each, _ in result.kept]
    assert sorted(names(left) + names(result.removable)) == sorted(names(backups))
    good = restorable(backups)
    for newest in (max(good, key=key, default=None) for key in (by_time, by_rank)):
        assert newest is None or newest in left
    past = [each for each in good if each.made_s <= now_s]
    assert len([each for each in past if each in left]) >= min(len(past), max(retention.minimum, 1))
    assert good or not result.removable
    assert all(each.made_s <= now_s for each in result.removable)
    for bad in (each for each in result.removable if not each.restorable):
        assert any(each.made_s > bad.made_s and each.rank >= bad.rank for each in restorable(left))
    if sorted(backups, key=by_time) == sorted(backups, key=by_rank):
        assert split(left, retention, now_s=now_s).removable == []
    return left


def by_time(backup: Candidate) -> tuple[float, tuple[Epoch, Lsn], str]:
    return backup.made_s, backup.rank, backup.name


def by_rank(backup: Candidate) -> tuple[tuple[Epoch, Lsn], float, str]:
    return backup.rank, backup.made_s, backup.name


# One after the other by right clocks, and from which one on how many were made by a wrong one.
days = st.lists(st.floats(60, 40 * DAY_S), min_size=3, max_size=40)
gaps = st.tuples(st.integers(0, 38), st.integers(1, 38))


@given(days, gaps, st.booleans(), st.booleans(), retentions)
def test_backups_with_wrong_times_take_no_place_of_others(
    pauses_s: list[float], wrong: tuple[int, int], is_ahead: bool, is_over: bool, retention: Retention
) -> None:
    """G8: what would stay without them stays, whether the clock was ahead or behind, and even once their time comes."""
    times = [NOW_S - sum(pauses_s[number:]) for number in range(len(pauses_s))]
    first, last = 1 + wrong[0] % (len(times) - 2), wrong[1]
    off_s = sum(pauses_s) + DAY_S
    backups = [candidate(str(number), time, number) for number, time in enumerate(times)]
    moved = [
        replace(each, made_s=each.made_s + (off_s if is_ahead else -off_s))
        for each in backups[first : min(first + last, len(times) - 1)]
    ]
    others = backups[:first] + backups[first + len(moved) :]
    now_s = NOW_S + off_s if is_over else NOW_S
    assert removed([*others, *moved], retention, now_s) <= removed(others, retention, now_s) | set(moved)


@given(days, st.integers(1, 38), st.lists(st.floats(0, 1), max_size=40), st.booleans(), retentions)
def test_a_node_that_was_cut_off_takes_no_place_of_others(
    pauses_s: list[float], cut_off: int, made: list[float], is_fenced: bool, retention: Retention
) -> None:
    """G3, G8: an old primary or a replica that lags goes on with its policy; what would stay without it stays."""
    times = [NOW_S - sum(pauses_s[number:]) for number in range(len(pauses_s))]
    fork = 1 + cut_off % (len(times) - 1)
    others = [
        candidate(f"{number}", time, number, epoch=2 if is_fenced and number >= fork else 1)
        for number, time in enumerate(times)
    ]
    behind = [
        candidate(f"{number} behind", NOW_S - share * (NOW_S - times[fork]), 1000 if is_fenced else fork - 1)
        for number, share in enumerate(made)
    ]
    behind = [each for each in behind if each.made_s > times[fork]]
    assert removed([*others, *behind], retention, NOW_S) <= removed(others, retention, NOW_S) | set(behind)


@given(days, retentions)
def test_with_right_clocks_it_does_not_matter_how_far_backups_reach(
    pauses_s: list[float], retention: Retention
) -> None:
    """A quiet server's backups are kept as those of a busy one are."""
    times = [NOW_S - sum(pauses_s[number:]) for number in range(len(pauses_s))]
    quiet = [candidate(str(number), time) for number, time in enumerate(times)]
    busy = [candidate(str(number), time, number) for number, time in enumerate(times)]
    results = [split(backups, retention, now_s=NOW_S) for backups in (quiet, busy)]
    assert names(results[0].removable) == names(results[1].removable)
    reasons = [[(each.name, why) for each, why in result.kept] for result in results]
    assert reasons[0] == reasons[1]


def removed(backups: Sequence[Candidate], retention: Retention, now_s: float) -> set[Candidate]:
    return set(split(backups, retention, now_s=now_s).removable)


@pytest.mark.parametrize("days_off", [-60, 60, 3650])
def test_a_clock_that_was_wrong_once_removes_nothing_that_is_good(days_off: int) -> None:
    """G8: eleven days' backups stay, by whatever clock another was made, and when it is right again."""
    good = [candidate(str(day), NOW_S - day * DAY_S, 100 - day) for day in range(12, 1, -1)]
    wrong = candidate("wrong", NOW_S + days_off * DAY_S, 99)
    after = candidate("after", NOW_S, 100)
    retention = Retention(daily=30, monthly=12, minimum=5)
    for now_s in (NOW_S, NOW_S + days_off * DAY_S):
        assert split([*good, wrong], retention, now_s=now_s).removable == []
        assert split([*good, wrong, after], retention, now_s=now_s).removable == []


def test_a_wrong_clock_and_a_node_that_was_cut_off_together_cost_no_day() -> None:
    """G8: of each day stays what reaches the furthest, where neither explanation holds by itself."""
    good = [candidate(str(day), NOW_S - day * DAY_S - 60, 100 - day) for day in range(10)]
    behind = [candidate(f"{day} behind", NOW_S - day * DAY_S, 1) for day in range(10)]
    wrong = candidate("wrong", NOW_S - 60 * DAY_S, 101)
    result = split([*good, *behind, wrong], Retention(daily=10, last=2, minimum=5), now_s=NOW_S)
    assert set(good) | {wrong} <= {each for each, _ in result.kept}


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 40), st.booleans()), max_size=40), retentions)
def test_the_order_in_which_backups_are_listed_does_not_matter(
    made: list[tuple[int, int, bool]], retention: Retention
) -> None:
    """The same backups are split in the same way however a directory lists them."""
    backups = [
        candidate(str(number), NOW_S - age, lsn, restorable=good)
        for number, (age, lsn, good) in enumerate(made)
    ]
    assert split(backups, retention, now_s=NOW_S) == split(backups[::-1], retention, now_s=NOW_S)
