"""A pinned snapshot of an LMDB file in ranges with their digests, and the copy that is built from them.

The source pins a snapshot with a read transaction; from then on LMDB writes only pages that the snapshot does not
reach, so the file can be read range by range, in any order, while another process commits. Two kinds of pages do
change, and are not sent as they are:

* the two meta pages: the snapshot's own is read when it is pinned and stands for both (:func:`lone_meta_pages`);
* the pages that the snapshot lists as free: they are sent as zeros. Nothing reads them, what they held was
  deleted, and only so does a range have one digest for as long as it is pinned.

The receiver builds the copy under a name of its own and keeps beside it, in ``<name>.ranges``, which ranges are in
place, so that a transfer that broke off is taken up again::

    8 bytes   magic "USRANGES"
    4         format version, 1
    4         bytes in a range
    8         bytes in the file
    16        the snapshot's name
    16        XXH3-128 of the 40 bytes above
    16 * n    for each range its digest, XXH3-128, or zeros where it is not known to be in place

Integers are little-endian. A digest is written only after its range was written and synced, so it never says more
than the disk holds. Where the header does not fit the transfer at hand, all digests are dropped, and what is in the
copy counts only as far as its content has the digests that are asked for.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import os
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from understudy.common.errors import CorruptionError
from understudy.common.files import OsFile, publish, storage_errors, sync_directory
from understudy.common.snapshot_ranges import (
    RANGE_BYTES,
    RANGE_DIGEST_BYTES,
    FileRanges,
    count_ranges,
    digest_of_zeros,
    open_newest,
    range_digest,
)

# Each flush waits for the disk; what was written since the last one is fetched again after a power failure.
FLUSH_RANGES = 64
# What is read back is still in memory, as a rule, so that it takes processors and not the disk.
_READERS = 2

_MAGIC = b"USRANGES"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ16s")
_MARKS_AT = _HEADER.size + RANGE_DIGEST_BYTES
_NO_MARK = bytes(RANGE_DIGEST_BYTES)
# The file systems can't do it, or not with each other.
_NO_CLONING = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


class SnapshotCopy:
    """A copy of a pinned snapshot while it is being put together.

    May be used from several threads; they wait for each other. A method that runs while :meth:`close` is called
    ends after the range it is at.
    """

    def __init__(self, path: Path, file_bytes: int, data: OsFile, marks_file: OsFile, is_new: bool) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self.ranges = count_ranges(file_bytes)
        # Where it is, nothing of it can fit, and no digests are needed to find out what does.
        self.is_new = is_new
        self._data = data
        self._marks_file = marks_file
        self._marks = bytearray(marks_file.read_at(self.ranges * RANGE_DIGEST_BYTES, _MARKS_AT))
        self._written: dict[int, bytes] = {}  # since the last sync began
        self._syncing: tuple[dict[int, bytes], Future[None]] | None = None
        # So that what comes next is written while the disk is still busy with the last.
        self._syncer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot-sync")
        self._lock = threading.RLock()
        self._closed = False
        with storage_errors("open", path):
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # for what an OsFile does not offer

    @classmethod
    def open(cls, path: Path, *, snapshot: bytes, file_bytes: int) -> Self:
        """Begins a copy at ``path``, or goes on with what is there.

        Args:
            path: of the copy; its directory must exist.
            snapshot: the source's 16-byte name of the snapshot.
            file_bytes: how long the copy will be.

        Raises:
            DiskFull, StorageFailed.
        """
        header = _header(snapshot, file_bytes)
        side = _side_file(path)
        is_new = not path.exists()
        with contextlib.ExitStack() as opened:
            data = OsFile(path, create=is_new)
            opened.callback(data.close)
            data.truncate(file_bytes)
            if is_new or not _is_side_file(side, header, file_bytes):
                # After the copy itself: this makes both names durable.
                publish(side, header + bytes(_marks_bytes(file_bytes)))
            marks_file = OsFile(side, create=False)
            opened.callback(marks_file.close)
            copy = cls(path, file_bytes, data, marks_file, is_new)
            opened.pop_all()
        return copy

    def missing(self, digests: Sequence[bytes]) -> list[int]:
        """The ranges that are still to be fetched.

        Args:
            digests: what each range must have. Whatever is in the copy with another one does not count.

        Raises:
            CorruptionError: not as many digests as ranges.
            DiskFull, StorageFailed.
        """
        self._check_count(digests)
        with self._lock:
            self._end_sync()
            return [index for index, digest in enumerate(digests) if not self._has(index, digest)]

    def write(self, index: int, data: bytes, digest: bytes) -> None:
        """Puts a range in its place.

        Args:
            index: which.
            data: its content, as it came; empty where it is nothing but zeros.
            digest: what it must have, as the source says.

        Raises:
            CorruptionError: this is not that range; nothing was written, ask for it again.
            DiskFull, StorageFailed.
        """
        if not self._is_range(index, data, digest):
            raise CorruptionError(
                f"range {index} of {self.path} arrived damaged", remedy="it has to be fetched again"
            )
        with self._lock:
            self._check_open()
            self._put(index, data if data or self._is_hole(index) else bytes(self._length(index)), digest)

    def _is_range(self, index: int, data: bytes, digest: bytes) -> bool:
        if not 0 <= index < self.ranges:
            return False
        length = self._length(index)
        if not data:
            return digest == digest_of_zeros(length)
        return len(data) == length and digest == range_digest(data)

    def adopt(self, base: Path, digests: Sequence[bytes]) -> list[int]:
        """Takes what fits from a file that nobody writes to, and returns the ranges that are still to be fetched.

        Args:
            base: an LMDB file, such as a store that is to be replaced.
            digests: what each range must have.

        Raises:
            CorruptionError: not as many digests as ranges.
            DiskFull, StorageFailed.
        """
        rest = collections.deque(self.missing(digests))
        left = []
        # A damaged base is no reason not to replace it; what can't be taken from it is fetched.
        with self._lock, contextlib.suppress(CorruptionError), open_newest(base) as source:
            while rest and rest[0] < source.count:
                if not self._adopt_range(source, rest[0], digests[rest[0]]):
                    left.append(rest[0])
                rest.popleft()
        return [*left, *rest]

    def flush(self) -> None:
        """Makes durable what was written, and then the note that it is there."""
        with self._lock:
            self._check_open()
            self._begin_sync()
            self._end_sync()

    def finish(self) -> list[int]:
        """Makes the whole copy durable, reads it back, and removes the side file if all is as the source has it.

        Returns:
            The ranges that are not: they have to be fetched, and then this is to be called again.

        Raises:
            DiskFull, StorageFailed.
        """
        with self._lock:
            self._check_open()
            self._begin_sync()
            found = self._read_back()  # while the disk is busy with the last ones
            self._end_sync()
            bad = [index for index, digest in enumerate(found) if digest != self._mark(index)]
            for index in bad:
                self._set_mark(index, _NO_MARK)
        if not bad:
            side = _side_file(self.path)
            with storage_errors("remove", side):
                side.unlink()
            sync_directory(self.path.parent)
        return bad

    def _read_back(self) -> list[bytes]:
        """The digests of all ranges as they are in the file now."""

        def digests(first: int) -> list[bytes]:
            last = min(first + FLUSH_RANGES, self.ranges)
            return [range_digest(self._read(index)) for index in range(first, last)]

        with ThreadPoolExecutor(_READERS, thread_name_prefix="snapshot-read") as readers:
            parts = readers.map(digests, range(0, self.ranges, FLUSH_RANGES))
            return list(itertools.chain.from_iterable(parts))

    def close(self) -> None:
        """Closes the files. What was not flushed is looked at again when the copy is taken up again."""
        already_closed, self._closed = self._closed, True
        with self._lock:
            if not already_closed:
                self._syncer.shutdown()
                self._data.close()
                self._marks_file.close()
                os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one range -----------------------------------------------------------------------------------------

    def _has(self, index: int, digest: bytes) -> bool:
        self._check_open()
        if digest in (self._mark(index), self._written.get(index)):
            return True
        if self._is_hole(index):
            data, found = b"", digest_of_zeros(self._length(index))
        else:
            data = self._read(index)
            found = range_digest(data)
        if found == digest:
            # Written once more: an earlier sync may have failed, and then the disk need not have what we read.
            self._put(index, data, digest)
        return found == digest

    def _adopt_range(self, source: FileRanges, index: int, digest: bytes) -> bool:
        data = source.read(index)
        if range_digest(data) != digest:
            return False
        cloned = source.is_verbatim(index) and self._clone(source.fd, index)
        self._put(index, b"" if cloned else data, digest)
        return True

    def _put(self, index: int, data: bytes, digest: bytes) -> None:
        """Writes ``data``, empty where the range's content is there already, and notes that it is."""
        self._check_open()
        self._data.write_at(data, index * RANGE_BYTES)
        self._written[index] = digest
        if len(self._written) >= FLUSH_RANGES:
            self._begin_sync()

    def _clone(self, source_fd: int, index: int) -> bool:
        """Has the file system copy a range; some then share the blocks of both files."""
        start, left = index * RANGE_BYTES, self._length(index)
        try:
            while left:
                copied = os.copy_file_range(source_fd, self._fd, left, start, start)
                if not copied:
                    return False
                start, left = start + copied, left - copied
        except OSError as error:
            if error.errno in _NO_CLONING:
                return False
            with storage_errors("write", self.path):
                raise
        return True

    def _is_hole(self, index: int) -> bool:
        start = index * RANGE_BYTES
        try:
            return os.lseek(self._fd, start, os.SEEK_DATA) >= start + self._length(index)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return True  # nothing but a hole up to the end
            with storage_errors("read", self.path):
                raise

    def _read(self, index: int) -> bytes:
        self._check_open()
        return self._data.read_at(self._length(index), index * RANGE_BYTES)

    def _length(self, index: int) -> int:
        return min(RANGE_BYTES, self.file_bytes - index * RANGE_BYTES)

    # -- marks ---------------------------------------------------------------------------------------------

    def _begin_sync(self) -> None:
        self._end_sync()
        self._syncing = self._written, self._syncer.submit(self._data.sync)
        self._written = {}

    def _end_sync(self) -> None:
        """Waits for the sync under way, if any, and notes what it has made durable."""
        if self._syncing is None:
            return
        (written, synced), self._syncing = self._syncing, None
        try:
            synced.result()
        except BaseException:
            # The kernel may have dropped any page that was to be written by now, and reports it but once.
            self._written = {}
            raise
        for index, digest in written.items():
            self._set_mark(index, digest)

    def _mark(self, index: int) -> bytes:
        at = index * RANGE_DIGEST_BYTES
        return bytes(self._marks[at : at + RANGE_DIGEST_BYTES])

    def _set_mark(self, index: int, digest: bytes) -> None:
        at = index * RANGE_DIGEST_BYTES
        self._marks[at : at + RANGE_DIGEST_BYTES] = digest
        self._marks_file.write_at(digest, _MARKS_AT + at)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the copy is closed")

    def _check_count(self, digests: Sequence[bytes]) -> None:
        if len(digests) != self.ranges:
            raise CorruptionError(
                f"{len(digests)} digests came for the {self.ranges} ranges of {self.path}",
                remedy="they have to be fetched again",
            )


def _side_file(path: Path) -> Path:
    return path.with_name(path.name + ".ranges")


def _header(snapshot: bytes, file_bytes: int) -> bytes:
    fields = _HEADER.pack(_MAGIC, _VERSION, RANGE_BYTES, file_bytes, snapshot)
    return fields + range_digest(fields)


def _is_side_file(path: Path, header: bytes, file_bytes: int) -> bool:
    length = _MARKS_AT + _marks_bytes(file_bytes)
    with storage_errors("read", path):
        return _read(path, _MARKS_AT) == header and path.stat().st_size == length


def _marks_bytes(file_bytes: int) -> int:
    return count_ranges(file_bytes) * RANGE_DIGEST_BYTES


def _read(path: Path, length: int) -> bytes:
    """The beginning of a file, empty where there is no such file."""
    with storage_errors("read", path):
        try:
            with path.open("rb") as file:
                return file.read(length)
        except FileNotFoundError:
            return b""
