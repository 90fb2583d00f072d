"""The change-log in a repository: stretches of it, each an object, from which a restore goes on behind a backup.

::

    log/0000000001-00000000000000000001-00000000000000048213-<digest before>-<digest at its end>.seg.zst.age
        epoch      first LSN            last LSN

An object is a segment of the log, as in a data directory, compressed and perhaps encrypted. The digests, 16 digits of
each, tell stretches of histories that have forked from each other. Stretches may overlap: the one of a whole segment
takes the place of those that were shipped while it was being written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from understudy.backup.archive import DEFAULT_LEVEL, opening
from understudy.backup.encryption import Encryption, Unlocking
from understudy.backup.log_files import LogPart
from understudy.backup.point import Point
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.repository import Repository
from understudy.backup.sinks import Stream
from understudy.backup.target_log import append_records, open_log
from understudy.common.changelog import ChangeLog
from understudy.common.directory import DataDirectory
from understudy.common.entries import parse_entry
from understudy.common.errors import AlreadyStored, CorruptionError
from understudy.common.segment import RECORDS_START, SECTOR_BYTES, SegmentHeader
from understudy.common.types import LSN_DIGITS, ClusterId, Epoch, Lsn, Position, format_lsn

LOG = "log/"
DIGEST_DIGITS = 16
_PIECE_BYTES = 1 << 20
_NAME = re.compile(
    rf"log/(?P<epoch>[0-9]{{10}})-(?P<first>[0-9]{{{LSN_DIGITS}}})-(?P<last>[0-9]{{{LSN_DIGITS}}})"
    rf"-(?P<before>[0-9a-f]{{{DIGEST_DIGITS}}})-(?P<digest>[0-9a-f]{{{DIGEST_DIGITS}}})"
    r"\.seg\.zst(?P<age>\.age)?\Z"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Entries ``first`` to ``last`` of the log, as an object."""

    epoch: Epoch  # of the last entry
    first: Lsn
    last: Lsn
    before: str  # the beginning of the digest at ``first - 1``
    digest: str  # and of that at ``last``
    is_encrypted: bool

    @property
    def name(self) -> str:
        """The object's."""
        suffix = ".seg.zst.age" if self.is_encrypted else ".seg.zst"
        lsns = f"{format_lsn(self.first)}-{format_lsn(self.last)}"
        return f"{LOG}{self.epoch:010d}-{lsns}-{self.before}-{self.digest}{suffix}"

    @classmethod
    def parse(cls, name: str) -> Stretch | None:
        """The inverse of :attr:`name`; None where it is none of such an object."""
        found = _NAME.match(name)
        if found is None:
            return None
        return cls(
            epoch=Epoch(int(found["epoch"])),
            first=Lsn(int(found["first"])),
            last=Lsn(int(found["last"])),
            before=found["before"],
            digest=found["digest"],
            is_encrypted=found["age"] is not None,
        )

    def may_follow(self, position: Position) -> bool:
        """Whether it goes on behind ``position``, as far as its name tells."""
        if position.lsn < self.first - 1 or position.lsn >= self.last:
            return False
        return position.lsn >= self.first or self.before == short_digest(position.digest)


def short_digest(digest: bytes) -> str:
    """As much of a digest as names have."""
    return digest.hex()[:DIGEST_DIGITS]


def list_stretches(repository: Repository) -> list[Stretch]:
    """All that a repository holds, by epoch and LSN.

    Raises:
        RepositoryError.
    """
    found = (Stretch.parse(stored.name) for stored in repository.list(LOG))
    return [stretch for stretch in found if stretch is not None]


def ship(
    repository: Repository,
    part: LogPart,
    *,
    epoch: Epoch,
    encryption: Encryption | None,
    level: int = DEFAULT_LEVEL,
) -> Stretch:
    """Stores a stretch of the log; one that is there already is fine.

    Args:
        part: at least one entry, whole and durable.
        epoch: of its last entry.

    Raises:
        RepositoryError, CorruptionError, StorageFailed, UsageError.
    """
    stretch = Stretch(
        epoch=epoch,
        first=part.header.first_lsn,
        last=part.end.position.lsn,
        before=short_digest(part.header.previous),
        digest=short_digest(part.end.position.digest),
        is_encrypted=encryption is not None,
    )
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
    try:
        with repository.upload(stretch.name) as out:
            if encryption is None:
                _compress(compressor, part, out)
            else:
                with encryption.encrypting(out) as encrypted:
                    _compress(compressor, part, encrypted)
    except AlreadyStored:
        pass
    return stretch


def _compress(compressor: zstandard.ZstdCompressor, part: LogPart, out: Any) -> None:
    with compressor.stream_writer(out, closefd=False) as compressed:
        for piece in part.content():
            compressed.write(piece)


# -- going on behind a backup ----------------------------------------------------------------------------------


def append_archived(
    repository: Repository,
    directory: DataDirectory,
    *,
    epoch: int,
    point: Point | None,
    known: Iterable[Lsn] = (),
    unlocking: Unlocking,
    progress: OnProgress | None,
) -> None:
    """Appends the log that was shipped after the copy in ``directory`` to it, as far as it reaches or is needed.

    Where histories have forked, the one of the highest epoch is followed.

    Args:
        epoch: of the copy's last entry.
        point: what lies behind it may be left out.
        known: entries that there are, since backups reach up to them.

    Raises:
        CorruptionError: what is needed is damaged, or not there though entries behind it are.
        NotPermitted: it does not open.
        RepositoryError, DiskFull, StorageFailed.
    """
    stretches = list_stretches(repository)
    meter = Meter(None, progress=progress)
    with open_log(directory) as target:
        while not (point is not None and _reaches(target.log, point)):
            # What ends in an earlier epoch was given up before the copy's last entry was written.
            stretches = [stretch for stretch in stretches if stretch.epoch >= epoch]
            candidates = [stretch for stretch in stretches if stretch.may_follow(target.log.end)]
            if not candidates:
                later = (stretch.last for stretch in stretches)
                _check_gap(target.log.end.lsn, [*known, *later], repository.url)
                return
            appended = _append_best(repository, candidates, target.log, directory.cluster, unlocking, meter)
            epoch = max(epoch, appended.epoch)


def _check_gap(end: Lsn, known: Iterable[Lsn], url: str) -> None:
    """Nothing follows: is that the end, or is something missing?"""
    beyond = [lsn for lsn in known if lsn > end]
    if beyond:
        raise CorruptionError(
            f"the log in {url} ends with LSN {end}, but there were entries up to LSN {max(beyond)}: what comes between "
            "was not shipped, or belongs to a history that was given up",
            remedy=f"restore up to --lsn {end}, or a backup that reaches further by its id",
        )


def _append_best(
    repository: Repository,
    candidates: list[Stretch],
    log: ChangeLog,
    cluster: ClusterId,
    unlocking: Unlocking,
    meter: Meter,
) -> Stretch:
    """Appends one of the stretches, and returns it; only their content tells for sure whether it goes on here.

    Raises:
        CorruptionError: none of them does.
    """
    problems = []
    for stretch in sorted(candidates, key=lambda stretch: (stretch.epoch, stretch.last), reverse=True):
        before = log.end
        try:
            with (
                repository.download(stretch.name) as file,
                opening(file, stretch.name, unlocking) as plain,
            ):
                _append(log, plain, cluster, f"{stretch.name} in {repository.url}", meter)
            if log.end.lsn < stretch.last:
                raise CorruptionError(f"{stretch.name} in {repository.url} was cut off")
            return stretch
        except CorruptionError as error:
            if log.end != before:
                raise
            problems.append(error)
    raise problems[0]


def _append(log: ChangeLog, plain: Stream, cluster: ClusterId, name: str, meter: Meter) -> None:
    block = _read_exactly(plain, RECORDS_START, name)
    header = SegmentHeader.decode(block[:SECTOR_BYTES], Path(name))
    known_bytes = log.end_offset - header.first_offset
    if header.cluster != cluster or known_bytes < 0:
        raise CorruptionError(f"{name} is of another log", remedy="restore to a point before it")
    while known_bytes:
        known_bytes -= len(_read_exactly(plain, min(known_bytes, _PIECE_BYTES), name))
    pieces = iter(lambda: plain.read(_PIECE_BYTES), b"")
    append_records(log, meter.metered(pieces), header.epoch)


def _read_exactly(plain: Stream, count: int, name: str) -> bytes:
    data = plain.read(count)
    while len(data) < count:
        more = plain.read(count - len(data))
        if not more:
            raise CorruptionError(f"{name} was cut off", remedy="restore to a point before it")
        data += more
    return data


def _reaches(log: ChangeLog, point: Point) -> bool:
    """Whether the log has an entry behind the point, or the point itself."""
    end = log.end
    if point.lsn is not None:
        return end.lsn >= point.lsn
    if log.first_lsn > end.lsn:
        return False  # nothing is behind the store yet
    *_, last = log.records(Lsn(end.lsn - 1))
    return point.is_before(end.lsn, parse_entry(last.payload, end.lsn).time_us)
