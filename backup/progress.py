"""How far a backup is, and how fast it may be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

OnProgress = Callable[[int, int | None], None]  # bytes done, and in all, if anybody knows


class Meter:
    """Counts bytes, tells of them, and waits where they go too fast.

    Args:
        total: bytes that there will be, if anybody knows.
        rate: bytes a second at the most; None: as fast as it goes.
    """

    def __init__(
        self, total: int | None, *, rate: int | None = None, progress: OnProgress | None = None
    ) -> None:
        self.done = 0
        self.total = total
        self._rate = rate
        self._progress = progress
        self._started_s = time.monotonic()

    def metered(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Hands ``pieces`` on, and counts each when the next is wanted."""
        for piece in pieces:
            yield piece
            self._add(len(piece))

    def _add(self, count: int) -> None:
        self.done += count
        if self._progress is not None:
            self._progress(self.done, self.total)
        if self._rate is not None:
            time.sleep(max(self._started_s + self.done / self._rate - time.monotonic(), 0))
