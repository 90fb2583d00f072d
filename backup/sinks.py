"""What backups are written to and read from: as little of a file as is needed."""

from __future__ import annotations

from typing import Protocol


class Sink(Protocol):
    """Takes bytes."""

    def write(self, data: bytes, /) -> int:
        """Takes all of ``data``."""

    def flush(self) -> object:
        """Hands on what is held back."""


class Stream(Protocol):
    """Gives bytes, from the beginning to the end."""

    def read(self, count: int, /) -> bytes:
        """Up to ``count`` bytes; none at the end."""
