"""Which backups are kept, and which may go. Pure: the clock is passed in."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from understudy.backup.zones import zone_named
from understudy.common.errors import UsageError
from understudy.common.types import Epoch, Lsn

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
    made_s: float  # seconds since 1970, by the clock of the node that made it
    rank: tuple[Epoch, Lsn]  # what it holds more or less of than others, whatever clocks say
    restorable: bool  # holds all that it was to hold, and is not known to be damaged


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Every backup once, the newest first."""

    kept: list[tuple[Candidate, tuple[str, ...]]]  # each with why, such as "daily 2026-11-20"
    removable: list[Candidate]  # in any order


def split(backups: Sequence[Candidate], retention: Retention, *, now_s: float) -> Split:
    """Tells the backups that are kept from those that may go.

    Whatever the retention says, these stay: the restorable backup of the highest rank, and the one that was made last;
    what is damaged or unfinished, until one that holds as much is restorable and was made later; and what was made
    later than ``now_s``, since a clock that was or is wrong says nothing about its age. Of the restorable ones that
    were not, at least ``minimum`` stay.

    Where a backup reaches less far than an earlier one, either its node was cut off or a clock was wrong, and nothing
    tells which. What the retention keeps by either explanation stays, see :func:`_views`.
    """
    newest_first = sorted(backups, key=_age, reverse=True)
    past = [backup for backup in newest_first if backup.made_s <= now_s]
    good = [backup for backup in past if backup.restorable]
    reasons: dict[str, list[str]] = {backup.name: [] for backup in newest_first}
    for rule in (
        _of_all(newest_first, retention),
        _of_future(newest_first, now_s),
        _of_bad(past, good),
        *(_of_good(counted, retention) for counted in _views(good)),
    ):
        for backup, reason in rule:
            if reason not in reasons[backup.name]:
                reasons[backup.name].append(reason)
    return Split(
        kept=[(each, tuple(reasons[each.name])) for each in newest_first if reasons[each.name]],
        removable=[each for each in newest_first if not reasons[each.name]],
    )


def _age(backup: Candidate) -> tuple[float, tuple[Epoch, Lsn], str]:
    return backup.made_s, backup.rank, backup.name


def _views(good: list[Candidate]) -> Iterator[list[Candidate]]:
    """The restorable backups, the last made first, by each explanation that there can be for their order.

    Without those that reach less far than an earlier one: by right clocks they are of a node that was cut off, and take
    no other's place. Without those that reach farther than a later one: where a clock was behind, these are wrong, and
    one that was dated back does not make all before it look cut off. With all: who was wrong, the minimum is made up of
    whatever can be restored. Where ranks are in the order of time, the three are one.
    """
    yield _rising(good[::-1])[::-1]
    yield _falling(good)
    yield good


def _rising(oldest_first: list[Candidate]) -> list[Candidate]:
    """Those that reach as far as each earlier one."""
    counted: list[Candidate] = []
    for backup in oldest_first:
        if not counted or backup.rank >= counted[-1].rank:
            counted.append(backup)
    return counted


def _falling(newest_first: list[Candidate]) -> list[Candidate]:
    """Those that reach no farther than each later one."""
    counted: list[Candidate] = []
    for backup in newest_first:
        if not counted or backup.rank <= counted[-1].rank:
            counted.append(backup)
    return counted


_Reasons = Iterator[tuple[Candidate, str]]


def _of_all(backups: list[Candidate], retention: Retention) -> _Reasons:
    if retention.keeps_all:
        yield from ((backup, "all") for backup in backups)


def _of_future(backups: list[Candidate], now_s: float) -> _Reasons:
    yield from ((backup, "future") for backup in backups if backup.made_s > now_s)


def _of_bad(past: list[Candidate], good: list[Candidate]) -> _Reasons:
    for backup in past:
        replaced = any(other.made_s > backup.made_s and other.rank >= backup.rank for other in good)
        if not backup.restorable and not replaced:
            yield backup, "nothing newer"


def _of_good(counted: list[Candidate], retention: Retention) -> _Reasons:
    # Of equal ones the last made stays first.
    by_rank = sorted(counted, key=lambda backup: backup.rank, reverse=True)
    kept = [*_of_last(by_rank, retention.last), *_of_periods(counted, retention)]
    yield from kept
    yield from _of_minimum(by_rank, retention.minimum, {backup.name for backup, _ in kept})


def _of_last(good: list[Candidate], count: int) -> _Reasons:
    yield from ((backup, "last") for backup in good[:count])


def _of_periods(good: list[Candidate], retention: Retention) -> _Reasons:
    zone = zone_named(retention.zone)
    for kind, form in _PERIODS.items():
        wanted: int = getattr(retention, kind)
        best: dict[str, Candidate] = {}  # of each period, the newest period first
        for backup in good:
            period = datetime.datetime.fromtimestamp(backup.made_s, zone).strftime(form)
            if period not in best or backup.rank > best[period].rank:
                best[period] = backup
        yield from ((backup, f"{kind} {period}") for period, backup in islice(best.items(), wanted))
        if 0 < len(best) < wanted:
            yield good[-1], f"{kind}, the oldest so far"


def _of_minimum(good: list[Candidate], minimum: int, kept: set[str]) -> _Reasons:
    """As many more of the newest as others have left below it."""
    unwanted = [backup for backup in good if backup.name not in kept]
    missing = max(minimum - (len(good) - len(unwanted)), 0)
    yield from ((backup, "minimum") for backup in unwanted[:missing])
