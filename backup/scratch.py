"""Folders for drills, and for realms on their way into a server: removed afterwards, and after a kill by the next."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from understudy.common.directory import DataDirectory
from understudy.common.errors import DirectoryInUse, UnderstudyError
from understudy.common.files import storage_errors

PREFIX = ".drill-"
_NAME = re.compile(rf"{re.escape(PREFIX)}[0-9a-f]{{8}}\Z")
# In each of these folders, so that none that is somebody else's is taken for one.
_MARK = "understudy-scratch"
_DATA = "data"


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """The place of a data directory, which is absent: in a folder of ``parent`` that is removed with all in it.

    Whatever killed drills have left in ``parent`` is removed first.

    Raises:
        DiskFull, StorageFailed.
    """
    _sweep(parent)
    folder, fd = _claim(parent)
    try:
        yield folder / _DATA
    finally:
        try:
            _delete(folder)
        except BaseException:  # Ctrl-C, also a second time: nobody wants what lies there in plain to stay
            _delete(folder)
            raise
        finally:
            os.close(fd)


def _claim(parent: Path) -> tuple[Path, int]:
    """A new folder and the lock on it: whoever holds none finds out that its owner is gone."""
    while True:
        folder = parent / f"{PREFIX}{secrets.token_hex(4)}"
        with storage_errors("create", folder):
            folder.mkdir(mode=0o700)
        fd = _lock(folder)
        if fd is None:
            continue  # another drill, which sweeps just now, took it for left over
        if folder.exists():
            with storage_errors("create", folder):
                (folder / _MARK).touch(mode=0o600)
            return folder, fd
        os.close(fd)


def _lock(folder: Path) -> int | None:
    """The folder's lock; None if somebody has it, or the folder is gone."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _sweep(parent: Path) -> None:
    with storage_errors("list", parent):
        folders = [path for path in parent.iterdir() if _NAME.match(path.name)]
    for folder in folders:
        fd = _lock(folder)
        if fd is not None:
            try:
                _remove(folder)
            finally:
                os.close(fd)


def _remove(folder: Path) -> None:
    """Removes it, unless the server that a killed drill had started there is still ending: the next one will."""
    if not (folder / _MARK).exists():
        with contextlib.suppress(OSError):
            folder.rmdir()  # killed before it was marked, if it is one; what holds anything stays
        return
    try:
        if (folder / _DATA).exists():
            DataDirectory.open_unfinished(folder / _DATA).close()
    except DirectoryInUse:
        return
    except UnderstudyError:
        pass  # whatever is wrong with it
    _delete(folder)


def _delete(folder: Path) -> None:
    """The mark last: what is cut off here can be told afterwards, too."""
    shutil.rmtree(folder / _DATA, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
