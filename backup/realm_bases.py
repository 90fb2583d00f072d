"""Realms as the store of a backup has them, kept while the log behind it is folded into that store.

A realm's changes say how it came to be what it is only together with the state before the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from understudy.backup.rows import PART_BYTES, decode_rows, encode_row
from understudy.common.directory import DataDirectory
from understudy.common.files import storage_errors
from understudy.common.store import Store
from understudy.common.types import is_system_realm


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A realm at one version."""

    id: int
    version: int
    files: list[Path]  # rows, in the order of their keys

    def pairs(self) -> Iterator[tuple[bytes, bytes]]:
        """All that the realm held.

        Raises:
            CorruptionError, StorageFailed.
        """
        for path in self.files:
            with storage_errors("read", path):
                data = path.read_bytes()
            yield from decode_rows(data, str(path))


class Bases:
    """Those of the realms that are wanted and whose changes are not all known any more.

    Args:
        folder: they are kept in there, also those of an attempt before; made where it is absent.
        is_wanted: whether a realm of that path is.
    """

    def __init__(self, folder: Path, is_wanted: Callable[[str], bool]) -> None:
        self._folder = folder
        self._is_wanted = is_wanted
        self._kept: dict[str, Base] = {}

    def keep(self, directory: DataDirectory) -> None:
        """Copies them out of a directory's store, which nobody has open.

        Raises:
            CorruptionError, DiskFull, StorageFailed.
        """
        with storage_errors("create", self._folder):
            self._folder.mkdir(exist_ok=True)
        with Store.open(directory.store, cluster=directory.cluster) as store:
            for path, row in store.current.realms():
                if row.history_first > 1 and not is_system_realm(path) and self._is_wanted(path):
                    name = f"{row.id:020d}"
                    files = list(self._write(name, store.current.scan(row.id)))
                    self._kept[path] = Base(id=row.id, version=row.version, files=files)

    def _write(self, name: str, pairs: Iterable[tuple[bytes, bytes]]) -> Iterator[Path]:
        part = bytearray()
        number = 0
        for key, value in pairs:
            part += encode_row(key, value)
            if len(part) >= PART_BYTES:
                number += 1
                yield self._write_part(f"{name}-{number:06d}", part)
                part.clear()
        yield self._write_part(f"{name}-{number + 1:06d}", part)

    def _write_part(self, name: str, part: bytearray) -> Path:
        path = self._folder / name
        with storage_errors("write", path):
            path.write_bytes(part)
        return path

    def find(self, path: str) -> Base | None:
        """What was kept of a realm, if anything."""
        return self._kept.get(path)
