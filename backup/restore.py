"""A backup becomes a data directory again: checked while it is written, up to a moment of one's choice.

What comes out is a backup itself until a server starts on it: that begins a new epoch of the same cluster, so that
clients who saw later things are told apart, and heal or reset.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from understudy.backup.catalog import Catalog, StoredBackup
from understudy.backup.encryption import Unlocking
from understudy.backup.given_up import describe_given_up, ends_of
from understudy.backup.log_following import Following, Goal
from understudy.backup.manifest import Manifest
from understudy.backup.places import check_apart, check_repository_apart
from understudy.backup.point import Point
from understudy.backup.progress import OnProgress
from understudy.backup.repository import Repository
from understudy.backup.restore_chosen import Restored, restore_chosen
from understudy.backup.restore_whole import BeforeFolding, Origin, restore_whole
from understudy.backup.selection import EVERYTHING, Selection
from understudy.backup.stretch import Stretch, list_stretches
from understudy.backup.unpacking import Unpacking, copy_files, extract
from understudy.common.directory import MANIFEST_FILE, DataDirectory, check_finished
from understudy.common.errors import OTHER_BACKUP, CorruptionError, NotADataDirectory, UsageError
from understudy.common.files import storage_errors
from understudy.common.types import Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport(Restored):
    """What was restored, and how that went."""

    seconds: float
    ended: (
        bool  # the log has no entry behind the point that was asked for: later ones may not have been shipped
    )
    notes: list[str]  # what whoever asked for a point may not expect of it


def restore_backup(
    backup: Path,
    target: Path,
    *,
    point: Point | None = None,
    selection: Selection = EVERYTHING,
    unlocking: Unlocking | None = None,
    before_folding: BeforeFolding | None = None,
    progress: OnProgress | None = None,
) -> RestoreReport:
    """Makes a data directory of a backup: every file is checked against the manifest as it is written.

    Args:
        backup: a backup's directory, or an archive.
        target: absent, empty, or what an attempt before has left.
        point: how far to go; all of it if not given.
        selection: which realms.
        unlocking: what opens an archive that is encrypted.
        before_folding: shown the store as the backup has it, and the log behind it.
        progress: told of bytes done, and in all.

    Raises:
        NotADataDirectory, UnfinishedBackup, WrongRole, DirectoryInUse: of one or the other, or the backup was updated
            while it was read.
        CorruptionError: the backup is damaged; ``target`` is removed where it was absent, else marked as unfinished.
        NotPermitted: it does not open.
        UsageError: it does not hold that point, or no realm of any of the patterns.
        DirectoryError: it was made by a machine of another kind.
        DiskFull, StorageFailed.
    """
    check_finished(backup)
    if backup.is_dir():
        check_apart(backup, target)
    if not backup.exists():
        raise NotADataDirectory(f"there is no backup {backup}")

    started_s = time.monotonic()
    ends: list[int] = []  # nothing where an attempt before has read the backup

    def fill(directory: DataDirectory) -> tuple[Manifest, bool]:
        manifest, is_reached = _read(backup, Unpacking(directory, point, progress), unlocking or Unlocking())
        ends.append(manifest.lsn)
        return manifest, is_reached

    origin = Origin(
        name=str(backup),
        fill=fill,
        goal=Goal(point=point),
        following=None,
        identity=_identity(backup),
        before_folding=before_folding,
    )
    restored = _restore(target, origin, selection, progress)
    lsn = restored.manifest.lsn
    ended = point is not None and point.time_us is not None and ends[-1:] == [lsn]
    return RestoreReport(
        manifest=restored.manifest,
        unmatched=restored.unmatched,
        seconds=time.monotonic() - started_s,
        ended=ended,
        notes=[f"the backup ends with {_describe_end(restored.manifest)}"] if ended else [],
    )


def _read(backup: Path, unpacking: Unpacking, unlocking: Unlocking) -> tuple[Manifest, bool]:
    if backup.is_dir():
        return copy_files(backup, unpacking)
    with storage_errors("read", backup), backup.open("rb") as file:
        return extract(file, str(backup), unpacking, unlocking)


def _describe_end(manifest: Manifest) -> str:
    return f"LSN {manifest.lsn} of {manifest.time}, before what was asked for"


def _identity(backup: Path) -> str:
    file = backup / MANIFEST_FILE if backup.is_dir() else backup
    if not file.exists():
        return ""  # whoever reads it says so
    about = file.stat()
    return f"{about.st_ino} {about.st_size} {about.st_mtime_ns}"


def restore_stored(
    repository: Repository,
    backup: StoredBackup,
    target: Path,
    *,
    with_log: bool,
    point: Point | None = None,
    epoch_max: Epoch | None = None,
    catalog: Catalog | None = None,
    stretches: Sequence[Stretch] | None = None,
    selection: Selection = EVERYTHING,
    unlocking: Unlocking | None = None,
    before_folding: BeforeFolding | None = None,
    progress: OnProgress | None = None,
) -> RestoreReport:
    """Makes a data directory of a backup in a repository, and of the log that was shipped after it.

    Args:
        with_log: go on behind the backup, as far as the log in the repository reaches or to ``point``.
        point: how far to go.
        epoch_max: the highest epoch whose log is followed.
        catalog: of the repository, as it was read: where other backups reach further than the log, it has a gap; and
            the epoch to come is higher than those of all of them.
        stretches: of the log in the repository, if they were listed already.
        and the others: as of :func:`restore_backup`.

    Raises:
        RepositoryError: the repository can't be read.
        and what :func:`restore_backup` raises.
    """
    started_s = time.monotonic()
    check_repository_apart(repository.url, target)
    name = f"{backup.archive_name} in {repository.url}"
    if with_log and not backup.manifest.is_whole:
        raise UsageError(
            f"{name} does not hold all realms, so the log does not go on behind it",
            remedy="restore it as it is: name it, and give neither --lsn nor --at",
        )
    if epoch_max is not None and backup.manifest.epoch > epoch_max:
        raise UsageError(
            f"{name} is of epoch {backup.manifest.epoch}, behind epoch {epoch_max}",
            remedy="name an earlier backup",
        )
    unlocking = unlocking or Unlocking()

    def fill(directory: DataDirectory) -> tuple[Manifest, bool]:
        with repository.download(backup.archive_name) as file:
            manifest, is_reached = extract(file, name, Unpacking(directory, point, progress), unlocking)
        if manifest != backup.manifest:
            raise CorruptionError(f"{name} holds another backup than its manifest says", remedy=OTHER_BACKUP)
        return manifest, is_reached

    stretches = stretches if stretches is not None else list_stretches(repository)
    backups = catalog.backups if catalog is not None else [backup]
    ranks = [one.manifest.rank for one in backups]
    goal = Goal(point=point, epoch_max=epoch_max)
    origin = Origin(
        name=f"{repository.url} {backup.id}",
        fill=fill,
        goal=goal,
        following=Following(repository, goal, unlocking, stretches=stretches, known=ranks, progress=progress)
        if with_log
        else None,
        epoch_floor=max(epoch for epoch, _ in [*ranks, *(one.rank for one in stretches)]),
        before_folding=before_folding,
    )
    restored = _restore(target, origin, selection, progress)
    following = origin.following
    ended = point is not None and following is not None and following.ended
    end = _describe_end(restored.manifest)
    notes = [f"the log in the repository ends with {end}: whatever came in between was not shipped"]
    forks = following.forks if following is not None else []
    given_up = describe_given_up(ends_of(backups, stretches), forks, restored.manifest, point)
    return RestoreReport(
        manifest=restored.manifest,
        unmatched=restored.unmatched,
        seconds=time.monotonic() - started_s,
        ended=ended,
        notes=[*(notes if ended else []), *([given_up] if given_up else [])],
    )


def _restore(target: Path, origin: Origin, selection: Selection, progress: OnProgress | None) -> Restored:
    if selection.is_filtered:
        return restore_chosen(target, origin, selection, progress)
    return Restored(manifest=restore_whole(target, origin), unmatched=[])
