"""A pinned snapshot of an LMDB file, read range by range while commits go on: see :mod:`understudy.common.snapshot`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import lmdb

from understudy.common.errors import RESTORE, CorruptionError, Overloaded
from understudy.common.files import storage_errors
from understudy.common.lmdb_pages import Meta, read_metas
from understudy.common.snapshot_ranges import RANGE_BYTES, FileRanges
from understudy.common.store import Store
from understudy.common.store_layout import CHECKPOINT_KEY, lmdb_errors, row_errors
from understudy.v1.store_pb2 import CheckpointRow

# A try costs some 50 us and fails only if a commit ends in them.
_PIN_TRIES_MAX = 1000


class PinnedSnapshot:
    """A snapshot that stays readable, range by range, until it is closed. Its reads may run in any thread."""

    range_bytes = RANGE_BYTES

    def __init__(self, txn: lmdb.Transaction[bytes], ranges: FileRanges) -> None:
        self.txn = txn
        self._ranges = ranges
        self.file_bytes = ranges.meta.file_bytes
        self.page_bytes = ranges.meta.page_bytes
        self.ranges = ranges.count

    @classmethod
    def open(cls, env: lmdb.Environment, data_file: Path) -> Self:
        """Pins the newest snapshot of ``env``, whose file is ``data_file``.

        ``env`` must use LMDB's lock file, or the writer would not see the pin.

        Raises:
            Overloaded: too many snapshots are pinned, or commits end faster than one can be.
            CorruptionError, StorageFailed.
        """
        with storage_errors("open", data_file):
            fd = os.open(data_file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            txn, meta, page = _pin(env, fd, data_file)
        except BaseException:
            os.close(fd)
            raise
        return cls(txn, FileRanges(fd, data_file, meta, page))

    def read(self, index: int) -> bytes:
        """One range, of :data:`RANGE_BYTES` but for the last.

        Raises:
            CorruptionError: the file was cut off, or its list of free pages is damaged.
            StorageFailed: it can't be read.
            IndexError: there is no such range.
            Unavailable: the snapshot was let go.
        """
        return self._ranges.read(index)

    def content(self) -> Iterator[bytes | memoryview]:
        """The whole file, in pieces: see :meth:`FileRanges.pieces`.

        Raises:
            CorruptionError, StorageFailed, Unavailable: see :meth:`read`.
        """
        return self._ranges.pieces()

    def close(self) -> None:
        """Lets go of the snapshot."""
        self._ranges.close()
        self.txn.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checkpoint_of(store: Store, snapshot: PinnedSnapshot) -> CheckpointRow:
    """Where a pinned snapshot of ``store`` stands: perhaps already past ``store.current``.

    Raises:
        CorruptionError.
    """
    with lmdb_errors("read", store.path), row_errors(store.path):
        row = snapshot.txn.get(CHECKPOINT_KEY, db=store.environment.meta)
        if row is None:
            raise CorruptionError(f"the store {store.path} has no checkpoint", remedy=RESTORE)
        return CheckpointRow.FromString(row)


def _pin(env: lmdb.Environment, fd: int, path: Path) -> tuple[lmdb.Transaction[bytes], Meta, bytes]:
    """A read transaction and its own meta page."""
    for _ in range(_PIN_TRIES_MAX):
        with contextlib.ExitStack() as opened, lmdb_errors("pin a snapshot of", path.parent):
            txn = opened.enter_context(env.begin())
            own, page = read_metas(fd, path)[txn.id() & 1]
            # The next commit but one overwrites this meta page. It can't begin before the next one has ended, so if
            # a transaction begun now still gets the same snapshot, neither LMDB nor we have read a page that was half
            # written. The other meta page can't tell: a commit writes it before it ends, and may be killed between.
            with env.begin() as later:
                if txn.id() != later.id():
                    continue
            if own.txn_id != txn.id():
                raise CorruptionError(
                    f"{path} has no meta page of transaction {txn.id()}, which was read from it",
                    remedy="was the file replaced while it was open? If not, restore this node from its peer",
                )
            opened.pop_all()
            return txn, own, page
    raise Overloaded(f"commits to {path} end faster than a snapshot can be pinned", remedy="try again")
