"""The memtable: what changed since the last freeze mark, in memory.

A ``RealmDelta`` is what changed in one realm; older layers (a frozen memtable, then the store) answer for the
rest. A memtable is bounded by the freeze mark that the primary sets when it passes ``MEMTABLE_BYTES`` or
``MEMTABLE_OPERATIONS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar

from sortedcontainers import SortedList

from understudy.common.errors import RESTORE, CorruptionError
from understudy.common.operations import DELETE, DELETE_RANGE, KIND_NAMES, PUT, UPDATE, added
from understudy.common.ranges import RangeSet
from understudy.common.types import KEY_BYTES_MAX, START, Digest, Lsn, Position
from understudy.v1 import log_pb2, store_pb2

# One LMDB transaction writes a whole memtable, and holds every page it touches in memory: up to one page of
# 4 KiB an operation where the store is large. Recovery time grows with it, too.
MEMTABLE_BYTES = 32 << 20
MEMTABLE_OPERATIONS = 64_000
# What a change costs in memory beside its bytes: history row, receipt, dictionary entries, object headers.
CHANGE_OVERHEAD_BYTES = 300
# A part takes about a millisecond to make.
PART_BYTES = 1 << 20
_CHUNK_BYTES = PART_BYTES // 2
_ROW_OVERHEAD_BYTES = 64
_FREED_AT_ONCE = 2_000

_Row = TypeVar("_Row")


class Missing:
    """The type of :data:`MISSING`."""

    __slots__ = ()


MISSING: Final = Missing()  # "not here: ask the layer below", as opposed to None: "deleted"


class Receipt(NamedTuple):
    """What a committed transaction is answered with."""

    realm: str
    version: int
    lsn: Lsn
    digest: Digest  # the log's digest at `lsn`


class RealmDelta:
    """What changed in one realm since the last freeze mark.

    ``created``: nothing of this realm is in any older layer. Invariant: ``history`` holds the versions
    ``version - len(history) + 1 ... version``.
    """

    __slots__ = (
        "_sorted_keys", "client_rows", "created", "deleted", "head", "history", "id", "path", "values",
        "version", "versions",
    )  # fmt: skip

    def __init__(self, path: str, realm_id: int, version: int, head: bytes, *, created: bool) -> None:
        self.path = path
        self.id = realm_id
        self.version = version
        self.head = head
        self.created = created
        self.values: dict[bytes, bytes | None] = {}
        self.deleted = RangeSet()
        self.history: list[bytes] = []
        self.versions: dict[bytes, dict[int, int]] = {}  # that a client's transactions made, by their numbers
        self.client_rows: dict[bytes, tuple[int, int, int]] = {}
        self._sorted_keys: SortedList[bytes] = SortedList()

    def get(self, key: bytes) -> bytes | Missing | None:
        """The value, None where it was deleted, MISSING where an older layer knows."""
        if key in self.values:
            return self.values[key]
        return None if self.created or (self.deleted and key in self.deleted) else MISSING

    def apply(
        self,
        operations: Sequence[log_pb2.Operation],
        older: Callable[[RealmDelta, bytes], bytes | None],
    ) -> None:
        """Applies operations; ``older`` gives the current value of a key that this delta does not hold.

        Raises:
            CorruptionError: one is of an unknown kind, or its key is none; those before it are applied, so that
                this delta is not to be used any more.
        """
        values = self.values
        for operation in operations:
            key = operation.key
            # Most are puts, and a call costs more than the rest of it. A bad one is refused there, too.
            if operation.kind == PUT and 0 < len(key) <= KEY_BYTES_MAX:
                values[key] = operation.value
            else:
                self._apply_other(operation, older)

    def _apply_other(
        self, operation: log_pb2.Operation, older: Callable[[RealmDelta, bytes], bytes | None]
    ) -> None:
        kind, key = operation.kind, operation.key
        if kind == DELETE_RANGE:
            self._delete_range(key, operation.end)
        elif kind not in KIND_NAMES:  # never skipped: every node must come to the same state
            raise CorruptionError(
                f"an operation on {self.path} is of kind {kind}, which this version does not know",
                remedy="upgrade Understudy on this node",
            )
        elif not 0 < len(key) <= KEY_BYTES_MAX:
            raise CorruptionError(
                f"an operation on {self.path} has a key of {len(key)} bytes", remedy=RESTORE
            )
        elif kind == DELETE:
            self.values[key] = None
        elif kind == UPDATE:
            if self._current(key, older) is not None:
                self.values[key] = operation.value
        else:
            self.values[key] = added(self._current(key, older), operation.amount)

    def _current(self, key: bytes, older: Callable[[RealmDelta, bytes], bytes | None]) -> bytes | None:
        found = self.get(key)
        return older(self, key) if isinstance(found, Missing) else found

    def note_client(self, client: bytes, number: int, time_us: int) -> None:
        """The present version was made by the transaction of that number of that client.

        Raises:
            CorruptionError: the client's id is none.
        """
        version = self.version
        versions = self.versions.get(client)
        if versions is None:
            if len(client) > KEY_BYTES_MAX:  # looked at but once; the store could not hold it
                raise CorruptionError(
                    f"a client of {self.path} has an id of {len(client)} bytes", remedy=RESTORE
                )
            versions = self.versions[client] = {}
        versions[number] = version
        self.client_rows[client] = (number, version, time_us)

    def history_row(self, version: int) -> bytes:
        """The row of one of the versions made since the last freeze mark."""
        return self.history[version - self.version - 1]

    def _delete_range(self, start: bytes, end: bytes) -> None:
        for key in list(self.keys(start, end, reverse=False)):
            del self.values[key]
            self._sorted_keys.remove(key)
        self.deleted.add(start, end)

    def keys(self, start: bytes, end: bytes, *, reverse: bool) -> Iterator[bytes]:
        """Keys that this delta holds a value or a deletion for, from ``start`` to before ``end``, in order.

        Sorted only when somebody looks: most memtables are written out without ever being scanned.
        """
        # A dictionary keeps the order of insertion, so those that are not sorted yet stand at its end.
        new = len(self.values) - len(self._sorted_keys)
        if new:
            self._sorted_keys.update(list(islice(reversed(self.values), new)))
        keys: Iterator[bytes] = self._sorted_keys.irange(
            start or None, end or None, inclusive=(True, False), reverse=reverse
        )
        return keys


class Memtable:
    """All realms' deltas between two freeze marks, and the marks themselves."""

    __slots__ = (
        "bytes", "dropped_ids", "epochs", "first_change_lsn", "offset", "operations", "position", "realms",
        "time_us",
    )  # fmt: skip

    def __init__(self) -> None:
        self.realms: dict[str, RealmDelta | None] = {}  # None: dropped, and not made again
        self.dropped_ids: list[int] = []
        self.epochs: list[store_pb2.EpochRow] = []
        self.bytes = 0
        self.operations = 0
        self.first_change_lsn = Lsn(0)  # 0: no change yet
        self.position: Position = START  # set when frozen: where it ends
        self.offset = 0
        self.time_us = 0

    @property
    def is_full(self) -> bool:
        """Whether it is time for a freeze mark."""
        return self.bytes >= MEMTABLE_BYTES or self.operations >= MEMTABLE_OPERATIONS

    def freeze(self, position: Position, offset: int, time_us: int) -> None:
        """Notes where the memtable ends; nothing is applied to it afterwards."""
        self.position, self.offset, self.time_us = position, offset, time_us

    def parts(self) -> Iterator[store_pb2.CheckpointJob]:
        """What the checkpoint process is handed, in messages of bounded size that it merges in order.

        In parts, because each is made by one long call that lets nobody else have the interpreter.
        """
        part = store_pb2.CheckpointJob(
            checkpoint=store_pb2.CheckpointRow(
                lsn=self.position.lsn,
                digest=self.position.digest,
                log_offset=self.offset,
                time_us=self.time_us,
            ),
            epochs=self.epochs,
            dropped_realm_ids=self.dropped_ids,
            dropped_realms=[path for path, delta in self.realms.items() if delta is None],
        )
        weight = 0
        for delta in self.realms.values():
            for piece, piece_weight in _pieces(delta) if delta is not None else ():
                if weight and weight + piece_weight > PART_BYTES:
                    yield part
                    part, weight = store_pb2.CheckpointJob(), 0
                part.realms.append(piece)
                weight += piece_weight
        yield part

    def dismantle(self) -> Iterator[None]:
        """Frees the memtable bit by bit: freeing it at once would hold up everything else for as long."""
        for delta in self.realms.values():
            if delta is None:
                continue
            while delta.history:
                del delta.history[-_FREED_AT_ONCE:]
                yield
            tables: list[dict[Any, Any]] = [delta.values, *delta.versions.values()]
            for table in tables:
                while table:
                    for _ in range(min(_FREED_AT_ONCE, len(table))):
                        table.popitem()
                    yield


def _pieces(delta: RealmDelta) -> Iterator[tuple[store_pb2.RealmDelta, int]]:
    """A delta as messages to be merged, with a weight in bytes for each."""

    def piece() -> store_pb2.RealmDelta:
        return store_pb2.RealmDelta(
            path=delta.path,
            id=delta.id,
            version=delta.version,
            head=delta.head,
            created=delta.created,
            history_first=delta.version - len(delta.history) + 1,
        )

    first = piece()
    for start, end in delta.deleted:
        first.deleted_starts.append(start)
        first.deleted_ends.append(end)
    first.deleted_keys.extend(key for key, value in delta.values.items() if value is None)
    for client, (number, version, time_us) in delta.client_rows.items():
        first.clients.append(client)
        first.client_rows.add(number=number, version=version, time_us=time_us)
    yield first, first.ByteSize()
    puts = ((key, value) for key, value in delta.values.items() if value is not None)
    for chunk, weight in _chunks(puts, lambda put: len(put[0]) + len(put[1])):
        rows = piece()
        rows.put_keys.extend([key for key, _ in chunk])
        rows.put_values.extend([value for _, value in chunk])
        yield rows, weight
    for history, weight in _chunks(delta.history, len):
        rows = piece()
        rows.history.extend(history)
        yield rows, weight


def _chunks(rows: Iterable[_Row], size: Callable[[_Row], int]) -> Iterator[tuple[list[_Row], int]]:
    """Runs of rows of about ``_CHUNK_BYTES`` together, and what they weigh."""
    chunk: list[_Row] = []
    weight = 0
    for row in rows:
        chunk.append(row)
        weight += size(row) + _ROW_OVERHEAD_BYTES
        if weight >= _CHUNK_BYTES:
            yield chunk, weight
            chunk, weight = [], 0
    if chunk:
        yield chunk, weight
