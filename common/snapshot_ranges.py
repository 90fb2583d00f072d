"""The ranges of an LMDB file's newest or pinned snapshot, as they are sent: see :mod:`understudy.common.snapshot`."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import xxhash

from understudy.common.errors import RESTORE, CorruptionError, Unavailable
from understudy.common.files import storage_errors
from understudy.common.lmdb_pages import Meta, free_pages, lone_meta_pages, read_metas

RANGE_BYTES = 1 << 20
RANGE_DIGEST_BYTES = 16
# Mapped at a time: what is mapped counts as this process's memory, though it is the page cache's.
_WINDOW_BYTES = 16 << 20
_POPULATE_READ = 22  # MADV_POPULATE_READ, of Linux 5.14
_ZEROS = memoryview(
    mmap.mmap(-1, RANGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
)


def range_digest(data: bytes) -> bytes:
    """XXH3-128, 16 bytes."""
    return xxhash.xxh3_128_digest(data)


@functools.lru_cache(maxsize=2)  # whole ranges, and the last one
def digest_of_zeros(length: int) -> bytes:
    """The digest of so many zeros, which are not sent."""
    return range_digest(bytes(length))


def count_ranges(file_bytes: int) -> int:
    """How many ranges a file has; the last one may be short."""
    return -(-file_bytes // RANGE_BYTES)


class FileRanges:
    """The ranges of one snapshot in an open file. From any thread; :meth:`close` waits for a read to end."""

    def __init__(self, fd: int, path: Path, meta: Meta, meta_page: bytes) -> None:
        self.meta = meta
        self.meta_pages = lone_meta_pages(meta_page, meta)
        self.count = count_ranges(meta.file_bytes)
        self.fd = fd
        self._path = path
        self._free: bytearray | None = None
        self._lock = threading.Lock()
        self._closed = False

    def read(self, index: int) -> bytes:
        """One range, see the module's docstring."""
        if not 0 <= index < self.count:
            raise IndexError(f"range {index} of {self.count}")
        with self._lock:
            if self._closed:
                raise Unavailable("that snapshot is not pinned any more", remedy="pin a new one")
            self._find_free()
            data = self._read_raw(index)
            return data if self.is_verbatim(index) else self._as_sent(index, bytearray(data))

    def pieces(self) -> Iterator[bytes | memoryview]:
        """All ranges one after the other, in pieces.

        A memoryview begins where a page of memory does, and stays as it is until :meth:`close`: pages of the snapshot
        are not copied.
        """
        self._find_free()
        for start in range(0, self.meta.file_bytes, _WINDOW_BYTES):
            end = min(start + _WINDOW_BYTES, self.meta.file_bytes)
            window = self._map(start, end)
            if window is None:
                yield from map(self.read, range(start // RANGE_BYTES, count_ranges(end)))
            else:
                yield from self._window_pieces(window, start, end)

    def _map(self, start: int, end: int) -> memoryview | None:
        """The file's bytes as they lie in memory; None where they have to be read."""
        try:
            window = mmap.mmap(self.fd, end - start, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=start)
            # A page that the disk does not give ends the process that looks at it. Here that is an error, which reading
            # gives a name to.
            window.madvise(_POPULATE_READ)
        except (OSError, ValueError):  # ValueError: the file is shorter
            return None
        return memoryview(window)

    def _window_pieces(self, window: memoryview, start: int, end: int) -> Iterator[bytes | memoryview]:
        at = start
        if at == 0:
            yield self.meta_pages
            at = len(self.meta_pages)
        while at < end:
            is_free, run_end = self._run(at, end)
            yield _ZEROS[: run_end - at] if is_free else window[at - start : run_end - start]
            at = run_end

    def _run(self, at: int, end: int) -> tuple[bool, int]:
        """Whether the page at a byte is free, and up to where all are alike, within a range at the most."""
        assert self._free is not None, "the list was read"
        page_bytes = self.meta.page_bytes
        first, last = at // page_bytes, min(at + RANGE_BYTES, end) // page_bytes
        is_free = bool(self._free[first])
        found = self._free.find(not is_free, first, last)
        return is_free, (last if found < 0 else found) * page_bytes

    def _as_sent(self, index: int, data: bytearray) -> bytes:
        for first, last in self._free_runs(index):
            data[first:last] = bytes(last - first)
        if index == 0:
            data[: len(self.meta_pages)] = self.meta_pages
        return bytes(data)

    def is_verbatim(self, index: int) -> bool:
        """Whether a range that was read is, byte for byte, what the file has."""
        return index > 0 and next(self._free_runs(index), None) is None

    def _find_free(self) -> None:
        # Not when opening: where millions of pages are free, this takes a second.
        if self._free is None:
            self._free = free_pages(self.fd, self.meta, self._path)

    def _read_raw(self, index: int) -> bytes:
        start = index * RANGE_BYTES
        length = min(RANGE_BYTES, self.meta.file_bytes - start)
        with storage_errors("read", self._path):
            data = os.pread(self.fd, length, start)
            while len(data) < length and (more := os.pread(self.fd, length - len(data), start + len(data))):
                data += more
        self._check_end(start + len(data), start + length)
        return data.ljust(length, b"\0")  # pages that are missing at the end are free

    def _check_end(self, end: int, wanted: int) -> None:
        # LMDB never writes pages that a transaction takes and gives back, so the last ones may be missing.
        page_bytes = self.meta.page_bytes
        missing = self._free_between(end // page_bytes, wanted // page_bytes)
        if not all(missing):
            raise CorruptionError(
                f"{self._path} was cut off at {end} bytes",
                remedy=RESTORE,
            )

    def _free_between(self, first: int, last: int) -> bytes:
        return bytes(self._free[first:last]) if self._free is not None else b""

    def _free_runs(self, index: int) -> Iterator[tuple[int, int]]:
        """Runs of free pages in a range, as offsets into it."""
        page_bytes = self.meta.page_bytes
        pages = RANGE_BYTES // page_bytes
        free = self._free_between(index * pages, (index + 1) * pages)
        first = free.find(1)
        while first >= 0:
            last = free.find(0, first)
            last = len(free) if last < 0 else last
            yield first * page_bytes, last * page_bytes
            first = free.find(1, last)

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self.fd)


@contextlib.contextmanager
def open_newest(path: Path) -> Iterator[FileRanges]:
    """The newest snapshot of a file that nobody writes to."""
    with storage_errors("open", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        meta, page = max(read_metas(fd, path), key=lambda found: found[0].txn_id)
        yield FileRanges(fd, path, meta, page)
    finally:
        os.close(fd)
