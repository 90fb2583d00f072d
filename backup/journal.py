"""What was done to backups, line by line, in a text file for people."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from understudy.backup.side_lock import side_lock
from understudy.common.files import storage_errors, sync_directory

# What says more than this is cut: one line must not push all others out.
_LINE_CHARACTERS_MAX = 10_000


class Journal:
    """Lines with their times, the newest last; several processes may write at the same time.

    A file that is full becomes ``journal.1``, what was that ``journal.2``, and so on.

    Args:
        path: the file that is written; made with the first line.
        bytes_max: of one file.
        files: how many full ones are kept beside it.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        path: Path,
        *,
        bytes_max: int = 10_000_000,
        files: int = 5,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._bytes_max = bytes_max
        self._files = files
        self._clock = clock

    def write(self, line: str) -> None:
        """Appends ``line`` durably, as one line whatever is in it, or not at all.

        Raises:
            DiskFull, StorageFailed.
        """
        with side_lock(self._path):
            moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._clock()))
            data = f"{moment} {_one_line(line)}\n".encode()
            self._make_room(len(data))
            with storage_errors("write", self._path):
                is_new = not self._path.exists()
                fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    _append(fd, data)
                finally:
                    os.close(fd)
            if is_new:
                sync_directory(self._path.parent)

    def mark(self) -> tuple[int, int]:
        """What is another one once anybody has written a line; the file is not read."""
        try:
            about = self._path.stat()
        except OSError:  # there is none yet; whoever writes it says what else is wrong
            return 0, 0
        return about.st_ino, about.st_size

    def _full(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def _make_room(self, count: int) -> None:
        """Moves all files on by one if ``count`` bytes more would be too many for the one that is written."""
        with storage_errors("rotate", self._path):
            if not self._path.exists() or self._path.stat().st_size + count <= self._bytes_max:
                return
            for number in range(self._files, 1, -1):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self._full(number - 1), self._full(number))
            os.replace(self._path, self._full(1))


def _one_line(text: str) -> str:
    """``text`` with everything escaped that a terminal or a reader of lines would not show as one character."""
    if len(text) > _LINE_CHARACTERS_MAX:
        text = text[:_LINE_CHARACTERS_MAX] + "…"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _append(fd: int, data: bytes) -> None:
    size = os.fstat(fd).st_size
    if size and os.pread(fd, 1, size - 1) != b"\n":
        data = b"\n" + data  # a crash has cut off the last line
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, size)  # rather no line than half of one
        raise
