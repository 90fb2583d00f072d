"""Scans: memtable layers merged over a store snapshot, in key order, as of one LSN."""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterator
from operator import itemgetter

from understudy.common.memtable import RealmDelta
from understudy.common.ranges import RangeSet
from understudy.common.store import Store

_Pair = tuple[bytes, bytes | None]


class Scan:
    """One consistent scan. Must be closed; pages are made on the thread that applies entries.

    The first page is made straight from the live layers. If there is more, what the memtables hold of the rest
    is copied (references only) before anything else can be applied, and the store's snapshot stays pinned.
    """

    def __init__(
        self,
        store: Store,
        deltas: list[RealmDelta],
        store_id: int,
        start: bytes,
        end: bytes,
        *,
        reverse: bool,
    ) -> None:
        self._snapshot = store.current.acquire()
        self._reverse = reverse
        self._hidden = RangeSet()
        for delta in deltas:
            for range_start, range_end in delta.deleted:
                self._hidden.add(range_start, range_end)
        self._overlay = _overlay(deltas, start, end, reverse=reverse)
        self._stored = self._snapshot.scan(store_id, start, end, reverse=reverse) if store_id else None
        self._pairs = self._merge()
        self._detached = False

    def __enter__(self) -> Scan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the store's snapshot."""
        self._pairs.close()
        if self._stored is not None:
            self._stored.close()  # it holds the snapshot, too
        self._snapshot.release()

    def page(self, *, bytes_max: int, pairs_max: int) -> tuple[list[bytes], list[bytes], bool]:
        """The next keys and values, and whether the scan is at its end."""
        keys: list[bytes] = []
        values: list[bytes] = []
        size = 0
        while len(keys) < pairs_max and size < bytes_max:
            pair = next(self._pairs, None)
            if pair is None:
                return keys, values, True
            keys.append(pair[0])
            values.append(pair[1])
            size += len(pair[0]) + len(pair[1])
        if not self._detached:
            self._overlay = iter(list(self._overlay))  # the layers change under us from here on
            self._detached = True
        return keys, values, False

    def _merge(self) -> Generator[tuple[bytes, bytes], None, None]:
        pair = next(self._overlay, None)
        for key, value in self._stored or ():
            while pair is not None and self._comes_before(pair[0], key):
                if pair[1] is not None:
                    yield pair[0], pair[1]
                pair = next(self._overlay, None)
            if pair is not None and pair[0] == key:
                if pair[1] is not None:
                    yield key, pair[1]
                pair = next(self._overlay, None)
            elif not (self._hidden and key in self._hidden):
                yield key, value
        while pair is not None:
            if pair[1] is not None:
                yield pair[0], pair[1]
            pair = next(self._overlay, None)

    def _comes_before(self, one: bytes, other: bytes) -> bool:
        return one > other if self._reverse else one < other


def _overlay(deltas: list[RealmDelta], start: bytes, end: bytes, *, reverse: bool) -> Iterator[_Pair]:
    """What the layers (newest first) hold, the newest word on each key; None where it was deleted."""
    layers = [_tagged(delta, age, start, end, reverse=reverse) for age, delta in enumerate(deltas)]
    last: bytes | None = None
    # heapq.merge is stable: of equal keys the newest layer's comes first.
    for key, age in heapq.merge(*layers, key=itemgetter(0), reverse=reverse):
        if key == last:
            continue
        last = key
        if any(key in newer.deleted for newer in deltas[:age]):
            yield key, None
        else:
            yield key, deltas[age].values[key]


def _tagged(
    delta: RealmDelta, age: int, start: bytes, end: bytes, *, reverse: bool
) -> Iterator[tuple[bytes, int]]:
    return ((key, age) for key in delta.keys(start, end, reverse=reverse))
