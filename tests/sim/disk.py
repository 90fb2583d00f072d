"""Disks that fail when told to, and that forget at a power loss what was not synced.

What a process reads back is in real files, so that everything else of a data directory may lie beside; what a power
loss would take is kept here. Modelled are the files that the product writes through its file layer, those of the
change-log:

* A sector of 512 bytes is on disk whole or not at all. Until its file is synced, each may be there as it was after any
  of the writes since, or as before; the length likewise.
* A name made or removed may be found either way until its directory is synced.
* A sync that fails leaves the content readable and takes it for clean: some of it is on disk, and the next sync
  succeeds without bringing the rest there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from sim.universe import Universe

from understudy.common.files import OsFile, storage_errors, sync_directory

SECTOR_BYTES = 512
Action = Literal["create", "write", "truncate", "sync", "remove", "sync directory"]


class _Content:
    """Of a file: what each sector held at the last sync and after each write since."""

    def __init__(self, length: int) -> None:
        self.sectors: dict[int, list[bytes]] = {}
        self.stale: dict[int, bytes] = {}  # what the disk holds where a sync has failed, and nobody knows
        self.lengths = [length]

    def synced(self, length: int) -> None:
        self.sectors.clear()
        self.lengths = [length]

    def sync_fails(self) -> None:
        """The kernel takes what it could not write for written."""
        self.stale |= {number: versions[0] for number, versions in self.sectors.items() if number % 2}
        self.synced(self.lengths[-1])

    def is_durable(self, path: Path, start: int, stop: int) -> bool:
        """Whether every sector of the range holds the same bytes of it, whichever version of it is kept."""
        if min(self.lengths) < stop:
            return False
        with open(path, "rb") as file:
            for number in range(start // SECTOR_BYTES, -(-stop // SECTOR_BYTES)):
                versions = [*self.sectors.get(number, []), *filter(None, [self.stale.get(number)])]
                begin = number * SECTOR_BYTES
                part = slice(max(start - begin, 0), min(stop - begin, SECTOR_BYTES))
                file.seek(begin)
                now = file.read(SECTOR_BYTES).ljust(SECTOR_BYTES, b"\0")
                if any(version[part] != now[part] for version in versions):
                    return False
        return True

    def lose(self, path: Path, rng: Random) -> None:
        kept = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        length = rng.choice(self.lengths)
        with open(path, "r+b") as file:
            for number, content in sorted(self.stale.items()):
                file.seek(number * SECTOR_BYTES)
                file.write(content)
            for number, versions in sorted(self.sectors.items()):
                if rng.random() < kept:
                    content = versions[-1] if rng.random() < 0.8 else rng.choice(versions)
                else:
                    content = versions[0]
                file.seek(number * SECTOR_BYTES)
                file.write(content)
            file.truncate(length)
        self.stale.clear()
        self.synced(length)


@dataclass(frozen=True, slots=True)
class _Removed:
    """A name that no sync of its directory has taken away for good.

    Attributes:
        name: where the file was.
        directory: the inode of that directory; another may have taken its place since.
        kept: where the file is kept meanwhile.
    """

    name: Path
    directory: int
    kept: Path

    @property
    def can_be_found_again(self) -> bool:
        parent = self.name.parent
        return parent.exists() and parent.stat().st_ino == self.directory and not self.name.exists()


def _nothing() -> None:
    pass


class Disk:
    """A machine's.

    Attributes:
        space: bytes of logs that fit on it; None: no limit.
    """

    def __init__(self, universe: Universe, root: Path) -> None:
        self._universe = universe
        self._root = root
        self.space: int | None = None
        self.sync_s = (100e-6, 2e-3)
        self._contents: dict[int, _Content] = {}  # by inode
        self._made: dict[int, Path] = {}  # names that no sync of their directory has made durable
        self._removed: list[_Removed] = []  # likewise
        self._kept = 0
        self._faults: list[
            tuple[Action, int, int]
        ] = []  # action, how many more, errno; 0: the process is killed

    # -- what the product asks of it ---------------------------------------------------------------------------

    def open(self, path: Path, *, create: bool = False) -> DiskFile:
        """See :class:`understudy.common.files.FileSystem`."""
        if create:
            with storage_errors("create", path):
                self.act("create")
        file = OsFile(path, create=create)
        inode = path.stat().st_ino
        if create:
            self._made[inode] = path
            self._contents[inode] = _Content(0)
        return DiskFile(self, path, file, self._contents.setdefault(inode, _Content(file.size())))

    def names(self, directory: Path) -> list[str]:
        """See there."""
        with storage_errors("list", directory):
            return sorted(os.listdir(directory))

    def remove(self, path: Path) -> None:
        """See there."""
        with storage_errors("remove", path):
            self.act("remove")
            self._kept += 1
            kept = self._root / f"removed-{self._kept}"
            os.rename(path, kept)
            self._removed.append(_Removed(path, path.parent.stat().st_ino, kept))

    def sync_directory(self, path: Path) -> None:
        """See there."""
        with storage_errors("sync", path):
            self.act("sync directory")
        sync_directory(path)
        self._made = {inode: name for inode, name in self._made.items() if name.parent != path}
        for one in self._removed:
            if one.name.parent == path:
                one.kept.unlink()
        self._removed = [one for one in self._removed if one.name.parent != path]

    # -- what goes wrong ---------------------------------------------------------------------------------------

    def fail(self, action: Action, nth: int, code: int) -> None:
        """The ``nth`` (from 1) such action from now on fails; with code 0, the process that asks for it is killed."""
        self._faults.append((action, nth, code))

    def mend(self) -> None:
        """Nothing fails any more."""
        self._faults.clear()
        self.space = None

    def act(
        self, action: Action, partly: Callable[[], None] = _nothing, fails: Callable[[], None] = _nothing
    ) -> None:
        """Counts an action; if it is its turn, it fails, or the process is killed in it.

        Args:
            action: that is about to be done.
            partly: does a part of it, which either leaves behind.
            fails: what else a failure leaves behind, but no kill.

        Raises:
            OSError.
        """
        process = self._universe.current
        assert process is not None, f"{action} by nobody"
        for at, (wanted, left, code) in enumerate(self._faults):
            if wanted != action:
                continue
            if left > 1:
                self._faults[at] = (wanted, left - 1, code)
                continue
            del self._faults[at]
            self._universe.trace("disk fault", process.name, action, errno.errorcode.get(code, "killed"))
            partly()
            if code == 0:
                self._universe.crashes += 1
                process.kill()
            fails()
            raise OSError(code, os.strerror(code))

    def room(self, content: int, wanted: int) -> bool:
        """Whether a file may grow from so many to so many bytes."""
        if self.space is None or wanted <= content:
            return True
        used = sum(path.stat().st_size for path in self._root.rglob("*.seg"))
        return used + wanted - content <= self.space

    def lose_power(self) -> None:
        """Keeps what was synced and any part of the rest, of contents as of names."""
        rng = self._universe.rng
        for one in self._removed:
            if rng.random() < 0.5 and one.can_be_found_again:
                os.rename(one.kept, one.name)
            else:
                one.kept.unlink()
        self._removed.clear()
        files = {path.stat().st_ino: path for path in sorted(self._root.rglob("*.seg"))}
        for inode, path in sorted(files.items(), key=lambda one: one[1]):
            if inode in self._made and rng.random() < 0.5:
                path.unlink()
            elif inode in self._contents:
                self._contents[inode].lose(path, rng)
        self._made.clear()
        self._contents.clear()

    def is_durable(self, path: Path, start: int, stop: int) -> bool:
        """Whether these bytes of a file survive a power loss, whatever that takes."""
        inode = path.stat().st_ino
        content = self._contents.get(inode)
        if inode in self._made:
            return False
        return content is None or content.is_durable(path, start, stop)

    def forget(self) -> None:
        """Everything on it is as it is: files were put there while nothing ran."""
        self._made.clear()
        self._contents.clear()
        for one in self._removed:
            one.kept.unlink()
        self._removed.clear()

    def rot(self) -> Path | None:
        """One byte of a log changes, durably; the file, if there is one."""
        rng = self._universe.rng
        files = [path for path in sorted(self._root.rglob("*.seg")) if path.stat().st_size]
        if not files:
            return None
        path = rng.choice(files)
        at = rng.randrange(path.stat().st_size)
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ (1 << rng.randrange(8))]))
        return path


class DiskFile:
    """An open file of a :class:`Disk`; see :class:`understudy.common.files.WritableFile`."""

    def __init__(self, disk: Disk, path: Path, file: OsFile, content: _Content) -> None:
        self._disk = disk
        self._path = path
        self._file = file
        self._content = content

    def write_at(self, data: bytes, offset: int) -> None:
        """See there."""
        with storage_errors("write", self._path):
            self._disk.act("write", lambda: self._write_part(data, offset, 2))
            if not self._disk.room(self._file.size(), offset + len(data)):
                self._write_part(data, offset, 3)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._write(data, offset)

    def _write(self, data: bytes, offset: int) -> None:
        if data:
            self._changing(offset, offset + len(data), lambda: self._file.write_at(data, offset))

    def _write_part(self, data: bytes, offset: int, divisor: int) -> None:
        """Of a write that fails, whole pages are written or not; taken to be as small as sectors here."""
        end = (offset + len(data) // divisor) // SECTOR_BYTES * SECTOR_BYTES
        self._write(data[: max(end - offset, 0)], offset)

    def _changing(self, start: int, end: int, change: Callable[[], None]) -> None:
        first, stop = start // SECTOR_BYTES, -(-end // SECTOR_BYTES)
        content = self._content
        before = self._sectors(first, stop)
        change()
        for number, old, new in zip(range(first, stop), before, self._sectors(first, stop), strict=True):
            if new != old or number in content.sectors or number in content.stale:
                content.sectors.setdefault(number, [content.stale.pop(number, old)]).append(new)
        content.lengths.append(self._file.size())

    def _sectors(self, first: int, stop: int) -> list[bytes]:
        size = (stop - first) * SECTOR_BYTES
        data = self._file.read_at(size, first * SECTOR_BYTES).ljust(size, b"\0")
        return [data[at : at + SECTOR_BYTES] for at in range(0, size, SECTOR_BYTES)]

    def read_at(self, length: int, offset: int) -> bytes:
        """See there."""
        return self._file.read_at(length, offset)

    def size(self) -> int:
        """See there."""
        return self._file.size()

    def truncate(self, length: int) -> None:
        """See there."""
        with storage_errors("truncate", self._path):
            self._disk.act("truncate")
        size = self._file.size()
        self._changing(min(size, length), max(size, length), lambda: self._file.truncate(length))

    def sync(self) -> None:
        """See there."""
        with storage_errors("sync", self._path):
            self._disk.act("sync", fails=self._content.sync_fails)
        self._content.synced(self._file.size())

    def close(self) -> None:
        """See there."""
        self._file.close()
