"""Ships the change-log to a repository while its server goes on: whole segments, and the last one as it grows.

Each shipped stretch of the unfinished segment takes the place of the small ones before it, so that sizes at least halve
from one to the next: a segment that takes weeks to fill is some twenty objects, and each entry was shipped that often.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from understudy.backup.archive_options import DEFAULT_LEVEL
from understudy.backup.catalog import read_catalog
from understudy.backup.encryption import Encryption
from understudy.backup.log_archive import ship
from understudy.backup.log_files import LogFiles, LogPart
from understudy.backup.repository import Repository
from understudy.backup.stretch import DIGEST_DIGITS, Stretch, list_stretches, short_digest
from understudy.common.entries import parse_epoch_start
from understudy.common.log_reader import LogPlace
from understudy.common.types import ClusterId, Epoch, Lsn


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of the unfinished segment that was shipped."""

    stretch: Stretch
    begin: LogPlace
    record_bytes: int


class Archiver:
    """Ships the log of one directory to one repository.

    Args:
        log: the directory ``log/`` of a data directory, whose server may run.
        cluster: its cluster.
        repository: claimed for that cluster.
        encryption: as of the backups beside it; may be set anew between calls.
    """

    def __init__(
        self,
        log: Path,
        cluster: ClusterId,
        repository: Repository,
        *,
        encryption: Encryption | None,
        level: int = DEFAULT_LEVEL,
    ) -> None:
        self._log = log
        self._cluster = cluster
        self._repository = repository
        self.encryption = encryption
        self._level = level
        self._shipped: LogPlace | None = None
        self._epoch = Epoch(0)  # of the last entry shipped
        self._pieces: list[_Piece] = []  # each at least twice as large as the next

    def ship(self) -> Lsn:
        """Ships what is durable and not in the repository yet; returns up to which LSN it reaches now.

        Raises:
            As :meth:`ship_parts`.
        """
        *_, shipped = self.ship_parts()
        return shipped

    def ship_parts(self) -> Iterator[Lsn]:
        """Ships what is durable and not in the repository yet, segment by segment.

        Yields:
            Up to which LSN it reaches: before anything is shipped, and after each part.

        Raises:
            RepositoryError: what could not be shipped is shipped by the next call.
            CorruptionError, StorageFailed: of the log.
            UsageError: the log no longer holds what comes next; a new :class:`Archiver` begins where it can.
        """
        with LogFiles(self._log, self._cluster) as files:
            if self._shipped is None:
                self._shipped = self._find_shipped(files)
            yield self._shipped.position.lsn
            end, epochs = self._scan(files, self._shipped)
            if end.position.lsn == self._shipped.position.lsn:
                return
            begin = files.begin_of_segment(Lsn(self._shipped.position.lsn + 1))
            *sealed, _ = files.parts(begin, end)
            yield from self._ship_whole(files, sealed, epochs)
            if end.position.lsn > self._shipped.position.lsn:
                self._ship_piece(files, self._shipped, end, epochs)
                yield end.position.lsn

    def _find_shipped(self, files: LogFiles) -> LogPlace:
        """Where the newest stretch of this history in the repository ends.

        Without any, the place of the oldest backup of this history that the log still reaches: from there on, all
        moments can be restored. Without that, the place before all that the log holds.
        """
        for lsn, digest, epoch in self._ends():
            place = files.place_at(lsn)
            if place is not None and short_digest(place.position.digest) == digest[:DIGEST_DIGITS]:
                self._epoch = epoch
                return place
        return files.begin

    def _ends(self) -> Iterator[tuple[Lsn, str, Epoch]]:
        """LSN, digest and epoch of what may have been shipped last, in the order in which they count.

        The catalog, each of whose manifests has to be read, is looked at only where no stretch is of this history.
        """
        stretches = [(one.last, one.digest, one.epoch) for one in list_stretches(self._repository)]
        yield from sorted(stretches, reverse=True)
        manifests = [backup.manifest for backup in read_catalog(self._repository).backups]
        yield from sorted((Lsn(one.lsn), one.digest, Epoch(one.epoch)) for one in manifests)

    def _ship_whole(
        self, files: LogFiles, segments: list[LogPart], epochs: dict[Lsn, Epoch]
    ) -> Iterator[Lsn]:
        """Ships whole segments, and removes what of each was shipped while it was being written."""
        shipped = list_stretches(self._repository) if segments else []
        for segment in segments:
            whole = self._ship(segment, epochs)
            self._pieces.clear()
            for stretch in shipped:
                within = whole.first <= stretch.first and stretch.last <= whole.last and stretch != whole
                if within and _is_of(stretch, files):
                    self._repository.delete(stretch.name)
            yield whole.last

    def _ship_piece(self, files: LogFiles, begin: LogPlace, end: LogPlace, epochs: dict[Lsn, Epoch]) -> None:
        """Ships what the unfinished segment has got, in one stretch with the pieces before that are not much larger."""
        kept = len(self._pieces)
        while kept and self._pieces[kept - 1].record_bytes < 2 * (end.offset - begin.offset):
            kept -= 1
            begin = self._pieces[kept].begin
        stretch = self._ship(files.parts(begin, end)[0], epochs)
        replaced = self._pieces[kept:]
        self._pieces[kept:] = [_Piece(stretch, begin, end.offset - begin.offset)]
        for piece in replaced:
            self._repository.delete(piece.stretch.name)

    def _ship(self, part: LogPart, epochs: dict[Lsn, Epoch]) -> Stretch:
        end = part.end.position.lsn
        begun = (epoch for lsn, epoch in epochs.items() if lsn <= end)
        self._epoch = max(self._epoch, part.header.epoch, *begun)
        stretch = ship(
            self._repository, part, epoch=self._epoch, encryption=self.encryption, level=self._level
        )
        self._shipped = part.end
        return stretch

    @staticmethod
    def _scan(files: LogFiles, after: LogPlace) -> tuple[LogPlace, dict[Lsn, Epoch]]:
        """How far the log is durable, and the epochs that begin on the way."""
        place, epochs = after, {}
        for record in files.durable_records(after):
            place = LogPlace(record.position, place.offset + record.encoded_bytes)
            started = parse_epoch_start(record.payload)
            if started is not None:
                epochs[record.lsn] = Epoch(started[0].epoch)
        return place, epochs


def _is_of(stretch: Stretch, files: LogFiles) -> bool:
    """Whether a stretch ends with an entry that this log has."""
    position = files.position_at(stretch.last)
    return position is not None and short_digest(position.digest) == stretch.digest
