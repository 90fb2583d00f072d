"""A copy of one realm as a directory of its own, made before a reset so that nothing can get lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import lmdb

from understudy.client.local_layout import (
    Environment,
    Transaction,
    local_errors,
    prefix,
    prefix_end,
    walk,
    write_new,
)
from understudy.common.files import storage_errors, sync_directory, sync_tree
from understudy.v1 import local_pb2

_ROWS_AT_ONCE = 1_000


def export(
    source: Environment,
    txn: Transaction,
    directory_row: local_pb2.LocalDirectory,
    path: str,
    row: local_pb2.LocalRealm,
    target: Path,
) -> None:
    """Writes what ``row`` says a realm is, with copy and queue, to a new directory: complete, durable, or not at all.

    Nothing happens where the target exists: it was completed earlier.

    Raises:
        DiskFull, StorageFailed.
    """
    if target.exists():
        return
    beside = _beside(target)
    with storage_errors("create", beside):
        if beside.exists():  # left by a crash
            shutil.rmtree(beside)
        beside.mkdir(mode=0o700, parents=True)
    try:
        _write(source, txn, directory_row, path, row, beside)
        sync_tree(beside)
        with storage_errors("create", target):
            os.rename(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_directory(target.parent)


def remove(target: Path) -> None:
    """Removes what :func:`export` has written, also where it was cut off."""
    for path in (target, _beside(target)):
        shutil.rmtree(path, ignore_errors=True)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.new")


def _write(
    source: Environment,
    txn: Transaction,
    directory_row: local_pb2.LocalDirectory,
    path: str,
    row: local_pb2.LocalRealm,
    beside: Path,
) -> None:
    alone = local_pb2.LocalRealm()
    alone.CopyFrom(row)
    alone.ClearField("incoming")
    alone.tail_first = alone.tail_bytes = 0
    environment = write_new(beside, directory_row)
    with environment.env as env, local_errors("write to", beside):
        with env.begin(write=True) as new:
            new.put(path.encode(), alone.SerializeToString(), db=environment.realms)
        for number, old, copied in (
            (row.copy.id, source.data, environment.data),
            (row.id, source.queue, environment.queue),
        ):
            _copy_rows(env, walk(txn.cursor(old), prefix(number), prefix_end(number)), copied)
        env.sync(True)


def _copy_rows(env: lmdb.Environment, rows: Iterable[tuple[bytes, bytes]], to: lmdb._Database) -> None:
    remaining: Iterator[tuple[bytes, bytes]] = iter(rows)
    while chunk := list(islice(remaining, _ROWS_AT_ONCE)):
        with env.begin(to, write=True) as txn:
            txn.cursor().putmulti(chunk, append=True)
