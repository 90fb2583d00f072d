"""The file layer: everything that writes files durably goes through here, so that tests can make it fail.

``FileSystem`` is the port; ``OsFileSystem`` the real one. Errors of the operating system are translated here,
once: no space is :class:`DiskFull` (nothing was promised yet), anything else :class:`StorageFailed`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from understudy.common.errors import DiskFull, StorageFailed

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NAME_BYTES_MAX = 255  # of one file's, on all usual file systems
_RANDOM_BYTES = 8


@contextlib.contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Turns an ``OSError`` into one of ours that says what was being done to which file."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise DiskFull(
                f"no space left to {action} {path}", remedy="free some space, then try again"
            ) from error
        raise StorageFailed(f"can't {action} {path}: {error.strerror}") from error


class WritableFile(Protocol):
    """A file opened for reading and writing at offsets."""

    def write_at(self, data: bytes, offset: int) -> None:
        """Writes all of ``data``."""

    def read_at(self, length: int, offset: int) -> bytes:
        """Up to ``length`` bytes; fewer only at the end of the file."""

    def size(self) -> int:
        """The file's length in bytes."""

    def truncate(self, length: int) -> None:
        """Cuts or extends the file."""

    def sync(self) -> None:
        """Makes content and length durable (``fdatasync``)."""

    def close(self) -> None:
        """Closes the file; it can't be used afterwards."""


class FileSystem(Protocol):
    """What the change-log needs of a file system."""

    def open(self, path: Path, *, create: bool = False) -> WritableFile:
        """Opens ``path`` for reading and writing; ``create`` makes it and fails if it is there."""

    def names(self, directory: Path) -> list[str]:
        """The names in a directory, sorted."""

    def remove(self, path: Path) -> None:
        """Removes a file."""

    def sync_directory(self, path: Path) -> None:
        """Makes the names in a directory durable."""


class OsFile:
    """A file of the operating system."""

    def __init__(self, path: Path, *, create: bool) -> None:
        self._path = path
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        with storage_errors("open", path):
            self._fd = os.open(path, flags, 0o600)

    def write_at(self, data: bytes, offset: int) -> None:
        """Writes all of ``data``; a short write is continued."""
        view = memoryview(data)
        with storage_errors("write", self._path):
            while view:
                written = os.pwrite(self._fd, view, offset)
                view = view[written:]
                offset += written

    def read_at(self, length: int, offset: int) -> bytes:
        """Up to ``length`` bytes; fewer only at the end of the file."""
        with storage_errors("read", self._path):
            data = os.pread(self._fd, length, offset)
            while len(data) < length:
                more = os.pread(self._fd, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        return data

    def size(self) -> int:
        """The file's length in bytes."""
        return os.fstat(self._fd).st_size

    def truncate(self, length: int) -> None:
        """Cuts or extends the file."""
        with storage_errors("truncate", self._path):
            os.ftruncate(self._fd, length)

    def sync(self) -> None:
        """``fdatasync``."""
        with storage_errors("sync", self._path):
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)


class OsFileSystem:
    """The operating system's files."""

    def open(self, path: Path, *, create: bool = False) -> OsFile:
        """Opens or creates a file."""
        return OsFile(path, create=create)

    def names(self, directory: Path) -> list[str]:
        """The names in a directory, sorted."""
        with storage_errors("list", directory):
            return sorted(os.listdir(directory))

    def remove(self, path: Path) -> None:
        """Removes a file."""
        with storage_errors("remove", path):
            path.unlink()

    def sync_directory(self, path: Path) -> None:
        """``fsync`` of the directory."""
        sync_directory(path)


def sync_directory(path: Path) -> None:
    """Makes the names in ``path`` durable."""
    with storage_errors("sync", path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def open_regular(path: Path) -> IO[bytes]:
    """Opens a file to read it; what else has that name is an ``OSError``, as opening a pipe waits for a writer."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path.open("rb")


def publish(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replaces ``path`` by ``data``, so that after a crash it holds either the old or the new bytes, whole."""
    with publishing(path, mode=mode, beside=beside_ours(path)) as file:
        file.write(data)


@contextlib.contextmanager
def publishing(path: Path, *, mode: int = 0o600, beside: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path`` when the block ends: whole, durable, or not at all.

    If anything fails, here or in the block, nothing is left of it; what a kill leaves is removed by whoever publishes
    to that name next. An ``OSError`` in the block is taken for one of writing.

    Args:
        path: the file's name.
        mode: its permissions, less the umask.
        beside: its name until then, in the same directory. If not given, a hidden one that nobody has.

    Raises:
        DiskFull, StorageFailed.
    """
    with storage_errors("write", path), contextlib.ExitStack() as held:
        if beside is None:
            _remove_leftovers(path)
            beside, fd = _begin_hidden(path, mode)
            # Its lock stays until it has been renamed, though it is closed before.
            held.callback(os.close, os.dup(fd))
        else:
            fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        file = os.fdopen(fd, "wb")  # closed below: when, and what then fails, depends on how the block ends
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.rename(beside, path)
        except BaseException:
            # Closing flushes, which fails again where it has failed before; why is on its way already.
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
    sync_directory(path.parent)


def _begin_hidden(path: Path, mode: int) -> tuple[Path, int]:
    """A new file beside ``path`` that nobody else has, locked as long as it is open: its name, and it itself."""
    while True:  # once more for each of the others that look for leftovers at just this moment
        # The random part keeps everybody's files, and other exports to this name, out of each other's way.
        beside = path.with_name(_hidden_prefix(path) + secrets.token_hex(_RANDOM_BYTES))
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                return beside, fd
        except BlockingIOError:
            pass  # taken for a leftover before it was locked, and removed
        except OSError:  # no locks on this file system, so that nobody takes it for a leftover
            return beside, fd
        os.close(fd)


def _hidden_prefix(path: Path) -> str:
    """What the names of hidden files beside ``path`` begin with; for nobody else's but by a collision of digests."""
    prefix = f".{path.name}-"
    if len(os.fsencode(prefix)) + 2 * _RANDOM_BYTES <= _NAME_BYTES_MAX:
        return prefix
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}-"


def _remove_leftovers(path: Path) -> None:
    """Removes the hidden files beside ``path`` whose writers were killed; what can't be removed stays."""
    pattern = re.escape(_hidden_prefix(path)) + f"[0-9a-f]{{{2 * _RANDOM_BYTES}}}"
    is_hidden_part = re.compile(pattern).fullmatch
    with contextlib.suppress(OSError):
        for name in filter(is_hidden_part, os.listdir(path.parent)):
            _remove_if_left(path.with_name(name))


def _remove_if_left(part: Path) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(part, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error while its writer lives
                os.unlink(part)
        finally:
            os.close(fd)


def beside_ours(path: Path) -> Path:
    """Where a file of a data directory is written until it is published.

    Always the same name, since nobody else writes there: what a crash leaves is overwritten by the next attempt
    instead of staying for ever.
    """
    return path.with_name(path.name + ".new")


def sync_tree(root: Path) -> None:
    """Makes every file and name below ``root`` durable."""
    for folder, _, files in os.walk(root):
        for name in files:
            path = Path(folder) / name
            with storage_errors("sync", path):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        sync_directory(Path(folder))
