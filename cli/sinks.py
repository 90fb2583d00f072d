"""Where exported pairs go: standard output, a file of JSON lines, a tree of files.

A sink is a context manager; what it makes appears under its name when the block ends without an error, whole and
durable, and not at all otherwise.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

from understudy.cli.json_lines import encode_pair
from understudy.cli.output import printable
from understudy.common.errors import DiskFull, UnderstudyError, UsageError
from understudy.common.files import publishing, storage_errors, sync_directory


class Sink(AbstractContextManager["Sink"], Protocol):
    """Takes pairs in the order of their keys."""

    def write(self, key: bytes, value: bytes) -> None:
        """Takes one pair.

        Raises:
            UnderstudyError: it can't be held.
        """


class StandardOutput(Sink):
    """JSON lines on standard output."""

    def __init__(self) -> None:
        self._file = sys.stdout.buffer

    def write(self, key: bytes, value: bytes) -> None:
        """Writes one line."""
        self._file.write(encode_pair(key, value) + b"\n")

    def __exit__(self, *_: object) -> None:
        self._file.flush()


class FileSink(Sink):
    """A file of JSON lines, written beside its name and then renamed.

    Args:
        path: its name.
        replace: whether it may take the place of a file of that name.
        mode: its permissions, of which the umask takes away.
    """

    def __init__(self, path: Path, *, replace: bool = False, mode: int = 0o666) -> None:
        self._path = path
        self._replace = replace
        self._mode = mode
        self._opened = contextlib.ExitStack()
        self._file: IO[bytes]

    def __enter__(self) -> FileSink:
        self._check_free()
        self._file = self._opened.enter_context(publishing(self._path, mode=self._mode))
        self._opened.push(self._check_still_free)
        return self

    def _check_free(self) -> None:
        with storage_errors("write", self._path):
            if self._path.exists() and not self._path.is_file():  # a rename would take a device's place, too
                raise UsageError(f"{self._path} is not a file")
            if os.path.lexists(self._path) and not self._replace:
                raise UsageError(f"{self._path} is there already", remedy="--force replaces it")

    def _check_still_free(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._check_free()  # the export may have taken long

    def write(self, key: bytes, value: bytes) -> None:
        """Writes one line."""
        with storage_errors("write", self._path):
            self._file.write(encode_pair(key, value) + b"\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)


class TreeSink(Sink):
    """A tree of files: the key is a file's path, the value its bytes. Made beside its name and then renamed."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._part = self._root

    def __enter__(self) -> TreeSink:
        # In an empty directory of our own no link can lead elsewhere.
        with storage_errors("write", self._root):
            if self._root.is_symlink() or (self._root.exists() and not self._root.is_dir()):
                raise UsageError(f"{self._root} is not a directory")
            if self._root.exists() and any(self._root.iterdir()):
                raise UsageError(f"{self._root} is not empty", remedy="give an absent or empty directory")
            self._root.parent.mkdir(parents=True, exist_ok=True)
            self._part = Path(tempfile.mkdtemp(prefix=f".{self._root.name}-", dir=self._root.parent))
        return self

    def write(self, key: bytes, value: bytes) -> None:
        """Writes one file.

        Raises:
            UnderstudyError: the key is no safe relative path, or can't be a file's beside the others.
        """
        path = self._part / os.fsdecode(check_relative(key))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise UnderstudyError(
                f"key {printable(key)} can't be a file: another key is a path above or below it",
                remedy=_AS_LINES,
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"no space left to write below {self._root}") from error
            raise UnderstudyError(
                f"key {printable(key)} can't be written as a file: {error.strerror}", remedy=_AS_LINES
            ) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                os.sync()  # once for all: an fsync each takes a minute for every 50,000 small files
                with storage_errors("write", self._root):
                    self._part.chmod(0o777 & ~_umask())  # mkdtemp's is for its owner only
                    self._part.rename(self._root)
                sync_directory(self._root.parent)
        finally:
            shutil.rmtree(self._part, ignore_errors=True)


_AS_LINES = "export JSON lines instead, which hold any key"


def check_relative(key: bytes) -> bytes:
    """``key`` if it is a path that stays below the directory that it is put into.

    Raises:
        UnderstudyError: with what is wrong.
    """
    if b"\0" in key:
        why = "it has a zero byte"
    elif key.startswith(b"/"):
        why = "it begins with /"
    elif any(part in (b"", b".", b"..") for part in key.split(b"/")):
        why = "a part of it is empty, . or .."
    else:
        return key
    raise UnderstudyError(f"key {printable(key)} is not a safe relative path: {why}", remedy=_AS_LINES)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
