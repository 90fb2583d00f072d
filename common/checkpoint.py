"""A checkpoint: what changed between two freeze marks goes into the store, in one LMDB transaction.

Old values are read from a snapshot of the store as it was, through the map and without copying them, however
large they are; so the order of writes is free, and each named database is written in the order of its keys.

Everything that a checkpoint does follows from the job and the store alone: two nodes that hand the same jobs to
equal stores get equal stores.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import chain, islice

import lmdb

from understudy.common.checkpoint_job import Delta, Job
from understudy.common.errors import RESTORE, CorruptionError
from understudy.common.state_digest import (
    REALM_PREFIX_BYTES,
    decode,
    encode,
    realm_hash,
    sum_pairs,
    sum_stored_pairs,
)
from understudy.common.store_expiry import Expiry
from understudy.common.store_layout import (
    CHECKPOINT_KEY,
    DROPPING_PREFIX,
    MARK_PREFIX,
    Environment,
    dropping_key,
    epoch_key,
    history_row_lsn,
    lmdb_errors,
    mark_key,
    prefix_end,
    realm_prefix,
    row_errors,
)
from understudy.common.store_rows import delete_rows, put_rows, rows_between, rows_under
from understudy.v1.log_pb2 import RealmDigest
from understudy.v1.store_pb2 import (
    CheckpointJob,
    CheckpointResult,
    CheckpointRow,
    RealmRow,
)

# How far back a client can catch up without loading a realm anew, and a retried transaction finds its receipt.
HISTORY_VERSIONS_MAX = 100_000
# So that a realm's history never outgrows by much what a client would load instead. Every change fits.
HISTORY_BYTES_MAX = 64 << 20
# Where the log stood at earlier checkpoints. 200 KiB; a checkpoint a minute for three days before any is dropped.
MARKS_MAX = 4096
# Rows of dropped realms that one checkpoint deletes, so that dropping a large realm never holds up a checkpoint
# by more than a fraction of a second.
DROPPED_ROWS_MAX = 50_000
# A larger value counts as several rows: each of its pages goes into the list of free ones.
_DROPPED_ROW_BYTES = 16 << 10
_ROWS_AT_ONCE = 8_192  # handles of rows held at a time, some 400 bytes each


class JobRefused(ValueError):
    """The job does not follow from what the store holds: a mistake in the program that made it."""


def apply_checkpoint(store: Environment, parts: Iterable[CheckpointJob]) -> CheckpointResult:
    """Writes a job to the store, all of it, durably, or nothing.

    Args:
        parts: of the job; the first says where it ends, and a realm's delta goes on in those that follow. Each is
            let go as soon as the next is taken.

    Raises:
        JobRefused: nothing was changed.
        DiskFull: nothing was changed; trying again can help.
        CorruptionError, StorageFailed: nothing more may be written through ``store``. LMDB's next commit would
            succeed as if nothing had been.
    """
    job = Job(parts)
    started = time.monotonic()
    with lmdb_errors("write a checkpoint to", store.path), row_errors(store.path):
        # A reader that was killed would keep the pages of its snapshot from ever being used again.
        store.env.reader_check()
        with store.env.begin(buffers=True) as before, store.env.begin(write=True) as txn:
            result = _Checkpoint(store, before, txn, job).write()
    result.seconds = time.monotonic() - started
    result.store_bytes = store.data_path.stat().st_size
    return result


class _Change:
    """One realm's delta on its way into the store."""

    __slots__ = ("bytes", "delta", "digest", "entries", "prefix", "row")

    def __init__(self, delta: Delta, row: RealmRow) -> None:
        self.delta = delta
        self.row = row  # as it was; `finish` brings it up to date
        self.prefix = realm_prefix(row.id)
        self.digest = decode(row.state_digest)
        self.entries = row.entries
        self.bytes = row.bytes

    def add(self, keys: list[bytes], values: list[bytes]) -> None:
        self.digest += sum_pairs(keys, values)
        self.entries += len(keys)
        self.bytes += sum(map(len, keys)) + sum(map(len, values))

    def subtract(self, pairs: list[tuple[memoryview, memoryview]]) -> None:
        self.digest -= sum_stored_pairs(pairs)
        self.entries -= len(pairs)
        self.bytes -= sum(map(len, chain.from_iterable(pairs))) - REALM_PREFIX_BYTES * len(pairs)

    def finish(self) -> RealmRow:
        row, delta = self.row, self.delta
        row.version, row.head = delta.version, delta.head
        row.head_lsn = history_row_lsn(delta.history[-1]) if delta.history else row.head_lsn
        row.state_digest, row.entries, row.bytes = encode(self.digest), self.entries, self.bytes
        return row


class _Checkpoint:
    """One job being written; used once."""

    def __init__(
        self,
        store: Environment,
        before: lmdb.Transaction[memoryview],
        txn: lmdb.Transaction[bytes],
        job: Job,
    ) -> None:
        self._store = store
        self._before = before
        self._txn = txn
        self._job = job
        previous = CheckpointRow.FromString(txn.get(CHECKPOINT_KEY, b"", store.meta))
        if job.checkpoint.lsn <= previous.lsn:
            raise JobRefused(f"the store is at LSN {previous.lsn} already, the job at {job.checkpoint.lsn}")
        self._previous = previous
        self._digest = decode(previous.state_digest)
        self._realms = previous.realms

    def write(self) -> CheckpointResult:
        self._drop_realms()
        changes = self._resolve()
        for change in changes:
            self._delete_ranges(change)
        self._write_pairs(changes)
        self._write_history(changes)
        self._write_clients(changes)
        changed = self._write_realms(changes)
        self._sweep_dropped()
        Expiry(self._store, self._before, self._txn, self._job.checkpoint).run()
        return CheckpointResult(checkpoint=self._write_meta(), changed=changed)

    # -- realms --------------------------------------------------------------------------------------------

    def _drop_realms(self) -> None:
        """Takes out the rows of realms that were dropped, those made again since included."""
        job = self._job
        found = set()
        for path in chain(job.dropped_realms, (delta.path for delta in job.deltas if delta.created)):
            raw = self._txn.pop(path.encode(), db=self._store.realms)
            if raw is not None:
                row = RealmRow.FromString(raw)
                self._forget(path, row)
                self._realms -= 1
                found.add(row.id)
        if found != set(job.dropped_realm_ids):
            raise JobRefused(f"realms {sorted(found)} go, {sorted(job.dropped_realm_ids)} were to be dropped")
        for realm_id in sorted(found):
            self._txn.put(dropping_key(realm_id), b"", db=self._store.meta)

    def _resolve(self) -> list[_Change]:
        """The deltas with the rows that they change, in the order of realm ids."""
        deltas = sorted(self._job.deltas, key=lambda delta: delta.id)
        if len({delta.path for delta in deltas}) != len(deltas):
            raise JobRefused("two deltas for one realm")
        return [_Change(delta, self._row_before(delta)) for delta in deltas]

    def _row_before(self, delta: Delta) -> RealmRow:
        if delta.created:
            if not self._previous.lsn < delta.id <= self._job.checkpoint.lsn:
                raise JobRefused(f"realm {delta.path} was made at LSN {delta.id}, outside of the job")
            self._realms += 1
            row = RealmRow(id=delta.id, history_first=1)
        else:
            raw = self._txn.get(delta.path.encode(), db=self._store.realms)
            if raw is None:
                raise JobRefused(f"there is no realm {delta.path} to change")
            row = RealmRow.FromString(raw)
            self._forget(delta.path, row)
        last = delta.history_first + len(delta.history) - 1
        if (delta.id, delta.history_first, delta.version) != (row.id, row.version + 1, last):
            raise JobRefused(
                f"realm {delta.path} has id {row.id} and version {row.version}; the job is for id {delta.id}, "
                f"versions {delta.history_first} to {last}, and ends at {delta.version}"
            )
        return row

    def _forget(self, path: str, row: RealmRow) -> None:
        self._digest -= realm_hash(path, row.version, row.entries, row.state_digest)

    def _write_realms(self, changes: list[_Change]) -> list[RealmDigest]:
        rows = {change.delta.path: change.finish() for change in changes}
        paths = sorted(rows)
        for path, row in rows.items():
            self._digest += realm_hash(path, row.version, row.entries, row.state_digest)
        keys = [path.encode() for path in paths]
        put_rows(self._txn, self._store.realms, keys, [rows[path].SerializeToString() for path in paths])
        return [_realm_digest(path, rows[path]) for path in paths]

    # -- pairs ---------------------------------------------------------------------------------------------

    def _delete_ranges(self, change: _Change) -> None:
        delta = change.delta
        if delta.created:
            return
        cursor = self._before.cursor(self._store.data)
        for start, end in delta.deleted_ranges:
            stop = change.prefix + end if end else prefix_end(delta.id)
            rows = rows_between(cursor, change.prefix + start, stop)
            while pairs := list(islice(rows, _ROWS_AT_ONCE)):
                change.subtract(pairs)
                if delete_rows(self._txn, self._store.data, [bytes(key) for key, _ in pairs]) != len(pairs):
                    raise JobRefused(f"deleted ranges of realm {delta.path} overlap")

    def _write_pairs(self, changes: list[_Change]) -> None:
        values: dict[bytes, bytes] = {}
        ordered: list[bytes] = []
        for change in changes:
            delta, prefix = change.delta, change.prefix
            keys = [prefix + key for key in delta.put_keys]
            values.update(zip(keys, delta.put_values, strict=True))
            change.add(delta.put_keys, delta.put_values)
            # LMDB is about to need memory for as many pages; what `values` has need not be held twice.
            delta.put_keys, delta.put_values = [], []
            keys.sort()
            ordered += keys
            deleted = sorted(prefix + key for key in delta.deleted_keys)
            if len(values) != len(ordered) or not values.keys().isdisjoint(deleted):
                raise JobRefused(f"the delta of realm {delta.path} holds a key twice")
            if not delta.created:
                self._subtract_old(change, sorted(keys + deleted) if deleted else keys)
                delete_rows(self._txn, self._store.data, deleted)
        put_rows(self._txn, self._store.data, ordered, map(values.__getitem__, ordered))

    def _subtract_old(self, change: _Change, keys: list[bytes]) -> None:
        """Takes what the store holds at ``keys`` (sorted) out of the realm's sums."""
        keys = _outside_ranges(change, keys)
        cursor = self._before.cursor(self._store.data)
        for at in range(0, len(keys), _ROWS_AT_ONCE):
            change.subtract(cursor.getmulti(keys[at : at + _ROWS_AT_ONCE]))

    # -- history -------------------------------------------------------------------------------------------

    def _write_history(self, changes: list[_Change]) -> None:
        keys: list[bytes] = []
        rows: list[bytes] = []
        for change in changes:
            kept = self._prune_history(change)
            first = change.delta.version + 1 - len(kept)
            keys += _history_keys(change, first, len(kept))
            rows += kept
        put_rows(self._txn, self._store.history, keys, rows)

    def _prune_history(self, change: _Change) -> list[bytes]:
        """Deletes the oldest rows that are too many, and returns those of the new ones that stay."""
        row, new = change.row, change.delta.history
        stored = row.version + 1 - row.history_first
        count, size = stored + len(new), row.history_bytes + sum(map(len, new))
        pruned = 0
        if count > HISTORY_VERSIONS_MAX or size > HISTORY_BYTES_MAX:
            sizes = chain(self._history_sizes(change, stored), map(len, new))
            pruned, size = _excess(sizes, count, size)
        first = row.history_first
        gone = _history_keys(change, first, min(pruned, stored))
        if delete_rows(self._txn, self._store.history, gone) != len(gone):
            raise CorruptionError(f"the history of realm {change.delta.path} has gaps", remedy=RESTORE)
        row.history_first = first + pruned
        row.history_bytes = size
        return new[max(0, pruned - stored) :]

    def _history_sizes(self, change: _Change, count: int) -> Iterator[int]:
        cursor = self._before.cursor(self._store.history)
        rows = cursor.iternext(keys=False) if cursor.set_range(change.prefix) else ()
        return islice(map(len, rows), count)

    # -- clients -------------------------------------------------------------------------------------------

    def _write_clients(self, changes: list[_Change]) -> None:
        rows = {change.prefix + client: row for change in changes for client, row in change.delta.clients}
        keys = sorted(rows)
        put_rows(self._txn, self._store.clients, keys, map(rows.__getitem__, keys))

    # -- dropped realms ------------------------------------------------------------------------------------

    def _sweep_dropped(self) -> None:
        """Deletes rows of dropped realms, up to a limit; the next checkpoint goes on."""
        left = DROPPED_ROWS_MAX
        marks = rows_under(self._txn.cursor(self._store.meta), DROPPING_PREFIX)
        for mark, _ in list(islice(marks, DROPPED_ROWS_MAX)):
            prefix = mark.removeprefix(DROPPING_PREFIX)
            for database in (self._store.data, self._store.history, self._store.clients):
                left -= self._delete_some(database, prefix, left)
            left -= 1
            if left <= 0:
                return
            self._txn.delete(mark, db=self._store.meta)

    def _delete_some(self, database: lmdb._Database, prefix: bytes, left: int) -> int:
        """Deletes rows of one realm while less than ``left`` has been done, and returns how much was."""
        keys, done = [], 0
        stop = prefix_end(int.from_bytes(prefix, "big"))
        for key, row in rows_between(self._before.cursor(database), prefix, stop):
            if done >= left:
                break
            keys.append(bytes(key))
            done += 1 + len(row) // _DROPPED_ROW_BYTES
        delete_rows(self._txn, database, keys)
        return done

    # -- meta ----------------------------------------------------------------------------------------------

    def _write_meta(self) -> CheckpointRow:
        row = CheckpointRow()
        row.CopyFrom(self._job.checkpoint)
        row.state_digest, row.realms = encode(self._digest), self._realms
        put, meta = self._txn.put, self._store.meta
        for epoch in self._job.epochs:
            put(epoch_key(epoch.info.epoch), epoch.SerializeToString(), db=meta)
        put(mark_key(row.lsn), row.digest, db=meta)
        put(CHECKPOINT_KEY, row.SerializeToString(), db=meta)
        self._thin_marks()
        return row

    def _thin_marks(self) -> None:
        """Beyond the limit, drops every second mark of the older half; the first always stays."""
        keys = [key for key, _ in rows_under(self._txn.cursor(self._store.meta), MARK_PREFIX)]
        if len(keys) > MARKS_MAX:
            delete_rows(self._txn, self._store.meta, keys[1 : len(keys) // 2 : 2])


def _realm_digest(path: str, row: RealmRow) -> RealmDigest:
    return RealmDigest(realm=path, version=row.version, state_digest=row.state_digest, entries=row.entries)


def _outside_ranges(change: _Change, keys: list[bytes]) -> list[bytes]:
    """``keys`` (sorted; changed in place) without those in the delta's deleted ranges."""
    delta, prefix = change.delta, change.prefix
    for start, end in delta.deleted_ranges:
        del keys[bisect_left(keys, prefix + start) : bisect_left(keys, prefix + end) if end else len(keys)]
    return keys


def _history_keys(change: _Change, first: int, count: int) -> list[bytes]:
    prefix = change.prefix
    return [prefix + version.to_bytes(8, "big") for version in range(first, first + count)]


def _excess(sizes: Iterable[int], count: int, size: int) -> tuple[int, int]:
    """How many of the oldest rows are too many, and the bytes that stay.

    Args:
        sizes: bytes of each row, oldest first.
        count: how many rows there are.
        size: their bytes.
    """
    sizes = iter(sizes)
    pruned = max(0, count - HISTORY_VERSIONS_MAX)
    size -= sum(islice(sizes, pruned))
    for row_bytes in sizes:
        if size <= HISTORY_BYTES_MAX:
            break
        pruned += 1
        size -= row_bytes
    return pruned, size
