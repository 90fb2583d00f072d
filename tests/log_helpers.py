"""Records and logs for the tests of the change-log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from understudy.common import segment
from understudy.common.changelog import ChangeLog
from understudy.common.files import FileSystem
from understudy.common.records import Record, encode_record
from understudy.common.types import START, ClusterId, Epoch, Lsn, Position

CLUSTER = ClusterId(bytes(range(16)))
EPOCH = Epoch(3)
LOG = Path("/node/log")


def chain(after: Position, payloads: Iterable[bytes]) -> list[tuple[bytes, Position]]:
    """Each payload's record and the position behind it."""
    made = []
    for payload in payloads:
        data, digest = encode_record(after.digest, Lsn(after.lsn + 1), payload)
        after = Position(Lsn(after.lsn + 1), digest)
        made.append((data, after))
    return made


def payloads_of(records: Iterable[Record]) -> list[bytes]:
    """What the records hold."""
    return [record.payload for record in records]


def new_log(
    files: FileSystem, directory: Path = LOG, *, after: Position = START, after_offset: int = 0
) -> ChangeLog:
    """An empty log."""
    return ChangeLog.create(
        directory, cluster=CLUSTER, epoch=EPOCH, after=after, after_offset=after_offset, files=files
    )


def open_log(
    files: FileSystem, directory: Path = LOG, *, after: Position = START, after_offset: int = 0
) -> ChangeLog:
    """A log that is there, opened with a checkpoint at ``after``."""
    return ChangeLog.open(directory, cluster=CLUSTER, after=after, after_offset=after_offset, files=files)


def write(log: ChangeLog, *payloads: bytes) -> list[tuple[bytes, Position]]:
    """Writes the payloads as one batch; their records."""
    made = chain(log.end, payloads)
    log.write_batch(b"".join(data for data, _ in made), made[-1][1], epoch=EPOCH)
    return made


@contextmanager
def small_segments(segment_bytes: int = 2048, preallocated_bytes: int = 1024) -> Iterator[None]:
    """Lets segments end and room be made where the tests' few records reach."""
    with (
        mock.patch.object(segment, "SEGMENT_BYTES", segment_bytes),
        mock.patch.object(segment, "PREALLOCATED_BYTES", preallocated_bytes),
    ):
        yield
