"""The state after some LSN: layers of memtables over a store snapshot, and what each kind of entry does to it.

Used from one thread. Entries are applied in LSN order, each whole before anyone can look: a reader between two
calls sees all of a transaction or nothing of it (G2).
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass
from hashlib import sha256

from understudy.common.entries import parse_change, parse_entry, parse_start
from understudy.common.errors import RESTORE, CorruptionError
from understudy.common.memtable import CHANGE_OVERHEAD_BYTES, Memtable, Missing, RealmDelta
from understudy.common.realm_history import RealmHistory, RealmLayers
from understudy.common.records import RECORD_HEADER_BYTES, Record
from understudy.common.scan import Scan
from understudy.common.store import Store
from understudy.common.types import REALM_PATH_BYTES_MAX, SYSTEM_REALMS, Digest, Lsn, Position
from understudy.v1 import log_pb2, replication_pb2, store_pb2

_LSN = struct.Struct("<Q")
_COUNTED_AT_ONCE = 1_000  # keys looked up in a few milliseconds


@dataclass(frozen=True, slots=True)
class RealmHead:
    """Where a realm stands."""

    id: int
    version: int
    head: bytes  # SHA-256 of its latest serialized Change


class State(RealmHistory):
    """The applied state: active memtable, frozen memtables (newest first), store snapshot."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.active = Memtable()
        self.frozen: list[Memtable] = []
        checkpoint = store.current.checkpoint
        self._applied = Lsn(checkpoint.lsn), Digest(checkpoint.digest)
        self.offset: int = checkpoint.log_offset
        self.time_us: int = checkpoint.time_us
        self.epochs: list[store_pb2.EpochRow] = store.current.epochs()
        self.realm_count: int = checkpoint.realms

    @property
    def applied(self) -> Position:
        """The last applied entry."""
        return Position(*self._applied)

    # -- applying ------------------------------------------------------------------------------------------

    def apply(self, record: Record, entry: log_pb2.Entry | None = None) -> log_pb2.Entry:
        """Applies the next entry and returns it parsed; a freeze mark closes the active memtable.

        Raises:
            CorruptionError: the entry can't be decoded or does not follow from the state.
        """
        if entry is None:
            entry = parse_entry(record.payload, record.lsn)
        self.offset += RECORD_HEADER_BYTES + len(record.payload)
        self.time_us = entry.time_us
        raw = entry.change
        if raw:
            self._apply_change(record, entry, raw)
        else:
            self._apply_mark(record, entry)
        self._applied = record.lsn, record.digest
        return entry

    def _apply_change(self, record: Record, entry: log_pb2.Entry, raw: bytes) -> None:
        lsn, digest, _ = record
        change = parse_change(raw, lsn)
        active, path, version = self.active, change.realm, change.version
        delta = active.realms.get(path) or self._open_delta(path, lsn)
        if version != delta.version + 1 or change.previous != delta.head:
            raise CorruptionError(
                f"entry {lsn} does not follow: it makes version {version} of realm {path}, "
                f"which is at {delta.version}"
            )
        operations = change.operations[:]  # a list: protobuf's own container is slow to walk
        delta.apply(operations, self._older_value)
        delta.version = version
        delta.head = sha256(raw).digest()
        delta.history.append(_LSN.pack(lsn) + digest + entry.hmac + raw)
        delta.note_client(change.client, change.number, self.time_us)
        if not active.first_change_lsn:
            active.first_change_lsn = lsn
        active.bytes += 2 * len(raw) + CHANGE_OVERHEAD_BYTES
        active.operations += len(operations)

    def _apply_mark(self, record: Record, entry: log_pb2.Entry) -> None:
        kind = entry.WhichOneof("body")
        if kind == "freeze":
            self._freeze(record)
        elif kind == "epoch_start":
            self._start_epoch(record, entry)
        elif kind == "realm_dropped":
            self._drop(entry.realm_dropped.realm, record.lsn)
        elif kind != "digest_mark":  # that changes nothing
            raise CorruptionError(f"entry {record.lsn} is of kind {kind}, which is not applied here")

    def _open_delta(self, path: str, lsn: Lsn) -> RealmDelta:
        path_bytes = len(path.encode())
        if not 0 < path_bytes <= REALM_PATH_BYTES_MAX:  # the store could not hold it
            raise CorruptionError(
                f"entry {lsn} is of a realm whose path is of {path_bytes} bytes", remedy=RESTORE
            )
        head = self.realm(path)
        delta = (
            RealmDelta(path, lsn, 0, b"", created=True)
            if head is None
            else RealmDelta(path, head.id, head.version, head.head, created=False)
        )
        if head is None:
            self.realm_count += 1
        self.active.realms[path] = delta
        return delta

    def _freeze(self, record: Record) -> None:
        self.active.freeze(record.position, self.offset, self.time_us)
        self.frozen.insert(0, self.active)
        self.active = Memtable()

    def _start_epoch(self, record: Record, entry: log_pb2.Entry) -> None:
        start = parse_start(entry.epoch_start, record.lsn)
        row = store_pb2.EpochRow(
            info=replication_pb2.EpochInfo(
                epoch=start.epoch, first_lsn=record.lsn, previous=self.applied.digest
            ),
            proof=replication_pb2.EpochProof(entry=record.payload),
        )
        self.epochs.append(row)
        self.active.epochs.append(row)

    def _drop(self, path: str, lsn: Lsn) -> None:
        head = self.realm(path)
        if head is None:
            return
        self.realm_count -= 1
        self.active.first_change_lsn = self.active.first_change_lsn or lsn
        delta = self.active.realms.get(path)
        if delta is None or not delta.created:
            self.active.dropped_ids.append(head.id)
        self.active.realms[path] = None

    def skip(self, position: Position, offset: int, time_us: int) -> None:
        """Goes on behind entries that are not at hand; they concern nothing that this state is to hold.

        Args:
            offset: of the log, behind them.
            time_us: of the last of them.
        """
        self._applied = position.lsn, position.digest
        self.offset, self.time_us = offset, time_us

    def checkpointed(self) -> Memtable:
        """Called when the oldest frozen memtable is in the store: reads go there from now on.

        Returns:
            The memtable that is no longer needed.
        """
        self.store.refresh()
        return self.frozen.pop()

    @property
    def user_realm_count(self) -> int:
        """How many realms there are without the system's own."""
        return self.realm_count - sum(self.realm(path) is not None for path in SYSTEM_REALMS)

    # -- reading -------------------------------------------------------------------------------------------

    def _layers(self) -> list[Memtable]:
        return [self.active, *self.frozen]

    def realm(self, path: str) -> RealmHead | None:
        """Where a realm stands, or None where there is none."""
        for table in self._layers():
            if path in table.realms:
                delta = table.realms[path]
                return None if delta is None else RealmHead(delta.id, delta.version, delta.head)
        row = self.store.current.realm(path)
        return None if row is None else RealmHead(row.id, row.version, row.head)

    def layers_of(self, path: str) -> RealmLayers:
        deltas: list[RealmDelta] = []
        for table in self._layers():
            if path not in table.realms:
                continue
            delta = table.realms[path]
            if delta is None:
                return RealmLayers(path, deltas, None)
            deltas.append(delta)
            if delta.created:
                return RealmLayers(path, deltas, None)
        return RealmLayers(path, deltas, self.store.current.realm(path))

    def get(self, path: str, key: bytes) -> bytes | None:
        """The value at ``key``, or None.

        Raises:
            UnknownRealm: no such realm.
        """
        _, deltas, stored = self.known_layers_of(path)
        for delta in deltas:
            found = delta.get(key)
            if not isinstance(found, Missing):
                return found
        return self.store.current.get(stored.id, key) if stored is not None else None

    def _older_value(self, delta: RealmDelta, key: bytes) -> bytes | None:
        # `delta` is the active one and does not hold the key: ask the layers below it.
        for table in self.frozen:
            below = table.realms.get(delta.path)
            if below is not None:
                found = below.get(key)
                if not isinstance(found, Missing):
                    return found
        return self.store.current.get(delta.id, key)

    def scan(self, path: str, start: bytes = b"", end: bytes = b"", *, reverse: bool = False) -> Scan:
        """All pairs from ``start`` (included) to ``end`` (excluded) at the present LSN.

        Raises:
            UnknownRealm: no such realm.
        """
        _, deltas, stored = self.known_layers_of(path)
        return Scan(self.store, deltas, stored.id if stored is not None else 0, start, end, reverse=reverse)

    def counting(self, path: str) -> Generator[None, None, int | None]:
        """How many keys a realm has at the present LSN, worked out in steps; entries may be applied between them.

        It is the store's own count, corrected by what is in memory.

        Returns:
            None where that does not tell, so that the realm has to be walked.

        Raises:
            UnknownRealm: no such realm.
        """
        _, deltas, stored = self.known_layers_of(path)
        if any(delta.deleted for delta in deltas):
            return None
        newest: dict[bytes, bytes | None] = {}
        for delta in reversed(deltas):
            newest.update(delta.values)
        count = sum(value is not None for value in newest.values())
        if stored is None:
            return count
        with self.store.current.acquire() as snapshot:
            count += stored.entries
            keys = list(newest)
            for start in range(0, len(keys), _COUNTED_AT_ONCE):
                values = snapshot.get_many(stored.id, keys[start : start + _COUNTED_AT_ONCE])
                count -= sum(value is not None for value in values)
                yield
        return count

    def realms(self) -> dict[str, RealmHead]:
        """Every realm, by path."""
        found = {path: RealmHead(row.id, row.version, row.head) for path, row in self.store.current.realms()}
        for table in reversed(self._layers()):
            for path, delta in table.realms.items():
                if delta is None:
                    found.pop(path, None)
                else:
                    found[path] = RealmHead(delta.id, delta.version, delta.head)
        return dict(sorted(found.items()))

    def recent_paths(self) -> list[str]:
        """The paths, in order, of all realms that memtables know of, dropped ones too."""
        return sorted({path for table in self._layers() for path in table.realms})
