"""Reads a change-log for `log`, `status` and `verify`: nothing is changed, and the directory need not be owned.

A process may be writing meanwhile. Its records appear here as soon as they are whole, which can be before they are
durable; what is not whole yet looks like a batch that a crash cut short, and reading ends before it. Segments may
be removed meanwhile too, oldest first.

Opening for writing, with all that has to be mended then, is ``log_recovery.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from understudy.common.errors import RESTORE, CorruptionError, UsageError
from understudy.common.files import storage_errors
from understudy.common.log_recovery import is_torn
from understudy.common.records import HEADER, RECORD_HEADER_BYTES, Record, read_headers, scan_chain
from understudy.common.segment import (
    RECORDS_START,
    SECTOR_BYTES,
    Segment,
    SegmentHeader,
    Watermark,
    is_segment_name,
    segment_name,
)
from understudy.common.types import ClusterId, Lsn, Position

_READ_BYTES = 1 << 20
_WATERMARK_TRIES = 5  # a sector that is being written just now can be read half old and half new


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentEnd:
    """How far the records of a segment follow from each other."""

    position: Position  # of the last good record
    byte: int  # in the file, behind that record
    written: int  # in the file, behind the last byte that is not zero; `byte` if nothing follows
    damage: str  # what is wrong with the next record; empty where the file ends there, or within it


class LogPlace(NamedTuple):
    """A position, and the log offset behind its entry."""

    position: Position
    offset: int


def open_segments(directory: Path, cluster: ClusterId) -> tuple[list[Segment], list[CorruptionError]]:
    """The segments in ``directory``, oldest first, and what is wrong with files that should be some.

    A last file in which nothing was written yet is left out.

    Raises:
        StorageFailed: the directory or a file can't be read.
        NewerFormat: a later version wrote it.
    """
    with storage_errors("list", directory):
        paths = sorted(path for path in directory.iterdir() if is_segment_name(path.name))
    segments, damaged = [], []
    for path in paths:
        sector = _first_sector(path)
        if sector is None or (path == paths[-1] and len(paths) > 1 and not any(sector)):
            continue
        try:
            segments.append(Segment(path, _header(sector, path, cluster)))
        except CorruptionError as error:
            damaged.append(error)
    return segments, damaged


def _first_sector(path: Path) -> bytes | None:
    """None where the file was removed meanwhile."""
    with storage_errors("read", path):
        try:
            with path.open("rb") as file:
                return file.read(SECTOR_BYTES)
        except FileNotFoundError:
            return None


def _header(sector: bytes, path: Path, cluster: ClusterId) -> SegmentHeader:
    header = SegmentHeader.decode(sector, path)
    if header.cluster != cluster:
        raise CorruptionError(
            f"{path}: of cluster {header.cluster.hex()}, but this directory belongs to {cluster.hex()}",
            remedy=RESTORE,
        )
    if segment_name(header.first_lsn) != path.name:
        raise CorruptionError(
            f"{path}: the file that began with LSN {header.first_lsn}, renamed", remedy=RESTORE
        )
    return header


def segment_records(segment: Segment, after: LogPlace | None = None) -> Generator[Record, None, SegmentEnd]:
    """The good records of a segment, chain checked from its header or from ``after`` on; returns where they end.

    Raises:
        StorageFailed: the file can't be read.
    """
    start = after or LogPlace(segment.header.before, segment.header.first_offset)
    position, byte, rest, damage = start.position, segment.byte_of(start.offset), b"", ""
    with storage_errors("read", segment.path), segment.path.open("rb") as file:
        file.seek(byte)
        while not damage and (block := file.read(_READ_BYTES)):
            data = rest + block
            scan = scan_chain(data, position)
            yield from _records(data[: scan.good_bytes], Lsn(position.lsn + 1))
            position, damage = scan.position, scan.damage
            byte += scan.good_bytes
            rest = data[scan.good_bytes :]
        written = _written_up_to(file, byte)
    return SegmentEnd(position=position, byte=byte, written=written, damage=damage)


def _records(data: bytes, first_lsn: Lsn) -> Iterator[Record]:
    for lsn, digest, offset in read_headers(data, first_lsn):
        start = offset + RECORD_HEADER_BYTES
        yield Record(lsn, digest, data[start : start + HEADER.unpack_from(data, offset)[0]])


def _written_up_to(file: BinaryIO, start: int) -> int:
    file.seek(start)
    at = written = start
    while block := file.read(_READ_BYTES):
        used = len(block.rstrip(b"\0"))
        if used:
            written = at + used
        at += len(block)
    return written


def read_watermark(segment: Segment) -> Watermark:
    """The watermark of a segment. Read before the records, it says nothing of them that is not there yet.

    Raises:
        CorruptionError: it is damaged.
        StorageFailed: the file can't be read.
    """
    for _ in range(_WATERMARK_TRIES - 1):
        with contextlib.suppress(CorruptionError):
            return _watermark(segment)
    return _watermark(segment)


def _watermark(segment: Segment) -> Watermark:
    with storage_errors("read", segment.path), segment.path.open("rb") as file:
        file.seek(SECTOR_BYTES)
        return Watermark.decode(file.read(SECTOR_BYTES), segment.path)


def last_end_problem(segment: Segment, end: SegmentEnd, watermark: Watermark) -> CorruptionError | None:
    """What is wrong with the end of the last segment, or None where it just ends, or a crash cut a batch short."""
    lsn = end.position.lsn + 1
    if is_torn(watermark, lsn, written_behind=end.written > segment.byte_of(watermark.end_offset)):
        return None
    return segment.damaged(lsn, _log_offset(segment, end), end.damage or "the file ends before it")


def sealed_end_problem(segment: Segment, end: SegmentEnd, following: Segment) -> CorruptionError | None:
    """What is wrong with the end of a segment that another follows, or None."""
    offset = _log_offset(segment, end)
    if end.damage:
        return segment.damaged(end.position.lsn + 1, offset, end.damage)
    if (end.position, offset) != (following.header.before, following.header.first_offset):
        return CorruptionError(
            f"{following.path}: goes on behind entry {following.header.before}, but {segment.path.name} ends with "
            f"entry {end.position} at byte {end.byte}",
            remedy=RESTORE,
        )
    return None


def _log_offset(segment: Segment, end: SegmentEnd) -> int:
    return segment.header.first_offset + end.byte - RECORDS_START


def read_records(directory: Path, cluster: ClusterId, after: Lsn | None = None) -> Iterator[Record]:
    """The entries behind ``after``, or all that the log holds, up to the last whole one.

    Raises:
        UsageError: the log does not go back that far.
        CorruptionError: with file, byte and LSN.
        StorageFailed: a file can't be read, or was removed meanwhile.
    """
    segments = segments_behind(directory, cluster, after)
    for segment, following in pairwise(segments):
        end = yield from _records_behind(segment, after)
        _raise_if(sealed_end_problem(segment, end, following))
    last = segments[-1]
    watermark = read_watermark(last)
    end = yield from _records_behind(last, after)
    _raise_if(last_end_problem(last, end, watermark))


def records_from(segments: Sequence[Segment], place: LogPlace) -> Iterator[Record]:
    """The entries behind ``place``, which is in or before the first of ``segments``, up to the last whole one.

    Raises:
        CorruptionError: with file, byte and LSN.
        StorageFailed: a file can't be read, or was removed meanwhile.
    """
    start: LogPlace | None = place
    for segment, following in pairwise(segments):
        end = yield from segment_records(segment, start)
        _raise_if(sealed_end_problem(segment, end, following))
        start = None
    last = segments[-1]
    watermark = read_watermark(last)
    end = yield from segment_records(last, start)
    _raise_if(last_end_problem(last, end, watermark))


def segments_behind(directory: Path, cluster: ClusterId, after: Lsn | None) -> list[Segment]:
    """The segments that hold the entries behind ``after``, or all; the last one may have none of them yet.

    Raises:
        UsageError: the log does not go back that far.
        CorruptionError, NewerFormat, StorageFailed.
    """
    segments, damaged = open_segments(directory, cluster)
    if damaged:
        raise damaged[0]
    if not segments:
        raise CorruptionError(f"{directory} holds no segment of a change-log", remedy=RESTORE)
    if after is None:
        return segments
    first = segments[0].header.first_lsn
    if after + 1 < first:
        raise UsageError(f"the change-log begins with LSN {first}", remedy=f"ask for {first} or later")
    skipped = sum(segment.header.before.lsn <= after for segment in segments) - 1
    return segments[skipped:]


def _records_behind(segment: Segment, after: Lsn | None) -> Generator[Record, None, SegmentEnd]:
    records = segment_records(segment)
    while True:
        try:
            record = next(records)
        except StopIteration as ended:
            end: SegmentEnd = ended.value
            return end
        if after is None or record.lsn > after:
            yield record


def _raise_if(problem: CorruptionError | None) -> None:
    if problem is not None:
        raise problem
