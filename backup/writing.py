"""Files of a backup as they are written: each with its digest, and the disk kept busy meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from understudy.backup.contents import Member
from understudy.backup.manifest import FileEntry
from understudy.backup.progress import Meter
from understudy.common.files import OsFile, storage_errors

# What was written since then is brought to disk in the background, so that the last sync has little left to do.
_SYNC_BYTES = 64 << 20
_HASH_BYTES = 1 << 20


class FileWriter:
    """A new file, or one that an attempt before has left, written from its beginning to its end.

    What is there already, byte for byte, is not written again; runs of zeros that reach beyond the file's end are
    left as a hole. Hashing and syncing go on in the background.

    Args:
        root: the backup's directory.
        name: the file's path in it, with slashes.
        file_bytes: how long it will be.
    """

    def __init__(self, root: Path, name: str, file_bytes: int) -> None:
        self.path = root / name
        self._name = name
        self._sha256 = hashlib.sha256()
        with storage_errors("create", self.path):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_new = not self.path.exists()
        self._file = OsFile(self.path, create=is_new)
        self._there = 0 if is_new else self._file.size()  # bytes that may be right already
        self._at = self._unsynced = 0
        self._hashed: Future[None] | None = None
        self._synced: Future[None] | None = None
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="backup-write")
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
        if self._hashed is not None:
            self._hashed.result()
        self._hashed = self._threads.submit(self._sha256.update, data)
        if not self._is_there(data):
            self._file.write_at(data, self._at)
            self._unsynced += len(data)
        self._at += len(data)
        if self._unsynced >= _SYNC_BYTES:
            self._wait_for_sync()
            self._unsynced = 0
            self._synced = self._threads.submit(self._sync)

    def _is_there(self, data: bytes) -> bool:
        if self._at >= self._there:
            return not data.strip(b"\0")
        return self._file.read_at(len(data), self._at) == data

    def _sync(self) -> None:
        try:
            self._file.sync()
        except BaseException:
            # What is read from the file is not what is on disk then, and says nothing to a later attempt.
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise

    def _wait_for_sync(self) -> None:
        if self._synced is not None:
            self._synced.result()

    def finish(self) -> FileEntry:
        """All is written: makes it durable and says what it is.

        Raises:
            DiskFull, StorageFailed.
        """
        self._wait_for_sync()
        self._sync()
        if self._hashed is not None:
            self._hashed.result()
        return FileEntry(path=self._name, bytes=self._at, sha256=self._sha256.hexdigest())

    def close(self) -> None:
        """Closes the file, finished or not."""
        self._threads.shutdown()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    sha256, count = hashlib.sha256(), 0
    for block in read_blocks(root / name):
        sha256.update(block)
        count += len(block)
    return FileEntry(path=name, bytes=count, sha256=sha256.hexdigest())


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
                block = file.read(_HASH_BYTES)
            if not block:
                return
            yield block
