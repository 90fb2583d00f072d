"""Where realms stand while a log is read: for some in memory, for all others in a temporary file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from understudy.common.errors import StorageFailed

if TYPE_CHECKING:
    import sqlite3

_IN_MEMORY_MAX = 100_000  # some 300 bytes each
_VERSION_BYTES = 8

Head = tuple[int, bytes]  # version, digest


class RealmHeads:
    """A version and a digest for each of any number of realms.

    Everything here raises :class:`StorageFailed` where the temporary file can't be written or read.
    """

    def __init__(self) -> None:
        self._recent: dict[str, Head] = {}
        self._others: sqlite3.Connection | None = None  # of them it may have a head that is no longer right

    def __enter__(self) -> RealmHeads:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __bool__(self) -> bool:
        return bool(self._recent) or self._others is not None

    def __getitem__(self, path: str) -> Head | None:
        """A realm's head, or None where none was set."""
        found = self._recent.get(path)
        if found is not None or self._others is None:
            return found
        with _file_errors():
            row = self._others.execute("SELECT head FROM heads WHERE path = ?", (path.encode(),)).fetchone()
        return None if row is None else _decoded(row[0])

    def __setitem__(self, path: str, head: Head) -> None:
        self._recent[path] = head
        if len(self._recent) > _IN_MEMORY_MAX:
            self._write_recent()

    def items(self) -> Iterator[tuple[str, Head]]:
        """All of them; none may be set meanwhile."""
        if self._others is None:
            yield from self._recent.items()
            return
        self._write_recent()
        with _file_errors():
            for path, head in self._others.execute("SELECT path, head FROM heads"):
                yield path.decode(), _decoded(head)

    def clear(self) -> None:
        """Forgets all of them."""
        self._recent.clear()
        if self._others is not None:
            self._others.close()  # the file goes with it
            self._others = None

    def _write_recent(self) -> None:
        rows = ((path.encode(), _encoded(self._recent[path])) for path in sorted(self._recent))
        with _file_errors():
            self._others = self._others or _open_file()
            self._others.executemany("REPLACE INTO heads VALUES (?, ?)", rows)
        self._recent.clear()


def _open_file() -> sqlite3.Connection:
    """A database in a file without a name, which nothing is left of, however the process ends."""
    import sqlite3  # here: few logs need it, and not every Python has it

    opened = sqlite3.connect("", isolation_level=None)
    opened.execute("PRAGMA journal_mode = OFF")
    opened.execute("CREATE TABLE heads (path BLOB PRIMARY KEY, head BLOB NOT NULL) WITHOUT ROWID")
    opened.execute("BEGIN")  # never ended: what does not fit into its cache goes to the file by then
    return opened


@contextlib.contextmanager
def _file_errors() -> Iterator[None]:
    import sqlite3

    try:
        yield
    except sqlite3.Error as error:
        raise StorageFailed(
            f"the temporary file for the realms of a log can't be used: {error}",
            remedy="name a folder with some GiB of room: TMPDIR=/var/tmp",
        ) from error


def _encoded(head: Head) -> bytes:
    version, digest = head
    return version.to_bytes(_VERSION_BYTES, "big") + digest


def _decoded(raw: bytes) -> Head:
    return int.from_bytes(raw[:_VERSION_BYTES], "big"), raw[_VERSION_BYTES:]
