"""Files in memory that fail when told to, and that forget at a power loss what was not synced.

What is modelled, and is what disks and kernels do:

* A sector of 512 bytes is on disk whole or not at all. Until the file is synced, each sector may be there as it
  was after any of the writes since the last sync, or as it was before; the length likewise.
* A name made or removed may be found either way until its directory is synced.
* A sync that fails leaves the content readable and takes it for clean: some of it is on disk, and the
  next sync succeeds without bringing the rest there.
* A write that fails may have written a part, in whole sectors, but never all.
* A write that makes a file longer fails when there is no space.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from understudy.common.files import storage_errors

SECTOR_BYTES = 512
Action = Literal["open", "create", "read", "write", "truncate", "sync", "remove", "sync directory"]


class PowerCut(Exception):
    """The machine is off, or the process was killed: whoever sees this would not have run any further."""

    def __init__(self, written_bytes: int) -> None:
        super().__init__("no action is possible until power is restored")
        self.written_bytes = written_bytes


@dataclass
class _Fault:
    action: Action
    countdown: int
    code: int
    written_bytes: int


class _Node:
    """A file's content as read (``cache``), as on disk, and what lies between."""

    def __init__(self) -> None:
        self.cache = bytearray()
        self.disk = bytearray()
        self.sectors: dict[
            int, list[bytes]
        ] = {}  # number -> what it held after each write since the last sync
        self.lengths: list[int] = []

    def write(self, data: bytes, offset: int) -> None:
        if not data:
            return
        if offset > len(self.cache):
            self.cache.extend(bytes(offset - len(self.cache)))
        self.cache[offset : offset + len(data)] = data
        self._changed(offset, offset + len(data))

    def truncate(self, length: int) -> None:
        longer = length - len(self.cache)
        cut, before = min(length, len(self.cache)), len(self.cache)
        del self.cache[length:]
        self.cache.extend(bytes(max(longer, 0)))
        self._changed(cut, max(length, before))

    def _changed(self, start: int, end: int) -> None:
        for number in range(start // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
            content = self.cache[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES]
            self.sectors.setdefault(number, []).append(bytes(content).ljust(SECTOR_BYTES, b"\0"))
        self.lengths.append(len(self.cache))

    def sync(self) -> None:
        for number, versions in self.sectors.items():
            self._put(number, versions[-1])
        self._set_length(len(self.cache))
        self.forget_changes()

    def fail_sync(self) -> None:
        for number in [number for number in self.sectors if number % 2]:
            self._put(number, self.sectors[number][-1])
        self.forget_changes()

    def forget_changes(self) -> None:
        self.sectors.clear()
        self.lengths.clear()

    def lose_power(self, rng: Random) -> None:
        kept = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        length = rng.choice([len(self.disk), *self.lengths])
        for number, versions in self.sectors.items():
            if rng.random() < kept:
                self._put(number, versions[-1] if rng.random() < 0.8 else rng.choice(versions))
        self._set_length(length)
        self.cache = bytearray(self.disk)
        self.forget_changes()

    def _put(self, number: int, content: bytes) -> None:
        end = (number + 1) * SECTOR_BYTES
        self.disk.extend(bytes(max(end - len(self.disk), 0)))
        self.disk[end - SECTOR_BYTES : end] = content

    def _set_length(self, length: int) -> None:
        del self.disk[length:]
        self.disk.extend(bytes(length - len(self.disk)))


class FaultyFile:
    """An open file of :class:`FaultyFiles`."""

    def __init__(self, files: FaultyFiles, path: Path, node: _Node) -> None:
        self._files = files
        self._path = path
        self._node = node

    def write_at(self, data: bytes, offset: int) -> None:
        """Writes all of ``data``, or a part of it and fails."""
        with storage_errors("write", self._path):
            try:
                self._files.act("write")
            except (_Injected, PowerCut) as fault:
                written = min(fault.written_bytes, len(data) - 1)
                self._node.write(data[: _whole_sectors(offset, written)], offset)
                raise
            room = self._files.room(self._node, offset, len(data))
            if room < len(data):
                room = _whole_sectors(offset, room)
            self._node.write(data[:room], offset)
            if room < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read_at(self, length: int, offset: int) -> bytes:
        """Up to ``length`` bytes."""
        with storage_errors("read", self._path):
            self._files.act("read")
        return bytes(self._node.cache[offset : offset + length])

    def size(self) -> int:
        """The file's length."""
        return len(self._node.cache)

    def truncate(self, length: int) -> None:
        """Cuts or extends the file."""
        with storage_errors("truncate", self._path):
            self._files.act("truncate")
            self._node.truncate(length)

    def sync(self) -> None:
        """Makes content and length durable."""
        self._files.before_sync()
        with storage_errors("sync", self._path):
            try:
                self._files.act("sync")
            except _Injected:
                self._node.fail_sync()
                raise
            self._node.sync()

    def close(self) -> None:
        """Counts the file as closed."""
        self._files.open_count -= 1


def _whole_sectors(offset: int, length: int) -> int:
    """Of a write that fails, whole pages are written or not; taken to be as small as sectors here."""
    return max((offset + length) // SECTOR_BYTES * SECTOR_BYTES - offset, 0)


class _Injected(OSError):
    def __init__(self, fault: _Fault) -> None:
        super().__init__(fault.code, os.strerror(fault.code))
        self.written_bytes = fault.written_bytes


class FaultyFiles:
    """A :class:`understudy.common.files.FileSystem` in memory. Every directory exists.

    Attributes:
        space: bytes that all files together may take; none for no limit.
        before_sync: is called as each file's sync begins.
        counts: how often each action was tried.
    """

    def __init__(self) -> None:
        self.space: int | None = None
        self.before_sync: Callable[[], None] = lambda: None
        self.open_count = 0
        self.counts: dict[Action, int] = {}
        self._names: dict[Path, _Node] = {}
        self._durable_names: dict[Path, _Node] = {}
        self._fault: _Fault | None = None
        self._actions_left: int | None = None
        self._last_write_bytes = 0

    # -- what a FileSystem does ----------------------------------------------------------------------------

    def open(self, path: Path, *, create: bool = False) -> FaultyFile:
        """Opens or creates a file."""
        with storage_errors("open", path):
            self.act("create" if create else "open")
            if create == (path in self._names):
                code = errno.EEXIST if create else errno.ENOENT
                raise OSError(code, os.strerror(code))
        self.open_count += 1
        return FaultyFile(self, path, self._names.setdefault(path, _Node()))

    def names(self, directory: Path) -> list[str]:
        """The names in a directory."""
        return sorted(path.name for path in self._names if path.parent == directory)

    def remove(self, path: Path) -> None:
        """Removes a file."""
        with storage_errors("remove", path):
            self.act("remove")
            del self._names[path]

    def sync_directory(self, path: Path) -> None:
        """Makes the names in a directory durable."""
        with storage_errors("sync", path):
            self.act("sync directory")
        self._durable_names = {p: node for p, node in self._durable_names.items() if p.parent != path}
        self._durable_names.update({p: node for p, node in self._names.items() if p.parent == path})

    # -- what goes wrong -----------------------------------------------------------------------------------

    def fail(self, action: Action, nth: int, code: int, *, written_bytes: int = 0) -> None:
        """Makes the ``nth`` (from 1) such action from now on fail once, after writing ``written_bytes``."""
        self._fault = _Fault(action, nth, code, written_bytes)

    @property
    def fault_pending(self) -> bool:
        """Whether the fault that was asked for is still to come."""
        return self._fault is not None

    def cut_power(self, actions: int, *, written_bytes: int = 0) -> None:
        """After so many more actions, every action raises :class:`PowerCut` until power is back.

        If the first of them is a write, up to ``written_bytes`` of it are still written.
        """
        self._actions_left = actions
        self._last_write_bytes = written_bytes

    def restore_power(self) -> None:
        """Nothing fails any more and nothing is lost: for a process that was killed while the machine ran on."""
        self._fault = self._actions_left = None
        self.open_count = 0

    def lose_power(self, rng: Random) -> None:
        """Keeps what was synced and any part of the rest, of contents as of names; power is back then."""
        for path in sorted(self._names.keys() ^ self._durable_names.keys()):
            if rng.random() < 0.5:  # the change reached the disk
                if path in self._names:
                    self._durable_names[path] = self._names[path]
                else:
                    del self._durable_names[path]
        for _, node in sorted(self._durable_names.items()):
            node.lose_power(rng)
        self._names = dict(self._durable_names)
        self.restore_power()

    def content(self, path: Path) -> bytes:
        """A file's content as it is read."""
        return bytes(self._names[path].cache)

    def put(self, path: Path, content: bytes) -> None:
        """Makes or replaces a file, durably."""
        node = _Node()
        node.cache, node.disk = bytearray(content), bytearray(content)
        self._names[path] = self._durable_names[path] = node

    def drop(self, path: Path) -> None:
        """Removes a file, durably."""
        del self._names[path], self._durable_names[path]

    def act(self, action: Action) -> None:
        """Counts an action and fails it if it is its turn."""
        if self._actions_left is not None:
            if self._actions_left <= 0:
                written_bytes, self._last_write_bytes = self._last_write_bytes, 0
                raise PowerCut(written_bytes)
            self._actions_left -= 1
        self.counts[action] = self.counts.get(action, 0) + 1
        fault = self._fault
        if fault is not None and fault.action == action:
            fault.countdown -= 1
            if fault.countdown == 0:
                self._fault = None
                raise _Injected(fault)

    def room(self, node: _Node, offset: int, length: int) -> int:
        """How many of ``length`` bytes at ``offset`` can be written."""
        if self.space is None:
            return length
        free = max(self.space - sum(len(each.cache) for each in self._names.values()), 0)
        return max(min(length, len(node.cache) + free - offset), 0)
