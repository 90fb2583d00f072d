"""The change-log of a directory whose server goes on, read by stretches that are whole and durable."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from understudy.common.errors import CorruptionError, UsageError
from understudy.common.files import storage_errors
from understudy.common.log_reader import LogPlace, records_from, segments_behind
from understudy.common.records import Record
from understudy.common.segment import RECORDS_START, Segment, SegmentHeader, Watermark, segment_name
from understudy.common.types import ClusterId, Lsn, Position

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPart:
    """A stretch of records of one segment, as a segment of a copy."""

    header: SegmentHeader  # of the copy's segment
    end: LogPlace  # behind its last record
    fd: int  # of the source's segment; closed with the :class:`LogFiles` that it comes from
    start_byte: int  # of the first record, in the source's file

    @property
    def name(self) -> str:
        """The copy's file name."""
        return segment_name(self.header.first_lsn)

    @property
    def record_bytes(self) -> int:
        """How many bytes of records."""
        return self.end.offset - self.header.first_offset

    @property
    def file_bytes(self) -> int:
        """The copy's length."""
        return RECORDS_START + self.record_bytes

    def content(self) -> Iterator[bytes]:
        """The copy's file, in pieces.

        Raises:
            StorageFailed, CorruptionError: see :meth:`records`.
        """
        watermark = Watermark.settled(self.end.position.lsn, self.end.offset)
        yield (self.header.encode() + watermark.encode()).ljust(RECORDS_START, b"\0")
        yield from self.records()

    def records(self) -> Iterator[bytes]:
        """The record bytes, in pieces.

        Raises:
            StorageFailed, CorruptionError: the file can't be read, or has become shorter.
        """
        at, left = self.start_byte, self.record_bytes
        while left:
            with storage_errors("read", Path(self.name)):
                data = os.pread(self.fd, min(_READ_BYTES, left), at)
            if not data:
                raise CorruptionError(f"{self.name} was cut off at byte {at}")
            yield data
            at, left = at + len(data), left - len(data)


class LogFiles:
    """The segments in a directory, opened as they are needed, and closed together."""

    def __init__(self, directory: Path, cluster: ClusterId) -> None:
        self._directory = directory
        self._cluster = cluster
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> LogFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self._opened.close()

    def durable_records(self, after: LogPlace) -> Iterator[Record]:
        """The entries behind ``after``, chain checked; once all were taken, they are durable.

        Raises:
            UsageError: the log does not go back that far.
            CorruptionError, StorageFailed.
        """
        segments = self._behind(after.position.lsn)
        yield from records_from(segments, after)
        # Records can be read before they are durable. A copy must not hold what a power failure takes from its source.
        with storage_errors("sync", segments[-1].path):
            os.fdatasync(self._open(segments[-1]))

    def parts(self, after: LogPlace, end: LogPlace) -> list[LogPart]:
        """The stretch between two places of this log, at least one part.

        Raises:
            UsageError: the log does not go back that far.
            CorruptionError, StorageFailed.
        """
        segments = [
            segment
            for segment in self._behind(after.position.lsn)
            if segment.header.before.lsn <= end.position.lsn
        ]
        ends = [
            LogPlace(following.header.before, following.header.first_offset)
            for _, following in pairwise(segments)
        ]
        return [
            self._part(segment, after if segment is segments[0] else None, part_end)
            for segment, part_end in zip(segments, [*ends, end], strict=True)
        ]

    def _part(self, segment: Segment, after: LogPlace | None, end: LogPlace) -> LogPart:
        header = segment.header
        if after is not None and after.offset > header.first_offset:
            header = SegmentHeader(
                cluster=header.cluster,
                epoch=header.epoch,
                first_lsn=Lsn(after.position.lsn + 1),
                first_offset=after.offset,
                previous=after.position.digest,
            )
        return LogPart(
            header=header,
            end=end,
            fd=self._open(segment),
            start_byte=segment.byte_of(header.first_offset),
        )

    @property
    def first_lsn(self) -> Lsn:
        """The oldest entry held."""
        return self._behind(None)[0].header.first_lsn

    @property
    def begin(self) -> LogPlace:
        """The place before the oldest entry held."""
        header = self._behind(None)[0].header
        return LogPlace(header.before, header.first_offset)

    def begin_of_segment(self, lsn: Lsn) -> LogPlace:
        """The place before the first entry of the segment that holds an entry.

        Raises:
            UsageError: the log does not hold it.
        """
        header = self._behind(Lsn(lsn - 1))[0].header
        return LogPlace(header.before, header.first_offset)

    def place_at(self, lsn: Lsn) -> LogPlace | None:
        """The place behind an entry that the log holds, or before its oldest; None where it holds no such."""
        try:
            segment = self._behind(lsn)[0]
        except UsageError:
            return None
        if segment.header.before.lsn == lsn:
            return LogPlace(segment.header.before, segment.header.first_offset)
        with storage_errors("read", segment.path), segment.path.open("rb", buffering=0) as file:
            fd = file.fileno()
            try:
                found = segment.find(lsn, lambda at, length: os.pread(fd, length, segment.byte_of(at)))
            except CorruptionError:
                return None  # behind the end, as a rule; damage is found by who reads on from there
        return LogPlace(*found)

    def position_at(self, lsn: Lsn) -> Position | None:
        """The position of an entry that the log holds."""
        place = self.place_at(lsn)
        return place.position if place is not None else None

    def _behind(self, lsn: Lsn | None) -> list[Segment]:
        return segments_behind(self._directory, self._cluster, lsn)

    def _open(self, segment: Segment) -> int:
        with storage_errors("read", segment.path):
            fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
        self._opened.callback(os.close, fd)
        return fd
