"""Directories that are open in this process: the realms of one share a store and, where there is a server, a thread."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from understudy.client.local_store import LocalStore
from understudy.client.open_realm import OpenRealm, ResetPolicy
from understudy.client.reset import CopyResetter
from understudy.client.sync_thread import SyncThread
from understudy.common.credentials import Credentials
from understudy.common.errors import UsageError
from understudy.common.rpc import FORK_REMEDY, check_not_forked


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectorySettings:
    """What all realms of a directory have in common; ``addresses`` is empty for copies that are not synced."""

    addresses: tuple[str, ...]
    durability: str
    read_only: bool
    credentials: Credentials

    def difference(self, other: DirectorySettings) -> str:
        """The name of the first setting that differs; empty where none does."""
        names = {
            "server": self.addresses == other.addresses,
            "local_durability": self.durability == other.durability,
            "read_only": self.read_only == other.read_only,
            "token, ca, cert or key": self.credentials == other.credentials,
        }
        return next((name for name, is_equal in names.items() if not is_equal), "")


class OpenDirectory:
    """A store, its thread, and the realms that somebody has open."""

    def __init__(self, path: Path, settings: DirectorySettings) -> None:
        if settings.addresses:
            check_not_forked()
        self.process = os.getpid()
        self.path = path
        self.settings = settings
        self.store = LocalStore.open(path, durability=settings.durability, read_only=settings.read_only)
        self.thread: SyncThread | None = None
        self.realms: dict[str, OpenRealm] = {}
        try:
            if settings.addresses:
                self.thread = SyncThread(
                    self.store,
                    settings.addresses,
                    credentials=settings.credentials,
                    resetter=CopyResetter(path),
                )
        except BaseException:
            self.store.close()
            raise

    def check_process(self) -> None:
        """Refuses to work in a fork: the thread is missing there, and LMDB forbids it.

        Raises:
            UsageError.
        """
        if os.getpid() != self.process:
            raise UsageError(
                f"{self.path} was opened by process {self.process}, of which this one is a fork",
                remedy=FORK_REMEDY,
            )

    def attach(self, path: str, policy: ResetPolicy) -> OpenRealm:
        """Opens a realm, or takes part in it where somebody has it open.

        Raises:
            UsageError: it is open with another policy.
            BadRealmPath, UnknownRealm, DiskFull.
        """
        realm = self.realms.get(path)
        if realm is None:
            local = self.store.realm(path, create=not self.settings.read_only)
            realm = self.realms[path] = OpenRealm(local, policy)
        elif realm.policy != policy:
            raise UsageError(
                f"{path} is open with another on_reset, before_reset or after_reset",
                remedy="give the same ones each time, or close it first",
            )
        realm.users += 1
        return realm

    def start(self, realm: OpenRealm) -> None:
        """Begins to sync a realm, if that has not begun yet."""
        if self.thread is not None and not realm.is_started:
            realm.is_started = True
            self.thread.open(realm)

    def detach(self, realm: OpenRealm) -> None:
        """The opposite of :meth:`attach`."""
        realm.users -= 1
        if not realm.users:
            del self.realms[realm.path]
            if self.thread is not None and realm.is_started:
                self.thread.close(realm.path)

    def close(self) -> None:
        """Ends syncing and closes the store."""
        try:
            if self.thread is not None:
                self.thread.stop()
        finally:
            self.store.close()


_lock = threading.Lock()
_open: dict[Path, OpenDirectory] = {}
# Where the names lead under which directories were given, with device and inode there: to find that out takes longer
# than all else that opening one more realm of a directory does.
_places: dict[str, tuple[Path, tuple[int, int]]] = {}


def attach(
    directory: str | os.PathLike[str], path: str, settings: DirectorySettings, policy: ResetPolicy
) -> tuple[OpenDirectory, OpenRealm]:
    """Opens a realm of a directory, and the directory if nobody in this process has.

    Raises:
        UsageError: it is open with other settings, or in a process of which this one is a fork.
        DirectoryError, CorruptionError, DiskFull: the directory can't be used.
    """
    with _lock:
        place = _resolved(os.fspath(directory))
        found = _open.get(place)
        if found is None:
            found = _open[place] = OpenDirectory(place, settings)
        found.check_process()
        difference = found.settings.difference(settings)
        if difference:
            raise UsageError(
                f"{place} is open in this process with another {difference}",
                remedy="realms of one directory share it: give the same each time, or use another directory",
            )
        try:
            return found, found.attach(path, policy)
        finally:
            _close_if_unused(found)


def _resolved(name: str) -> Path:
    """Where a directory is; the same as long as the name leads there, and it is open."""
    known = _places.get(name)
    if known is not None and known[1] == _identity(name):
        return known[0]
    place = Path(name).resolve()
    if place in _open:
        _places[name] = place, _identity(name)
    return place


def _identity(name: str) -> tuple[int, int]:
    try:
        found = os.stat(name)
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


def start(directory: OpenDirectory, realm: OpenRealm) -> None:
    """Begins to sync a realm that was opened."""
    with _lock:
        directory.start(realm)


def detach(directory: OpenDirectory, realm: OpenRealm) -> None:
    """Closes a realm, and with its last one the directory. Waits for the directory's thread."""
    with _lock:
        directory.detach(realm)
        _close_if_unused(directory)


def _close_if_unused(directory: OpenDirectory) -> None:
    if not directory.realms:
        del _open[directory.path]
        for name in [name for name, (place, _) in _places.items() if place == directory.path]:
            del _places[name]
        directory.close()
