"""Whether what clients were told agrees with what a realm's log says happened.

Clients note each transaction and each read with the time at which it began and ended. A transaction that was
acknowledged took effect in between; one of unknown outcome at any time after it began, or never; one that was refused
never. The log gives the order in which they took effect, so nothing has to be searched for: it is enough that this
order, the receipts, the reads and real time agree. (For one object with a known order of writes, that is
linearizability: Herlihy and Wing, "Linearizability: A Correctness Condition for Concurrent Objects", 1990.)

No I/O and no clock in here.
"""

from __future__ import annotations

import bisect
import enum
import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


class Outcome(enum.Enum):
    """What a client knows of a transaction."""

    ACKNOWLEDGED = "acknowledged"
    UNKNOWN = "unknown"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """A transaction as its client saw it.

    Attributes:
        label: tells it from all others.
        started_s, ended_s: seconds of a clock that all clients share.
        version, lsn: of its receipt; 0 where it was acknowledged without one.
    """

    label: bytes
    started_s: float
    ended_s: float
    outcome: Outcome
    version: int = 0
    lsn: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What was read of some keys, all as of one moment.

    Attributes:
        session: who read.
        is_local: from a copy that may be behind, but must not go back; a session reads it one after the other.
    """

    session: str
    started_s: float
    ended_s: float
    values: Mapping[bytes, bytes | None]
    is_local: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A change in the log. ``adds`` are made after ``puts``; both say the value or amount for each key."""

    lsn: int
    version: int
    client: bytes
    number: int
    label: bytes
    puts: Mapping[bytes, bytes] = field(default_factory=dict)
    adds: Mapping[bytes, int] = field(default_factory=dict)


class Kind(enum.Enum):
    """What can be wrong with a history."""

    LOST = "was acknowledged and is not in the log"
    TWICE = "is in the log more than once"
    NOT_SENT = "is in the log, and nobody sent it"
    REFUSED = "was refused and is in the log"
    RECEIPT = "has another place in the log than its receipt says"
    ORDER = "was sent when a later one had already been acknowledged"
    NUMBER = "comes after a higher number of the same client"
    GAP = "does not follow the version before it"
    READ = "agrees with no state that there was in time"


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong."""

    kind: Kind
    what: str

    def __str__(self) -> str:
        return f"{self.what} {self.kind.value}"


def check(writes: Sequence[Write], reads: Sequence[Read], log: Sequence[Applied]) -> list[Violation]:
    """All that is wrong with what clients of one realm saw.

    Args:
        writes: all that were sent; in no particular order.
        reads: in no particular order.
        log: the realm's changes, from the first on, in order.
    """
    times = _Times(writes, log)
    return [
        *_check_log(log),
        *_check_writes({write.label: write for write in writes}, log),
        *_check_order(times, log),
        *_check_reads(times, reads, _States(log)),
    ]


def _check_log(log: Sequence[Applied]) -> Iterable[Violation]:
    highest: dict[bytes, int] = {}
    for version, applied in enumerate(log, start=1):
        if applied.version != version:
            yield Violation(Kind.GAP, _name(applied))
        if applied.number <= highest.get(applied.client, 0):
            yield Violation(Kind.NUMBER, _name(applied))
        highest[applied.client] = applied.number


def _check_writes(writes: Mapping[bytes, Write], log: Sequence[Applied]) -> Iterable[Violation]:
    times = Counter(applied.label for applied in log)
    for applied in log:
        write = writes.get(applied.label)
        if times[applied.label] > 1:
            yield Violation(Kind.TWICE, _name(applied))
        if write is None:
            yield Violation(Kind.NOT_SENT, _name(applied))
        elif write.outcome is Outcome.REFUSED:
            yield Violation(Kind.REFUSED, _name(applied))
        elif write.lsn and (write.version, write.lsn) != (applied.version, applied.lsn):
            receipt = f"with the receipt of version {write.version}, LSN {write.lsn}"
            yield Violation(Kind.RECEIPT, f"{_name(applied)}, {receipt}")
    for write in writes.values():
        if write.outcome is Outcome.ACKNOWLEDGED and not times[write.label]:
            yield Violation(Kind.LOST, f"{write.label!r} of version {write.version}, LSN {write.lsn}")


def _check_order(times: _Times, log: Sequence[Applied]) -> Iterable[Violation]:
    for applied in log:
        write = times.writes.get(applied.label)
        if write is not None and times.acknowledged_before(write.started_s) > applied.version:
            yield Violation(Kind.ORDER, _name(applied))


def _check_reads(times: _Times, reads: Sequence[Read], states: _States) -> Iterable[Violation]:
    """Gives each read the earliest state that it can have seen: if all fit in any way, they fit in this one."""
    shown: list[tuple[float, int]] = []  # when a read ended, and what it saw
    seen_by_all, seen_by = 0, dict[str, int]()
    for read in sorted(reads, key=lambda read: read.started_s):
        while shown and shown[0][0] <= read.started_s:
            seen_by_all = max(seen_by_all, heapq.heappop(shown)[1])
        if read.is_local:
            first = seen_by.get(read.session, 0)
        else:
            first = max(seen_by_all, times.acknowledged_before(read.started_s))
        last = times.first_sent_after(read.ended_s) - 1
        version = states.first_with(read.values, first, min(last, states.last))
        if version is None:
            yield Violation(
                Kind.READ, f"{dict(read.values)} read by {read.session}, version {first} to {last},"
            )
            continue
        if read.is_local:
            seen_by[read.session] = version
        else:
            heapq.heappush(shown, (read.ended_s, version))


class _Times:
    """What real time says about versions."""

    def __init__(self, writes: Sequence[Write], log: Sequence[Applied]) -> None:
        self.writes = {write.label: write for write in writes}
        placed = [(self.writes[one.label], one.version) for one in log if one.label in self.writes]
        ends = sorted(
            (write.ended_s, version) for write, version in placed if write.outcome is Outcome.ACKNOWLEDGED
        )
        self._ends = [end for end, _ in ends]
        self._highest = list(itertools.accumulate((version for _, version in ends), max))
        starts = sorted(((write.started_s, version) for write, version in placed), reverse=True)
        self._starts = [-start for start, _ in starts]
        self._lowest = list(itertools.accumulate((version for _, version in starts), min))

    def acknowledged_before(self, moment_s: float) -> int:
        """The highest version that somebody had been told of by then; 0: none."""
        count = bisect.bisect_left(self._ends, moment_s)
        return self._highest[count - 1] if count else 0

    def first_sent_after(self, moment_s: float) -> int:
        """The lowest version that was only sent after then; beyond the log's end where there is none."""
        count = bisect.bisect_left(self._starts, -moment_s)
        return self._lowest[count - 1] if count else 1 << 62


class _States:
    """The values of each key at every version."""

    def __init__(self, log: Sequence[Applied]) -> None:
        self.last = len(log)
        self._versions: dict[bytes, list[int]] = {}
        self._values: dict[bytes, list[bytes]] = {}
        for version, applied in enumerate(log, start=1):
            for key, value in applied.puts.items():
                self._set(key, version, value)
            for key, amount in applied.adds.items():
                before = int((self._values.get(key) or [b"0"])[-1])
                self._set(key, version, b"%d" % (before + amount))

    def _set(self, key: bytes, version: int, value: bytes) -> None:
        self._versions.setdefault(key, []).append(version)
        self._values.setdefault(key, []).append(value)

    def value(self, key: bytes, version: int) -> bytes | None:
        """What the key had then; None: nothing."""
        count = bisect.bisect_right(self._versions.get(key, []), version)
        return self._values[key][count - 1] if count else None

    def first_with(self, values: Mapping[bytes, bytes | None], first: int, last: int) -> int | None:
        """The first version from ``first`` to ``last`` at which all keys had these values."""
        for version in range(first, last + 1):
            if all(self.value(key, version) == value for key, value in values.items()):
                return version
        return None


def _name(applied: Applied) -> str:
    return f"{applied.label!r} at version {applied.version}, LSN {applied.lsn}"
