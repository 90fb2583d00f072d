"""A backup becomes a data directory again: checked while it is written, up to a moment of one's choice.

What comes out is a backup itself until a server starts on it: that begins a new epoch of the same cluster, so that
clients who saw later things are told apart, and heal or reset.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Self

from understudy.backup.archive import check_entry, unpack
from understudy.backup.catalog import Catalog, StoredBackup
from understudy.backup.contents import Member
from understudy.backup.encryption import Unlocking
from understudy.backup.in_progress import (
    Filled,
    begun_from,
    in_progress,
    is_in_progress,
    note_filled,
    read_filled,
)
from understudy.backup.load_records import Loading, load_selected
from understudy.backup.log_following import Following, Goal, WrongWay
from understudy.backup.manifest import FileEntry, Form, Manifest, read_manifest, write_manifest
from understudy.backup.places import check_apart, check_repository_apart
from understudy.backup.point import Point, cut_log
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.repository import Repository
from understudy.backup.rows import FOLDER
from understudy.backup.selection import EVERYTHING, Selection
from understudy.backup.source import open_source
from understudy.backup.stretch import list_stretches
from understudy.backup.target_log import describe_reached, settle
from understudy.backup.writing import read_blocks, write_member
from understudy.common.directory import MANIFEST_FILE, DataDirectory, Role, check_finished
from understudy.common.errors import (
    OTHER_BACKUP,
    CorruptionError,
    DirectoryError,
    DirectoryInUse,
    NotADataDirectory,
    StorageFailed,
    UnfinishedBackup,
    UsageError,
    WrongRole,
)
from understudy.common.files import storage_errors, sync_tree
from understudy.common.types import Epoch

# Writes a backup's files into a directory and returns what its manifest says.
Fill = Callable[[DataDirectory], Manifest]
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
        UsageError: it does not hold that point.
        DirectoryError: it was made by a machine of another kind.
        DiskFull, StorageFailed.
    """
    check_finished(backup)
    if backup.is_dir():
        check_apart(backup, target)
    if not backup.exists():
        raise NotADataDirectory(f"there is no backup {backup}")

    def fill(directory: DataDirectory) -> Manifest:
        if backup.is_dir():
            return _copy_files(backup, directory, progress)
        with storage_errors("read", backup), backup.open("rb") as file:
            return _extract(file, str(backup), directory, unlocking or Unlocking(), progress)

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

    def fill(directory: DataDirectory) -> Manifest:
        with repository.download(backup.archive_name) as file:
            manifest = _extract(file, name, directory, unlocking, progress)
        if manifest != backup.manifest:
            raise CorruptionError(f"{name} holds another backup than its manifest says", remedy=OTHER_BACKUP)
        return manifest

    ranks = [one.manifest.rank for one in (catalog.backups if catalog is not None else [backup])]
    goal = Goal(point=point, epoch_max=epoch_max)
    origin = _Origin(
        name=f"{repository.url} {backup.id}",
        fill=fill,
        goal=goal,
        following=Following(repository, goal, unlocking, known=ranks, progress=progress)
        if with_log
        else None,
        epoch_floor=max(epoch for epoch, _ in [*ranks, *(one.rank for one in list_stretches(repository))]),
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
    if selection.is_filtered:
        manifest = _restore_chosen(target, origin, selection, progress)
    else:
        manifest = _restore_all(target, origin)
    ended = origin.following is not None and origin.following.ended
    return RestoreReport(
        manifest=manifest,
        seconds=time.monotonic() - started_s,
        ended=ended and origin.goal.point is not None,
    )


def _restore_chosen(
    target: Path, origin: _Origin, selection: Selection, progress: OnProgress | None
) -> Manifest:
    """Restores all, and takes the chosen realms out of it."""
    name = f"{origin.name} {selection}"
    with DataDirectory.open_unfinished(target) as directory:
        _check_free(directory, name)
        incoming = directory.incoming
        goes_on = read_filled(target, name) == Filled(origin.end, reached=True) and _is_whole(incoming)
        with in_progress(target, name, anew=True, goes_on=goes_on):
            if not goes_on:
                _restore_incoming(incoming, origin)
                note_filled(target, Filled(origin.end, reached=True))
            node = read_manifest(incoming).node
            with open_source(incoming) as source:
                manifest = load_selected(directory, source, selection, Meter(None, progress=progress))
            directory.raise_epoch_floor(origin.epoch_floor)
            manifest = replace(manifest, node=node)
            sync_tree(target)
            write_manifest(target, manifest)
            note_filled(target, None)
            shutil.rmtree(incoming)
    return manifest


def _is_whole(path: Path) -> bool:
    return (path / MANIFEST_FILE).exists() and not is_in_progress(path)


def _restore_incoming(incoming: Path, origin: _Origin) -> None:
    if begun_from(incoming) != origin.name:
        shutil.rmtree(incoming, ignore_errors=True)
    _restore_all(incoming, origin)


def _check_free(directory: DataDirectory, origin: str) -> None:
    begun = begun_from(directory.path)
    if directory.is_new or begun == origin:
        return
    if begun:
        raise UnfinishedBackup(
            f"{directory.path} is not finished: it was begun from {begun}",
            remedy="name that backup to go on with it, or restore into another directory",
        )
    raise WrongRole(
        f"{directory.path} holds data already, its role is {directory.role.value}",
        remedy="restore into an absent or empty directory",
    )


def _restore_all(target: Path, origin: _Origin) -> Manifest:
    with DataDirectory.open_unfinished(target) as directory:
        _check_free(directory, origin.name)
        filled = read_filled(target, origin.name)
        goes_on = filled is not None and filled.goal == origin.end and origin.before_folding is None
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
    while True:
        if not goes_on:
            _fill(directory, origin)
        try:
            return _follow(directory, origin)
        except WrongWay:
            pass
        except CorruptionError:
            if not goes_on:  # else the attempt before may have gone a wrong way
                raise
        note_filled(directory.path, None)
        goes_on = False


def _fill(directory: DataDirectory, origin: _Origin) -> None:
    """Puts the backup itself in place."""
    for folder in (directory.log, directory.store):  # of an attempt before, perhaps of another backup
        shutil.rmtree(folder, ignore_errors=True)
    manifest = origin.fill(directory)
    directory.begin(Role.BACKUP, manifest.cluster_id)
    point = origin.goal.point
    reached = point is not None and cut_log(directory, point, goes_on=origin.following is not None)
    sync_tree(directory.path)
    write_manifest(directory.path, manifest)
    note_filled(directory.path, Filled(origin.end, reached))
    if origin.before_folding is not None:
        origin.before_folding(directory)


def _follow(directory: DataDirectory, origin: _Origin) -> Manifest:
    """Opens what is there, and goes on behind it where that is wanted; returns what the manifest is to say then."""
    manifest, filled = read_manifest(directory.path), read_filled(directory.path, origin.name)
    if origin.following is not None and filled is not None and not filled.reached:
        reached = origin.following.follow(directory, manifest.position)
    elif origin.goal.point is not None or manifest.form is Form.RECORDS:
        reached = settle(directory)
    else:
        return manifest
    return describe_reached(directory, manifest, reached)


class _Unpacking:
    """The files of a backup on their way into a directory: pages as they are, records as rows."""

    def __init__(self, directory: DataDirectory, meter: Meter) -> None:
        self._directory = directory
        self._meter = meter
        self._loading: Loading | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *of_error: object) -> None:
        if self._loading is not None:
            self._loading.__exit__(*of_error)

    def take(self, member: Member) -> FileEntry:
        """One file; says what it was."""
        if not member.name.startswith(FOLDER):
            return write_member(self._directory.path, member, self._meter)
        self._loading = self._loading or Loading(self._directory)
        return self._loading.take(member, self._meter)

    def finish(self, manifest: Manifest) -> None:
        """All were taken, and are what the manifest says."""
        if manifest.form is Form.RECORDS:
            (self._loading or Loading(self._directory)).finish(manifest)


def _copy_files(backup: Path, directory: DataDirectory, progress: OnProgress | None) -> Manifest:
    manifest = read_manifest(backup)
    _check_readable(manifest, str(backup))
    meter = Meter(manifest.total_bytes, progress=progress)
    with _unchanged(backup, manifest), _Unpacking(directory, meter) as unpacking:
        for entry in manifest.files:
            member = Member(entry.path, entry.bytes, read_blocks(backup / entry.path))
            check_entry(unpacking.take(member), entry, str(backup))
        unpacking.finish(manifest)
    return manifest


@contextlib.contextmanager
def _unchanged(backup: Path, manifest: Manifest) -> Iterator[None]:
    """Tells a backup that is brought up to date while it is read from a damaged one.

    Raises:
        DirectoryInUse: somebody does that.
    """
    try:
        yield
    except (CorruptionError, StorageFailed) as error:
        if is_in_progress(backup) or read_manifest(backup) != manifest:
            raise DirectoryInUse(
                f"{backup} was changed meanwhile", remedy="give the command again when that has ended"
            ) from error
        raise


def _extract(
    file: IO[bytes], name: str, directory: DataDirectory, unlocking: Unlocking, progress: OnProgress | None
) -> Manifest:
    with _Unpacking(directory, Meter(None, progress=progress)) as unpacking:
        manifest = unpack(file, name, unlocking, unpacking.take)
        _check_readable(manifest, name)
        unpacking.finish(manifest)
    return manifest


def _check_readable(manifest: Manifest, name: str) -> None:
    """Pages of LMDB are as the machine's memory is: its byte order, and 64 bits."""
    if manifest.form is Form.RECORDS:
        return
    if manifest.byte_order != sys.byteorder or struct.calcsize("P") != 8:
        raise DirectoryError(
            f"{name} was made by a machine of another kind ({manifest.machine}, {manifest.byte_order} endian)",
            remedy="restore it on such a machine; a backup that was made with --portable is restored on any",
        )
