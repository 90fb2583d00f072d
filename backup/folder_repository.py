"""Backups in a folder, of this machine or of the network."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from understudy.backup.repository import SIZE_MAX, StoredObject, check_name, check_prefix, is_name
from understudy.common.errors import AlreadyStored, CorruptionError, NotStored, RepositoryError, StorageFailed
from understudy.common.files import open_regular, storage_errors, sync_directory

# Files that are being written. No object's name begins with a dot.
_TEMPORARY = ".writing-"
_GUARD = ".lock-guard"
_CREATE_ATTEMPTS = 10  # each fails only where somebody removes the folder just then
# What file systems without hard links say: FAT, and some of the network or in user space.
_NO_LINKS = frozenset(
    {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES}
)
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class FolderRepository:
    """A :class:`~understudy.backup.repository.Repository` whose objects are files.

    Args:
        url: as it was given.
        root: the folder.
    """

    def __init__(self, url: str, root: Path) -> None:
        self.url = url
        self._root = root

    def check_root(self) -> None:
        """Makes sure that the folder is there.

        Raises:
            RepositoryError: it is not.
        """
        if not self._root.is_dir():
            raise RepositoryError(
                f"there is no folder {self._root}",
                remedy="if it is on another disk or machine, mount that; for a new repository, make the folder",
            )

    def put(self, name: str, data: bytes) -> None:
        """Creates a file."""
        with self.upload(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def upload(self, name: str, *, expected_bytes: int = 0) -> Iterator[IO[bytes]]:
        """A file that gets its name when the block ends. An ``OSError`` in the block is taken for one of writing."""
        path = self._path(name)
        with self._errors("read", path):
            if path.exists():
                raise self._already_stored(name)
        with self._written(path) as (file, temporary):
            yield file
            _finish(file)
            if not self._name(temporary, path):
                raise self._already_stored(name)

    def read(self, name: str, size_max: int = SIZE_MAX) -> bytes:
        """A file's content."""
        with self.download(name) as file:
            data = file.read(size_max + 1)
        if len(data) > size_max:
            raise CorruptionError(f"{name} in {self.url} has more than {size_max:,} bytes")
        return data

    @contextlib.contextmanager
    def download(self, name: str) -> Iterator[IO[bytes]]:
        """An open file. An ``OSError`` in the block is taken for one of reading."""
        path = self._path(name)
        with self._errors("read", path), contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(open_regular(path))
            except _ABSENT:
                self.check_root()
                raise NotStored(f"there is no {name} in {self.url}") from None
            yield file

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """The files; what has another name than objects have is left out."""
        folder, slash, _ = check_prefix(prefix).rpartition("/")
        found = [one for one in self._files(folder + slash) if one.name.startswith(prefix)]
        return iter(sorted(found, key=lambda one: one.name))

    def delete(self, name: str) -> None:
        """Removes a file, durably."""
        path = self._path(name)
        with self._errors("remove", path), contextlib.suppress(*_ABSENT):
            path.unlink()
            _sync_if_there(path.parent)
            self._remove_empty(path.parent)
        self.check_root()

    def swap(self, name: str, data: bytes, expected: bytes | None) -> bool:
        """Compares and replaces while nobody else does."""
        path = self._path(name)
        with self._guard():
            try:
                found: bytes | None = self.read(name)
            except NotStored:
                found = None
            if found != expected:
                return False
            with self._written(path) as (file, temporary):
                file.write(data)
                _finish(file)
                os.rename(temporary, path)
            sync_directory(path.parent)
        return True

    def now_s(self) -> float:
        """What a file that is made now is dated from: on a network folder, by another machine's clock."""
        with self._written(self._root / "clock") as (file, _):
            return os.fstat(file.fileno()).st_mtime

    def sweep(self, older_than_s: float) -> None:
        """Removes files that were being written when a run was cut off."""
        now_s = self.now_s()
        for path in sorted(self._root.rglob(f"{_TEMPORARY}*")):
            with self._errors("remove", path), contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime <= now_s - older_than_s:
                    path.unlink()

    # -- below ----------------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        return self._root / check_name(name)

    def _already_stored(self, name: str) -> AlreadyStored:
        return AlreadyStored(f"there is a {name} in {self.url} already")

    @contextlib.contextmanager
    def _errors(self, action: str, path: Path) -> Iterator[None]:
        """Says so where it is not a file that is missing, but all."""
        try:
            with storage_errors(action, path):
                yield
        except StorageFailed:
            self.check_root()
            raise

    @contextlib.contextmanager
    def _written(self, path: Path) -> Iterator[tuple[IO[bytes], Path]]:
        """A new file beside ``path``, with its own path; it is removed in the end if it is still there."""
        temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
        with self._errors("write", path):
            fd = self._create(temporary)
            file = os.fdopen(fd, "wb")  # closed below: closing flushes, which fails again where it has failed
            try:
                yield file, temporary
            finally:
                with contextlib.suppress(OSError):
                    file.close()
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _create(self, path: Path) -> int:
        """A new file, with the folders above it, which others may remove as empty until it is there."""
        for attempts_left in reversed(range(_CREATE_ATTEMPTS)):
            try:
                self._make_folders(path.parent)
                return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                if not attempts_left:
                    raise
        raise AssertionError("the last attempt ends in one way or the other")

    def _make_folders(self, folder: Path) -> None:
        """Makes what is missing between the root and ``folder``, durably; never the root."""
        if folder == self._root or folder.is_dir():
            return
        self._make_folders(folder.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        _sync_if_there(folder.parent)

    def _remove_empty(self, folder: Path) -> None:
        """Removes folders in which nothing is left, up to the root; one that stays does no harm."""
        with contextlib.suppress(OSError):
            while folder != self._root:
                folder.rmdir()
                folder = folder.parent

    def _name(self, temporary: Path, path: Path) -> bool:
        """Gives a finished file its name, durably, unless another has it."""
        try:
            os.link(temporary, path)
        except FileExistsError:
            # On a network folder the answer may be lost, and asking again finds what the first request has made.
            if not os.path.samefile(temporary, path):
                return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not self._rename_new(temporary, path):
                return False
        sync_directory(path.parent)
        return True

    def _rename_new(self, temporary: Path, path: Path) -> bool:
        """As a link, where there are none: renaming would replace, so all who create take turns."""
        with self._guard():
            if path.exists():
                return False
            os.rename(temporary, path)
        return True

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Only one process at a time is in here. It ends with the process that holds it."""
        path = self._root / _GUARD
        with self._errors("lock", path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with self._errors("lock", path):
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _files(self, folder: str) -> Iterator[StoredObject]:
        path = self._root / folder
        try:
            with self._errors("list", path), os.scandir(path) as found:
                entries = list(found)
        except StorageFailed as error:
            if isinstance(error.__cause__, _ABSENT):
                return  # the root is there, but no such folder in it
            raise
        for entry in entries:
            if not is_name(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._files(f"{folder}{entry.name}/")
            elif entry.is_file(follow_symlinks=False):
                yield from self._stored(folder + entry.name, entry)

    def _stored(self, name: str, entry: os.DirEntry[str]) -> Iterator[StoredObject]:
        with (
            self._errors("list", Path(entry.path)),
            contextlib.suppress(FileNotFoundError),
        ):  # deleted meanwhile
            about = entry.stat(follow_symlinks=False)
            yield StoredObject(name, about.st_size, about.st_mtime)


def _sync_if_there(folder: Path) -> None:
    """Makes the names in a folder durable; others may have removed it, as it was empty."""
    try:
        sync_directory(folder)
    except StorageFailed as error:
        if not isinstance(error.__cause__, _ABSENT):  # by now they may have made it again
            raise


def _finish(file: IO[bytes]) -> None:
    """All is written: makes it durable."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
