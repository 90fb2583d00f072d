"""How far a backup is, and how fast it may be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from understudy.backup.courtesy import Courtesy

OnProgress = Callable[[int, int | None], None]  # bytes done, and in all, if anybody knows
_TELL_EVERY_S = 0.5  # while it waits: whoever listens may want it to end

_P = TypeVar("_P", bound=Sized)


class Meter:
    """Counts bytes, tells of them, and waits where they go too fast.

    Args:
        total: bytes that there will be, if anybody knows.
        rate: bytes a second at the most; None: as fast as it goes.
        courtesy: says when to pause for a server.
    """

    def __init__(
        self,
        total: int | None,
        *,
        rate: int | None = None,
        courtesy: Courtesy | None = None,
        progress: OnProgress | None = None,
    ) -> None:
        self.done = 0
        self.total = total
        self._rate = rate
        self._courtesy = courtesy
        self._read_only = 0  # bytes
        self._progress = progress
        self._started_s = time.monotonic()

    def metered(self, pieces: Iterable[_P]) -> Iterator[_P]:
        """Hands ``pieces`` on, and counts each when the next is wanted."""
        for piece in pieces:
            yield piece
            self._add(len(piece))

    def read(self, count: int) -> None:
        """Bytes were read that will not come out: they take their time, and are no progress."""
        self._read_only += count
        self._wait()

    def _add(self, count: int) -> None:
        self.done += count
        self._wait()

    def _wait(self) -> None:
        self._tell()
        if self._courtesy is not None and (pause_s := self._courtesy.pause_s()):
            time.sleep(pause_s)
        while (wait_s := self._wait_s()) > 0:
            time.sleep(min(wait_s, _TELL_EVERY_S))
            self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self.done, self.total)

    def _wait_s(self) -> float:
        if self._rate is None:
            return 0.0
        return self._started_s + (self.done + self._read_only) / self._rate - time.monotonic()
