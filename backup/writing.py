"""Files of a backup as they are written: each with its digest, and past the page cache.

The cache belongs to the servers of this machine: what is written once and not read again would only push their pages
out of it, and have to be brought to disk from there at once in the end.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import xxhash

from understudy.backup.contents import Member
from understudy.backup.manifest import FileEntry
from understudy.backup.progress import Meter
from understudy.common.files import OsFile, open_regular, storage_errors

_BATCH_BYTES = 4 << 20  # of one write; a server's fdatasync waits for all that are under way
_PIECES_MAX = os.sysconf("SC_IOV_MAX") - 1  # of one write; one more may be open
_UNDER_WAY_MAX = 2
_BUFFERS = _UNDER_WAY_MAX + 1  # one is filled while the others are on their way to the disk
_BLOCK_BYTES = 4096  # what a write past the cache must begin at and consist of
_HOLE_BYTES_MIN = 1 << 20  # smaller holes would only cut writes into small ones
_READ_BYTES = 1 << 20
_ZEROS = bytes(_BATCH_BYTES)


class FileWriter:
    """A new file, or one that an attempt before has left, written from its beginning to its end.

    What is there already, byte for byte, is not written again, and what is all zeros is left as a hole.

    Args:
        root: the backup's directory.
        name: the file's path in it, with slashes.
        file_bytes: how long it will be.
    """

    def __init__(self, root: Path, name: str, file_bytes: int) -> None:
        self.path = root / name
        self._name = name
        self._digest = xxhash.xxh3_128()
        with storage_errors("create", self.path):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_new = not self.path.exists()
        self._file = OsFile(self.path, create=is_new)
        self._there = 0 if is_new else self._file.size()  # bytes that may be right already
        self._written = 0  # bytes that were handed to the threads
        self._batch: list[memoryview] = []  # what comes behind them
        self._batch_bytes = 0
        self._buffers = deque(_buffer() for _ in range(_BUFFERS))  # the first is being filled
        self._filled = self._taken = 0  # of its bytes; those that are in the batch
        self._under_way: deque[Future[None]] = deque()
        self._threads = ThreadPoolExecutor(max_workers=_UNDER_WAY_MAX, thread_name_prefix="backup-write")
        self._direct = _open_past_cache(self.path)
        try:
            self._file.truncate(file_bytes)
        except BaseException:
            self.close()
            raise

    def write(self, data: bytes | memoryview) -> None:
        """Appends; see :class:`Member` for what a memoryview is.

        Raises:
            DiskFull, StorageFailed.
        """
        self._digest.update(data)
        end = self._written + self._batch_bytes + self._filled - self._taken
        if isinstance(data, memoryview) and not end % _BLOCK_BYTES and not len(data) % _BLOCK_BYTES:
            self._take_filled()
            self._take(data)
            if self._batch_bytes >= _BATCH_BYTES or len(self._batch) >= _PIECES_MAX:
                self._flush()
        else:
            self._copy(memoryview(data))

    def _copy(self, data: memoryview) -> None:
        while data:
            count = min(len(data), _BATCH_BYTES - self._filled)
            self._buffers[0][self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == _BATCH_BYTES:
                self._flush()

    def _take_filled(self) -> None:
        """What was copied since the last piece becomes one."""
        if self._taken < self._filled:
            self._take(self._buffers[0][self._taken : self._filled])
            self._taken = self._filled

    def _take(self, piece: memoryview) -> None:
        self._batch.append(piece)
        self._batch_bytes += len(piece)

    def _flush(self) -> None:
        """Has all that was appended written, and waits until the next buffer can be filled."""
        self._take_filled()
        if len(self._under_way) == _UNDER_WAY_MAX:
            self._under_way.popleft().result()
        self._under_way.append(self._threads.submit(self._write_batch, self._batch, self._written))
        self._written += self._batch_bytes
        self._batch, self._batch_bytes = [], 0
        self._buffers.rotate(-1)
        self._filled = self._taken = 0

    def _write_batch(self, batch: list[memoryview], at: int) -> None:
        missing: list[memoryview] = []
        for piece in batch:
            if self._is_there(piece, at):
                self._write_pieces(missing, at)
                missing = []
            else:
                missing.append(piece)
            at += len(piece)
        self._write_pieces(missing, at)

    def _is_there(self, piece: memoryview, at: int) -> bool:
        if at < self._there:
            return self._file.read_at(len(piece), at) == bytes(piece)
        # Compared as bytes since memoryviews are compared byte by byte, which would take longer than to write them.
        return len(piece) >= _HOLE_BYTES_MIN and not piece[0] and bytes(piece) == _ZEROS[: len(piece)]

    def _write_pieces(self, pieces: list[memoryview], end: int) -> None:
        """Writes what lies before byte ``end``."""
        at = end - sum(map(len, pieces))
        written = self._write_direct(pieces, at) if self._direct is not None else 0
        # The end of a file, or a full disk, as a rule; the usual way says so.
        for piece in pieces:
            if written < len(piece):
                self._file.write_at(bytes(piece[written:]), at + written)
            written = max(written - len(piece), 0)
            at += len(piece)

    def _write_direct(self, pieces: list[memoryview], at: int) -> int:
        """Writes as many whole blocks as it can; says how many bytes that were."""
        if not pieces:
            return 0
        assert self._direct is not None, "it was looked at before"
        *whole, last = pieces
        with storage_errors("write", self.path):
            return os.pwritev(self._direct, [*whole, last[: len(last) // _BLOCK_BYTES * _BLOCK_BYTES]], at)

    def finish(self) -> FileEntry:
        """All is written: makes it durable and says what it is.

        Raises:
            DiskFull, StorageFailed.
        """
        self._flush()
        while self._under_way:
            self._under_way.popleft().result()
        try:
            self._file.sync()
        except BaseException:
            # What is read from the file is not what is on disk then, and says nothing to a later attempt.
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise
        return FileEntry(path=self._name, bytes=self._written, xxh3=self._digest.hexdigest())

    def close(self) -> None:
        """Closes the file, finished or not."""
        self._threads.shutdown()
        if self._direct is not None:
            os.close(self._direct)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _buffer() -> memoryview:
    """Memory that begins where a page does, of huge pages where there are any: the disk takes those twice as fast."""
    memory = mmap.mmap(-1, _BATCH_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def _open_past_cache(path: Path) -> int | None:
    """A descriptor that writes past the page cache; None where the file system has no such thing."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        with storage_errors("open", path):
            raise


def write_member(root: Path, member: Member, meter: Meter) -> FileEntry:
    """Writes a member of a backup below ``root``, durably but for its name.

    Raises:
        DiskFull, StorageFailed, and what reading the member raises.
    """
    with FileWriter(root, member.name, member.size) as file:
        for piece in meter.metered(member.pieces):
            file.write(piece)
        return file.finish()


def describe_file(root: Path, name: str) -> FileEntry:
    """Reads a file of a backup for what its manifest says of it.

    Raises:
        StorageFailed: it can't be read.
    """
    digest, count = xxhash.xxh3_128(), 0
    for block in read_blocks(root / name):
        digest.update(block)
        count += len(block)
    return FileEntry(path=name, bytes=count, xxh3=digest.hexdigest())


def read_blocks(path: Path) -> Iterator[bytes]:
    """A file's content, in pieces.

    Raises:
        StorageFailed: it can't be read.
    """
    with contextlib.ExitStack() as opened:
        with storage_errors("read", path):
            file = opened.enter_context(open_regular(path))
        while True:
            with storage_errors("read", path):
                block = file.read(_READ_BYTES)
            if not block:
                return
            yield block
