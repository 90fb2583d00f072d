"""Which backup a restore begins with."""

from __future__ import annotations

import datetime

from understudy.backup.catalog import Catalog, StoredBackup
from understudy.backup.point import Point
from understudy.common.errors import UsageError
from understudy.common.types import Lsn


def choose_backup(catalog: Catalog, point: Point | None, url: str) -> StoredBackup:
    """The newest backup that does not lie behind the point and is not known to be damaged.

    Newest means of the highest epoch, and of these the highest LSN: what an old primary has stored after another had
    taken its place counts less.

    Args:
        url: the repository's, for messages.

    Raises:
        UsageError: there is none.
    """
    suitable = [
        backup
        for backup in catalog.backups
        if not backup.is_damaged
        and (point is None or not point.is_before(Lsn(backup.manifest.lsn), _time_us(backup)))
    ]
    if not suitable:
        what = f"no backup in {url} lies before {point}" if point else f"there is no backup in {url}"
        raise UsageError(what, remedy=f"see what there is: understudy backups list {url}")
    return max(suitable, key=lambda backup: (backup.manifest.epoch, backup.manifest.lsn))


def _time_us(backup: StoredBackup) -> int:
    return round(datetime.datetime.fromisoformat(backup.manifest.time).timestamp() * 1e6)
