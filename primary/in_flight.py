"""Changes that were taken in and are not applied yet: where their realms' chains end, and whose they are.

What may live here: bookkeeping between a committer's taking in and applying; no decision about either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from understudy.common.memtable import Receipt
from understudy.common.records import Record
from understudy.common.state import State
from understudy.common.types import Durability

Done = Callable[[Receipt], None]


class SignedChange(NamedTuple):
    """A serialized ``Change``, its digest in the realm's chain, and its HMAC."""

    change: bytes
    digest: bytes
    hmac: bytes


@dataclass(slots=True)
class Pending:
    """An entry that somebody waits for."""

    record: Record
    receipt: Receipt
    level: Durability
    path: str | None  # of the realm whose head it changes
    client: bytes
    number: int
    done: list[Done]


@dataclass(slots=True)
class Head:
    """A realm's end of chain, ahead of what is applied. ``in_flight`` counts the changes not yet applied."""

    version: int
    digest: bytes
    in_flight: int


class InFlight:
    """By realm, and by realm and client."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._heads: dict[str, Head] = {}
        self._changes: dict[tuple[str, bytes], dict[int, Pending]] = {}

    def __contains__(self, path: str) -> bool:
        """Whether anything of this realm is in flight."""
        return path in self._heads

    def head(self, path: str) -> Head:
        """Where the realm's chain ends; version 0 where there is no realm."""
        head = self._heads.get(path)
        if head is not None:
            return head
        applied = self._state.realm(path)
        return Head(applied.version, applied.head, 0) if applied else Head(0, b"", 0)

    def of(self, path: str, client: bytes) -> dict[int, Pending]:
        """A client's changes to a realm, by their numbers, which rise."""
        return self._changes.get((path, client), {})

    def last_number(self, path: str, client: bytes) -> int:
        """The client's highest number, in flight or applied."""
        changes = self._changes.get((path, client))
        return next(reversed(changes)) if changes else self._state.last_number(path, client)

    def add(self, path: str, head: Head, digest: bytes, pending: Pending) -> None:
        """The next change of a realm whose chain ends in ``head``."""
        self._heads[path] = head
        head.version += 1
        head.digest = digest
        head.in_flight += 1
        self._changes.setdefault((path, pending.client), {})[pending.number] = pending

    def drop(self, path: str) -> None:
        """The realm's end: what comes behind it begins a new one."""
        head = self._heads.setdefault(path, Head(0, b"", 0))
        head.version, head.digest = 0, b""
        head.in_flight += 1

    def land(self, path: str, pending: Pending) -> None:
        """Forgets what was remembered of a change, or a drop, only while it was in flight."""
        head = self._heads[path]
        head.in_flight -= 1
        if not head.in_flight:
            del self._heads[path]
        owner = (path, pending.client)
        changes = self._changes.get(owner)
        if changes is not None:
            changes.pop(pending.number, None)
            if not changes:
                del self._changes[owner]
