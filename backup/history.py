"""What became of each run: ``history.json``, for programs. Backups do not need it; it can be lost without loss."""

from __future__ import annotations

import datetime
import enum
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from understudy.backup.manifest import utc_text
from understudy.backup.side_lock import side_lock
from understudy.common.errors import NewerFormat
from understudy.common.events import log
from understudy.common.files import publish, storage_errors, sync_directory

FORMAT_VERSION = 1
ENTRIES_MAX = 1000
# Enough to see what went wrong; all entries together stay below what is read.
_ERRORS_MAX = 10
_ERROR_CHARACTERS_MAX = 2000
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

    @property
    def start_s(self) -> float:
        """Seconds since 1970."""
        return datetime.datetime.fromisoformat(self.start).timestamp()

    @classmethod
    def decode(cls, raw: dict[str, Any]) -> Entry:
        """From what :func:`dataclasses.asdict` makes of it.

        Raises:
            ValueError, TypeError: it is none.
        """
        entry = cls(**{**raw, "result": Result(raw["result"])})
        numbers = (entry.number, entry.realms, entry.bytes, entry.lsn)
        texts = (entry.policy, entry.start, *entry.paths, *entry.errors)
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


class History:
    """The runs, the oldest first; several processes may write at the same time.

    A file that can't be read is moved aside, to ``history.json.damaged-1`` or the next number that is free, and the
    history begins anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def entries(self) -> list[Entry]:
        """All that are known.

        Raises:
            NewerFormat, DiskFull, StorageFailed.
        """
        with side_lock(self._path):
            return self._load().entries

    def add(
        self,
        *,
        policy: str,
        start_s: float,
        seconds: float,
        result: Result,
        realms: int,
        bytes: int,
        lsn: int,
        paths: Sequence[str] = (),
        errors: Sequence[str] = (),
        floor: int = 0,
    ) -> Entry:
        """Adds a run under the next number.

        Args:
            start_s: when it began, seconds since 1970.
            errors: the first of them are kept, and of each the beginning.
            floor: the highest number that a backup bears, so that none is given twice though the file was lost.

        Raises:
            NewerFormat, DiskFull, StorageFailed.
        """
        with side_lock(self._path):
            known = self._load()
            entry = Entry(
                number=max(known.last_number, floor) + 1,
                policy=policy,
                start=utc_text(start_s),
                seconds=seconds,
                result=result,
                realms=realms,
                bytes=bytes,
                lsn=lsn,
                paths=list(paths),
                errors=[error[:_ERROR_CHARACTERS_MAX] for error in errors[:_ERRORS_MAX]],
            )
            self._store(_Content(entry.number, [*known.entries, entry][-ENTRIES_MAX:]))
        return entry

    def keep(self, numbers: set[int]) -> None:
        """Forgets the runs whose backups are gone.

        What stays: the runs named; all that did not end well and are newer than the oldest of these; and all that are
        newer than the newest of these, since another process may have added them meanwhile.

        Args:
            numbers: of the backups that exist.

        Raises:
            NewerFormat, DiskFull, StorageFailed.
        """
        oldest, newest = min(numbers, default=0), max(numbers, default=0)
        with side_lock(self._path):
            known = self._load()
            entries = [
                entry
                for entry in known.entries
                if entry.number in numbers
                or entry.number > newest
                or (entry.number > oldest and entry.result is not Result.DONE)
            ]
            if entries != known.entries:
                self._store(_Content(known.last_number, entries))

    def _store(self, content: _Content) -> None:
        publish(self._path, content.encode())

    def _load(self) -> _Content:
        with storage_errors("read", self._path):
            try:
                with self._path.open("rb") as file:
                    data = file.read(_FILE_BYTES_MAX)
            except FileNotFoundError:
                return _Content(0, [])
        try:
            return self._decode(data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._move_aside(error)
            return _Content(0, [])

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
