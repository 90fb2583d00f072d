"""Going on behind a backup, along the stretches of the log in its repository.

Histories fork, and names of stretches do not tell all of what they hold, so that a way can turn out to be wrong once
something was taken along it. What shows that is remembered, and the copy is made anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from understudy.backup.archive import opening, read_exactly
from understudy.backup.encryption import Unlocking
from understudy.backup.given_up import Fork
from understudy.backup.log_path import Leg, find_path
from understudy.backup.point import Point
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.replay import Replay, replaying
from understudy.backup.repository import Repository
from understudy.backup.sinks import Stream
from understudy.backup.stretch import Stretch, list_stretches, short_digest
from understudy.backup.target_log import Reached
from understudy.common.directory import DataDirectory
from understudy.common.errors import CorruptionError, NotStored, RepositoryError, UsageError
from understudy.common.records import scan_chain
from understudy.common.segment import RECORDS_START, SECTOR_BYTES, SegmentHeader
from understudy.common.types import START, Epoch, Lsn, Position

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """How far to go along the log; to its end, in the highest epoch, if nothing is said."""

    point: Point | None = None
    epoch_max: Epoch | None = None  # the highest epoch to follow

    def __str__(self) -> str:
        return f"{self.point or 'the end'} of epoch {self.epoch_max or 'any'}"


class WrongWay(Exception):
    """The copy has taken what is of another history; it must be as the backup was before the next attempt."""


class Following:
    """The way through one repository's log.

    What turns out on it is remembered, and another way is looked for, until one was gone to its end: past stretches
    that are damaged, that others have replaced meanwhile, or whose history was given up. Where histories have forked,
    the one of the highest epoch is followed.

    Args:
        stretches: as they were listed.
        known: entries that there are, each with its epoch, since backups reach up to them.
    """

    def __init__(
        self,
        repository: Repository,
        goal: Goal,
        unlocking: Unlocking,
        *,
        stretches: Sequence[Stretch],
        known: Iterable[tuple[Epoch, Lsn]] = (),
        progress: OnProgress | None,
    ) -> None:
        self._repository = repository
        self._goal = goal
        self._unlocking = unlocking
        self._known = list(known)
        self._meter = Meter(None, progress=progress)
        self._stretches = stretches
        self._seen: dict[tuple[str, Lsn], str] = {}
        self._unusable: dict[Stretch, CorruptionError | RepositoryError] = {}
        self._origin = START
        self.begins_at_origin = False  # when it was opened, the copy was as the backup is
        self.ended = False  # the log ends before the point, as far as anybody knows
        self.forks: list[Fork] = []  # of the history that was followed

    def follow(self, directory: DataDirectory, origin: Position) -> Reached:
        """Brings a copy forward along the log, as far as that reaches or is wanted.

        Args:
            directory: the backup as it was; or what an attempt before has left.
            origin: the backup's last entry.

        Raises:
            WrongWay: the copy is to be made anew.
            CorruptionError: what is needed is damaged, or not there though entries behind it are.
            UsageError: the goal's point is not there.
            NotPermitted: it does not open.
            RepositoryError, DiskFull, StorageFailed.
        """
        with replaying(directory, self._goal.point) as copy:
            self._origin = origin
            self.begins_at_origin = copy.end == origin
            while not self._goes(copy):
                pass
            self.ended, self.forks = not copy.is_enough, copy.forks()
            return copy.finish()

    def _goes(self, copy: Replay) -> bool:
        """Goes one way; returns whether it was gone to its end, or as far as is wanted."""
        copy.read_from_end()
        legs = self._legs(copy)
        if not copy.is_enough or self._highest(copy) > copy.epoch:
            self._check_way(copy, legs)
        if not legs:
            return True  # where the point was reached, and what is behind it is damaged, that is good enough
        # Names tell what comes before and behind whole stretches; where one is left within, only going there does.
        unsure = [number for number, leg in enumerate(legs) if leg.last < leg.stretch.last]
        for number, (leg, following) in enumerate(zip(legs, [*legs[1:], None], strict=True)):
            if not self._take(copy, leg) or not self._joins(copy, leg, following):
                return False
            if copy.is_enough and number >= max(unsure, default=0):
                return True
        return False

    def _highest(self, copy: Replay) -> Epoch:
        """The highest epoch that is followed; the copy's own where no stretch is of a later one."""
        epochs = [one.epoch for one in self._stretches if self._is_followed(one.epoch, copy)]
        return max(epochs, default=copy.epoch)

    def _legs(self, copy: Replay) -> list[Leg]:
        """The way from where the copy ends."""
        usable = [one for one in self._stretches if one not in self._unusable]
        targets = [one for one in usable if self._is_followed(one.epoch, copy)]
        return find_path(targets, usable, copy.end, self._seen)

    def _check_way(self, copy: Replay, legs: list[Leg]) -> None:
        """Does it lead where it should?

        Raises:
            CorruptionError: it does not lead to the highest epoch, so which entries were given up can't be told; or
                it ends, and something is missing.
        """
        if not legs:
            self._check_end(copy)
            return
        head = copy.end
        highest = self._highest(copy)
        if legs[-1].stretch.epoch < highest:
            self._raise_unusable(copy)
            raise CorruptionError(
                f"the log in {self._repository.url} goes on behind LSN {head.lsn} in epoch {legs[-1].stretch.epoch}, "
                f"but nothing there leads to epoch {highest}, which has taken over from it",
                remedy=f"name an earlier backup, with --epoch {highest}, or follow the earlier history with --epoch "
                f"{legs[-1].stretch.epoch}",
            )

    def _is_followed(self, epoch: Epoch, copy: Replay) -> bool:
        # What ends in an earlier epoch was given up before the copy's last entry was written.
        return copy.epoch <= epoch and (self._goal.epoch_max is None or epoch <= self._goal.epoch_max)

    def _check_end(self, copy: Replay) -> None:
        """Nothing follows: is that the end, or is something missing?"""
        end, point = copy.end.lsn, self._goal.point
        ends = [*self._known, *(stretch.rank for stretch in self._stretches)]
        beyond = [rank for rank in ends if rank > (copy.epoch, end) and self._is_followed(rank[0], copy)]
        if beyond:
            self._raise_unusable(copy)
            epoch, lsn = max(beyond)
            remedy = f"restore up to --lsn {end}, or a backup that reaches further by its id"
            if lsn <= end:  # so that its history has left this one earlier
                remedy = f"name an earlier backup, with --epoch {epoch}"
            raise CorruptionError(
                f"the log in {self._repository.url} ends with LSN {end} of epoch {copy.epoch}, but there were entries "
                f"up to LSN {lsn} of epoch {epoch}: what comes between was not shipped, or belongs to a history that "
                "was given up",
                remedy=remedy,
            )
        if point is not None and point.lsn is not None:
            raise UsageError(f"the backup reaches up to LSN {end}, not to {point.lsn}")

    def _raise_unusable(self, copy: Replay) -> None:
        for error in self._unusable.values():
            if isinstance(error, CorruptionError):  # others were replaced
                error.remedy = f"restore up to --lsn {copy.end.lsn}"
                if self._highest(copy) > copy.epoch:  # nothing shows where that has taken over
                    error.remedy += f" --epoch {copy.epoch}"
                error.remedy += ", or a backup that lies behind the damage by its id"
                raise error

    def _take(self, copy: Replay, leg: Leg) -> bool:
        """Takes a leg; False where it turns out that another way has to be found, from where the copy ends now."""
        stretch = leg.stretch
        try:
            with (
                self._repository.download(stretch.name) as file,
                opening(file, stretch.name, self._unlocking) as plain,
            ):
                return self._extend(copy, plain, leg, f"{stretch.name} in {self._repository.url}")
        except NotStored as error:  # a longer one has replaced it
            self._unusable[stretch] = error
            self._stretches = list_stretches(self._repository)
            return False
        except CorruptionError as error:
            if copy.is_broken:
                raise
            self._unusable[stretch] = error
            return False

    def _extend(self, copy: Replay, plain: Stream, leg: Leg, name: str) -> bool:
        block = read_exactly(plain, RECORDS_START, name)
        header = SegmentHeader.decode(block[:SECTOR_BYTES], Path(name))
        begins = (header.first_lsn, short_digest(header.previous))
        if header.cluster != copy.cluster or begins != (leg.stretch.first, leg.stretch.before):
            raise CorruptionError(f"{name} is of another log", remedy="restore to a point before it")
        known = _skip(plain, header, copy.read_offset, name)
        if known != copy.read:
            # Of another entry, perhaps; then it differs all the more.
            self._seen[leg.stretch.name, copy.read.lsn] = short_digest(known.digest)
            self._turn_back(copy)
            return False
        pieces = iter(lambda: plain.read(_PIECE_BYTES), b"")
        copy.extend(self._meter.metered(pieces), header.epoch, last=leg.last)
        if copy.read.lsn < leg.last:
            raise CorruptionError(f"{name} was cut off")
        return True

    def _joins(self, copy: Replay, leg: Leg, following: Leg | None) -> bool:
        """Whether what was read up to the end of a leg is what its name, and the next one's, say."""
        found = short_digest(copy.read.digest)
        if leg.last == leg.stretch.last and found != leg.stretch.digest:
            self._unusable[leg.stretch] = CorruptionError(
                f"{leg.stretch.name} holds another history than its name says"
            )
        elif following is not None and found != following.stretch.before:
            self._seen[leg.stretch.name, leg.last] = found
        else:
            return True
        self._turn_back(copy)
        return False

    def _turn_back(self, copy: Replay) -> None:
        """Another way has to be found, from the beginning."""
        if copy.end != self._origin:
            raise WrongWay
        copy.forget_read()


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
        piece = read_exactly(plain, min(left, _PIECE_BYTES), name)
        left -= len(piece)
        scan = scan_chain(pending + piece, position)
        if scan.damage:
            raise CorruptionError(f"entry {scan.position.lsn + 1} in {name} is damaged: {scan.damage}")
        position, pending = scan.position, (pending + piece)[scan.good_bytes :]
    return position
