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
from understudy.backup.in_progress import in_progress, is_in_progress, was_begun_from
from understudy.backup.load_records import Loading, load_selected
from understudy.backup.log_archive import append_archived
from understudy.backup.manifest import FileEntry, Form, Manifest, read_manifest, write_manifest
from understudy.backup.places import check_apart, check_repository_apart
from understudy.backup.point import Point, cut_log
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.repository import Repository
from understudy.backup.rows import FOLDER
from understudy.backup.selection import EVERYTHING, Selection
from understudy.backup.source import open_source
from understudy.backup.stretch import list_stretches
from understudy.backup.target_log import describe_settled
from understudy.backup.writing import read_blocks, write_member
from understudy.common.directory import DataDirectory, Role, check_finished
from understudy.common.errors import (
    OTHER_BACKUP,
    CorruptionError,
    DirectoryError,
    DirectoryInUse,
    NotADataDirectory,
    StorageFailed,
    UsageError,
    WrongRole,
)
from understudy.common.files import storage_errors, sync_tree
from understudy.common.types import Epoch

# Writes a backup's files into a directory and returns what its manifest says.
Fill = Callable[[DataDirectory], Manifest]
# Given the directory when all of it is there, before the log behind the store is folded into that.
BeforeFolding = Callable[[DataDirectory], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """What was restored."""

    manifest: Manifest
    seconds: float


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

    def restore(target: Path) -> RestoreReport:
        return _restore(target, str(backup), fill, None, point, before_folding=before_folding)

    return _chosen(target, str(backup), restore, selection, progress)


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
    unlocking = unlocking or Unlocking()
    name = f"{backup.archive_name} in {repository.url}"

    def fill(directory: DataDirectory) -> Manifest:
        with repository.download(backup.archive_name) as file:
            manifest = _extract(file, name, directory, unlocking, progress)
        if manifest != backup.manifest:
            raise CorruptionError(f"{name} holds another backup than its manifest says", remedy=OTHER_BACKUP)
        return manifest

    def follow(directory: DataDirectory) -> None:
        append_archived(
            repository,
            directory,
            epoch=Epoch(backup.manifest.epoch),
            epoch_max=epoch_max,
            point=point,
            known=[one.manifest.rank for one in catalog.backups] if catalog is not None else (),
            unlocking=unlocking,
            progress=progress,
        )

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
    origin = f"{repository.url} {backup.id}"
    backups = catalog.backups if catalog is not None else [backup]
    epochs = [one.manifest.epoch for one in backups] + [one.epoch for one in list_stretches(repository)]

    def restore(target: Path) -> RestoreReport:
        return _restore(
            target,
            origin,
            fill,
            follow if with_log else None,
            point,
            epoch_floor=max(epochs),
            before_folding=before_folding,
        )

    return _chosen(target, origin, restore, selection, progress, epoch_floor=max(epochs))


def _chosen(
    target: Path,
    origin: str,
    restore: Callable[[Path], RestoreReport],
    selection: Selection,
    progress: OnProgress | None,
    *,
    epoch_floor: int = 0,
) -> RestoreReport:
    """Restores all, and where that is not wanted, takes the chosen realms out of it."""
    if not selection.is_filtered:
        return restore(target)
    started_s = time.monotonic()
    origin = f"{origin} {selection}"
    with DataDirectory.open_unfinished(target) as directory:
        _check_free(directory, origin)
        with in_progress(target, origin, anew=True):
            shutil.rmtree(directory.incoming, ignore_errors=True)
            whole = restore(directory.incoming).manifest
            with open_source(directory.incoming) as source:
                manifest = load_selected(directory, source, selection, Meter(None, progress=progress))
            shutil.rmtree(directory.incoming)
            directory.raise_epoch_floor(epoch_floor)
            sync_tree(target)
            manifest = replace(manifest, node=whole.node)
            write_manifest(target, manifest)
    return RestoreReport(manifest=manifest, seconds=time.monotonic() - started_s)


def _check_free(directory: DataDirectory, origin: str) -> None:
    if not directory.is_new and not was_begun_from(directory.path, origin):
        raise WrongRole(
            f"{directory.path} holds data already, its role is {directory.role.value}",
            remedy="restore into an absent or empty directory",
        )


def _restore(
    target: Path,
    origin: str,
    fill: Fill,
    follow: Callable[[DataDirectory], None] | None,
    point: Point | None,
    *,
    epoch_floor: int = 0,
    before_folding: BeforeFolding | None = None,
) -> RestoreReport:
    started_s = time.monotonic()
    with DataDirectory.open_unfinished(target) as directory:
        _check_free(directory, origin)
        with in_progress(target, origin, anew=True):
            # Of an attempt before, which may have been of another backup.
            shutil.rmtree(directory.log, ignore_errors=True)
            manifest = fill(directory)
            directory.begin(Role.BACKUP, manifest.cluster_id)
            directory.raise_epoch_floor(epoch_floor)
            if follow is not None:
                follow(directory)
            if point is not None:
                cut_log(directory, point)
            if before_folding is not None:
                before_folding(directory)
            if follow is not None or point is not None or manifest.form is Form.RECORDS:
                manifest = describe_settled(directory, manifest)
            sync_tree(target)
            write_manifest(target, manifest)
    return RestoreReport(manifest=manifest, seconds=time.monotonic() - started_s)


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
