"""The change-log in a repository: stretches of it, each an object, from which a restore goes on behind a backup.

An object is a segment of the log, as in a data directory, compressed and perhaps encrypted; see
:mod:`understudy.backup.stretch` for its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zstandard

from understudy.backup.archive import DEFAULT_LEVEL, opening
from understudy.backup.encryption import Encryption, Unlocking
from understudy.backup.log_files import LogPart
from understudy.backup.log_path import Leg, find_path
from understudy.backup.point import Point, cut_log
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.repository import Repository
from understudy.backup.sinks import Stream
from understudy.backup.stretch import Stretch, list_stretches, short_digest
from understudy.backup.target_log import append_records, open_log
from understudy.common.changelog import ChangeLog
from understudy.common.directory import DataDirectory
from understudy.common.entries import parse_entry
from understudy.common.errors import AlreadyStored, CorruptionError, NotStored, RepositoryError
from understudy.common.records import scan_chain
from understudy.common.segment import RECORDS_START, SECTOR_BYTES, SegmentHeader
from understudy.common.types import ClusterId, Epoch, Lsn, Position

_PIECE_BYTES = 1 << 20


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
    epoch: Epoch,
    epoch_max: Epoch | None = None,
    point: Point | None = None,
    known: Iterable[tuple[Epoch, Lsn]] = (),
    unlocking: Unlocking,
    progress: OnProgress | None,
) -> None:
    """Appends the log that was shipped after the copy in ``directory`` to it, as far as it reaches or is needed.

    Where histories have forked, the one of the highest epoch is followed.

    Args:
        epoch: of the copy's last entry.
        epoch_max: the highest epoch to follow.
        point: what lies behind it may be left out.
        known: entries that there are, each with its epoch, since backups reach up to them.

    Raises:
        CorruptionError: what is needed is damaged, or not there though entries behind it are.
        NotPermitted: it does not open.
        RepositoryError, DiskFull, StorageFailed.
    """
    meter = Meter(None, progress=progress)
    following = _Following(repository, directory.cluster, epoch, epoch_max, known, point, unlocking, meter)
    origin = None
    while True:
        with open_log(directory) as target:
            origin = origin or target.log.end
            try:
                following.go(target.log)
                return
            except _WrongWay:
                end = target.log.end
        if end != origin:
            cut_log(directory, Point(lsn=origin.lsn))


class _WrongWay(Exception):
    """A stretch is of another history than what was gone along before."""


class _Following:
    """The way through one repository's log.

    What turns out on it is remembered, and another way is looked for, until one was gone to its end: past stretches
    that are damaged, that others have replaced meanwhile, or whose history was given up.
    """

    def __init__(
        self,
        repository: Repository,
        cluster: ClusterId,
        epoch: Epoch,
        epoch_max: Epoch | None,
        known: Iterable[tuple[Epoch, Lsn]],
        point: Point | None,
        unlocking: Unlocking,
        meter: Meter,
    ) -> None:
        self._repository = repository
        self._cluster = cluster
        self._origin_epoch = epoch
        self._epoch = epoch  # of the last entry appended
        self._epoch_max = epoch_max
        self._known = list(known)
        self._point = point
        self._unlocking = unlocking
        self._meter = meter
        self._stretches = list_stretches(repository)
        self._seen: dict[tuple[str, Lsn], str] = {}
        self._unusable: dict[Stretch, CorruptionError | RepositoryError] = {}

    def go(self, log: ChangeLog) -> None:
        """Appends all that is needed.

        Raises:
            _WrongWay: what was appended is to be cut off before the next attempt, which looks for another way.
        """
        self._epoch = self._origin_epoch
        while not self._is_enough(log):
            legs = self._legs(log.end)
            if not legs:
                self._check_end(log.end.lsn)
                return
            for leg, following in zip(legs, [*legs[1:], None], strict=True):
                if not self._take(log, leg):
                    break
                self._check_joint(log, leg, following)
                if self._is_enough(log):
                    return

    def _is_enough(self, log: ChangeLog) -> bool:
        return self._point is not None and _reaches(log, self._point)

    def _legs(self, head: Position) -> list[Leg]:
        """The way from ``head``.

        Raises:
            CorruptionError: none leads to the highest epoch, so which entries were given up can't be told.
        """
        targets = [one for one in self._stretches if self._is_followed(one.epoch)]
        usable = [one for one in self._stretches if one not in self._unusable]
        reachable = [one for one in targets if one not in self._unusable]
        legs = find_path(reachable, usable, head, self._seen)
        highest = max((one.epoch for one in targets), default=self._epoch)
        if legs and legs[-1].stretch.epoch < highest:
            self._raise_unusable()
            raise CorruptionError(
                f"the log in {self._repository.url} goes on behind LSN {head.lsn} in epoch {legs[-1].stretch.epoch}, "
                f"but nothing there leads to epoch {highest}, which has taken over from it",
                remedy=f"name an earlier backup, with --epoch {highest}, or follow the earlier history with --epoch "
                f"{legs[-1].stretch.epoch}",
            )
        return legs

    def _is_followed(self, epoch: Epoch) -> bool:
        # What ends in an earlier epoch was given up before the copy's last entry was written.
        return self._epoch <= epoch and (self._epoch_max is None or epoch <= self._epoch_max)

    def _check_end(self, end: Lsn) -> None:
        """Nothing follows: is that the end, or is something missing?"""
        ends = [*self._known, *(stretch.rank for stretch in self._stretches)]
        beyond = [rank for rank in ends if rank > (self._epoch, end) and self._is_followed(rank[0])]
        if beyond:
            self._raise_unusable()
            epoch, lsn = max(beyond)
            remedy = f"restore up to --lsn {end}, or a backup that reaches further by its id"
            if lsn <= end:  # so that its history has left this one earlier
                remedy = f"name an earlier backup, with --epoch {epoch}"
            raise CorruptionError(
                f"the log in {self._repository.url} ends with LSN {end} of epoch {self._epoch}, but there were entries "
                f"up to LSN {lsn} of epoch {epoch}: what comes between was not shipped, or belongs to a history that "
                "was given up",
                remedy=remedy,
            )

    def _raise_unusable(self) -> None:
        for error in self._unusable.values():
            raise error

    def _take(self, log: ChangeLog, leg: Leg) -> bool:
        """Appends a leg; False where it turns out that another way has to be found, from where the log ends now."""
        stretch = leg.stretch
        try:
            with (
                self._repository.download(stretch.name) as file,
                opening(file, stretch.name, self._unlocking) as plain,
            ):
                self._append(log, plain, leg, f"{stretch.name} in {self._repository.url}")
        except NotStored as error:  # a longer one has replaced it
            self._unusable[stretch] = error
            self._stretches = list_stretches(self._repository)
            return False
        except CorruptionError as error:
            self._unusable[stretch] = error
            return False
        if leg.last == stretch.last:
            self._epoch = max(self._epoch, stretch.epoch)
        return True

    def _append(self, log: ChangeLog, plain: Stream, leg: Leg, name: str) -> None:
        block = _read_exactly(plain, RECORDS_START, name)
        header = SegmentHeader.decode(block[:SECTOR_BYTES], Path(name))
        begins = (header.first_lsn, short_digest(header.previous))
        if header.cluster != self._cluster or begins != (leg.stretch.first, leg.stretch.before):
            raise CorruptionError(f"{name} is of another log", remedy="restore to a point before it")
        known = _skip(plain, header, log.end_offset, name)
        if known != log.end:
            # Of another entry, perhaps; then it differs all the more.
            self._seen[leg.stretch.name, log.end.lsn] = short_digest(known.digest)
            raise _WrongWay
        pieces = iter(lambda: plain.read(_PIECE_BYTES), b"")
        last = leg.last if leg.last < leg.stretch.last else None
        append_records(log, self._meter.metered(pieces), header.epoch, last=last)
        if log.end.lsn < leg.last:
            raise CorruptionError(f"{name} was cut off")

    def _check_joint(self, log: ChangeLog, leg: Leg, following: Leg | None) -> None:
        found = short_digest(log.end.digest)
        if leg.last == leg.stretch.last and found != leg.stretch.digest:
            self._unusable[leg.stretch] = CorruptionError(
                f"{leg.stretch.name} holds another history than its name says"
            )
            raise _WrongWay
        if following is not None and found != following.stretch.before:
            self._seen[leg.stretch.name, leg.last] = found
            raise _WrongWay


def _skip(plain: Stream, header: SegmentHeader, upto_offset: int, name: str) -> Position:
    """Reads past what is known already; returns the position at its end as the stretch has it.

    Args:
        upto_offset: log offset.

    Raises:
        CorruptionError: it is damaged, or no entry of it ends there.
    """
    position, pending = header.before, b""
    left = upto_offset - header.first_offset
    while left > 0:
        piece = _read_exactly(plain, min(left, _PIECE_BYTES), name)
        left -= len(piece)
        scan = scan_chain(pending + piece, position)
        if scan.damage:
            raise CorruptionError(f"entry {scan.position.lsn + 1} in {name} is damaged: {scan.damage}")
        position, pending = scan.position, (pending + piece)[scan.good_bytes :]
    return position


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
