"""One segment file of the change-log: its bytes, where an entry lies in it, and how the last one grows.

What may live here: what concerns a single file. Which files make up a log is ``changelog.py``; what a log
looks like after a crash is ``log_recovery.py``; the bytes, for people, are in ``docs/FORMAT.md``.

A file is a block of 4096 bytes, then records. Sector 0 of the block is the :class:`SegmentHeader`, the same
on every node; sector 1 is this node's own :class:`Watermark`. A record belongs to the segment in whose
stretch of ``SEGMENT_BYTES`` of log its first byte lies, whatever batches it was written in, so that nodes
with the same history have the same files.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import xxhash

from understudy.common.errors import RESTORE, CorruptionError, DiskFull, NewerFormat, StorageFailed
from understudy.common.files import FileSystem, WritableFile
from understudy.common.records import HEADER, PAYLOAD_BYTES_MAX, RECORD_HEADER_BYTES, scan_chain
from understudy.common.types import ClusterId, Digest, Epoch, Lsn, Position, format_lsn, parse_lsn

MAGIC = b"UNDSTLOG"
FORMAT_VERSION = 1
SECTOR_BYTES = 512  # what a disk writes whole or not at all
RECORDS_START = 4096
SEGMENT_BYTES = 64 << 20
# Overwriting zeros spares each fdatasync the file system's journal, and lets a full disk show before a record
# is half written.
PREALLOCATED_BYTES = 1 << 20
SUFFIX = ".seg"
_HEADER = struct.Struct("<8sII16sQQQ32s392x32s")
_WATERMARK = struct.Struct("<QQQQ472xQ")
_INDEX_STEP_BYTES = 64 << 10

Read = Callable[[int, int], bytes]  # (log offset, length) -> bytes; shorter only where the segment ends


def boundary_behind(offset: int) -> int:
    """The log offset from which on records no longer belong to the segment that holds ``offset``."""
    return (offset // SEGMENT_BYTES + 1) * SEGMENT_BYTES


def segment_name(first_lsn: Lsn) -> str:
    """The name of the segment that begins with ``first_lsn``."""
    return format_lsn(first_lsn) + SUFFIX


def is_segment_name(name: str) -> bool:
    """Whether a file of that name is a segment; anything else in the directory is not looked at."""
    try:
        parse_lsn(name.removesuffix(SUFFIX))
    except ValueError:
        return False
    return name.endswith(SUFFIX)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHeader:
    """Sector 0: what the segment is and where it goes on from."""

    cluster: ClusterId
    epoch: Epoch  # of its first record
    first_lsn: Lsn
    first_offset: int  # log offset of its first record: bytes of all records since LSN 1
    previous: Digest  # at first_lsn - 1

    @property
    def before(self) -> Position:
        """The position that its first record follows."""
        return Position(Lsn(self.first_lsn - 1), self.previous)

    def encode(self) -> bytes:
        """One sector."""
        fields = (self.cluster, self.epoch, self.first_lsn, self.first_offset, self.previous)
        unsigned = _HEADER.pack(MAGIC, FORMAT_VERSION, 0, *fields, b"")[:-32]
        return unsigned + sha256(unsigned).digest()

    @classmethod
    def decode(cls, sector: bytes, path: Path) -> SegmentHeader:
        """Reads sector 0 of ``path``.

        Raises:
            CorruptionError: it is not a header.
            NewerFormat: it is one of a later version.
        """
        if len(sector) < SECTOR_BYTES or sha256(sector[:-32]).digest() != sector[-32:]:
            raise CorruptionError(f"{path}: bytes 0 to 511 are not a segment's header", remedy=RESTORE)
        magic, version, _, cluster, epoch, first_lsn, first_offset, previous, _ = _HEADER.unpack(sector)
        if magic != MAGIC:
            raise CorruptionError(f"{path}: not a segment of a change-log", remedy=RESTORE)
        if version != FORMAT_VERSION:
            raise NewerFormat(
                f"{path}: format {version} of the change-log",
                remedy=f"this version reads format {FORMAT_VERSION}; upgrade it",
            )
        if not first_lsn:
            raise CorruptionError(f"{path}: begins with LSN 0, which no entry has", remedy=RESTORE)
        return cls(
            cluster=ClusterId(cluster),
            epoch=Epoch(epoch),
            first_lsn=Lsn(first_lsn),
            first_offset=first_offset,
            previous=Digest(previous),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Watermark:
    """Sector 1: the batch last begun. It is written with the batch, before the one ``fdatasync`` for both.

    So after a crash: everything below ``first_lsn`` was durable, the batch itself may be there in part, and
    if there is anything at or behind ``end_offset``, the batch was durable too.
    """

    first_lsn: Lsn
    last_lsn: Lsn  # first_lsn - 1 for no batch
    start_offset: int  # log offset of the batch's first byte
    end_offset: int  # and of the one behind its last

    @classmethod
    def settled(cls, lsn: Lsn, offset: int) -> Watermark:
        """No batch is under way: everything up to ``lsn`` is durable."""
        return cls(first_lsn=Lsn(lsn + 1), last_lsn=lsn, start_offset=offset, end_offset=offset)

    def encode(self) -> bytes:
        """One sector."""
        fields = (self.first_lsn, self.last_lsn, self.start_offset, self.end_offset)
        unsigned = _WATERMARK.pack(*fields, 0)[:-8]
        return unsigned + xxhash.xxh3_64_intdigest(unsigned).to_bytes(8, "little")

    @classmethod
    def decode(cls, sector: bytes, path: Path) -> Watermark:
        """Reads sector 1 of ``path``.

        Raises:
            CorruptionError: it is damaged.
        """
        checksum = int.from_bytes(sector[-8:], "little")
        if len(sector) < SECTOR_BYTES or xxhash.xxh3_64_intdigest(sector[:-8]) != checksum:
            raise CorruptionError(f"{path}: bytes 512 to 1023 are not a watermark", remedy=RESTORE)
        first_lsn, last_lsn, start_offset, end_offset, _ = _WATERMARK.unpack(sector)
        return cls(
            first_lsn=Lsn(first_lsn), last_lsn=Lsn(last_lsn), start_offset=start_offset, end_offset=end_offset
        )


class Segment:
    """A segment file as the log knows it: path, header, and a sparse index that fills as entries are sought.

    Safe for threads.
    """

    __slots__ = ("_lock", "_lsns", "_offsets", "header", "path")

    def __init__(self, path: Path, header: SegmentHeader) -> None:
        self.path = path
        self.header = header
        self._lock = threading.Lock()
        # The log offset behind an LSN, about every 64 KiB; plain numbers, since there can be many segments.
        self._lsns = array("Q", [header.first_lsn - 1])
        self._offsets = array("Q", [header.first_offset])

    def byte_of(self, offset: int) -> int:
        """Where the record byte at that log offset is in the file."""
        return RECORDS_START + offset - self.header.first_offset

    def note(self, lsn: Lsn, offset: int) -> None:
        """Remembers that the record ``lsn`` ends at log offset ``offset``, if nothing near is known."""
        with self._lock:
            at = bisect_right(self._lsns, lsn)
            if offset - self._offsets[at - 1] < _INDEX_STEP_BYTES:
                return
            if at < len(self._lsns) and self._offsets[at] - offset < _INDEX_STEP_BYTES:
                return
            self._lsns.insert(at, lsn)
            self._offsets.insert(at, offset)

    def find(self, lsn: Lsn, read: Read) -> tuple[Position, int]:
        """The position of entry ``lsn``, which must be of this segment, and the log offset behind it.

        Goes from header to header, then checks the entry itself against the digest that stands before it: so
        a damaged digest is never taken for another history.

        Raises:
            CorruptionError: an entry on the way is not there, or the entry is damaged.
        """
        digest = self.header.previous
        # Two entries back, because the digest of the one before is wanted and stands in its header.
        at, offset = self._nearest(max(lsn - 2, self.header.first_lsn - 1))
        while at < lsn - 1:
            reached, passed, digest = _pass_headers(read(offset, _INDEX_STEP_BYTES), at, lsn - 1)
            if reached == at:
                raise self.damaged(at + 1, offset, "no such record is there")
            at = reached
            offset += passed
            self.note(Lsn(at), offset)
        head = read(offset, RECORD_HEADER_BYTES)
        length = HEADER.unpack(head)[0] if len(head) == RECORD_HEADER_BYTES else 0
        record = read(offset, RECORD_HEADER_BYTES + min(length, PAYLOAD_BYTES_MAX))
        scan = scan_chain(record, Position(Lsn(at), digest))
        if scan.position.lsn != lsn:
            raise self.damaged(lsn, offset, scan.damage or "it is not whole")
        return scan.position, offset + scan.good_bytes

    def damaged(self, lsn: int, offset: int, why: str) -> CorruptionError:
        """The error for entry ``lsn``, which should begin at log offset ``offset``."""
        return CorruptionError(
            f"{self.path}: entry {lsn}, at byte {self.byte_of(offset)}, is damaged: {why}", remedy=RESTORE
        )

    def _nearest(self, lsn: int) -> tuple[int, int]:
        with self._lock:
            at = bisect_right(self._lsns, lsn) - 1
            return self._lsns[at], self._offsets[at]


def _pass_headers(block: bytes, lsn: int, upto: int) -> tuple[int, int, Digest]:
    """(LSN, end, digest) of the last record not behind ``upto`` whose header is in ``block``.

    The end may lie behind the block: a large payload need not be read to be passed.
    """
    offset, digest = 0, b""
    while lsn < upto and len(block) - offset >= RECORD_HEADER_BYTES:
        length, found_lsn, found_digest = HEADER.unpack_from(block, offset)
        if found_lsn != lsn + 1 or not 0 < length <= PAYLOAD_BYTES_MAX:
            break
        offset += RECORD_HEADER_BYTES + length
        digest = found_digest
        lsn += 1
    return lsn, offset, Digest(digest)


@contextlib.contextmanager
def final() -> Iterator[None]:
    """Makes a full disk final, where it can't be undone: after a failed sync nobody knows what is on disk."""
    try:
        yield
    except DiskFull as error:
        raise StorageFailed(error.message) from error


class SegmentWriter:
    """The file of the last segment, with zeros ahead of its records."""

    def __init__(self, file: WritableFile, segment: Segment, *, file_bytes: int) -> None:
        self.file = file
        self.segment = segment
        self._file_bytes = file_bytes  # records, then zeros

    @classmethod
    def create(cls, directory: Path, header: SegmentHeader, files: FileSystem) -> SegmentWriter:
        """A new segment without records, durable with its name.

        Raises:
            DiskFull: nothing is left of it; may be tried again.
            StorageFailed.
        """
        path = directory / segment_name(header.first_lsn)
        file = files.open(path, create=True)
        watermark = Watermark.settled(header.before.lsn, header.first_offset)
        block = (header.encode() + watermark.encode()).ljust(RECORDS_START, b"\0")
        try:
            file.write_at(block + bytes(PREALLOCATED_BYTES), 0)
            file.sync()
            with final():
                files.sync_directory(directory)
        except DiskFull:
            file.close()
            # The next attempt has a file of its own, so the sync that may have failed is not repeated.
            with final():
                files.remove(path)
            raise
        except StorageFailed:
            file.close()
            raise
        return cls(file, Segment(path, header), file_bytes=len(block) + PREALLOCATED_BYTES)

    def append(self, data: bytes, batch: Watermark) -> None:
        """Writes a batch of records with its watermark; both are durable on return.

        Raises:
            DiskFull: the file is as it was; may be tried again.
            StorageFailed: what is in the file now is not known.
        """
        start = self.segment.byte_of(batch.start_offset)
        self._make_room(start + len(data))
        try:
            self.file.write_at(data, start)
            self.file.write_at(batch.encode(), SECTOR_BYTES)
        except DiskFull:
            self._take_back(start)
            raise
        with final():
            self.file.sync()

    def settle(self, lsn: Lsn, offset: int) -> None:
        """Notes that everything up to ``lsn`` is durable, without waiting for that note to be so.

        Recovery can then tell a damaged entry from a torn one in the last batch too, unless the power fails
        within the seconds until the kernel writes it out.
        """
        # Recovery does without it. A copying file system may have no space for it.
        with contextlib.suppress(DiskFull):
            self.file.write_at(Watermark.settled(lsn, offset).encode(), SECTOR_BYTES)

    def seal(self, end_offset: int) -> None:
        """Cuts off the zeros, durably: the segment is complete.

        Raises:
            StorageFailed.
        """
        self._file_bytes = self.segment.byte_of(end_offset)
        with final():
            self.file.truncate(self._file_bytes)
            self.file.sync()

    def _make_room(self, end: int) -> None:
        if end <= self._file_bytes:
            return
        longest = self.segment.byte_of(boundary_behind(self.segment.header.first_offset))
        target = max(end, min(end + PREALLOCATED_BYTES, longest))
        self.file.write_at(bytes(target - self._file_bytes), self._file_bytes)
        self._file_bytes = target

    def _take_back(self, start: int) -> None:
        # Only where overwriting needs new space (a file system that copies on write). What was written must
        # be gone for good, or it would lie behind a shorter batch and look like the batch after it.
        self._file_bytes = start
        with final():
            self.file.truncate(start)
            self.file.sync()
