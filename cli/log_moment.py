"""The entries of a log around a moment: what ``understudy log --at`` shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from understudy.cli.log_entries import LogEntry, directory_cluster, directory_records, shown_time
from understudy.common.log_reader import open_segments, segment_records
from understudy.common.types import Lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A moment and how far around it to look. The log's time never goes back, so this is one stretch of it."""

    at_us: int  # since 1970
    around_s: int

    @property
    def first_us(self) -> int:
        """The first time that is shown."""
        return self.at_us - self.around_s * 1_000_000

    @property
    def last_us(self) -> int:
        """The last time that is shown."""
        return self.at_us + self.around_s * 1_000_000


def entries_around(
    path: Path, moment: Moment, from_lsn: int | None, to_lsn: int | None, say: Callable[[str], None]
) -> Iterator[LogEntry]:
    """The entries around a moment, of those from ``from_lsn`` to ``to_lsn``.

    Args:
        say: told where the log begins or ends if the moment is not within it, and what is next to it if nothing is
            near.

    Raises:
        as :func:`directory_records`.
    """
    start = _segment_start(path, moment)
    first_lsn = max(filter(None, (from_lsn, start)), default=None)
    before, found = None, False
    for entry in map(LogEntry.of, directory_records(path, first_lsn, to_lsn)):
        if before is None and from_lsn is None and entry.time_us > moment.at_us:
            say(f"the log begins after that moment, with {_place(entry)}")
        if entry.time_us > moment.last_us:
            if before is not None and not found:
                say(f"nothing within {moment.around_s} s of it: {_place(before)}, then {_place(entry)}")
            return
        if entry.time_us >= moment.first_us:
            found = True
            yield entry
        before = entry
    if before is not None and to_lsn is None and before.time_us < moment.at_us:
        say(f"the log ends before that moment, with {_place(before)}")


def _segment_start(path: Path, moment: Moment) -> Lsn | None:
    """Where to begin to read: the last segment that begins before the moment's stretch, or None, the log's start."""
    start = None
    segments, _ = open_segments(path / "log", directory_cluster(path))
    for segment in segments:
        first = next(segment_records(segment), None)
        if first is None or LogEntry.of(first).time_us >= moment.first_us:
            break
        start = first.lsn
    return start


def _place(entry: LogEntry) -> str:
    return f"LSN {entry.record.lsn} of {shown_time(entry.time_us)}"
