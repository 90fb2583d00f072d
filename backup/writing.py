"""Files of a backup as they are written: each with its digest, and past the page cache.

The cache belongs to the servers of this machine: what is written once and not read again would only push their pages
out of it, and have to be brought to disk from there at once in the end.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import xxhash

from understudy.backup.contents import Member
from understudy.backup.manifest import FileEntry
from understudy.backup.progress import Meter
from understudy.common.files import OsFile, storage_errors

_BUFFER_BYTES = 4 << 20
_BUFFERS = 3  # one is filled while two are on their way to the disk
_BLOCK_BYTES = 4096  # what a write past the cache must begin at and consist of
_READ_BYTES = 1 << 20
_ZEROS = bytes(_BUFFER_BYTES)


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
        self._written = self._filled = self._current = 0
        # Memory of their own, because that begins where a page does.
        self._buffers = [mmap.mmap(-1, _BUFFER_BYTES) for _ in range(_BUFFERS)]
        self._under_way: list[Future[None] | None] = [None] * _BUFFERS
        self._threads = ThreadPoolExecutor(max_workers=_BUFFERS - 1, thread_name_prefix="backup-write")
        self._direct = _open_past_cache(self.path)
        try:
            self._file.truncate(file_bytes)
        except BaseException:
            self.close()
            raise

    def write(self, data: bytes) -> None:
        """Appends.

        Raises:
            DiskFull, StorageFailed.
        """
        self._digest.update(data)
        view = memoryview(data)
        while view:
            count = min(len(view), _BUFFER_BYTES - self._filled)
            self._buffers[self._current][self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == _BUFFER_BYTES:
                self._flush()

    def _flush(self) -> None:
        """Has the current buffer written, and waits until the next one can be filled."""
        number, count, at = self._current, self._filled, self._written
        self._under_way[number] = self._threads.submit(self._write_buffer, number, count, at)
        self._written, self._filled = at + count, 0
        self._current = (number + 1) % _BUFFERS
        self._wait_for(self._current)

    def _wait_for(self, number: int) -> None:
        under_way, self._under_way[number] = self._under_way[number], None
        if under_way is not None:
            under_way.result()

    def _write_buffer(self, number: int, count: int, at: int) -> None:
        with memoryview(self._buffers[number]) as whole, whole[:count] as data:
            if self._is_there(data, at):
                return
            direct = count - count % _BLOCK_BYTES if self._direct is not None else 0
            if direct:
                self._write_direct(data[:direct], at)
            if direct < count:
                self._file.write_at(bytes(data[direct:]), at + direct)

    def _is_there(self, data: memoryview, at: int) -> bool:
        if at < self._there:
            return self._file.read_at(len(data), at) == data
        return data == _ZEROS[: len(data)]

    def _write_direct(self, data: memoryview, at: int) -> None:
        assert self._direct is not None, "it was looked at before"
        with storage_errors("write", self.path):
            written = os.pwrite(self._direct, data, at)
        if written < len(data):  # a full disk, as a rule; the usual way says so
            self._file.write_at(bytes(data[written:]), at + written)

    def finish(self) -> FileEntry:
        """All is written: makes it durable and says what it is.

        Raises:
            DiskFull, StorageFailed.
        """
        if self._filled:
            self._flush()
        for number in range(_BUFFERS):
            self._wait_for(number)
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
        for buffer in self._buffers:
            buffer.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
            file = opened.enter_context(path.open("rb"))
        while True:
            with storage_errors("read", path):
                block = file.read(_READ_BYTES)
            if not block:
                return
            yield block
