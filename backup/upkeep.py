"""What is done to the backups of a repository once they are there: checked, copied, and removed when they are old.

Whoever removes something holds the repository's lock, and a backup that is to stay is looked at before any other is
touched: so no repository is left without a backup that can be restored.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from understudy.backup.catalog import (
    Catalog,
    Finding,
    StoredBackup,
    manifest_name,
    note_check,
    publish_backup,
    read_catalog,
)
from understudy.backup.manifest import Manifest
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.repository import Repository
from understudy.backup.repository_lock import RepositoryLock
from understudy.backup.retention import Candidate, Retention, Split, split
from understudy.backup.stretch import LOG, Stretch
from understudy.common.errors import AlreadyStored, CorruptionError, NotStored, UsageError

_PIECE_BYTES = 1 << 20
# What has no manifest after so long was cut off. Log stays for as long, see `_unneeded`.
ORPHAN_S = 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport:
    """What was removed, or would be."""

    kept: list[tuple[str, tuple[str, ...]]]  # ids, the newest first, and why
    removed: list[str]  # ids
    orphans: list[str]  # folders
    stretches: list[str]  # objects of the log
    catalog: Catalog  # as it was before
    oldest_before: Manifest | None  # of the oldest backup that restores to a moment could begin with
    oldest: Manifest | None  # and of the oldest that they can begin with afterwards


def prune(
    repository: Repository,
    lock: RepositoryLock | None,
    retention: Retention,
    *,
    policy: str | None = None,
) -> PruneReport:
    """Removes the backups that the retention no longer keeps, the log before the oldest one kept, and leftovers.

    Log that was stored within the last day stays: a backup that is being stored may lie before it.

    Args:
        lock: of the repository, held; None: only say what would be removed.
        policy: whose backups; of None, those of each by themselves. Other policies' stay as they are.

    Raises:
        CorruptionError: the newest backup that is to stay is not there as its manifest says; nothing was removed.
        RepositoryError.
    """
    now_s = time.time()
    old_s = repository.now_s() - ORPHAN_S
    catalog = read_catalog(repository)
    known = {backup.id: backup for backup in catalog.backups}
    policies = {backup.policy for backup in catalog.backups if policy in (None, backup.policy)}
    told = [_told(catalog, one, retention, now_s) for one in sorted(policies)]
    removed = [one.name for part in told for one in part.removable]
    kept = [backup for backup in catalog.backups if backup.id not in removed]
    report = PruneReport(
        kept=[(one.name, reasons) for part in told for one, reasons in part.kept],
        removed=removed,
        orphans=_orphans(repository, catalog, old_s),
        stretches=_unneeded(repository, kept, catalog, old_s),
        catalog=catalog,
        oldest_before=_oldest(catalog.backups),
        oldest=_oldest(kept),
    )
    if lock is None:
        return report
    if report.removed or report.stretches:
        for part in told:
            _check_remains(repository, [known[one.name] for one, _ in part.kept if one.restorable])
    _remove(repository, lock, report, known)
    return report


def _told(catalog: Catalog, policy: str, retention: Retention, now_s: float) -> Split:
    """Which backups of a policy stay; one that lacks realms which were damaged counts for no day."""
    backups = [
        Candidate(
            name=backup.id,
            made_s=backup.made_s,
            rank=backup.manifest.rank,
            restorable=backup.is_restorable,
        )
        for backup in catalog.backups
        if backup.policy == policy
    ]
    return split(backups, retention, now_s=now_s)


def _remove(
    repository: Repository, lock: RepositoryLock, report: PruneReport, known: dict[str, StoredBackup]
) -> None:
    for backup_id in report.removed:
        lock.check()
        delete_backup(repository, known[backup_id])
    for name in report.stretches:
        lock.check()
        repository.delete(name)
    for folder in report.orphans:
        lock.check()
        _delete_folder(repository, folder)
    repository.sweep(ORPHAN_S)


def _check_remains(repository: Repository, restorable: list[StoredBackup]) -> None:
    """What stays must be there: a listing may be old, and a manifest may have lost its archive."""
    if not restorable:
        raise CorruptionError(
            f"no backup in {repository.url} that is to stay can be restored: nothing was removed",
            remedy="make a new backup first",
        )
    newest = max(restorable, key=lambda backup: (backup.manifest.rank, backup.made_s))
    repository.read(manifest_name(newest.folder))
    sizes = [
        stored.size for stored in repository.list(newest.archive_name) if stored.name == newest.archive_name
    ]
    if sizes != [newest.size]:
        raise CorruptionError(
            f"the archive of {newest.id}, the newest backup in {repository.url}, is not there as its manifest says: "
            "nothing was removed",
            remedy="run `understudy backups verify`, and make a new backup",
        )


def _orphans(repository: Repository, catalog: Catalog, old_s: float) -> list[str]:
    """Folders that have no manifest, and have had none for a day."""
    found = []
    for folder in catalog.orphans:
        newest_s = max((stored.modified_s for stored in repository.list(folder)), default=old_s)
        if newest_s < old_s and not has_manifest(repository, folder):
            found.append(folder)
    return found


def has_manifest(repository: Repository, folder: str) -> bool:
    """Whether a backup is visible. Asked for by name: a listing may not show it yet.

    Raises:
        RepositoryError.
    """
    try:
        repository.read(manifest_name(folder))
    except NotStored:
        return False
    return True


def _unneeded(repository: Repository, kept: list[StoredBackup], catalog: Catalog, old_s: float) -> list[str]:
    """The log before the oldest backup kept; all of it stays while there is a backup that can't be read.

    A backup that is being stored, by another policy or node, is in no catalog yet, and holds no lock. Entries behind it
    were stored after it had been begun, since it takes in all that is durable; if its source is a replica, as long
    before as that lags, at the earliest. So log that has been there for a day, by the clock of the storage that dates
    it, is needed by none, unless storing, waiting for the lock (up to six hours) and lag come to more than that: such a
    run looks itself whether its log is there (`run.py`).
    """
    if not kept or catalog.problems:
        return []
    oldest = min(backup.manifest.lsn for backup in kept)
    found = ((stored, Stretch.parse(stored.name)) for stored in repository.list(LOG))
    return [
        stored.name
        for stored, stretch in found
        if stretch is not None and stretch.last <= oldest and stored.modified_s < old_s
    ]


def _oldest(backups: list[StoredBackup]) -> Manifest | None:
    """Of those that a restore to a moment can begin with, the one that lies furthest back."""
    usable = [backup.manifest for backup in backups if not backup.is_damaged and backup.manifest.is_whole]
    return min(usable, key=lambda manifest: manifest.lsn, default=None)


def delete_backup(repository: Repository, backup: StoredBackup) -> None:
    """Removes a backup: first its manifest, so that what is cut off is no backup any more.

    Raises:
        RepositoryError.
    """
    repository.delete(manifest_name(backup.folder))
    _delete_folder(repository, backup.folder)


def delete_chosen(repository: Repository, lock: RepositoryLock, backup_id: str, *, force: bool) -> None:
    """Removes the backup that an operator names.

    Args:
        lock: of the repository, held.
        force: though it is the last one that can be restored.

    Raises:
        UsageError: there is none of that id, or it is the last one.
        RepositoryError.
    """
    catalog = read_catalog(repository)
    backup = catalog.find(backup_id)
    others = [
        other
        for other in catalog.backups
        if other.id != backup_id
        and other.is_restorable
        and (other.manifest.is_whole or not backup.manifest.is_whole)
    ]
    if not force:
        if not others and not backup.is_damaged:
            raise UsageError(
                f"{backup_id} is the only backup in {repository.url} that can be restored",
                remedy="give --force",
            )
        if others:
            _check_remains(repository, others)
    lock.check()
    delete_backup(repository, backup)


def _delete_folder(repository: Repository, folder: str) -> None:
    for stored in list(repository.list(folder)):
        repository.delete(stored.name)


def verify_stored(repository: Repository, backup: StoredBackup, *, progress: OnProgress | None = None) -> str:
    """Reads a backup's archive, compares it with the manifest's digest, and remembers what came out.

    Returns:
        What is wrong; empty where it is intact.

    Raises:
        RepositoryError: it can't be read now, which says nothing about it.
    """
    problem = archive_problem(repository, backup, progress=progress)
    finding = Finding.DAMAGED if problem else Finding.INTACT
    note_check(repository, backup, finding, problem, time.time())
    return problem


def archive_problem(
    repository: Repository, backup: StoredBackup, *, progress: OnProgress | None = None
) -> str:
    """What is wrong with a backup's archive; empty where it has the digest that the manifest says.

    Raises:
        RepositoryError: it can't be read now, which says nothing about it.
    """
    meter = Meter(backup.size, progress=progress)
    sha256, size = hashlib.sha256(), 0
    try:
        with repository.download(backup.archive_name) as file:
            for piece in meter.metered(iter(lambda: file.read(_PIECE_BYTES), b"")):
                sha256.update(piece)
                size += len(piece)
    except NotStored:
        return f"{backup.archive_name} is missing"
    if (size, sha256.hexdigest()) != (backup.size, backup.sha256):
        return f"{backup.archive_name} has {size:,} bytes with SHA-256 {sha256.hexdigest()}, not what its manifest says"
    return ""


def by_need(backups: list[StoredBackup]) -> list[StoredBackup]:
    """Those never checked first, then those whose last check is the longest ago; within each the oldest."""
    return sorted(backups, key=lambda backup: (backup.last_check.at if backup.last_check else "", backup.id))


def nearest_intact(backups: list[StoredBackup], damaged: StoredBackup) -> StoredBackup | None:
    """The backup nearest in time to a damaged one that is not known to be damaged."""
    others = [backup for backup in backups if backup.id != damaged.id and not backup.is_damaged]
    return min(others, key=lambda backup: abs(backup.made_s - damaged.made_s), default=None)


def copy_backup(
    source: Repository,
    target: Repository,
    lock: RepositoryLock,
    backup: StoredBackup,
    *,
    progress: OnProgress | None = None,
) -> None:
    """Copies a backup to another repository, checked on the way; one that is there already is fine.

    Args:
        lock: of the target, held.

    Raises:
        CorruptionError: it is damaged; nothing is visible at the target.
        RepositoryError.
    """
    meter = Meter(backup.size, progress=progress)
    sha256 = hashlib.sha256()
    try:
        with (
            source.download(backup.archive_name) as file,
            target.upload(backup.archive_name, expected_bytes=backup.size) as out,
        ):
            for piece in meter.metered(iter(lambda: file.read(_PIECE_BYTES), b"")):
                sha256.update(piece)
                out.write(piece)
            if sha256.hexdigest() != backup.sha256:
                raise CorruptionError(
                    f"{backup.archive_name} in {source.url} is not what its manifest says",
                    remedy="copy another backup",
                )
    except AlreadyStored:  # by an attempt before
        problem = archive_problem(target, backup, progress=progress)
        if problem:
            raise CorruptionError(f"in {target.url}, {problem}", remedy="remove it there") from None
    lock.check()
    try:
        publish_backup(target, backup)
    except AlreadyStored:
        return
