"""A backup of records becomes a data directory: its rows in a new store, the log's tail applied, an empty log behind.

The store then stands where the backup ends, so that no entry that concerns left-out realms is ever to be applied.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Self

import lmdb
import xxhash

from understudy.backup.contents import Member, token_member
from understudy.backup.manifest import FileEntry, Manifest
from understudy.backup.point import Point, check_state
from understudy.backup.progress import Meter
from understudy.backup.records import Records
from understudy.backup.rows import PART_BYTES_MAX, TAIL, TailRow, database_of, decode_rows, decode_tail
from understudy.backup.selection import Selection
from understudy.backup.source import Source
from understudy.backup.target_log import describe_reached, settle
from understudy.backup.writing import write_member
from understudy.common.changelog import ChangeLog
from understudy.common.checkpoint_process import Checkpointer
from understudy.common.directory import DataDirectory, Role
from understudy.common.errors import OTHER_BACKUP, CorruptionError
from understudy.common.files import OsFileSystem, storage_errors, sync_directory
from understudy.common.log_reader import LogPlace
from understudy.common.memtable import Memtable
from understudy.common.records import Record, chain_digest
from understudy.common.state import State
from understudy.common.store import Store
from understudy.common.store_layout import Environment, create_environment, lmdb_errors
from understudy.common.store_rows import put_rows
from understudy.common.types import Epoch

_ROWS_AT_ONCE = 8_192


class Loading:
    """The files of a backup of records on their way into a directory, in the order in which they were written.

    Args:
        point: what lies behind it in the log's tail is left out.
    """

    def __init__(self, directory: DataDirectory, point: Point | None = None) -> None:
        self._directory = directory
        self._point = point
        # Of an attempt before.
        for folder in (directory.store, directory.log):
            shutil.rmtree(folder, ignore_errors=True)
        self._environment: Environment | None = create_environment(directory.store)
        self._replay: _Replay | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._environment is not None:
            self._environment.close()
        if self._replay is not None:
            self._replay.close()

    def take(self, member: Member, meter: Meter) -> FileEntry:
        """One file; says what it was.

        Raises:
            CorruptionError: it is no such file.
            DiskFull, StorageFailed, and what reading the member raises.
        """
        if member.size > PART_BYTES_MAX:
            raise CorruptionError(f"{member.name} has {member.size:,} bytes", remedy=OTHER_BACKUP)
        data = b"".join(meter.metered(member.pieces))
        database = database_of(member.name)
        if database == TAIL:
            for row in decode_tail(data, member.name):
                self._replaying().apply(row)
        elif database and self._environment is not None:
            self._put(self._environment, database, decode_rows(data, member.name))
        else:
            raise CorruptionError(f"{member.name} has no place there", remedy=OTHER_BACKUP)
        return FileEntry(path=member.name, bytes=len(data), xxh3=xxhash.xxh3_128_hexdigest(data))

    @staticmethod
    def _put(environment: Environment, database: str, rows: Iterator[tuple[bytes, bytes]]) -> None:
        into: lmdb._Database = getattr(environment, database)
        with lmdb_errors("write to", environment.path), environment.env.begin(write=True) as txn:
            while chunk := list(islice(rows, _ROWS_AT_ONCE)):
                put_rows(txn, into, [key for key, _ in chunk], [value for _, value in chunk])

    def _replaying(self) -> _Replay:
        if self._replay is None:
            assert self._environment is not None, "there is one until all rows are in"
            self._environment.close()
            self._environment = None
            self._replay = _Replay(self._directory, self._point)
        return self._replay

    def finish(self, manifest: Manifest) -> bool:
        """All files were taken: brings the store to the end of the backup, and makes the log that goes on there.

        Returns:
            Whether some of the tail was left out.

        Raises:
            CorruptionError: they do not lead to where the manifest says.
            UsageError: the state before the tail is behind the point.
            DiskFull, StorageFailed.
        """
        replay = self._replaying()
        if not replay.is_cut:
            replay.check_end(manifest)
        replay.finish()
        log = self._directory.log
        with storage_errors("create", log):
            log.mkdir(mode=0o700)
        ChangeLog.create(
            log,
            cluster=manifest.cluster_id,
            epoch=replay.epoch,
            after=replay.end.position,
            after_offset=replay.end.offset,
            files=OsFileSystem(),
        ).close()
        sync_directory(self._directory.path)
        return replay.is_cut


class _Replay:
    """The log's tail being applied to the rows before it, as a server does that recovers, up to a point."""

    def __init__(self, directory: DataDirectory, point: Point | None) -> None:
        self._point = point
        self.is_cut = False  # there is more behind the point
        self._store = Store.open(directory.store)
        self._checkpointer = Checkpointer()
        try:
            if point is not None:
                check_state(self._store.current.checkpoint, point)
            self._checkpointer.start(directory.store, directory.lock_fd)
            self._state = State(self._store)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process that writes, and closes the store."""
        self._checkpointer.close()
        self._store.close()

    def apply(self, row: TailRow) -> None:
        """The next entry, or where the log stands behind some that are left out.

        Raises:
            CorruptionError: it does not follow.
            DiskFull, StorageFailed.
        """
        position, before = row.place.position, self._state.applied
        # What is left out changes nothing here, so that a point within is as good as the one before.
        self.is_cut |= self._point is not None and self._point.is_before(position.lsn, row.time_us)
        if self.is_cut:
            return
        if not row.payload:
            self._state.skip(position, row.place.offset, row.time_us)
            return
        if (position.lsn, position.digest) != (
            before.lsn + 1,
            chain_digest(before.digest, position.lsn, row.payload),
        ):
            raise CorruptionError(f"entry {position.lsn} does not follow entry {before}", remedy=OTHER_BACKUP)
        self._state.apply(Record(position.lsn, position.digest, row.payload))
        while self._state.frozen:
            self._write(self._state.frozen[-1])
            self._state.checkpointed()

    @property
    def end(self) -> LogPlace:
        """Behind the last entry applied."""
        return LogPlace(self._state.applied, self._state.offset)

    @property
    def epoch(self) -> Epoch:
        """Of the last entry applied."""
        return Epoch(self._state.epochs[-1].info.epoch if self._state.epochs else 0)

    def check_end(self, manifest: Manifest) -> None:
        """Compares where the tail ends with what the manifest says.

        Raises:
            CorruptionError.
        """
        expected = LogPlace(manifest.position, manifest.log_offset)
        if self.end != expected:
            raise CorruptionError(
                f"the records lead to entry {self.end.position}, not to {expected.position}",
                remedy=OTHER_BACKUP,
            )

    def finish(self) -> None:
        """The last entry was applied: the store gets what it has not got yet.

        Raises:
            DiskFull, StorageFailed.
        """
        state = self._state
        if state.applied.lsn > self._store.current.checkpoint.lsn:
            state.active.freeze(state.applied, state.offset, state.time_us)
            self._write(state.active)

    def _write(self, table: Memtable) -> None:
        self._checkpointer.run(table.parts())


def load_selected(directory: DataDirectory, source: Source, selection: Selection, meter: Meter) -> Manifest:
    """Makes a data directory of the chosen realms of a pinned source; nothing of it is marked as finished.

    Returns:
        Its manifest, which is not written yet.

    Raises:
        CorruptionError, DiskFull, StorageFailed.
    """
    records = Records(source, selection, meter)
    with Loading(directory) as loading:
        entries = [loading.take(member, meter) for member in records.members()]
        manifest = records.describe(entries)
        loading.finish(manifest)
    directory.begin(Role.BACKUP, source.cluster)
    secrets = () if selection.is_filtered else token_member(source)
    written = [write_member(directory.path, member, meter) for member in secrets]
    return describe_reached(directory, replace(manifest, files=written), settle(directory))
