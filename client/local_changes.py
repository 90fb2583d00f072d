"""What received changes do to a copy: checked against its chain, clipped to what is loaded, written to its rows.

Nothing here knows the queue; everything happens in the caller's LMDB transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple

import lmdb
from google.protobuf.message import DecodeError

from understudy.client.local_layout import Transaction, delete_rows, prefix, prefix_end
from understudy.client.local_types import Received
from understudy.common.errors import ProtocolError
from understudy.common.locator import LOCATOR_POSITIONS_MAX
from understudy.common.memtable import RealmDelta
from understudy.common.operations import DELETE_RANGE
from understudy.common.types import DIGEST_BYTES
from understudy.v1 import local_pb2, log_pb2, sync_pb2


class Checked(NamedTuple):
    """A received change that follows the one before it."""

    change: log_pb2.Change
    received: Received
    digest: bytes


def checked(changes: Sequence[Received], copy: local_pb2.LocalCopy) -> list[Checked]:
    """The changes, each following the one before and the first the copy's head.

    Raises:
        ProtocolError: one does not, or is of another realm, or can't be read.
    """
    version, head = copy.version, copy.head
    found = []
    for received in changes:
        change = _parsed(received.raw, behind=version)
        version += 1
        if change.version != version or change.previous != head or change.realm != copy.path:
            raise ProtocolError(
                f"version {change.version} of {change.realm} does not follow version {version - 1} of {copy.path}"
            )
        head = sha256(received.raw).digest()
        found.append(Checked(change, received, head))
    return found


def _parsed(raw: bytes, *, behind: int) -> log_pb2.Change:
    try:
        return log_pb2.Change.FromString(raw)
    except DecodeError as error:
        raise ProtocolError(f"the change behind version {behind} can't be read: {error}") from error


def leading_to(copy: local_pb2.LocalCopy, changes: Sequence[Received]) -> list[Checked]:
    """The last changes that made a copy's state, which came without them: each follows the one before, up to its head.

    Raises:
        ProtocolError: they don't.
    """
    if not changes:
        return []
    before = _before(_parsed(changes[0].raw, behind=copy.version - len(changes)), copy.path)
    found = checked(changes, before)
    if (found[-1].change.version, found[-1].digest) != (copy.version, copy.head):
        raise ProtocolError(
            f"version {found[-1].change.version} of {copy.path} came, which is not the version {copy.version} "
            "that was loaded"
        )
    return found


def _before(first: log_pb2.Change, path: str) -> local_pb2.LocalCopy:
    """Where a copy stood before a change, as the change has it."""
    if not first.version or len(first.previous) != (DIGEST_BYTES if first.version > 1 else 0):
        raise ProtocolError(f"version {first.version} of {path} can't have followed any other")
    return local_pb2.LocalCopy(path=path, version=first.version - 1, head=first.previous)


# -- writing -----------------------------------------------------------------------------------------------


def write_changes(
    txn: Transaction, data: lmdb._Database, copy: local_pb2.LocalCopy, changes: Iterable[Checked]
) -> None:
    """Applies changes to the copy's rows, and keeps its ``entries`` and ``bytes`` true.

    They are put together in memory first, so that each key is written once.
    """
    start = prefix(copy.id)
    delta = RealmDelta(copy.path, copy.id, copy.version, copy.head, created=False)

    def older(_: RealmDelta, key: bytes) -> bytes | None:
        return txn.get(start + key, db=data)

    for change, _, _ in changes:
        operations: Sequence[log_pb2.Operation] = change.operations
        delta.apply(_clipped(operations, copy.frontier) if copy.loading else operations, older)
    for first, end in delta.deleted:
        _delete_range(txn.cursor(data), copy, first, end)
    _write_values(txn, data, copy, delta.values)


def _delete_range(cursor: lmdb.Cursor[bytes], copy: local_pb2.LocalCopy, first: bytes, end: bytes) -> None:
    start = prefix(copy.id)
    rows, size = delete_rows(cursor, start + first, start + end if end else prefix_end(copy.id))
    copy.entries -= rows
    copy.bytes -= size - rows * len(start)


def _write_values(
    txn: Transaction, data: lmdb._Database, copy: local_pb2.LocalCopy, values: dict[bytes, bytes | None]
) -> None:
    start = prefix(copy.id)
    entries = size = 0
    puts = []
    for key in sorted(values):
        full, value = start + key, values[key]
        old = txn.get(full, db=data)
        if old is not None:
            entries -= 1
            size -= len(key) + len(old)
        if value is not None:
            puts.append((full, value))
            entries += 1
            size += len(key) + len(value)
        elif old is not None:
            txn.delete(full, db=data)
    if puts:
        txn.cursor(data).putmulti(puts)
    copy.entries += entries
    copy.bytes += size


def _clipped(operations: Iterable[log_pb2.Operation], frontier: bytes) -> list[log_pb2.Operation]:
    """What operations do to the keys up to ``frontier``; behind it there are none yet that a range could delete."""
    return [one for one in operations if one.kind == DELETE_RANGE or one.key <= frontier]


# -- the locator ---------------------------------------------------------------------------------------------


def go_on(copy: local_pb2.LocalCopy, changes: Sequence[Checked], *, lsn: int, epoch: int) -> None:
    """Brings a copy's position up to date: the last of ``changes`` is its head now."""
    last = changes[-1]
    earlier = thinned(last.change.version, [*_passed(changes), *copy.earlier])
    copy.version, copy.head = last.change.version, last.digest
    copy.lsn, copy.epoch = lsn, epoch
    del copy.earlier[:]
    copy.earlier.extend(earlier)


def look_back(copy: local_pb2.LocalCopy, changes: Sequence[Checked]) -> None:
    """Notes the positions that a loaded copy's last changes, of which there are some, have passed."""
    oldest = changes[0].change.version - 1
    earlier = thinned(
        copy.version, [*_passed(changes), *(one for one in copy.earlier if one.version < oldest)]
    )
    del copy.earlier[:]
    copy.earlier.extend(earlier)


def _passed(changes: Sequence[Checked]) -> Iterator[sync_pb2.RealmPosition]:
    """The positions before each change, nearest first."""
    for change, _, _ in reversed(changes):
        if change.previous:
            yield sync_pb2.RealmPosition(version=change.version - 1, digest=change.previous)


def thinned(head: int, positions: Iterable[sync_pb2.RealmPosition]) -> list[sync_pb2.RealmPosition]:
    """Of positions below ``head``, nearest first, as few as leave each at most twice as far away as the one before.

    That stays so while the head goes on, because the distances of all grow alike. Where no position is known in
    between, the next one is taken, however far it is. The farthest one always stays, as long as there is room.
    """
    kept: list[sync_pb2.RealmPosition] = []
    reach = 1
    candidate: sync_pb2.RealmPosition | None = None
    for position in positions:
        if head - position.version > reach and candidate is not None:
            kept.append(candidate)
            reach = 2 * (head - candidate.version)
            candidate = None
        if head - position.version > reach:
            kept.append(position)
            reach = 2 * (head - position.version)
        else:
            candidate = position
    if candidate is not None:
        kept.append(candidate)
    # Two of them more than double the distance, so it takes 2^31 changes to have more.
    return kept[: LOCATOR_POSITIONS_MAX - 1]
