"""The tail: raw changes that are not known to be safe on a replica, for a server that has lost them.

Kept are the versions from ``tail_first`` up to the copy's, without a gap. Everything happens in the caller's LMDB
transaction, and to the realm's row that the caller writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import lmdb

from understudy.client.local_changes import Checked
from understudy.client.local_layout import Transaction, delete_rows, prefix, prefix_end, walk
from understudy.client.local_types import Received
from understudy.common.types import DIGEST_BYTES
from understudy.v1 import local_pb2

# More than servers lose that have replicas at all; without any, a device is no place for the whole history.
TAIL_BYTES_MAX: Final = 4 << 20
TAIL_CHANGES_MAX: Final = 10_000


def keep(
    txn: Transaction, tail: lmdb._Database, row: local_pb2.LocalRealm, changes: Sequence[Checked]
) -> None:
    """Keeps those of the copy's newest changes that are not safe; the oldest go where it gets too much."""
    start = prefix(row.id)
    rows = [
        (start + prefix(change.version), received.hmac + received.raw)
        for change, received, _ in changes
        if change.version > row.safe_version
    ]
    if not rows:
        return
    txn.cursor(tail).putmulti(rows)
    row.tail_first = row.tail_first or row.copy.version - len(rows) + 1
    row.tail_bytes += sum(len(value) for _, value in rows)
    _keep_bounds(txn.cursor(tail), row)


def _keep_bounds(cursor: lmdb.Cursor[bytes], row: local_pb2.LocalRealm) -> None:
    while row.tail_first and (
        row.tail_bytes > TAIL_BYTES_MAX or row.copy.version - row.tail_first >= TAIL_CHANGES_MAX
    ):
        row.tail_bytes -= len(cursor.pop(prefix(row.id) + prefix(row.tail_first)) or b"")
        row.tail_dropped += 1
        row.tail_first = row.tail_first + 1 if row.tail_first < row.copy.version else 0


def note_safe(txn: Transaction, tail: lmdb._Database, row: local_pb2.LocalRealm, version: int) -> None:
    """Up to ``version`` everything is safe; an older word on that changes nothing."""
    if version <= row.safe_version:
        return
    row.safe_version = version
    if row.tail_first and row.tail_first <= version:
        start = prefix(row.id)
        count, size = delete_rows(txn.cursor(tail), start, start + prefix(min(version, row.copy.version) + 1))
        row.tail_bytes -= size - count * 2 * len(start)
        row.tail_first = version + 1 if version < row.copy.version else 0
    first_kept = row.tail_first or row.copy.version + 1
    row.tail_dropped = min(row.tail_dropped, max(first_kept - 1 - version, 0))


def clear(txn: Transaction, tail: lmdb._Database, row: local_pb2.LocalRealm) -> None:
    """Lets go of everything: the copy's versions go on from elsewhere."""
    delete_rows(txn.cursor(tail), prefix(row.id), prefix_end(row.id))
    row.tail_first = row.tail_bytes = row.tail_dropped = 0


def read(
    txn: Transaction, tail: lmdb._Database, row: local_pb2.LocalRealm, from_version: int, bytes_max: int
) -> list[Received]:
    """Changes from ``from_version`` on, oldest first, the first whatever its size; none where that one is gone."""
    found: list[Received] = []
    if not row.tail_first or from_version < row.tail_first:
        return found
    start = prefix(row.id)
    size = 0
    for _, value in walk(txn.cursor(tail), start + prefix(from_version), prefix_end(row.id)):
        size += len(value)
        if found and size > bytes_max:
            break
        found.append(Received(value[DIGEST_BYTES:], value[:DIGEST_BYTES]))
    return found
