"""Which backup a restore begins with."""

from __future__ import annotations

import datetime

from understudy.backup.catalog import Catalog, StoredBackup
from understudy.backup.point import Point
from understudy.common.errors import UsageError
from understudy.common.types import Lsn


def choose_backup(catalog: Catalog, point: Point | None, url: str) -> StoredBackup:
    """The newest backup of all realms that does not lie behind the point and is not known to be damaged.

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
        and backup.manifest.is_whole
        and (point is None or not point.is_before(Lsn(backup.manifest.lsn), _time_us(backup)))
    ]
    if not suitable:
        what = f"no backup in {url} holds all realms" + (f" and lies before {point}" if point else "")
        raise UsageError(what, remedy=f"see what there is, and name one: understudy backups list {url}")
    return max(suitable, key=lambda backup: (backup.manifest.epoch, backup.manifest.lsn))


def known_lsns(catalog: Catalog, chosen: StoredBackup) -> list[Lsn]:
    """Up to which entries the other backups of the same reign or a later one reach."""
    return [
        Lsn(backup.manifest.lsn)
        for backup in catalog.backups
        if backup.manifest.epoch >= chosen.manifest.epoch
    ]


def _time_us(backup: StoredBackup) -> int:
    return round(datetime.datetime.fromisoformat(backup.manifest.time).timestamp() * 1e6)
