"""A point in the log, and how a copy is brought back to it: what is behind it is cut off."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

from understudy.backup.manifest import utc_text
from understudy.common.directory import DataDirectory
from understudy.common.entries import parse_entry
from understudy.common.errors import UsageError
from understudy.common.files import storage_errors, sync_directory
from understudy.common.log_reader import LogPlace, records_from, segment_records, segments_behind
from understudy.common.records import Record
from understudy.common.segment import RECORDS_START, Segment, Watermark
from understudy.common.store import Store
from understudy.common.types import NO_LSN, Digest, Lsn, Position
from understudy.v1.store_pb2 import CheckpointRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The last entry to keep: one of an LSN, or the last one not after a time. Exactly one is given."""

    lsn: Lsn | None = None
    time_us: int | None = None  # since 1970

    def is_before(self, lsn: Lsn, time_us: int) -> bool:
        """Whether the point lies before that entry."""
        if self.lsn is not None:
            return lsn > self.lsn
        assert self.time_us is not None, "one is given"
        return time_us > self.time_us

    def is_before_entry(self, record: Record) -> bool:
        """As :meth:`is_before`, of an entry as the log has it.

        Raises:
            CorruptionError: it can't be decoded.
        """
        # An entry's time is in its payload, and parsing takes long.
        time_us = 0 if self.lsn is not None else parse_entry(record.payload, record.lsn).time_us
        return self.is_before(record.lsn, time_us)

    def __str__(self) -> str:
        if self.lsn is not None:
            return f"LSN {self.lsn}"
        assert self.time_us is not None, "one is given"
        return utc_text(self.time_us / 1e6)


def parse_time(text: str) -> int:
    """Microseconds since 1970 of an ISO 8601 date and time; in the local time zone where it names none.

    Raises:
        UsageError: it is none.
    """
    try:
        found = datetime.datetime.fromisoformat(text).astimezone(datetime.UTC)
        return round(found.timestamp() * 1e6)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"{text!r} is no date and time",
            remedy="give one like 2026-05-01T14:30:00, or with +02:00 or Z behind it",
        ) from None


def cut_log(directory: DataDirectory, point: Point, *, goes_on: bool = False) -> bool:
    """Takes what is behind ``point`` out of a copy's log. The directory must be marked as unfinished meanwhile.

    Args:
        goes_on: more may come behind the log, so that it need not reach up to an LSN.

    Returns:
        Whether the log reaches up to it: it has that entry, or one behind.

    Raises:
        UsageError: the copy's store is behind the point already, or its log does not reach up to that LSN.
        CorruptionError, StorageFailed.
    """
    with Store.open(directory.store, cluster=directory.cluster) as store:
        row = store.current.checkpoint
    check_state(row, point)
    place = LogPlace(Position(Lsn(row.lsn), Digest(row.digest)), row.log_offset)
    segments = segments_behind(directory.log, directory.cluster, place.position.lsn)
    # What is skipped is checked when the copy is opened.
    skipped = _segments_before(segments, point)
    if skipped:
        header = segments[skipped].header
        place = LogPlace(header.before, header.first_offset)
    for record in records_from(segments[skipped:], place):
        if point.is_before_entry(record):
            _check_reached(place, point)
            _truncate(segments, place)
            return True
        place = LogPlace(record.position, place.offset + record.encoded_bytes)
    if not goes_on:
        _check_reached(place, point)
    return place.position.lsn == point.lsn


def check_state(row: CheckpointRow, point: Point) -> None:
    """Refuses a point that lies before the state which a backup holds.

    Raises:
        UsageError.
    """
    if point.is_before(Lsn(row.lsn), row.time_us):
        raise UsageError(
            f"the backup's state is of LSN {row.lsn} at {utc_text(row.time_us / 1e6)}, behind {point}",
            remedy="use an older backup",
        )


def _check_reached(place: LogPlace, point: Point) -> None:
    if point.lsn is not None and point.lsn > place.position.lsn:
        raise UsageError(f"the backup reaches up to LSN {place.position.lsn}, not to {point.lsn}")
    if place.position.lsn == NO_LSN:
        raise UsageError(f"{point} lies before the first entry of all")


def _segments_before(segments: list[Segment], point: Point) -> int:
    """How many of the first segments hold nothing behind the point; never all."""
    for number in range(len(segments) - 1, 0, -1):
        first = next(segment_records(segments[number]), None)
        if first is not None and not point.is_before_entry(first):
            return number
    return 0


def _truncate(segments: list[Segment], place: LogPlace) -> None:
    """Nothing of this is safe from a crash: the directory is marked as unfinished."""
    for segment in segments[1:]:
        if segment.header.before.lsn >= place.position.lsn:
            with storage_errors("remove", segment.path):
                segment.path.unlink()
    last = max(
        (segment for segment in segments if segment.path.exists()),
        key=lambda segment: segment.header.first_lsn,
    )
    block = last.header.encode() + Watermark.settled(place.position.lsn, place.offset).encode()
    with storage_errors("write", last.path), last.path.open("r+b") as file:
        file.truncate(last.byte_of(place.offset))
        file.write(block.ljust(RECORDS_START, b"\0"))
        file.flush()
        os.fsync(file.fileno())
    sync_directory(last.path.parent)
