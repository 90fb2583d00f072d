"""Which backup a restore begins with."""

from __future__ import annotations

from understudy.backup.catalog import Catalog, StoredBackup
from understudy.backup.manifest import utc_seconds
from understudy.backup.point import Point
from understudy.common.errors import UsageError
from understudy.common.types import Epoch, Lsn


def choose_backup(
    catalog: Catalog, point: Point | None, url: str, *, epoch_max: Epoch | None = None
) -> StoredBackup:
    """The newest backup of all realms that does not lie behind the point and is not known to be damaged.

    Newest means of the highest epoch, and of these the highest LSN: what an old primary has stored after another had
    taken its place counts less.

    Args:
        url: the repository's, for messages.
        epoch_max: the highest epoch to choose from.

    Raises:
        UsageError: there is none.
    """
    suitable = [
        backup
        for backup in catalog.backups
        if not backup.is_damaged
        and backup.manifest.is_whole
        and (epoch_max is None or backup.manifest.epoch <= epoch_max)
        and (point is None or not point.is_before(Lsn(backup.manifest.lsn), _time_us(backup)))
    ]
    if not suitable:
        what = f"no backup in {url} holds all realms"
        what += f", lies before {point}" if point else ""
        what += f", is of epoch {epoch_max} or an earlier one" if epoch_max is not None else ""
        raise UsageError(what, remedy=f"see what there is, and name one: understudy backups list {url}")
    return max(suitable, key=lambda backup: backup.manifest.rank)


def _time_us(backup: StoredBackup) -> int:
    return round(utc_seconds(backup.manifest.time) * 1e6)
