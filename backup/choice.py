"""Which backup a restore begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from understudy.backup.catalog import Catalog, StoredBackup
from understudy.backup.in_progress import begun_from
from understudy.backup.log_path import find_path
from understudy.backup.manifest import utc_seconds
from understudy.backup.point import Point
from understudy.backup.stretch import Stretch
from understudy.common.errors import UsageError
from understudy.common.types import Epoch, Lsn


def choose_backup(
    catalog: Catalog,
    point: Point | None,
    url: str,
    *,
    stretches: Sequence[Stretch] = (),
    epoch_max: Epoch | None = None,
) -> StoredBackup:
    """The newest backup of all realms that does not lie behind the point and is not known to be damaged.

    Newest means of the highest epoch, and of these the highest LSN: what an old primary has stored after another had
    taken its place counts less. One that was made behind the fork, in a history that was given up, is passed over
    where an earlier one leads on.

    Args:
        url: the repository's, for messages.
        stretches: of the log in the repository.
        epoch_max: the highest epoch to choose from.

    Raises:
        UsageError: there is none.
    """
    whole = [
        backup
        for backup in catalog.backups
        if backup.manifest.is_whole and (epoch_max is None or backup.manifest.epoch <= epoch_max)
    ]
    before = [backup for backup in whole if not _lies_behind(backup, point)]
    suitable = [backup for backup in before if not backup.is_damaged]
    see = f"see what there is, and name one: understudy backups list {url}"
    ends = [one.manifest.rank for one in catalog.backups] + [one.rank for one in stretches]
    if epoch_max is not None and epoch_max > max((epoch for epoch, _ in ends), default=0):
        raise UsageError(f"nothing in {url} is of epoch {epoch_max}", remedy=see)
    reached = max((rank for rank in ends if epoch_max is None or rank[0] <= epoch_max), default=None)
    if point is not None and point.lsn is not None and reached is not None and point.lsn > reached[1]:
        raise UsageError(f"what is in {url} reaches up to LSN {reached[1]}, not to {point.lsn}")
    if not suitable:
        what = f"there is no backup in {url} that holds all realms"
        what += f" and was made before {point}" if point else ""
        what += f", of epoch {epoch_max} or an earlier one" if epoch_max is not None else ""
        raise UsageError(what + _why_none(whole, before), remedy=see)
    newest_first = sorted(suitable, key=lambda backup: backup.manifest.rank, reverse=True)
    followed = [one for one in stretches if epoch_max is None or one.epoch <= epoch_max]
    return next((one for one in newest_first if _leads_on(one, followed)), newest_first[0])


def _lies_behind(backup: StoredBackup, point: Point | None) -> bool:
    return point is not None and point.is_before(Lsn(backup.manifest.lsn), _time_us(backup))


def _why_none(whole: Sequence[StoredBackup], before: Sequence[StoredBackup]) -> str:
    """What was passed over, and what would do instead.

    Args:
        whole: what might be chosen from for some point.
        before: those of them that the point does not lie before.
    """
    said = "".join(f"; {one.id}, of {one.manifest.time}, is known to be damaged" for one in before)
    sound = [one.manifest for one in whole if not one.is_damaged]
    if sound:
        first = min(sound, key=lambda manifest: (utc_seconds(manifest.time), manifest.lsn))
        said += f"; the earliest moment that can be restored is that of LSN {first.lsn}, {first.time}"
    return said


def reach_of(
    backup: StoredBackup, stretches: Sequence[Stretch], epoch_max: Epoch | None
) -> tuple[Epoch, Lsn]:
    """The epoch and LSN that the log behind a backup leads to, as far as the names of stretches tell."""
    manifest = backup.manifest
    followed = [one for one in stretches if epoch_max is None or one.epoch <= epoch_max]
    targets = [one for one in followed if one.epoch >= manifest.epoch]
    legs = find_path(targets, followed, manifest.position, {})
    return legs[-1].stretch.rank if legs else manifest.rank


def begun_with(catalog: Catalog, url: str, target: Path) -> Catalog:
    """The catalog with no other backup than the one from which a restore into ``target`` was begun and not finished.

    The whole catalog where nothing was, or that backup is gone.
    """
    begun_id = begun_from(target).removeprefix(f"{url} ").partition(" ")[0]
    found = [backup for backup in catalog.backups if backup.id == begun_id]
    return replace(catalog, backups=found) if found else catalog


def _leads_on(backup: StoredBackup, stretches: Sequence[Stretch]) -> bool:
    """Whether the way behind a backup leads to the highest epoch, as far as the names of stretches tell."""
    manifest = backup.manifest
    newest = [one for one in stretches if one.epoch == max(each.epoch for each in stretches)]
    if not newest or newest[0].epoch <= manifest.epoch:
        return True
    return bool(find_path(newest, stretches, manifest.position, {}))


def _time_us(backup: StoredBackup) -> int:
    return round(utc_seconds(backup.manifest.time) * 1e6)
