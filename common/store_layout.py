"""Where everything lies in the store's LMDB environment, and how the environment is opened.

What may live here: names, keys, fixed-size rows, limits, and the translation of LMDB's errors; nothing that
knows what a checkpoint or a snapshot is. ``docs/FORMAT.md`` has the same facts for people.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lmdb
from google.protobuf.message import DecodeError

from understudy.common.errors import (
    RESTORE,
    CorruptionError,
    DirectoryError,
    DiskFull,
    NewerFormat,
    NotADataDirectory,
    Overloaded,
    StorageFailed,
    UnderstudyError,
)
from understudy.common.files import NO_SPACE, storage_errors
from understudy.common.lmdb_check import check_structure
from understudy.common.state_digest import REALM_PREFIX_BYTES
from understudy.common.types import DIGEST_BYTES, KEY_BYTES_MAX, LSN_DIGITS, Digest, Lsn, format_lsn

FORMAT = 1
_LMDB_MAJOR_VERSION = 0  # 0.9, whose format every LMDB tool can read; not what a variable may choose instead
DATA_FILE = "data.mdb"
LOCK_FILE = "lock.mdb"

# Address space, not memory or disk. It can't grow while anyone reads, so it is beyond what one server holds.
MAP_BYTES = 1 << 40
READERS_MAX = 1024  # snapshots open at one time, over all processes; 64 bytes each
_DATABASES_MAX = 16  # five are used; the rest is room for later formats
_LOCK_FILE_BYTES = 64 * (READERS_MAX + 2)
# What must be writable for a short write not to have been a full disk.
_PROBE_BYTES = 1 << 20

FORMAT_KEY = b"format"
CLUSTER_KEY = b"cluster"
CHECKPOINT_KEY = b"checkpoint"
CLIENTS_CURSOR_KEY = b"clients-cursor"
HISTORY_CURSOR_KEY = b"history-cursor"
EPOCH_PREFIX = b"epoch/"
MARK_PREFIX = b"mark/"
TIME_PREFIX = b"time/"
DROPPING_PREFIX = b"dropping/"

_BEHIND_KEYS = b"\xff" * (KEY_BYTES_MAX + 1)
_FORMAT_ROW = struct.Struct("<I")
_TIME_ROW = struct.Struct("<Q")
_HISTORY_ROW = struct.Struct(f"<Q{DIGEST_BYTES}s{DIGEST_BYTES}s")
HISTORY_HEADER_BYTES = _HISTORY_ROW.size

_DAMAGED = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PageFullError,
    lmdb.CursorFullError,
    lmdb.IncompatibleError,
    lmdb.NotFoundError,
    lmdb.BadTxnError,  # what LMDB says to all that follows in a transaction that has met a damaged page
)
_NOT_OURS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """One change as the store keeps it."""

    version: int
    lsn: Lsn
    digest: Digest  # the log's digest at `lsn`
    hmac: bytes  # 32 bytes, with the cluster's history key
    change: bytes  # a serialized Change


@dataclass(frozen=True, slots=True)
class Environment:
    """An open LMDB environment and its named databases."""

    path: Path
    env: lmdb.Environment
    data: lmdb._Database
    realms: lmdb._Database
    history: lmdb._Database
    clients: lmdb._Database
    meta: lmdb._Database

    @property
    def data_path(self) -> Path:
        """The file that holds everything; its length in bytes is the store's size."""
        return self.path / DATA_FILE

    def close(self) -> None:
        """Ends every transaction and unmaps the file."""
        self.env.close()


# -- keys and rows -----------------------------------------------------------------------------------------


def realm_prefix(realm_id: int) -> bytes:
    """What keys of ``data``, ``history`` and ``clients`` begin with."""
    return realm_id.to_bytes(REALM_PREFIX_BYTES, "big")


def prefix_end(realm_id: int) -> bytes:
    """Behind all keys of this realm in ``data``, ``history`` and ``clients``, and before the next realm's."""
    return realm_prefix(realm_id) + _BEHIND_KEYS


def history_key(realm_id: int, version: int) -> bytes:
    """A key of ``history``."""
    return realm_prefix(realm_id) + version.to_bytes(8, "big")


def encode_history_row(lsn: Lsn, digest: Digest, hmac: bytes, change: bytes) -> bytes:
    """A row of ``history``."""
    return _HISTORY_ROW.pack(lsn, digest, hmac) + change


def decode_history_row(version: int, row: bytes) -> HistoryRow:
    """The inverse of :func:`encode_history_row`.

    Raises:
        CorruptionError: the row is too short.
    """
    if len(row) < HISTORY_HEADER_BYTES:
        raise CorruptionError(f"history of version {version} has only {len(row)} bytes", remedy=RESTORE)
    lsn, digest, hmac = _HISTORY_ROW.unpack_from(row)
    return HistoryRow(version, lsn, digest, hmac, row[HISTORY_HEADER_BYTES:])


def history_row_lsn(row: bytes | memoryview) -> int:
    """The LSN in a row of ``history``, without reading all of the row."""
    return int.from_bytes(row[:8], "little")


def epoch_key(epoch: int) -> bytes:
    """The key in ``meta`` of an epoch's row."""
    return EPOCH_PREFIX + b"%0*d" % (LSN_DIGITS, epoch)


def mark_key(lsn: int) -> bytes:
    """The key in ``meta`` of the log's digest at a checkpoint."""
    return MARK_PREFIX + format_lsn(Lsn(lsn)).encode()


def time_key(lsn: int) -> bytes:
    """The key in ``meta`` of the log's time at a checkpoint."""
    return TIME_PREFIX + format_lsn(Lsn(lsn)).encode()


def encode_time_row(time_us: int) -> bytes:
    """A row ``time/...`` of ``meta``."""
    return _TIME_ROW.pack(time_us)


def decode_time_row(row: bytes) -> int:
    """The inverse of :func:`encode_time_row`.

    Raises:
        CorruptionError: the row has another length.
    """
    if len(row) != _TIME_ROW.size:
        raise CorruptionError(f"a checkpoint's time has {len(row)} bytes", remedy=RESTORE)
    time_us: int = _TIME_ROW.unpack(row)[0]
    return time_us


def dropping_key(realm_id: int) -> bytes:
    """The key in ``meta`` that says that a dropped realm's rows are not all deleted yet."""
    return DROPPING_PREFIX + realm_prefix(realm_id)


def format_row() -> bytes:
    """The row ``format`` of ``meta``."""
    return _FORMAT_ROW.pack(FORMAT)


# -- LMDB's errors -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def lmdb_errors(action: str, path: Path) -> Iterator[None]:
    """Turns LMDB's errors into ours.

    Args:
        action: what was being done, as in "can't <action> the store".
        path: the environment's directory.
    """
    try:
        yield
    except lmdb.Error as error:
        raise translated(error, action, path) from error


def translated(error: lmdb.Error, action: str, path: Path) -> UnderstudyError:
    """Our error for one of LMDB's; for hot paths, where a context manager would cost more than the read."""
    what = f"can't {action} the store {path}: {error}"
    code = getattr(error, "code", 0)  # py-lmdb's own refusals have none
    if isinstance(error, _DAMAGED):
        return CorruptionError(f"{what}: the file is damaged", remedy=RESTORE)
    if isinstance(error, lmdb.VersionMismatchError):
        return NewerFormat(what, remedy="install a newer version")
    if isinstance(error, lmdb.MapFullError):
        return DiskFull(f"{what}: it has reached {MAP_BYTES >> 40} TiB, the most that a store can hold")
    if isinstance(error, lmdb.ReadersFullError):
        return Overloaded(f"{what}: {READERS_MAX} snapshots of it are open", remedy="end some of the readers")
    if isinstance(error, lmdb.MemoryError):
        return StorageFailed(f"{what}: no address space", remedy="raise the limit: ulimit -v unlimited")
    if code in _NOT_OURS:
        return DirectoryError(what, remedy=f"chown -R $USER {path} gives it to the user that runs this")
    if _is_full(code, path):
        return DiskFull(
            f"no space left to {action} the store {path}", remedy="free some space, then try again"
        )
    return StorageFailed(what)


def _is_full(code: int, path: Path) -> bool:
    # LMDB reports a write that was cut short as EIO, and on a regular file only a full disk cuts one short.
    return code in NO_SPACE or (code == errno.EIO and not _can_grow(path))


def _can_grow(path: Path) -> bool:
    probe = path / "space-probe"
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, _PROBE_BYTES)
        finally:
            os.close(fd)
            os.unlink(probe)
    except OSError as error:
        return error.errno not in NO_SPACE
    return True


@contextlib.contextmanager
def row_errors(path: Path) -> Iterator[None]:
    """Turns what comes of reading a damaged row into our error: no message, no text, a number beyond all others."""
    try:
        yield
    except (DecodeError, UnicodeDecodeError, OverflowError, struct.error) as error:
        raise CorruptionError(f"a row of the store {path} can't be read: {error}", remedy=RESTORE) from error


# -- opening -----------------------------------------------------------------------------------------------


def create_environment(path: Path) -> Environment:
    """Makes an empty environment in ``path``, which must not exist or be empty.

    Raises:
        DirectoryError: there is something in ``path``.
        DiskFull, StorageFailed: the disk's fault.
    """
    with storage_errors("create", path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise DirectoryError(f"{path} is not empty", remedy="a new store needs an empty directory")
    reserve_lock_file(path)
    return _open(path, readonly=False, create=True)


def open_environment(path: Path, *, readonly: bool) -> Environment:
    """Opens the environment in ``path``. A process can have it open once.

    Raises:
        NotADataDirectory: there is no store.
        CorruptionError: the file is not LMDB's, or damaged.
        NewerFormat, DirectoryError, DiskFull, StorageFailed: see :func:`translated`.
    """
    with storage_errors("read", path):
        if not (path / DATA_FILE).exists():
            raise NotADataDirectory(f"there is no store in {path}", remedy=RESTORE)
        if not (path / DATA_FILE).stat().st_size:
            raise CorruptionError(f"the store {path / DATA_FILE} is empty", remedy=RESTORE)
    reserve_lock_file(path)
    return _open(path, readonly=readonly, create=False)


def _open(path: Path, *, readonly: bool, create: bool) -> Environment:
    with lmdb_errors("open", path):
        env = lmdb.open(
            os.fspath(path),
            map_size=MAP_BYTES,
            max_dbs=_DATABASES_MAX,
            max_readers=READERS_MAX,
            readonly=readonly,
            create=create,
            mode=0o600,
            lib_version=_LMDB_MAJOR_VERSION,
        )
        try:
            if readonly:  # a server opens its store for reading first
                _check_length(env, path)
            meta = env.open_db(b"meta", create=create)
            if not create:
                _check_format(env, meta, path)
            names = ("data", "realms", "history", "clients")
            databases = {name: env.open_db(name.encode(), create=create) for name in names}
            return Environment(path=path, env=env, meta=meta, **databases)
        except BaseException:
            env.close()
            raise


def _check_format(env: lmdb.Environment, meta: lmdb._Database, path: Path) -> None:
    with env.begin(meta) as txn:
        row = txn.get(FORMAT_KEY)
    found = _FORMAT_ROW.unpack(row)[0] if row is not None and len(row) == _FORMAT_ROW.size else 0
    if found > FORMAT:
        raise NewerFormat(
            f"the store {path} has format {found}, this version reads {FORMAT}",
            remedy="install a newer version",
        )
    if found != FORMAT:
        raise CorruptionError(f"the store {path} does not say what format it has", remedy=RESTORE)


def _check_length(env: lmdb.Environment, path: Path) -> None:
    """Refuses a file that was cut off: reading a page behind its end through the map would be a SIGBUS.

    The last pages may be missing where they are free ones that were never written; only a walk can tell.
    """
    pages = env.info()["last_pgno"] + 1
    if (path / DATA_FILE).stat().st_size < pages * env.stat()["psize"]:
        problems = check_structure(path)
        if problems:
            raise CorruptionError(f"the store {path} was cut off: {problems[0]}", remedy=RESTORE)


def reserve_lock_file(path: Path) -> None:
    """Gives LMDB's lock file its blocks before LMDB maps it.

    LMDB makes it as a hole and writes to it through the map, where a full disk is no error but a SIGBUS.
    """
    lock = path / LOCK_FILE
    with storage_errors("create", lock):
        try:
            status = lock.stat() if lock.exists() else None
            size = max(status.st_size if status else 0, _LOCK_FILE_BYTES)
            if status is not None and status.st_blocks * 512 >= size == status.st_size:
                return  # Not opened without need: closing it would drop the locks that this process has on it.
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno in _NOT_OURS:
                return  # LMDB says what is wrong, or does without the file on a read-only file system
            raise
        try:
            os.posix_fallocate(fd, 0, size)
        finally:
            os.close(fd)
