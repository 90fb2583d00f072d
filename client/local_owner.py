"""Who has a client's directory: one process at a time, known by name, and where the directory lies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from understudy.client.local_layout import OWNER_FILE
from understudy.common.errors import DirectoryInUse
from understudy.common.files import storage_errors
from understudy.common.store_layout import DATA_FILE

_LOCK_BYTES = 128  # always as long, so that a full disk has room for it
# Whoever asks who has the directory holds the lock for a moment; a process that was killed, until it is gone.
_LOCK_WAIT_S = 1.0
_LOCK_POLL_S = 0.01
_RELAXED = "relaxed"
_DURABLE = "durable"


@dataclass(frozen=True, slots=True)
class Owner:
    """The lock that says that this process has the directory, and what its last owner left in it."""

    fd: int
    left_by: list[str]  # pid, boot, durability; empty after a clean close

    @property
    def was_relaxed(self) -> bool:
        """Whether LMDB wrote without order, and nobody has seen to it that everything is on disk."""
        return len(self.left_by) == 3 and self.left_by[2] == _RELAXED

    @property
    def may_be_damaged(self) -> bool:
        """Whether the machine stopped meanwhile, too."""
        return self.was_relaxed and self.left_by[1] != _boot()

    def declare(self, *, relaxed: bool) -> None:
        """Says how this process writes. What it found is on disk by now."""
        self.write(_boot(), _RELAXED if relaxed else _DURABLE)

    def write(self, boot: str, durability: str) -> None:
        """Writes what the next owner is told."""
        self._put(f"{os.getpid()} {boot} {durability}")
        os.fsync(self.fd)  # after a power loss it has to tell that there was no clean close

    def release(self, *, clean: bool) -> None:
        """Gives the directory up; ``clean``: everything is on disk."""
        if clean:
            self._put("")
        os.close(self.fd)

    def _put(self, text: str) -> None:
        os.pwrite(self.fd, text.ljust(_LOCK_BYTES).encode(), 0)


def take(path: Path) -> Owner:
    """Makes this process the directory's owner. The lock goes on telling what is to be made good until it is.

    Raises:
        DirectoryInUse: another one is.
    """
    with storage_errors("create", path / OWNER_FILE):
        fd = os.open(path / OWNER_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(path, fd)
        owner = Owner(fd, _said(fd))
        boot, durability = (owner.left_by[1], _RELAXED) if owner.was_relaxed else (_boot(), _DURABLE)
        with storage_errors("write", path / OWNER_FILE):
            owner.write(boot, durability)
        return owner
    except BaseException:
        os.close(fd)
        raise


def _lock(path: Path, fd: int) -> None:
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if _is_running(_said(fd)) or time.monotonic() > deadline:
                raise _in_use(path, fd) from None
            time.sleep(_LOCK_POLL_S)


def _is_running(said: list[str]) -> bool:
    return bool(said) and Path(f"/proc/{said[0]}").exists()


def _in_use(path: Path, fd: int) -> DirectoryInUse:
    pid = (_said(fd) or ["?"])[0]
    if pid == str(os.getpid()):
        return DirectoryInUse(f"{path} is in use by this very process", remedy="use what is open already")
    return DirectoryInUse(f"{path} is in use by process {pid}", remedy="stop it, or give another directory")


def owner_pid(path: Path) -> int | None:
    """The process that has the directory open, 0 where it does not say; None where none has."""
    try:
        fd = os.open(path / OWNER_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = (_said(fd) or ["?"])[0]
        return int(pid) if pid.isdigit() else 0
    else:
        return None
    finally:
        os.close(fd)


def _said(fd: int) -> list[str]:
    return os.pread(fd, 256, 0).decode("ascii", "replace").split()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keeps the environment from being replaced by a compacted one, for a process that only reads."""
    with _directory_lock(path, fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """For as long as the environment is being replaced: LMDB's lock file belongs to one environment only.

    Raises:
        DirectoryInUse: another process reads it.
    """
    try:
        with _directory_lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            yield
    except BlockingIOError:
        raise DirectoryInUse(f"{path} is being read by another process", remedy="try again later") from None


@contextlib.contextmanager
def _directory_lock(path: Path, kind: int) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, kind)
        yield
    finally:
        os.close(fd)


def place(path: Path) -> str:
    """Where the environment lies: the same only as long as it is not copied."""
    status = (path / DATA_FILE).stat()
    return f"{_first_line('/etc/machine-id')} {status.st_dev} {status.st_ino}"


def _boot() -> str:
    return _first_line("/proc/sys/kernel/random/boot_id") or "unknown"


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
