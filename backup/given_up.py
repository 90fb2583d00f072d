"""What a restore up to a moment leaves out since a later epoch has given it up: whoever asks may be after just that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from understudy.backup.catalog import StoredBackup
from understudy.backup.manifest import Manifest, utc_seconds
from understudy.backup.point import Point
from understudy.backup.stretch import Stretch
from understudy.common.types import Epoch, Lsn


@dataclass(frozen=True, slots=True)
class Fork:
    """Where an epoch has taken over from those before it."""

    epoch: Epoch
    last: Lsn  # the last entry before it


@dataclass(frozen=True, slots=True)
class End:
    """An entry that a repository reaches up to."""

    epoch: Epoch
    lsn: Lsn
    time: str = ""  # UTC, where it is known


def ends_of(backups: Iterable[StoredBackup], stretches: Iterable[Stretch]) -> Iterator[End]:
    """Where backups and stretches end; names of stretches have no times."""
    for manifest in (backup.manifest for backup in backups):
        yield End(Epoch(manifest.epoch), Lsn(manifest.lsn), manifest.time)
    for stretch in stretches:
        yield End(stretch.epoch, stretch.last)


def describe_given_up(
    ends: Iterable[End], forks: Sequence[Fork], reached: Manifest, point: Point | None
) -> str:
    """What of earlier epochs goes on behind what was restored, in words; empty where nothing does.

    Args:
        ends: of all that the repository holds.
        forks: of the history that was restored, and of the epoch that begins right behind it.
        point: how far to go. Up to an LSN, each history goes equally far.
    """
    if point is None or point.time_us is None:
        return ""
    further = [
        (end, fork)
        for end in ends
        if (fork := _left_at(end, forks)) is not None and _is_further(end, reached, point.time_us)
    ]
    if not further:
        return ""
    end, fork = max(further, key=lambda each: (each[0].epoch, each[0].lsn, each[0].time))
    of_time = f" of {end.time}" if end.time else ""
    return (
        f"epoch {end.epoch} has entries up to LSN {end.lsn}{of_time}, and epoch {fork.epoch} has given up those "
        f"behind LSN {fork.last}: --epoch {end.epoch} restores them as well, as far as they are not behind {point}"
    )


def _left_at(end: End, forks: Sequence[Fork]) -> Fork | None:
    """Where the history that was restored has left the one of ``end``; None where it is not known to have."""
    found = [fork for fork in forks if fork.epoch > end.epoch and fork.last < end.lsn]
    return min(found, key=lambda fork: fork.epoch, default=None)


def _is_further(end: End, reached: Manifest, time_us: int) -> bool:
    if end.lsn > reached.lsn:
        return True
    return bool(end.time) and utc_seconds(reached.time) < utc_seconds(end.time) <= time_us / 1e6
