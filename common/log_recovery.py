"""What a change-log looks like after a crash, and how it is made whole: the reading half of opening one.

Scanning begins at the checkpoint and checks the chain to the end. What is wrong before the last segment's end
is always damage, because a segment is durable before the next one is made. At the end it may be a batch that
a crash cut short, of which any sectors may be on disk; :func:`is_torn` decides by the watermark. Nothing
of what was written is changed until all of it has been judged.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from understudy.common.errors import RESTORE, CorruptionError
from understudy.common.files import FileSystem, WritableFile
from understudy.common.records import scan_chain
from understudy.common.segment import (
    RECORDS_START,
    SECTOR_BYTES,
    Segment,
    SegmentHeader,
    SegmentWriter,
    Watermark,
    is_segment_name,
    segment_name,
)
from understudy.common.types import ClusterId, Lsn, Position, format_id

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """A log that is whole and durable up to ``end``."""

    segments: tuple[Segment, ...]
    writer: SegmentWriter
    end: Position
    end_offset: int
    torn_bytes: int  # cut off behind the end


@dataclass(frozen=True, slots=True)
class _Reached:
    """How far a scan came: the last good entry, the log offset behind it, what is wrong with the next one."""

    position: Position
    offset: int
    damage: str


def is_torn(watermark: Watermark, lsn: int, *, written_behind: bool) -> bool:
    """Whether the first bad entry may be one that a crash cut short; if not, it was durable and is damaged.

    Args:
        lsn: of the first bad entry in the last segment.
        written_behind: whether anything but zeros stands behind the batch that the watermark names.
    """
    if lsn < watermark.first_lsn:
        return False  # durable before the last known batch began
    if lsn <= watermark.last_lsn:
        return not written_behind  # the batch after it began only when this one was durable
    return True  # of a batch whose watermark did not reach the disk, so its sync did not return


def recover(
    directory: Path, *, cluster: ClusterId, after: Position, after_offset: int, files: FileSystem
) -> Recovered:
    """Checks the log in ``directory`` from the checkpoint ``after`` on, and cuts off a torn tail.

    Raises:
        CorruptionError: with file, byte and LSN.
        NewerFormat, DiskFull, StorageFailed.
    """
    segments = _load(directory, cluster, files)
    last = segments[-1]
    at = _check_checkpoint(segments, after, after_offset, files)
    reached = _scan_sealed(segments[at:], _Reached(after, after_offset, ""), files)
    file = files.open(last.path)
    try:
        reached = _scan(file, last, reached)
        watermark = Watermark.decode(file.read_at(SECTOR_BYTES, SECTOR_BYTES), last.path)
        torn_bytes = _judge(file, last, watermark, reached)
        _secure(file, last, watermark, reached)
        files.sync_directory(directory)
    except BaseException:
        file.close()
        raise
    return Recovered(
        segments=segments,
        writer=SegmentWriter(file, last, file_bytes=last.byte_of(reached.offset)),
        end=reached.position,
        end_offset=reached.offset,
        torn_bytes=torn_bytes,
    )


# -- the files -----------------------------------------------------------------------------------------------


def _load(directory: Path, cluster: ClusterId, files: FileSystem) -> tuple[Segment, ...]:
    paths = [directory / name for name in files.names(directory) if is_segment_name(name)]
    if len(paths) > 1 and _is_unfinished(paths[-1], files):
        files.remove(paths.pop())  # durable with the directory in the end; until then, just found again
    if not paths:
        raise CorruptionError(f"{directory} holds no segment of a change-log", remedy=RESTORE)
    segments = tuple(_open_segment(path, cluster, files) for path in paths)
    for segment, following in pairwise(segments):
        _check_contiguous(segment, following, files)
    return segments


def _is_unfinished(path: Path, files: FileSystem) -> bool:
    """Whether a crash came while the segment was made: its block is durable before a record is written."""
    with contextlib.closing(files.open(path)) as file:
        block = file.read_at(RECORDS_START, 0)
        never_written = not any(block[:SECTOR_BYTES]) or not any(block[SECTOR_BYTES : 2 * SECTOR_BYTES])
        return never_written and _written_up_to(file, RECORDS_START) == RECORDS_START


def _open_segment(path: Path, cluster: ClusterId, files: FileSystem) -> Segment:
    with contextlib.closing(files.open(path)) as file:
        header = SegmentHeader.decode(file.read_at(SECTOR_BYTES, 0), path)
    if header.cluster != cluster:
        raise CorruptionError(
            f"{path}: of cluster {format_id(header.cluster)}, but the directory belongs to {format_id(cluster)}",
            remedy=RESTORE,
        )
    if segment_name(header.first_lsn) != path.name:
        raise CorruptionError(f"{path}: renamed, it begins with LSN {header.first_lsn}", remedy=RESTORE)
    return Segment(path, header)


def _check_contiguous(segment: Segment, following: Segment, files: FileSystem) -> None:
    with contextlib.closing(files.open(segment.path)) as file:
        size = file.size()
    if size != segment.byte_of(following.header.first_offset):
        wanted = segment.byte_of(following.header.first_offset)
        raise CorruptionError(
            f"{segment.path}: ends at byte {size}, but {following.path.name} goes on behind byte {wanted}: a file "
            f"or a part of one is missing before LSN {following.header.first_lsn}",
            remedy=RESTORE,
        )


# -- the entries ---------------------------------------------------------------------------------------------


def _check_checkpoint(segments: tuple[Segment, ...], after: Position, offset: int, files: FileSystem) -> int:
    """The index of the segment where the entry behind ``after`` is or will be, once ``after`` was found."""
    at = sum(segment.header.before.lsn <= after.lsn for segment in segments) - 1
    if at < 0:
        raise CorruptionError(
            f"{segments[0].path}: begins with LSN {segments[0].header.first_lsn}, but the store's checkpoint is at "
            f"LSN {after.lsn}: what is between is missing",
            remedy=RESTORE,
        )
    segment = segments[at]
    found = (segment.header.before, segment.header.first_offset)
    if after.lsn > segment.header.before.lsn:
        found = _find(segment, after.lsn, files)
    if found != (after, offset):
        raise CorruptionError(
            f"{segment.path}: entry {found[0]} ends at byte {segment.byte_of(found[1])}, but the store's "
            f"checkpoint is {after} ending at byte {segment.byte_of(offset)}: they are not of one history",
            remedy=RESTORE,
        )
    return at


def _find(segment: Segment, lsn: Lsn, files: FileSystem) -> tuple[Position, int]:
    with contextlib.closing(files.open(segment.path)) as file:
        try:
            return segment.find(lsn, lambda offset, length: file.read_at(length, segment.byte_of(offset)))
        except CorruptionError as error:
            raise CorruptionError(
                f"the store's checkpoint at LSN {lsn} is not in the change-log: {error.message}",
                remedy=RESTORE,
            ) from error


def _scan_sealed(segments: tuple[Segment, ...], reached: _Reached, files: FileSystem) -> _Reached:
    for segment, following in pairwise(segments):
        with contextlib.closing(files.open(segment.path)) as file:
            reached = _scan(file, segment, reached)
        if reached.damage:
            raise segment.damaged(reached.position.lsn + 1, reached.offset, reached.damage)
        if (reached.position, reached.offset) != (following.header.before, following.header.first_offset):
            raise CorruptionError(
                f"{following.path}: goes on behind entry {following.header.before}, but {segment.path.name} ends "
                f"at byte {segment.byte_of(reached.offset)} with entry {reached.position}",
                remedy=RESTORE,
            )
    return reached


def _scan(file: WritableFile, segment: Segment, reached: _Reached) -> _Reached:
    """Checks the chain from ``reached`` to the end of the file or the first bad entry."""
    position, offset, rest = reached.position, reached.offset, b""
    while block := file.read_at(_READ_BYTES, segment.byte_of(offset) + len(rest)):
        scan = scan_chain(rest + block, position)
        position = scan.position
        offset += scan.good_bytes
        segment.note(position.lsn, offset)
        if scan.damage:
            return _Reached(position, offset, scan.damage)
        rest = (rest + block)[scan.good_bytes :]
    return _Reached(position, offset, "the file ends within it" if rest else "")


# -- the end -------------------------------------------------------------------------------------------------


def _judge(file: WritableFile, segment: Segment, watermark: Watermark, reached: _Reached) -> int:
    """How many bytes of a torn batch are behind the last good entry; raises if they are no torn batch."""
    lsn = reached.position.lsn + 1
    start = segment.byte_of(reached.offset)
    written = _written_up_to(file, start)
    batch_end = segment.byte_of(watermark.end_offset)
    if not is_torn(watermark, lsn, written_behind=written > batch_end):
        raise segment.damaged(lsn, reached.offset, reached.damage or "the file ends before it")
    return written - start


def _written_up_to(file: WritableFile, start: int) -> int:
    """The place behind the last byte from ``start`` on that is not zero; ``start`` if there is none."""
    at = written = start
    while block := file.read_at(_READ_BYTES, at):
        used = len(block.rstrip(b"\0"))
        if used:
            written = at + used
        at += len(block)
    return written


def _secure(file: WritableFile, segment: Segment, watermark: Watermark, reached: _Reached) -> None:
    """Makes everything up to the last good entry durable and cuts off the rest.

    What can be read need not be durable: the process may have ended before its sync did. After a sync that
    failed, the kernel even takes the pages for clean, and only writing them again brings them to disk.
    """
    start, end = segment.byte_of(watermark.start_offset), segment.byte_of(reached.offset)
    if start < end:
        file.write_at(file.read_at(end - start, start), start)
    file.truncate(end)
    file.sync()
    # Only now may the watermark say so.
    settled = Watermark.settled(reached.position.lsn, reached.offset)
    file.write_at(segment.header.encode() + settled.encode(), 0)
    file.sync()
