"""The change-log: all entries in order, in segment files, durable when written; the one source of truth.

Reading order: ``records.py`` (one record and the chain), ``segment.py`` (one file), ``log_recovery.py``
(opening after a crash), this module (the log as a whole), ``group_writer.py`` (who writes to it).

One thread writes; others may read and prune at the same time. What makes that safe is little: ``end`` moves
only when everything before it is durable, and bytes before it never change; the tuple of segments is
replaced, never modified; and one lock keeps a file from being closed or removed while it is read or opened.

A failed write or sync is final: the log is poisoned, and every later call raises :class:`StorageFailed`. No sync
is ever repeated, because the kernel may have dropped the pages and would report success. A failed read concerns
only who asked for it.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from understudy.common.errors import CorruptionError, DirectoryError, StorageFailed, UsageError
from understudy.common.files import FileSystem
from understudy.common.log_recovery import recover
from understudy.common.records import HEADER, ChainReader, Record, read_headers, scan_chain
from understudy.common.segment import (
    Segment,
    SegmentHeader,
    SegmentWriter,
    Watermark,
    boundary_behind,
    final,
)
from understudy.common.types import ClusterId, Epoch, Lsn, Position

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentInfo:
    """What is told of a segment file. ``bytes`` counts records only."""

    path: Path
    first_lsn: Lsn
    first_offset: int
    bytes: int
    sealed: bool


@dataclass(frozen=True, slots=True)
class _End:
    """Replaced as one, so that a reader never sees the LSN of one batch with the offset of another."""

    position: Position
    offset: int


class ChangeLog:
    """An open change-log. Made by :meth:`create` or :meth:`open`."""

    def __init__(
        self,
        directory: Path,
        files: FileSystem,
        *,
        segments: tuple[Segment, ...],
        writer: SegmentWriter,
        end: _End,
        torn_bytes: int,
    ) -> None:
        self._directory = directory
        self._files = files
        self._cluster = segments[-1].header.cluster
        self._segments = segments  # never empty; the last one is written to
        self._writer: SegmentWriter | None = writer  # none between one segment and the next
        self._end = end
        self._failed: StorageFailed | None = None
        self._lock = threading.Lock()
        self._prune_lock = threading.Lock()
        self.torn_bytes = torn_bytes  # cut off when the log was opened: a batch that a crash had interrupted

    # -- opening and closing -------------------------------------------------------------------------------

    @staticmethod
    def create(
        directory: Path,
        *,
        cluster: ClusterId,
        epoch: Epoch,
        after: Position,
        after_offset: int,
        files: FileSystem,
    ) -> ChangeLog:
        """An empty log that goes on behind ``after``.

        Args:
            directory: exists and is empty.
            epoch: of the first entry to come.
            after_offset: log offset behind ``after``: bytes of all records since LSN 1.

        Raises:
            DirectoryError: it is not empty.
            DiskFull, StorageFailed.
        """
        if files.names(directory):
            raise DirectoryError(f"{directory} is not empty, and a new change-log was to be made there")
        header = SegmentHeader(
            cluster=cluster,
            epoch=epoch,
            first_lsn=Lsn(after.lsn + 1),
            first_offset=after_offset,
            previous=after.digest,
        )
        writer = SegmentWriter.create(directory, header, files)
        end = _End(after, after_offset)
        return ChangeLog(directory, files, segments=(writer.segment,), writer=writer, end=end, torn_bytes=0)

    @staticmethod
    def open(
        directory: Path, *, cluster: ClusterId, after: Position, after_offset: int, files: FileSystem
    ) -> ChangeLog:
        """Opens a log, checks it from the checkpoint ``after`` on, and cuts off a torn tail.

        All that it holds afterwards is durable.

        Raises:
            CorruptionError: with file, byte, LSN and remedy. Nothing was changed.
            NewerFormat, DiskFull, StorageFailed.
        """
        found = recover(directory, cluster=cluster, after=after, after_offset=after_offset, files=files)
        return ChangeLog(
            directory,
            files,
            segments=found.segments,
            writer=found.writer,
            end=_End(found.end, found.end_offset),
            torn_bytes=found.torn_bytes,
        )

    def close(self) -> None:
        """Closes the files. There is nothing to finish: what was written is durable."""
        if self._writer is not None:
            self._close(self._writer)

    def _close(self, writer: SegmentWriter) -> None:
        with self._lock:
            self._writer = None
        writer.file.close()

    def __enter__(self) -> ChangeLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- facts ---------------------------------------------------------------------------------------------

    @property
    def end(self) -> Position:
        """The last durable entry."""
        return self._end.position

    @property
    def end_offset(self) -> int:
        """The log offset behind :attr:`end`."""
        return self._end.offset

    @property
    def first_lsn(self) -> Lsn:
        """The oldest entry held, or to come in an empty log."""
        return self._segments[0].header.first_lsn

    @property
    def first_offset(self) -> int:
        """Where :attr:`first_lsn` begins."""
        return self._segments[0].header.first_offset

    @property
    def retained_bytes(self) -> int:
        """Bytes of all records held."""
        return self.end_offset - self.first_offset

    def segments(self) -> list[SegmentInfo]:
        """All segments, oldest first; the last one is not sealed."""
        end, segments = self._end, self._segments
        starts = [segment.header.first_offset for segment in segments]
        return [
            SegmentInfo(
                path=segment.path,
                first_lsn=segment.header.first_lsn,
                first_offset=start,
                bytes=behind - start,
                sealed=segment is not segments[-1],
            )
            for segment, start, behind in zip(segments, starts, [*starts[1:], end.offset], strict=True)
        ]

    # -- writing -------------------------------------------------------------------------------------------

    def write_batch(self, data: bytes, last: Position, *, epoch: Epoch) -> None:
        """Appends whole records that follow directly behind :attr:`end`; they are durable on return.

        A batch that crosses a segment's boundary is made durable in parts. After :class:`DiskFull` the log is
        usable, and :attr:`end` and :attr:`end_offset` tell how much of the batch is in; the caller goes on
        with the rest of the same bytes.

        Args:
            last: the last record's position.
            epoch: of all these records.

        Raises:
            DiskFull: may be tried again.
            StorageFailed.
            ValueError: the records do not follow.
        """
        with self._changing():
            first_lsn = HEADER.unpack_from(data)[1]
            if first_lsn != self.end.lsn + 1 or last.lsn < first_lsn:
                raise ValueError(f"records {first_lsn} to {last.lsn} do not follow entry {self.end.lsn}")
            while data:
                used, position = self._fitting(data, last)
                self._append(data[:used], position, epoch)
                data = data[used:]

    def _fitting(self, data: bytes, last: Position) -> tuple[int, Position]:
        """How much of ``data`` belongs to its first record's segment, and the position of the last in it."""
        end = self._end
        room = boundary_behind(end.offset) - end.offset
        if len(data) <= room:
            return len(data), last
        before = end.position
        for lsn, digest, start in read_headers(data, Lsn(end.position.lsn + 1)):
            if start >= room:
                return start, before
            before = Position(lsn, digest)
        return len(data), last  # the last record begins before the boundary and ends behind it

    def _append(self, data: bytes, last: Position, epoch: Epoch) -> None:
        end = self._end
        writer = self._writer_at(end, epoch)
        behind = end.offset + len(data)
        batch = Watermark(
            first_lsn=Lsn(end.position.lsn + 1),
            last_lsn=last.lsn,
            start_offset=end.offset,
            end_offset=behind,
        )
        writer.append(data, batch)
        self._end = _End(last, behind)
        writer.segment.note(last.lsn, behind)
        writer.settle(last.lsn, behind)

    def _writer_at(self, end: _End, epoch: Epoch) -> SegmentWriter:
        """The writer of the segment to which a record at ``end`` belongs."""
        if end.offset >= boundary_behind(self._segments[-1].header.first_offset):
            if self._writer is not None:  # else the disk was full when the new segment was tried last
                self._writer.seal(end.offset)
                self._close(self._writer)
            self._begin_segment(end, epoch)
        assert self._writer is not None, "the log is closed"
        return self._writer

    def _begin_segment(self, end: _End, epoch: Epoch) -> None:
        header = SegmentHeader(
            cluster=self._cluster,
            epoch=epoch,
            first_lsn=Lsn(end.position.lsn + 1),
            first_offset=end.offset,
            previous=end.position.digest,
        )
        writer = SegmentWriter.create(self._directory, header, self._files)
        with self._lock:
            self._segments = (*self._segments, writer.segment)
            self._writer = writer

    # -- reading -------------------------------------------------------------------------------------------

    def read(self, offset: int, bytes_max: int) -> bytes:
        """Record bytes from log offset ``offset`` on, as they are: unchecked, and cut anywhere.

        Returns:
            At most ``bytes_max``; fewer at a segment's end, none at the log's end.

        Raises:
            UsageError: the log no longer goes back that far.
            CorruptionError: a file is shorter than it was.
            StorageFailed.
        """
        self._check_failed()
        with self._lock:
            segment, behind = self._segment_at(offset)
            length = min(bytes_max, behind - offset)
            if length <= 0:
                return b""
            place = segment.byte_of(offset)
            if self._writer is not None and segment is self._writer.segment:
                data = self._writer.file.read_at(length, place)
                file = None
            else:
                file = self._files.open(segment.path)
        if file is not None:
            # Removing it meanwhile does no harm: it is open.
            with contextlib.closing(file):
                data = file.read_at(length, place)
        if len(data) < length:
            raise CorruptionError(f"{segment.path}: ends at byte {place + len(data)}, too early")
        return data

    def records(self, after: Lsn, upto: Lsn | None = None) -> Iterator[Record]:
        """The entries behind ``after`` up to ``upto`` or the end as of the first one taken, chain checked.

        Raises:
            UsageError: the log does not hold the entries behind ``after``.
            CorruptionError: with file, byte and LSN.
            StorageFailed.
        """
        end = self._end
        last = end.position.lsn if upto is None else min(upto, end.position.lsn)
        start, stop = self._find(after), self._find(max(after, last))
        if start is None or stop is None:
            raise UsageError(
                f"the change-log holds LSN {self.first_lsn} to {end.position.lsn}, not what is behind {after}",
                remedy="give an LSN that it holds",
            )
        reader, offset = ChainReader(start.position), start.offset
        while offset < stop.offset:
            data = self.read(offset, min(_READ_BYTES, stop.offset - offset))
            offset += len(data)
            yield from self._checked(reader, data, offset)

    def _checked(self, reader: ChainReader, data: bytes, behind: int) -> list[Record]:
        start = behind - len(data) - reader.pending_bytes
        try:
            return reader.feed(data)
        except CorruptionError as error:
            # Once more, to say where.
            segment, _ = self._segment_at(start)
            scan = scan_chain(self.read(start, behind - start), reader.position)
            raise segment.damaged(
                scan.position.lsn + 1, start + scan.good_bytes, scan.damage or error.message
            ) from error

    def position_at(self, lsn: Lsn) -> Position | None:
        """The position of entry ``lsn``, held or the one before :attr:`first_lsn`; none for any other.

        Raises:
            CorruptionError: the entry is damaged.
            StorageFailed.
        """
        found = self._find(lsn)
        return found.position if found else None

    def offset_behind(self, lsn: Lsn) -> int | None:
        """The log offset behind entry ``lsn``, held or the one before :attr:`first_lsn`; none for any other.

        Raises:
            CorruptionError: the entry is damaged.
            StorageFailed.
        """
        found = self._find(lsn)
        return found.offset if found else None

    def _find(self, lsn: Lsn) -> _End | None:
        self._check_failed()
        end, segments = self._end, self._segments
        if lsn == end.position.lsn:
            return end
        at = bisect_right(segments, lsn, key=lambda segment: segment.header.before.lsn) - 1
        if at < 0 or lsn > end.position.lsn:
            return None
        segment = segments[at]
        if lsn == segment.header.before.lsn:
            return _End(segment.header.before, segment.header.first_offset)
        try:
            return _End(*segment.find(lsn, self.read))
        except UsageError:
            return None  # removed meanwhile

    def _segment_at(self, offset: int) -> tuple[Segment, int]:
        """The segment that holds the byte at ``offset``, and the log offset behind that segment."""
        end, segments = self._end, self._segments
        at = bisect_right(segments, offset, key=lambda segment: segment.header.first_offset) - 1
        if at < 0:
            begin = segments[0].header.first_offset
            raise UsageError(
                f"the change-log no longer holds what was at offset {offset}: it begins at {begin}",
                remedy="a copy that needs it has to bootstrap again",
            )
        return segments[at], segments[at + 1].header.first_offset if at + 1 < len(segments) else end.offset

    # -- pruning -------------------------------------------------------------------------------------------

    def prune(self, keep_from: Lsn) -> list[Path]:
        """Removes the segments all of whose records are below ``keep_from``, durably; never the last segment.

        Returns:
            What was removed.

        Raises:
            StorageFailed.
        """
        removed: list[Path] = []
        with self._changing(), self._prune_lock:
            while len(self._segments) > 1 and self._segments[1].header.first_lsn <= keep_from:
                with self._lock:
                    oldest, self._segments = self._segments[0], self._segments[1:]
                with final():
                    self._files.remove(oldest.path)
                    # Each by itself: were two removals under way, a power loss could undo the first alone and
                    # leave a gap.
                    self._files.sync_directory(self._directory)
                removed.append(oldest.path)
        return removed

    # -- failure -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Around what changes files: where that fails, nobody knows what they hold. A failed read changes nothing."""
        self._check_failed()
        try:
            yield
        except StorageFailed as error:
            self._failed = error
            raise

    def _check_failed(self) -> None:
        if self._failed is not None:
            raise StorageFailed(f"the change-log failed before: {self._failed.message}") from self._failed
