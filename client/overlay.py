"""What own changes that are not confirmed yet make of a copy: the queue, replayed on top of every read. Pure.

Semantics are those of :class:`understudy.common.memtable.RealmDelta`, but by key and only when somebody looks,
because the copy below changes all the time, and a change that is confirmed has to go without a trace.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from sortedcontainers import SortedList

from understudy.common.operations import ADD, DELETE, DELETE_RANGE, PUT, added
from understudy.common.ranges import RangeSet
from understudy.v1 import log_pb2


class _Change(NamedTuple):
    first: int  # the order of its first operation; the others follow
    operations: Sequence[log_pb2.Operation]


class _Pending:
    """A key's operations, oldest first, each with its order among all of them."""

    __slots__ = ("operations", "owner")

    def __init__(self, owner: object, operations: Iterable[tuple[int, log_pb2.Operation]] = ()) -> None:
        self.owner = owner
        self.operations = deque(operations)


class Overlay:
    """Operations of queued changes, by key. Changes are added in the order of their numbers.

    May be read by several threads as long as nobody changes it: :meth:`clone` gives another one to change.
    """

    __slots__ = ("_changes", "_hidden", "_keys", "_next", "_owner", "_ranges", "_sorted")

    def __init__(self) -> None:
        self._changes: dict[int, _Change] = {}
        self._keys: dict[bytes, _Pending] = {}
        self._ranges: dict[int, tuple[bytes, bytes]] = {}  # by their order, which rises
        self._next = 0
        self._owner = object()
        self._sorted: SortedList[bytes] | None = None  # made when somebody scans
        self._hidden: RangeSet | None = None  # all ranges together, made when somebody looks

    def __bool__(self) -> bool:
        return bool(self._changes)

    def clone(self) -> Overlay:
        """Another overlay with the same content. This one must not be changed afterwards.

        What they hold of a key is shared until the clone changes it.
        """
        other = Overlay()
        other._changes = self._changes.copy()
        other._keys = self._keys.copy()
        other._ranges = self._ranges.copy()
        other._next = self._next
        return other

    # -- changing it ---------------------------------------------------------------------------------------

    def add(self, number: int, operations: Sequence[log_pb2.Operation]) -> None:
        """Adds the change of that number, behind all others."""
        order = self._next
        self._changes[number] = _Change(order, operations)
        for operation in operations:
            if operation.kind == DELETE_RANGE:
                self._ranges[order] = (operation.key, operation.end)
                self._hidden = None
            else:
                self._own(operation.key).append((order, operation))
            order += 1
        self._next = order

    def remove(self, number: int) -> None:
        """Removes the change of that number, if it is here."""
        change = self._changes.pop(number, None)
        if change is None:
            return
        for order, operation in enumerate(change.operations, change.first):
            if operation.kind == DELETE_RANGE:
                del self._ranges[order]
                self._hidden = None
            else:
                self._remove_one(operation.key, order)

    def _own(self, key: bytes) -> deque[tuple[int, log_pb2.Operation]]:
        """The key's operations, to be changed."""
        pending = self._keys.get(key)
        if pending is None:
            if self._sorted is not None:
                self._sorted.add(key)
            pending = self._keys[key] = _Pending(self._owner)
        elif pending.owner is not self._owner:
            pending = self._keys[key] = _Pending(self._owner, pending.operations)
        return pending.operations

    def _remove_one(self, key: bytes, order: int) -> None:
        operations = self._own(key)
        if operations[0][0] == order:  # confirmed in the order in which they were made, as nearly all are
            operations.popleft()
        else:
            operations.remove(next(pair for pair in operations if pair[0] == order))
        if not operations:
            del self._keys[key]
            if self._sorted is not None:
                self._sorted.remove(key)

    # -- looking through it --------------------------------------------------------------------------------

    def value(self, key: bytes, base: bytes | None) -> bytes | None:
        """The value at ``key`` (None: there is none) where the copy below has ``base``."""
        pending = self._keys.get(key)
        deleted_at = self._deleted_at(key)
        value = base if deleted_at < 0 else None
        if pending is None:
            return value
        for order, operation in pending.operations:
            if order < deleted_at:
                continue
            kind = operation.kind
            if kind == PUT:
                value = operation.value
            elif kind == DELETE:
                value = None
            elif kind == ADD:
                value = added(value, operation.amount)
            elif value is not None:  # an update
                value = operation.value
        return value

    def _deleted_at(self, key: bytes) -> int:
        """The order of the last deleted range that has ``key``; -1: none has."""
        if not self._ranges or key not in self._all_ranges():
            return -1
        return next(
            order
            for order, (start, end) in reversed(self._ranges.items())
            if start <= key and (not end or key < end)
        )

    def _all_ranges(self) -> RangeSet:
        hidden = self._hidden
        if hidden is None:
            hidden = RangeSet()
            for start, end in self._ranges.values():
                hidden.add(start, end)
            self._hidden = hidden
        return hidden

    def scan(
        self, base: Iterator[tuple[bytes, bytes]], start: bytes, end: bytes, *, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        """Pairs in order, ``base`` being the copy's from ``start`` to before ``end``; empty means without bound."""
        if not self._changes:
            yield from base
            return
        hidden = self._all_ranges()
        keys = self._between(start, end, reverse=reverse)
        ours = next(keys, None)
        for key, below in base:
            while ours is not None and ours != key and (ours > key if reverse else ours < key):
                value = self.value(ours, None)
                if value is not None:
                    yield ours, value
                ours = next(keys, None)
            if ours == key:
                value = self.value(key, below)
                if value is not None:
                    yield key, value
                ours = next(keys, None)
            elif not (hidden and key in hidden):
                yield key, below
        while ours is not None:
            value = self.value(ours, None)
            if value is not None:
                yield ours, value
            ours = next(keys, None)

    def _between(self, start: bytes, end: bytes, *, reverse: bool) -> Iterator[bytes]:
        if self._sorted is None:
            self._sorted = SortedList(self._keys)
        keys: Iterator[bytes] = self._sorted.irange(
            start or None, end or None, inclusive=(True, False), reverse=reverse
        )
        return keys
