"""The change-log of a backup, which grows as a replica's does when the backup is brought up to date."""

from __future__ import annotations

import contextlib
import mmap
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.backup.contents import STORE_FILE
from understudy.backup.manifest import Form, Manifest, utc_text
from understudy.backup.writing import describe_file
from understudy.common.changelog import ChangeLog
from understudy.common.directory import DataDirectory
from understudy.common.entries import parse_epoch_start
from understudy.common.errors import OTHER_BACKUP, CorruptionError
from understudy.common.files import OsFileSystem
from understudy.common.log_reader import LogPlace, records_from, segments_behind
from understudy.common.records import scan_chain
from understudy.common.store import Store
from understudy.common.types import Digest, Epoch, Lsn, Position
from understudy.v1.store_pb2 import CheckpointRow

if TYPE_CHECKING:
    from understudy.common.engine import Engine

_BATCH_BYTES = 8 << 20


@contextlib.contextmanager
def open_log(directory: DataDirectory) -> Iterator[ChangeLog]:
    """Opens the log; what an attempt before has left half written is cut off.

    Raises:
        CorruptionError, NewerFormat, DiskFull, StorageFailed.
    """
    with Store.open(directory.store, cluster=directory.cluster) as store:
        row = store.current.checkpoint
    with ChangeLog.open(
        directory.log,
        cluster=directory.cluster,
        after=Position(Lsn(row.lsn), Digest(row.digest)),
        after_offset=row.log_offset,
        files=OsFileSystem(),
    ) as log:
        yield log


def read_head(directory: DataDirectory) -> tuple[LogPlace, Epoch]:
    """How far a backup reaches that was cut off while it was brought up to date, and the epoch of its last entry.

    Nothing is changed.

    Raises:
        CorruptionError, NewerFormat, StorageFailed.
    """
    with Store.open(directory.store, cluster=directory.cluster) as store:
        row, epochs = store.current.checkpoint, store.current.epochs()
    position, offset = Position(Lsn(row.lsn), Digest(row.digest)), row.log_offset
    epoch = epochs[-1].info.epoch if epochs else 0
    segments = segments_behind(directory.log, directory.cluster, position.lsn)
    for record in records_from(segments, LogPlace(position, offset)):
        started = parse_epoch_start(record.payload)
        epoch = started[0].epoch if started is not None else epoch
        position, offset = record.position, offset + record.encoded_bytes
    return LogPlace(position, offset), Epoch(epoch)


def append_records(log: ChangeLog, pieces: Iterable[bytes], epoch: Epoch) -> None:
    """Appends record bytes, cut anywhere, that follow behind the log's end.

    Args:
        epoch: of the first of them, which a segment that they begin will name.

    Raises:
        CorruptionError: they do not follow, or end within a record.
        DiskFull, StorageFailed.
    """
    rest = b""
    for batch in in_batches(pieces):
        rest = _append_whole(log, rest + batch, epoch)
    if rest:
        raise CorruptionError(f"the change-log behind LSN {log.end.lsn} ends within an entry")


def in_batches(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Joins pieces to as much as is made durable at a time."""
    batch: list[bytes] = []
    size = 0
    try:
        for piece in pieces:
            batch.append(piece)
            size += len(piece)
            if size >= _BATCH_BYTES:
                whole, batch, size = b"".join(batch), [], 0
                yield whole
    except CorruptionError:
        yield b"".join(batch)  # what came before the damage may be all that is wanted
        raise
    if batch:
        yield b"".join(batch)


def _append_whole(log: ChangeLog, data: bytes, epoch: Epoch) -> bytes:
    """Appends the whole records in ``data``, and returns the rest."""
    scan = scan_chain(data, log.end)
    if scan.damage:
        raise CorruptionError(f"entry {scan.position.lsn + 1} of the change-log is damaged: {scan.damage}")
    if scan.good_bytes:
        log.write_batch(data[: scan.good_bytes], scan.position, epoch=epoch)
    return data[scan.good_bytes :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """Where a copy stands that was opened."""

    place: LogPlace
    epoch: Epoch
    time_us: int  # of the last entry
    realms: int  # without the system's own
    checkpoint: CheckpointRow


def settle(directory: DataDirectory) -> Reached:
    """Opens a copy as a server would, which shows that it can be.

    That brings the store up to the last freeze mark in the log; the segments that are not needed then are removed.

    Raises:
        CorruptionError, DiskFull, StorageFailed.
    """
    from understudy.common.engine import Engine  # takes longer to load than a small backup to make

    engine = Engine.open(directory)
    try:
        return reached(engine)
    finally:
        engine.abandon()


def reached(engine: Engine) -> Reached:
    """Where an opened copy stands, without the segments that are not needed any more.

    Raises:
        CorruptionError: its state is not what the log says it was.
        StorageFailed.
    """
    if engine.mismatches:
        raise CorruptionError(engine.mismatches[0], remedy=OTHER_BACKUP)
    engine.log.prune(Lsn(engine.checkpoint.lsn + 1))
    return Reached(
        place=LogPlace(engine.durable, engine.log.end_offset),
        epoch=engine.epoch,
        time_us=engine.state.time_us,
        realms=engine.state.user_realm_count,
        checkpoint=engine.checkpoint,
    )


def log_files(directory: Path) -> list[str]:
    """The names of all segments, as a manifest has them."""
    return sorted(f"log/{path.name}" for path in (directory / "log").iterdir())


def describe_reached(directory: DataDirectory, manifest: Manifest, reached: Reached) -> Manifest:
    """The manifest of what is in a copy's directory now.

    Args:
        manifest: says the rest of it.
        reached: where the copy was found to stand when it was opened.
    """
    if manifest.form is Form.RECORDS:  # whose pages this machine has made
        manifest = replace(
            manifest,
            form=Form.PAGES,
            machine=platform.machine(),
            byte_order=sys.byteorder,
            page_bytes=mmap.PAGESIZE,
        )
    known = [entry for entry in manifest.files if not entry.path.startswith(("log/", "records/", STORE_FILE))]
    names = [STORE_FILE, *log_files(directory.path)]
    return replace(
        manifest,
        epoch=reached.epoch,
        lsn=reached.place.position.lsn,
        digest=reached.place.position.digest.hex(),
        log_offset=reached.place.offset,
        time=utc_text(reached.time_us / 1e6),
        checkpoint_lsn=reached.checkpoint.lsn,
        state_digest=reached.checkpoint.state_digest.hex(),
        realms=reached.realms,
        files=known + [describe_file(directory.path, name) for name in names],
    )
