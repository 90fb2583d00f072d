"""How long to wait between attempts. Pure: chance is passed in."""

from __future__ import annotations


class Backoff:
    """Longer and longer pauses: doubling up to a limit, back to the first after a success."""

    def __init__(self, *, first_s: float, last_s: float) -> None:
        self._first_s = self._next_s = first_s
        self._last_s = last_s

    def reset(self) -> None:
        """It worked: the next pause is the shortest again."""
        self._next_s = self._first_s

    def next_s(self, jitter: float) -> float:
        """Seconds to wait; ``jitter`` is a random number from 0 to 1, so that peers don't come all at once."""
        wait_s = self._next_s * (0.5 + jitter)
        self._next_s = min(2 * self._next_s, self._last_s)
        return wait_s
