"""Where everything lies in a client's directory, and how its environment is made and opened.

::

    DIR/data.mdb    an LMDB environment with all local copies and queues
    DIR/lock.mdb    LMDB's own
    DIR/lock        flock'ed by the process that has DIR open: "PID BOOT DURABILITY"; blank after a clean close
    DIR/recovered/  copies of realms that a reset has replaced, each a directory like this one

What may live here: names, keys, limits, and the translation of LMDB's errors; nothing that knows what a
change or a load is. ``docs/FORMAT.md`` has the same facts for people.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import lmdb
from google.protobuf.message import DecodeError

from understudy.common.client_ids import new_client_id
from understudy.common.errors import (
    CorruptionError,
    DirectoryError,
    DiskFull,
    NewerFormat,
    NotADataDirectory,
    UnderstudyError,
)
from understudy.common.files import storage_errors, sync_directory
from understudy.common.lmdb_check import check_structure
from understudy.common.store_layout import DATA_FILE, LOCK_FILE, READERS_MAX, reserve_lock_file, translated
from understudy.common.types import KEY_BYTES_MAX, new_id
from understudy.v1 import local_pb2

FORMAT = 1
_LMDB_MAJOR_VERSION = 0  # 0.9, whose format every LMDB tool can read; not what a variable may choose instead
# Address space, not memory or disk. It can't grow while anyone reads, so it is beyond what a device holds for one
# application, and within what phones' kernels give a process.
MAP_BYTES = 64 << 30
_DATABASES_MAX = 16  # six are used; the rest is room for later formats

OWNER_FILE = "lock"
RECOVERED = "recovered"
_CREATING = "creating"  # a new environment until it is complete
_OURS = {OWNER_FILE, _CREATING, RECOVERED, LOCK_FILE, "lost+found"}

FORMAT_KEY = b"format"
DIRECTORY_KEY = b"directory"
NUMBERS_KEY = b"numbers"  # u64: the highest that a forgotten realm may have used
PREFIX_BYTES = 8  # of the id that keys begin with
_FORMAT_ROW = struct.Struct("<I")
LAST_KEY = b"\xff" * KEY_BYTES_MAX  # no key is behind it
_BEHIND_KEYS = LAST_KEY + b"\xff"

REMEDY = (
    "keep this directory under another name for examination, and open an empty one: it loads the server's state "
    "anew; changes that were not uploaded are only in the old one"
)

Transaction: TypeAlias = "lmdb.Transaction[bytes]"
_Row = TypeVar("_Row", local_pb2.LocalDirectory, local_pb2.LocalRealm, local_pb2.QueuedChange)


@dataclass(frozen=True, slots=True)
class Environment:
    """An open LMDB environment and its named databases."""

    path: Path
    env: lmdb.Environment
    meta: lmdb._Database
    realms: lmdb._Database
    data: lmdb._Database
    queue: lmdb._Database
    tail: lmdb._Database
    sweeping: lmdb._Database


_NAMES = ("meta", "realms", "data", "queue", "tail", "sweeping")


# -- keys --------------------------------------------------------------------------------------------------


def prefix(number: int) -> bytes:
    """What keys begin with that belong to a copy or a realm; also a number as the end of a key."""
    return number.to_bytes(PREFIX_BYTES, "big")


def prefix_end(number: int) -> bytes:
    """Behind all keys that begin with :func:`prefix`, and before the next one's."""
    return number.to_bytes(PREFIX_BYTES, "big") + _BEHIND_KEYS


def walk(
    cursor: lmdb.Cursor[bytes], start: bytes, stop: bytes, *, reverse: bool = False
) -> Iterator[tuple[bytes, bytes]]:
    """Rows from ``start`` to before ``stop``, in order."""
    if not reverse:
        if cursor.set_range(start):
            for key, value in cursor:
                if key >= stop:
                    return
                yield key, value
        return
    found = cursor.prev() if cursor.set_range(stop) else cursor.last()
    if found:
        for key, value in cursor.iterprev():
            if key < start:
                return
            yield key, value


def delete_rows(
    cursor: lmdb.Cursor[bytes], start: bytes, stop: bytes, *, rows_max: int | None = None
) -> tuple[int, int]:
    """Deletes rows from ``start`` to before ``stop``, at most ``rows_max``; returns their number and bytes."""
    rows = size = 0
    found = cursor.set_range(start)
    while found and rows != rows_max:
        key = cursor.key()
        if key >= stop:
            break
        rows += 1
        size += len(key) + len(cursor.value())
        cursor.delete()
        found = bool(cursor.key())  # what followed has moved up; at the end there is none
    return rows, size


def parsed(kind: type[_Row], raw: bytes, path: Path) -> _Row:
    """A row's message.

    Raises:
        CorruptionError: it is none.
    """
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise CorruptionError(f"a row of {path} can't be read: {error}", remedy=REMEDY) from error


# -- errors ------------------------------------------------------------------------------------------------


def local_error(error: lmdb.Error, action: str, path: Path) -> UnderstudyError:
    """Our error for one of LMDB's, with what helps on a client."""
    if isinstance(error, lmdb.MapFullError):
        return DiskFull(
            f"can't {action} {path}: it has reached {MAP_BYTES >> 30} GiB, the most that a directory can hold",
            remedy="forget realms that are not needed; nothing that was committed is lost",
        )
    ours = translated(error, action, path)
    return CorruptionError(ours.message, remedy=REMEDY) if isinstance(ours, CorruptionError) else ours


@contextlib.contextmanager
def local_errors(action: str, path: Path) -> Iterator[None]:
    """Turns LMDB's errors into ours."""
    try:
        yield
    except lmdb.Error as error:
        raise local_error(error, action, path) from error


@contextlib.contextmanager
def row_errors(path: Path) -> Iterator[None]:
    """Turns what comes of damaged rows into our error: names that are no text, numbers that don't fit each other."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise CorruptionError(
            f"the rows of {path} can't be what was written: {error}", remedy=REMEDY
        ) from error


# -- opening -------------------------------------------------------------------------------------------------


def prepare(path: Path) -> None:
    """Makes the directory if it is not there.

    Raises:
        NotADataDirectory: it holds something else.
        DirectoryError, DiskFull, StorageFailed.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = {entry.name for entry in path.iterdir()}
    except (FileExistsError, NotADirectoryError):
        raise NotADataDirectory(f"{path} is not a directory", remedy="give another name") from None
    except PermissionError as error:
        raise DirectoryError(
            f"can't use {path}: {error.strerror}", remedy="give another directory"
        ) from error
    if DATA_FILE not in found and not found <= _OURS:
        raise not_ours(path)


def not_ours(path: Path) -> NotADataDirectory:
    """The directory is something else, or is not there."""
    if not path.exists():
        return NotADataDirectory(f"there is no {path}", remedy="give a directory with local copies of realms")
    return NotADataDirectory(
        f"{path} holds something else than local copies of realms", remedy="give an empty or absent directory"
    )


def create(path: Path) -> None:
    """Makes an empty environment in a directory that has none: complete, durable, or not at all."""
    beside = new_beside(path)
    secret = new_id()
    directory = local_pb2.LocalDirectory(client=new_client_id(secret), next_copy_id=1, secret=secret)
    write_new(beside, directory).env.close()
    with storage_errors("create", path / DATA_FILE):
        os.rename(beside / DATA_FILE, path / DATA_FILE)
    sync_directory(path)
    shutil.rmtree(beside, ignore_errors=True)


def new_beside(path: Path) -> Path:
    """An empty folder in the directory, for an environment that is to take its place; what a crash left there goes."""
    beside = path / _CREATING
    shutil.rmtree(beside, ignore_errors=True)
    with storage_errors("create", beside):
        beside.mkdir(mode=0o700)
    return beside


def write_new(path: Path, directory: local_pb2.LocalDirectory) -> Environment:
    """A new environment with nothing but its directory row, on disk; the caller closes it."""
    reserve_lock_file(path)
    with local_errors("create", path):
        env = _environment(path, readonly=False, sync=True, metasync=True)
        try:
            with env.begin(write=True) as txn:
                databases = {name: env.open_db(name.encode(), txn=txn) for name in _NAMES}
                txn.put(FORMAT_KEY, _FORMAT_ROW.pack(FORMAT), db=databases["meta"])
                txn.put(DIRECTORY_KEY, directory.SerializeToString(), db=databases["meta"])
        except BaseException:
            env.close()
            raise
        return Environment(path=path, env=env, **databases)


def open_environment(path: Path, *, readonly: bool, sync: bool) -> Environment:
    """Opens the environment. A process can have it open once.

    Args:
        path: the directory.
        readonly: nothing is changed but LMDB's lock file.
        sync: a power loss undoes at most the last commit, and none behind which the environment was synced. Without,
            it may damage the file.

    Raises:
        NotADataDirectory, NewerFormat, CorruptionError, DirectoryError, DiskFull, StorageFailed.
    """
    with storage_errors("read", path):
        if not (path / DATA_FILE).is_file():
            raise NotADataDirectory(f"there are no local copies in {path}", remedy="give the right directory")
        if not (path / DATA_FILE).stat().st_size:
            raise CorruptionError(f"{path / DATA_FILE} is empty", remedy=REMEDY)
    reserve_lock_file(path)
    with local_errors("open", path):
        env = _environment(path, readonly=readonly, sync=sync, metasync=False)
        try:
            _check_length(env, path)
            _check_format(env, path)
            return Environment(path, env, *(env.open_db(name.encode(), create=False) for name in _NAMES))
        except BaseException:
            env.close()
            raise


def _environment(path: Path, *, readonly: bool, sync: bool, metasync: bool) -> lmdb.Environment:
    return lmdb.open(
        os.fspath(path),
        map_size=MAP_BYTES,
        max_dbs=_DATABASES_MAX,
        max_readers=READERS_MAX,
        readonly=readonly,
        create=not readonly,
        sync=sync,
        metasync=metasync,
        mode=0o600,
        lib_version=_LMDB_MAJOR_VERSION,
        max_spare_txns=4,  # views are opened and closed all the time
    )


def _check_format(env: lmdb.Environment, path: Path) -> None:
    try:
        meta = env.open_db(b"meta", create=False)
    except lmdb.NotFoundError:
        raise not_ours(path) from None
    with env.begin(meta) as txn:
        row, directory = txn.get(FORMAT_KEY), txn.get(DIRECTORY_KEY)
    found = _FORMAT_ROW.unpack(row)[0] if row is not None and len(row) == _FORMAT_ROW.size else 0
    if directory is None:
        raise not_ours(path)
    if found > FORMAT:
        raise NewerFormat(
            f"{path} has format {found}, this version reads {FORMAT}", remedy="install a newer version"
        )
    if found != FORMAT:
        raise CorruptionError(f"{path} does not say what format it has", remedy=REMEDY)


def _check_length(env: lmdb.Environment, path: Path) -> None:
    """Refuses a file that was cut off: reading a page behind its end through the map would be a SIGBUS."""
    pages = env.info()["last_pgno"] + 1
    if (path / DATA_FILE).stat().st_size < pages * env.stat()["psize"]:
        check(path)


def check(path: Path) -> None:
    """Checks the structure of the environment, page by page; some seconds a GiB.

    Raises:
        CorruptionError: it is damaged.
    """
    problems = check_structure(path)
    if problems:
        raise CorruptionError(f"{path / DATA_FILE} is damaged: {problems[0]}", remedy=REMEDY)
