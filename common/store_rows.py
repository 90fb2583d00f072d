"""Rows of the store's named databases, read and written by the many in one LMDB transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import TypeVar

import lmdb

_Buffer = TypeVar("_Buffer", bytes, memoryview)


def rows_between(
    cursor: lmdb.Cursor[_Buffer], start: bytes, stop: bytes
) -> Iterator[tuple[_Buffer, _Buffer]]:
    """Rows from ``start`` (included) to ``stop`` (excluded; empty: to the last)."""
    if not cursor.set_range(start):
        return iter(())
    rows = cursor.iternext()
    return takewhile(lambda row: bytes(row[0]) < stop, rows) if stop else rows


def rows_under(cursor: lmdb.Cursor[_Buffer], prefix: bytes) -> Iterator[tuple[_Buffer, _Buffer]]:
    """Rows whose keys begin with ``prefix``."""
    if not cursor.set_range(prefix):
        return iter(())
    return takewhile(lambda row: bytes(row[0]).startswith(prefix), cursor.iternext())


def put_rows(
    txn: lmdb.Transaction[bytes], database: lmdb._Database, keys: list[bytes], rows: Iterable[bytes]
) -> None:
    """Writes rows, given as columns, whose keys ascend."""
    if not keys:
        return
    cursor = txn.cursor(database)
    # Behind all that is there, LMDB fills page after page; elsewhere it leaves a trail of half-full ones.
    append = not cursor.last() or cursor.key() < keys[0]
    cursor.putmulti(zip(keys, rows, strict=True), append=append)


def delete_rows(txn: lmdb.Transaction[bytes], database: lmdb._Database, keys: Iterable[bytes]) -> int:
    """Deletes rows and returns how many of them there were."""
    delete = txn.delete
    return sum([delete(key, b"", database) for key in keys])
