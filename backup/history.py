"""What became of each run: ``history.json``, for programs. Backups do not need it; it can be lost without loss."""

from __future__ import annotations

import datetime
import enum
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from understudy.backup.manifest import utc_text
from understudy.backup.side_lock import side_lock
from understudy.common.errors import CorruptionError, NewerFormat
from understudy.common.events import log
from understudy.common.files import publish, storage_errors, sync_directory

FORMAT_VERSION = 1
# Of one policy, runs that have left no backup: enough to see since when it goes wrong.
WITHOUT_BACKUP_MAX = 100
# Of all policies: an hour's backups, kept for two years. It is all loaded when it has changed.
ENTRIES_MAX = 20_000
# Enough to see what went wrong; all entries together stay below what is read.
ERRORS_MAX = 10
ERROR_CHARACTERS_MAX = 2000
_FILE_BYTES_MAX = 256 << 20


class Result(enum.StrEnum):
    """How a run ended."""

    DONE = "done"
    PARTIAL = "partial"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One run."""

    number: int  # from 1, no two runs have the same
    policy: str
    start: str  # UTC, ISO 8601
    seconds: float
    result: Result
    realms: int
    bytes: int
    lsn: int  # up to which the backup reaches
    paths: list[str]  # what was made
    errors: list[str]
    id: str = ""  # by which a server knows it

    @property
    def start_s(self) -> float:
        """Seconds since 1970."""
        return datetime.datetime.fromisoformat(self.start).timestamp()

    @classmethod
    def decode(cls, raw: dict[str, Any]) -> Entry:
        """From what :func:`dataclasses.asdict` makes of it.

        What a later version says beside that is passed over: a server may still run while the next version is used.

        Raises:
            ValueError, TypeError: it is none.
        """
        known = {each.name: raw[each.name] for each in fields(cls) if each.name in raw}
        entry = cls(**{**known, "result": Result(raw["result"])})
        numbers = (entry.number, entry.realms, entry.bytes, entry.lsn)
        texts = (entry.policy, entry.start, entry.id, *entry.paths, *entry.errors)
        if not all(isinstance(each, int) for each in numbers) or not all(
            isinstance(each, str) for each in texts
        ):
            raise ValueError("a value is of the wrong kind")
        if not isinstance(entry.seconds, int | float) or not isinstance(entry.start_s, float):
            raise ValueError("a time is none")
        return entry


@dataclass(frozen=True, slots=True)
class _Content:
    last_number: int  # of any run, though its entry may be gone
    entries: list[Entry]  # the oldest first

    def encode(self) -> bytes:
        entries = [asdict(entry) for entry in self.entries]
        content = {"format": FORMAT_VERSION, "last_number": self.last_number, "entries": entries}
        return json.dumps(content, indent=1).encode() + b"\n"


_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class History:
    """The runs, the oldest first; several processes may write at the same time.

    A file that can't be read is moved aside, to ``history.json.damaged-1`` or the next number that is free, and the
    history begins anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: tuple[tuple[int, int, int], _Content] | None = None  # which file, and what it held

    def entries(self) -> list[Entry]:
        """All that are known.

        Raises:
            NewerFormat, DiskFull, StorageFailed.
        """
        with side_lock(self._path):
            return list(self._load().entries)

    def look(self) -> list[Entry]:
        """As :meth:`entries`, without a change to any file.

        Raises:
            CorruptionError: it can't be read.
            NewerFormat, StorageFailed.
        """
        try:
            return list(self._read_file().entries)
        except _UNREADABLE as error:
            raise CorruptionError(
                f"{self._path} can't be read: {error}",
                remedy="the next run moves it aside and begins a new one",
            ) from error

    def reserve(self, floor: int = 0) -> int:
        """The next number, which nobody else is given.

        Args:
            floor: the highest number that a backup bears, so that none is given twice though the file was lost.

        Raises:
            NewerFormat, DiskFull, StorageFailed.
        """
        with side_lock(self._path):
            known = self._load()
            number = max(known.last_number, floor) + 1
            self._store(_Content(number, known.entries))
        return number

    def add(
        self,
        *,
        number: int,
        policy: str,
        start_s: float,
        seconds: float,
        result: Result,
        realms: int,
        bytes: int,
        lsn: int,
        paths: Sequence[str] = (),
        errors: Sequence[str] = (),
        id: str = "",
    ) -> Entry:
        """Adds a run, or replaces what was said of it.

        Args:
            number: as :meth:`reserve` gave it.
            start_s: when it began, seconds since 1970.
            errors: the first of them are kept, and of each the beginning.

        Raises:
            NewerFormat, DiskFull, StorageFailed.
        """
        with side_lock(self._path):
            known = self._load()
            entry = Entry(
                number=number,
                policy=policy,
                start=utc_text(start_s),
                seconds=seconds,
                result=result,
                realms=realms,
                bytes=bytes,
                lsn=lsn,
                paths=list(paths),
                errors=[error[:ERROR_CHARACTERS_MAX] for error in errors[:ERRORS_MAX]],
                id=id,
            )
            others = [other for other in known.entries if other.number != number]
            entries = sorted([*others, entry], key=lambda each: each.number)  # runs may end in another order
            self._store(_Content(max(known.last_number, number), entries[-ENTRIES_MAX:]))
        return entry

    def forget(self, policy: str, is_there: Callable[[str], bool]) -> None:
        """Forgets the oldest of a policy's runs that have left no backup, but for :data:`WITHOUT_BACKUP_MAX`.

        Args:
            is_there: whether the backup of a path exists, or may.

        Raises:
            NewerFormat, DiskFull, StorageFailed.
        """
        with side_lock(self._path):
            known = self._load()
            without = [
                entry.number
                for entry in known.entries
                if entry.policy == policy and not any(map(is_there, entry.paths))
            ]
            forgotten = set(without[:-WITHOUT_BACKUP_MAX])
            if forgotten:
                left = [entry for entry in known.entries if entry.number not in forgotten]
                self._store(_Content(known.last_number, left))

    def _store(self, content: _Content) -> None:
        publish(self._path, content.encode())

    def _load(self) -> _Content:
        try:
            return self._read_file()
        except _UNREADABLE as error:
            self._move_aside(error)
            return _Content(0, [])

    def _read_file(self) -> _Content:
        with storage_errors("read", self._path):
            try:
                with self._path.open("rb") as file:
                    about = os.fstat(file.fileno())
                    which = about.st_ino, about.st_mtime_ns, about.st_size
                    if self._read is not None and self._read[0] == which:
                        return self._read[1]
                    data = file.read(_FILE_BYTES_MAX)
            except FileNotFoundError:
                return _Content(0, [])
        content = self._decode(data)
        self._read = which, content
        return content

    def _decode(self, data: bytes) -> _Content:
        raw: dict[str, Any] = json.loads(data)
        if raw["format"] > FORMAT_VERSION:
            raise NewerFormat(
                f"{self._path} was written by a newer version of Understudy (format {raw['format']})",
                remedy=f"this version reads format {FORMAT_VERSION}; upgrade it",
            )
        entries = [Entry.decode(entry) for entry in raw["entries"]]
        numbers = [entry.number for entry in entries]
        if numbers != sorted(set(numbers)) or max(numbers, default=0) > raw["last_number"]:
            raise ValueError("its numbers are out of order")
        return _Content(raw["last_number"], entries)

    def _move_aside(self, error: Exception) -> None:
        number = 1
        while (aside := self._path.with_name(f"{self._path.name}.damaged-{number}")).exists():
            number += 1
        with storage_errors("move", self._path):
            self._path.rename(aside)
        sync_directory(self._path.parent)
        log.warning("backup_history_damaged", path=str(self._path), moved_to=str(aside), error=str(error))
