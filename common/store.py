"""The store: the state after some LSN, the checkpoint, in an LMDB environment that only checkpoints write.

This process reads it through snapshots; :mod:`understudy.common.checkpoint` says what a checkpoint writes, and
:mod:`understudy.common.checkpoint_process` where. Memtables hold what came after.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import lmdb
from google.protobuf.message import DecodeError

from understudy.common import store_layout as layout
from understudy.common.errors import RESTORE, CorruptionError, DirectoryError
from understudy.common.files import sync_directory
from understudy.common.state_digest import EMPTY_STATE, REALM_PREFIX_BYTES
from understudy.common.store_layout import Environment, HistoryRow, lmdb_errors, realm_prefix, translated
from understudy.common.types import NO_LSN, ClusterId, Digest, Lsn, Position, format_id, parse_lsn
from understudy.v1.store_pb2 import CheckpointRow, ClientRow, EpochRow, RealmRow

# Looked up with every transaction and every read; a few hundred bytes each.
_REALM_ROWS_CACHED = 10_000
_BEHIND_PATHS = b"\xff"  # a byte that UTF-8 has no use for

_Row = TypeVar("_Row", CheckpointRow, ClientRow, EpochRow, RealmRow)


class StoreSnapshot:
    """The store at one checkpoint, until the last one who uses it releases it.

    May be used from several threads, by one at a time. Rows that it returns must not be changed: they are
    cached. Everything here raises :class:`CorruptionError` where the file turns out to be damaged.
    """

    def __init__(self, environment: Environment, lock: threading.RLock) -> None:
        self._environment = environment
        self._lock = lock
        self._users = 1  # 0: closed
        self._realms: dict[str, RealmRow | None] = {}
        with lmdb_errors("read", environment.path):
            self._txn: lmdb.Transaction[bytes] = environment.env.begin()
        try:
            row = self._meta(layout.CHECKPOINT_KEY)
            if row is None:
                raise CorruptionError(f"the store {environment.path} has no checkpoint", remedy=RESTORE)
            self.checkpoint = self._parsed(CheckpointRow, row)
        except BaseException:
            self._txn.abort()
            raise

    def __enter__(self) -> StoreSnapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> StoreSnapshot:
        """Keeps the snapshot open until a :meth:`release`."""
        with self._lock:
            if not self._users:
                raise RuntimeError("the snapshot was released by everyone and is closed")
            self._users += 1
        return self

    def release(self) -> None:
        """Lets go of it; the last one closes it."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self._txn.abort()
        del self._txn  # the slot among LMDB's readers goes with it

    # -- reading -------------------------------------------------------------------------------------------

    def realm(self, path: str) -> RealmRow | None:
        """The realm's row, or None where there is no such realm."""
        cache = self._realms
        if path in cache:
            return cache[path]
        raw = self._get(path.encode(), self._environment.realms)
        row = None if raw is None else self._parsed(RealmRow, raw)
        if len(cache) >= _REALM_ROWS_CACHED:
            del cache[next(iter(cache))]
        cache[path] = row
        return row

    def realms(self, after: str = "") -> Iterator[tuple[str, RealmRow]]:
        """Every realm's path and row, ordered by path, from behind ``after``."""
        start = after.encode() + b"\0"
        with self._damage():
            for path, raw in self._walk(self._environment.realms, start, _BEHIND_PATHS):
                yield path.decode(), RealmRow.FromString(raw)

    def get(self, realm_id: int, key: bytes) -> bytes | None:
        """The value at ``key``, or None."""
        return self._get(realm_prefix(realm_id) + key, self._environment.data)

    def get_many(self, realm_id: int, keys: Iterable[bytes]) -> list[bytes | None]:
        """The values at ``keys``, in their order, None where there is none."""
        prefix = realm_prefix(realm_id)
        full = [prefix + key for key in keys]
        with lmdb_errors("read", self._environment.path):
            found = dict(self._txn.cursor(self._environment.data).getmulti(full))
        return [found.get(key) for key in full]

    def scan(
        self, realm_id: int, start: bytes = b"", end: bytes = b"", *, reverse: bool = False
    ) -> Generator[tuple[bytes, bytes], None, None]:
        """Pairs from ``start`` (included; empty: the first) to ``end`` (excluded; empty: to the last), in order.

        Keeps the snapshot open while it is being read.
        """
        prefix = realm_prefix(realm_id)
        stop = prefix + end if end else layout.prefix_end(realm_id)
        for key, value in self._walk(self._environment.data, prefix + start, stop, reverse=reverse):
            yield key[REALM_PREFIX_BYTES:], value

    def history(
        self, realm_id: int, from_version: int, *, reverse: bool = False
    ) -> Generator[HistoryRow, None, None]:
        """The changes kept of a realm: ``from_version`` and later, or with ``reverse`` it and earlier."""
        here = layout.history_key(realm_id, from_version)
        start, stop = (
            (realm_prefix(realm_id), here + b"\0") if reverse else (here, layout.prefix_end(realm_id))
        )
        for key, row in self._walk(self._environment.history, start, stop, reverse=reverse):
            yield layout.decode_history_row(int.from_bytes(key[REALM_PREFIX_BYTES:], "big"), row)

    def client(self, realm_id: int, client_id: bytes) -> ClientRow | None:
        """What is known of a client's changes to a realm, or None."""
        raw = self._get(realm_prefix(realm_id) + client_id, self._environment.clients)
        return None if raw is None else self._parsed(ClientRow, raw)

    def cluster(self) -> ClusterId:
        """The cluster that the store belongs to."""
        return ClusterId(self._meta(layout.CLUSTER_KEY) or b"")

    def epochs(self) -> list[EpochRow]:
        """Every epoch up to the checkpoint, oldest first."""
        with self._damage():
            return [EpochRow.FromString(raw) for _, raw in self._meta_rows(layout.EPOCH_PREFIX)]

    def mark(self, lsn: Lsn) -> Digest | None:
        """The log's digest at an earlier checkpoint's LSN, or None where none is kept."""
        raw = self._meta(layout.mark_key(lsn))
        return None if raw is None else Digest(raw)

    def marks(self) -> list[Position]:
        """Where the log stood at earlier checkpoints, oldest first, sparser towards the beginning."""
        with self._damage():
            return [
                Position(parse_lsn(key.removeprefix(layout.MARK_PREFIX).decode()), Digest(raw))
                for key, raw in self._meta_rows(layout.MARK_PREFIX)
            ]

    # -- how it is read ------------------------------------------------------------------------------------

    def _meta(self, key: bytes) -> bytes | None:
        return self._get(key, self._environment.meta)

    def _meta_rows(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        # No other prefix is this one with its last byte, a slash, replaced by the next.
        return self._walk(self._environment.meta, prefix, prefix[:-1] + b"0")

    def _get(self, key: bytes, database: lmdb._Database) -> bytes | None:
        try:
            return self._txn.get(key, db=database)
        except lmdb.Error as error:
            raise translated(error, "read", self._environment.path) from error

    def _walk(
        self, database: lmdb._Database, start: bytes, stop: bytes, *, reverse: bool = False
    ) -> Generator[tuple[bytes, bytes], None, None]:
        """Rows from ``start`` (included) to ``stop`` (excluded)."""
        with (
            self.acquire(),
            lmdb_errors("read", self._environment.path),
            self._txn.cursor(database) as cursor,
        ):
            if reverse:
                if not (cursor.prev() if cursor.set_range(stop) else cursor.last()):
                    return
                for row in cursor.iterprev():
                    if row[0] < start:
                        return
                    yield row
            elif cursor.set_range(start):
                for row in cursor.iternext():
                    if row[0] >= stop:
                        return
                    yield row

    def _parsed(self, kind: type[_Row], raw: bytes) -> _Row:
        with self._damage():
            return kind.FromString(raw)

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (DecodeError, ValueError) as error:
            raise CorruptionError(
                f"a row of the store {self._environment.path} can't be read: {error}", remedy=RESTORE
            ) from error


class Store:
    """The store of a data directory, open for reading. A process can open it once.

    ``current`` is replaced by :meth:`refresh` on one thread; everything else may be called from any.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._lock = threading.RLock()
        self._current = StoreSnapshot(environment, self._lock)

    @staticmethod
    def create(
        path: Path, cluster: ClusterId, checkpoint: CheckpointRow, epochs: Iterable[EpochRow] = ()
    ) -> None:
        """Makes an empty store that stands at ``checkpoint``, durably.

        Args:
            path: the directory ``store/``; must not exist or be empty.
            checkpoint: its state digest and realm count are those of a server without realms.

        Raises:
            DirectoryError: ``path`` is not empty.
            DiskFull, StorageFailed: the disk's fault.
        """
        row = CheckpointRow()
        row.CopyFrom(checkpoint)
        row.state_digest, row.realms = EMPTY_STATE, 0
        rows = {
            layout.FORMAT_KEY: layout.format_row(),
            layout.CLUSTER_KEY: bytes(cluster),
            layout.CHECKPOINT_KEY: row.SerializeToString(),
            **{layout.epoch_key(epoch.info.epoch): epoch.SerializeToString() for epoch in epochs},
        }
        if row.lsn != NO_LSN:
            rows[layout.mark_key(row.lsn)] = row.digest
        environment = layout.create_environment(path)
        try:
            with lmdb_errors("create", path), environment.env.begin(environment.meta, write=True) as txn:
                txn.cursor().putmulti(sorted(rows.items()))
        finally:
            environment.close()
        sync_directory(path)
        sync_directory(path.parent)

    @classmethod
    def open(cls, path: Path, *, cluster: ClusterId | None = None) -> Store:
        """Opens the store in the directory ``path``.

        Args:
            cluster: the cluster that it must belong to, if known.

        Raises:
            NotADataDirectory: there is none.
            NewerFormat: a later version wrote it.
            CorruptionError: the file is damaged, with the remedy.
            DirectoryError: it belongs to another cluster or to another user.
            DiskFull, Overloaded, StorageFailed: see :func:`understudy.common.store_layout.translated`.
        """
        environment = layout.open_environment(path, readonly=True)
        try:
            store = cls(environment)
            found = store.current.cluster()
            if cluster is not None and found != cluster:
                raise DirectoryError(
                    f"the store {path} belongs to cluster {format_id(found)}, not to {format_id(cluster)}",
                    remedy="put back the store that was there before, or restore this node from its peer",
                )
            return store
        except BaseException:
            environment.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes it; snapshots that someone still holds can't be read any more."""
        self._environment.close()

    @property
    def path(self) -> Path:
        """The directory ``store/``."""
        return self._environment.path

    @property
    def data_path(self) -> Path:
        """The file that holds everything."""
        return self._environment.data_path

    @property
    def env(self) -> lmdb.Environment:
        """LMDB's own handle, for who reads pages or rows past snapshots."""
        return self._environment.env

    @property
    def environment(self) -> Environment:
        """LMDB's handles of the environment and its named databases."""
        return self._environment

    @property
    def current(self) -> StoreSnapshot:
        """The snapshot that :meth:`refresh` made last, or :meth:`open`; open until it is replaced."""
        return self._current

    def refresh(self) -> StoreSnapshot:
        """The store as it is now, after a checkpoint. The snapshot before it closes with its last user."""
        latest = StoreSnapshot(self._environment, self._lock)
        with self._lock:
            previous, self._current = self._current, latest
        previous.release()
        return latest

    @contextlib.contextmanager
    def hold(self) -> Iterator[StoreSnapshot]:
        """The current snapshot, kept open in the block, on whatever thread."""
        with self._lock:
            snapshot = self._current.acquire()
        with snapshot:
            yield snapshot
