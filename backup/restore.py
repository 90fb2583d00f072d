"""A backup becomes a data directory again: checked while it is written, up to a moment of one's choice.

What comes out is a backup itself until a server starts on it: that begins a new epoch of the same cluster, so that
clients who saw later things are told apart, and heal or reset.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from understudy.backup.catalog import Catalog, StoredBackup
from understudy.backup.encryption import Unlocking
from understudy.backup.in_progress import (
    begun_from,
    in_progress,
    note_filled,
    read_filled,
)
from understudy.backup.load_records import load_selected
from understudy.backup.log_following import Following, Goal, WrongWay
from understudy.backup.manifest import Form, Manifest, read_manifest, write_manifest
from understudy.backup.places import check_apart, check_repository_apart
from understudy.backup.point import Point, cut_log
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.repository import Repository
from understudy.backup.restore_target import holds_copy, is_whole_copy, open_target
from understudy.backup.selection import EVERYTHING, Selection, describe_unmatched
from understudy.backup.source import open_source
from understudy.backup.stretch import Stretch, list_stretches
from understudy.backup.target_log import describe_reached, settle
from understudy.backup.unpacking import Unpacking, copy_files, extract
from understudy.common.directory import MANIFEST_FILE, DataDirectory, Role, check_finished
from understudy.common.errors import (
    OTHER_BACKUP,
    CorruptionError,
    NotADataDirectory,
    UsageError,
)
from understudy.common.files import storage_errors, sync_tree
from understudy.common.types import Epoch, is_system_realm

# Writes a backup's files into a directory; returns what its manifest says, and whether some of its log, behind the
# point, was left out.
Fill = Callable[[DataDirectory], tuple[Manifest, bool]]
# Given the directory with the backup in it, before the log behind the store is folded into that: once, or more often.
BeforeFolding = Callable[[DataDirectory], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """What was restored."""

    manifest: Manifest
    seconds: float
    ended: (
        bool  # the log has no entry behind the point that was asked for: later ones may not have been shipped
    )
    unmatched: list[str]  # of the patterns of realms: there is no such realm at the point

    @property
    def problems(self) -> list[str]:
        """What is missing that was asked for, a line each."""
        return [*self.manifest.problems, *map(describe_unmatched, self.unmatched)]


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
        CorruptionError: the backup is damaged; ``target`` is left marked as unfinished.
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

    def fill(directory: DataDirectory) -> tuple[Manifest, bool]:
        unpacking = Unpacking(directory, point, progress)
        if backup.is_dir():
            return copy_files(backup, unpacking)
        with storage_errors("read", backup), backup.open("rb") as file:
            return extract(file, str(backup), unpacking, unlocking or Unlocking())

    origin = _Origin(
        name=str(backup),
        fill=fill,
        goal=Goal(point=point),
        following=None,
        identity=_identity(backup),
        before_folding=before_folding,
    )
    return _restore(target, origin, selection, progress)


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
            manifest, is_cut = extract(file, name, Unpacking(directory, point, progress), unlocking)
        if manifest != backup.manifest:
            raise CorruptionError(f"{name} holds another backup than its manifest says", remedy=OTHER_BACKUP)
        return manifest, is_cut

    stretches = stretches if stretches is not None else list_stretches(repository)
    ranks = [one.manifest.rank for one in (catalog.backups if catalog is not None else [backup])]
    goal = Goal(point=point, epoch_max=epoch_max)
    origin = _Origin(
        name=f"{repository.url} {backup.id}",
        fill=fill,
        goal=goal,
        following=Following(repository, goal, unlocking, stretches=stretches, known=ranks, progress=progress)
        if with_log
        else None,
        epoch_floor=max(epoch for epoch, _ in [*ranks, *(one.rank for one in stretches)]),
        before_folding=before_folding,
    )
    return _restore(target, origin, selection, progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """What a directory is restored from."""

    name: str
    fill: Fill
    goal: Goal
    following: Following | None  # the log behind it
    identity: str = ""  # what tells it from another one that takes its name
    epoch_floor: int = 0  # the epoch to come is higher
    before_folding: BeforeFolding | None

    @property
    def end(self) -> str:
        """How far to go: what an attempt before has begun is gone on with only where that is the same."""
        end = str(self.goal) if self.following is not None else f"the backup alone, {self.goal}"
        return f"{end}, {self.identity}" if self.identity else end


def _restore(
    target: Path, origin: _Origin, selection: Selection, progress: OnProgress | None
) -> RestoreReport:
    started_s = time.monotonic()
    unmatched: list[str] = []
    if selection.is_filtered:
        manifest, unmatched = _restore_chosen(target, origin, selection, progress)
    else:
        manifest = _restore_all(target, origin)
    ended = origin.following is not None and origin.following.ended
    return RestoreReport(
        manifest=manifest,
        seconds=time.monotonic() - started_s,
        ended=ended and origin.goal.point is not None,
        unmatched=unmatched,
    )


def _restore_chosen(
    target: Path, origin: _Origin, selection: Selection, progress: OnProgress | None
) -> tuple[Manifest, list[str]]:
    """Restores all, and takes the chosen realms out of it; returns the patterns as well that no realm matches."""
    name = f"{origin.name} (chosen realms)"  # whichever: they are chosen last
    with open_target(target, name) as directory:
        goes_on = read_filled(target, name) == origin.end and is_whole_copy(directory.incoming)
        with in_progress(target, name, anew=True, goes_on=goes_on):
            found = _bring_chosen(directory, origin, selection, progress, goes_on=goes_on)
            directory.raise_epoch_floor(origin.epoch_floor)
            sync_tree(target)
            write_manifest(target, found[0])
            note_filled(target, None)
            shutil.rmtree(directory.incoming)
    return found


def _bring_chosen(
    directory: DataDirectory,
    origin: _Origin,
    selection: Selection,
    progress: OnProgress | None,
    *,
    goes_on: bool,
) -> tuple[Manifest, list[str]]:
    """The chosen realms, and the patterns that none matches.

    Args:
        goes_on: an attempt before has restored all.
    """
    while True:
        if not goes_on:
            _restore_incoming(directory.incoming, origin)
            note_filled(directory.path, origin.end)
        try:
            return _take_chosen(directory, origin, selection, progress)
        except CorruptionError:
            if not goes_on:
                raise
        # Damaged since then.
        note_filled(directory.path, None)
        shutil.rmtree(directory.incoming)
        goes_on = False


def _restore_incoming(incoming: Path, origin: _Origin) -> None:
    if begun_from(incoming) != origin.name:
        shutil.rmtree(incoming, ignore_errors=True)
    _restore_all(incoming, origin)


def _take_chosen(
    directory: DataDirectory, origin: _Origin, selection: Selection, progress: OnProgress | None
) -> tuple[Manifest, list[str]]:
    whole = read_manifest(directory.incoming)
    with open_source(directory.incoming) as source:
        there = [path for path in source.state.realms() if not is_system_realm(path)]
        left_out = [one.realm for one in whole.failed]  # whoever reads the report hears of them
        unmatched = selection.unmatched([*there, *left_out])
        if selection.realms and len(unmatched) == len(selection.realms):
            raise UsageError(
                f"{origin.name} holds no realm of {' or '.join(unmatched)} at LSN {source.end.position.lsn}",
                remedy="give the command again with --realm of one that it holds"
                + (f", such as {', '.join(there[:5])}" if there else "")
                + f": it goes on with what was fetched into {directory.path}; or remove that",
            )
        manifest = load_selected(directory, source, selection, Meter(None, progress=progress))
    return replace(manifest, node=whole.node), unmatched


def _restore_all(target: Path, origin: _Origin) -> Manifest:
    with open_target(target, origin.name) as directory:
        goes_on = (
            origin.following is not None
            and origin.before_folding is None
            and read_filled(target, origin.name) == origin.end
            and holds_copy(target)
        )
        with in_progress(target, origin.name, anew=True, goes_on=goes_on):
            manifest = _bring_forward(directory, origin, goes_on=goes_on)
            directory.raise_epoch_floor(origin.epoch_floor)
            sync_tree(target)
            write_manifest(target, manifest)
    return manifest


def _bring_forward(directory: DataDirectory, origin: _Origin, *, goes_on: bool) -> Manifest:
    """The backup and the log behind it.

    Args:
        goes_on: an attempt before has put the backup in place, and perhaps taken some of the log.
    """
    is_reached = False
    while True:
        if not goes_on:
            is_reached = _fill(directory, origin)
        try:
            return _follow(directory, origin, is_reached=is_reached)
        except WrongWay:
            pass
        except CorruptionError:
            # The copy may be damaged since then, or have gone a wrong way; else it is the log's fault.
            if not goes_on or (origin.following is not None and origin.following.begins_at_origin):
                raise
        note_filled(directory.path, None)
        goes_on = False


def _fill(directory: DataDirectory, origin: _Origin) -> bool:
    """Puts the backup itself in place; returns whether it goes as far as is wanted."""
    for folder in (directory.log, directory.store):  # of an attempt before, perhaps of another backup
        shutil.rmtree(folder, ignore_errors=True)
    manifest, is_reached = origin.fill(directory)
    directory.begin(Role.BACKUP, manifest.cluster_id)
    point = origin.goal.point
    if point is not None and not is_reached:
        is_reached = cut_log(directory, point, goes_on=origin.following is not None)
    sync_tree(directory.path)
    write_manifest(directory.path, manifest)
    if origin.following is not None and not is_reached:
        note_filled(directory.path, origin.end)
    if origin.before_folding is not None:
        origin.before_folding(directory)
    return is_reached


def _follow(directory: DataDirectory, origin: _Origin, *, is_reached: bool) -> Manifest:
    """Opens what is there, and goes on behind it where that is wanted; returns what the manifest is to say then."""
    manifest = read_manifest(directory.path)
    if origin.following is not None and not is_reached:
        reached = origin.following.follow(directory, manifest.position)
    elif origin.goal.point is not None or manifest.form is Form.RECORDS:
        reached = settle(directory)
    else:
        return manifest
    return describe_reached(directory, manifest, reached)
