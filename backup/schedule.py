"""When backups are made: a cron expression, read in a time zone. Pure: the clock is passed in.

Summer time is treated as Debian's cron does. Times that an expression names (``30 2 * * *``) come once a night: in the
night that has no 02:30 at the first moment after it, in the night that has two at the first of them. Times given by a
``*`` as minute or hour (``0 * * * *``) come whenever the wall clock shows one, so every real hour. (Where summer time
is half an hour, on Lord Howe Island alone, one of the latter can be missed in those two nights.)
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass

from cronsim import CronSim, CronSimError

from understudy.backup.zones import zone_named
from understudy.common.errors import UsageError

_FIELDS = 5
_REMEDY = "give minute, hour, day, month and weekday, such as '30 2 * * *' for every night at 02:30"
# Clocks that are kept right are set back by less, and no expression plans more than one time in it.
_SET_BACK_S = 60.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """Planned times. Made by :meth:`parse`, which checks both."""

    expression: str
    zone: str

    @classmethod
    def parse(cls, expression: str, zone: str = "UTC") -> Schedule:
        """The schedule that ``expression`` describes in the time zone ``zone``.

        Raises:
            UsageError: one or the other can't be read, or no time ever comes that fits.
        """
        zone_named(zone)
        schedule = cls(" ".join(expression.split()), zone)
        if len(expression.split()) != _FIELDS:
            raise _unreadable(expression, f"it has {len(expression.split())} fields instead of {_FIELDS}")
        try:
            first_s = schedule.next_after(0)
        except (CronSimError, ValueError) as error:
            raise _unreadable(expression, str(error)) from error
        if first_s == math.inf:
            raise _unreadable(expression, "there is no such day")
        return schedule

    def next_after(self, moment_s: float) -> float:
        """The first planned time that is later than ``moment_s``; both in seconds since 1970."""
        # Planned times are whole seconds; a datetime of the fraction could be rounded up to one of them.
        moment = datetime.datetime.fromtimestamp(math.floor(moment_s), zone_named(self.zone))
        for planned in CronSim(self.expression, moment):
            # In the second of two equal hours, what is found first may lie in the first.
            if planned.timestamp() > moment_s:
                return planned.timestamp()
        return math.inf  # none in fifty years

    def is_due(self, *, last_s: float, now_s: float) -> bool:
        """Whether a run is owed: a time was planned after ``last_s``, and has come.

        However many times were missed, one run is owed, and whether it is late does not matter.

        A ``last_s`` that has not come yet means that the clock was set back. Waiting until it has caught up could take
        years, so a run is owed at once if a planned time would be missed by waiting; it has a start that has come, and
        so ends this. Where the clock went back by a minute or less, it is waited for.

        Args:
            last_s: when the last run began, whatever became of it; where there was none, when the policy was first
                seen. Seconds since 1970, like ``now_s``.
        """
        if last_s > now_s:
            return self.next_after(now_s) <= last_s - _SET_BACK_S
        return self.next_after(last_s) <= now_s


def _unreadable(expression: str, why: str) -> UsageError:
    return UsageError(
        f"the schedule {expression!r} can't be read: {why[:1].lower()}{why[1:]}", remedy=_REMEDY
    )
