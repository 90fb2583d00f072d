"""A set of key ranges: what ``delete range`` leaves behind in memory until the next checkpoint."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

# Behind every key: keys have at most 480 bytes.
_LAST = b"\xff" * 512


class RangeSet:
    """Disjoint, sorted half-open ranges of keys. An empty end means: to the last key."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[bytes] = []
        self._ends: list[bytes] = []

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        for start, end in zip(self._starts, self._ends, strict=True):
            yield start, (b"" if end == _LAST else end)

    def __contains__(self, key: bytes) -> bool:
        at = bisect_right(self._starts, key) - 1
        return at >= 0 and key < self._ends[at]

    def add(self, start: bytes, end: bytes) -> None:
        """Adds ``[start, end)``, joining what it touches; an empty range adds nothing."""
        stop = end or _LAST
        if start >= stop:
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [stop]
