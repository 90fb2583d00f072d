"""Which backups are kept, and which may go. Pure: the clock is passed in."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from understudy.backup.zones import zone_named
from understudy.common.errors import UsageError

# One text for each period; with its offset an hour that summer time's end brings twice is two.
_PERIODS = {
    "hourly": "%Y-%m-%d %H:00%z",
    "daily": "%Y-%m-%d",
    "weekly": "%G-W%V",
    "monthly": "%Y-%m",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How many are kept. With no number but ``minimum`` given, all are.

    Of each kind of period, the newest backup in each of the newest periods that have one is kept; and as long as there
    are fewer such periods than asked for, the oldest backup, so that the way back, which begins there, gets no shorter.
    ``last`` keeps the newest ones, whenever they were made. What any of them keeps stays. Only restorable backups
    count.

    Raises:
        UsageError: a number is negative, or the zone is unknown.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    minimum: int = 1  # restorable backups that remain at the least, however old
    zone: str = "UTC"  # whose days and hours

    def __post_init__(self) -> None:
        zone_named(self.zone)
        if min(self.last, self.hourly, self.daily, self.weekly, self.monthly, self.minimum) < 0:
            raise UsageError("fewer than no backups can't be kept", remedy="give 0 or more")

    @property
    def keeps_all(self) -> bool:
        """Whether nothing was asked for by which backups could be told apart."""
        return not any((self.last, self.hourly, self.daily, self.weekly, self.monthly))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A backup that is there."""

    name: str  # unique
    made_s: float  # seconds since 1970
    restorable: bool  # counts: whole, not known to be damaged, and not behind an earlier one


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Every backup once, the newest first."""

    kept: list[tuple[Candidate, tuple[str, ...]]]  # each with why, such as "daily 2026-11-20"
    removable: list[Candidate]  # in any order


def split(backups: Sequence[Candidate], retention: Retention, *, now_s: float) -> Split:
    """Tells the backups that are kept from those that may go.

    Whatever the retention says, these stay: the newest restorable backup, which every rule keeps; what is damaged
    or unfinished, until a newer backup is restorable; and what was made later than ``now_s``, since a clock that was
    or is wrong says nothing about its age.
    """
    newest_first = sorted(backups, key=lambda backup: (backup.made_s, backup.name), reverse=True)
    past = [backup for backup in newest_first if backup.made_s <= now_s]
    good = [backup for backup in past if backup.restorable]
    reasons: dict[str, list[str]] = {backup.name: [] for backup in newest_first}
    for rule in (
        _of_all(newest_first, retention),
        _of_future(newest_first, now_s),
        _of_bad(past, good),
        _of_last(good, retention.last),
        _of_periods(good, retention),
        _of_minimum(good, retention.minimum, reasons),  # the last, since it looks at what the others keep
    ):
        for backup, reason in rule:
            reasons[backup.name].append(reason)
    return Split(
        kept=[(each, tuple(reasons[each.name])) for each in newest_first if reasons[each.name]],
        removable=[each for each in newest_first if not reasons[each.name]],
    )


_Reasons = Iterator[tuple[Candidate, str]]


def _of_all(backups: list[Candidate], retention: Retention) -> _Reasons:
    if retention.keeps_all:
        yield from ((backup, "all") for backup in backups)


def _of_future(backups: list[Candidate], now_s: float) -> _Reasons:
    yield from ((backup, "future") for backup in backups if backup.made_s > now_s)


def _of_bad(past: list[Candidate], good: list[Candidate]) -> _Reasons:
    for backup in past:
        if not backup.restorable and not (good and good[0].made_s > backup.made_s):
            yield backup, "nothing newer"


def _of_last(good: list[Candidate], count: int) -> _Reasons:
    yield from ((backup, "last") for backup in good[:count])


def _of_periods(good: list[Candidate], retention: Retention) -> _Reasons:
    zone = zone_named(retention.zone)
    for kind, form in _PERIODS.items():
        wanted: int = getattr(retention, kind)
        seen: set[str] = set()
        for backup in good:
            period = datetime.datetime.fromtimestamp(backup.made_s, zone).strftime(form)
            if period not in seen and len(seen) < wanted:
                seen.add(period)
                yield backup, f"{kind} {period}"
        if good and 0 < len(seen) < wanted:
            yield good[-1], f"{kind}, the oldest so far"


def _of_minimum(good: list[Candidate], minimum: int, reasons: dict[str, list[str]]) -> _Reasons:
    """As many more of the newest as others have left below it."""
    unwanted = [backup for backup in good if not reasons[backup.name]]
    missing = max(minimum - (len(good) - len(unwanted)), 0)
    yield from ((backup, "minimum") for backup in unwanted[:missing])
