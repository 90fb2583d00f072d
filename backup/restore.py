"""A backup becomes a data directory again: checked while it is written, up to a moment of one's choice.

What comes out is a backup itself until a server starts on it: that begins a new epoch of the same cluster, so that
clients who saw later things are told apart, and heal or reset.
"""

from __future__ import annotations

import shutil
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from understudy.backup.archive import decode_manifest, reading_archive
from understudy.backup.catalog import StoredBackup
from understudy.backup.contents import STORE_FILE, Member
from understudy.backup.encryption import Unlocking
from understudy.backup.in_progress import in_progress, was_begun_from
from understudy.backup.log_archive import append_archived
from understudy.backup.manifest import FileEntry, Manifest, read_manifest, utc_text, write_manifest
from understudy.backup.point import Point, cut_log
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.repository import Repository
from understudy.backup.target_log import log_files, settle
from understudy.backup.writing import describe_file, read_blocks, write_member
from understudy.common.directory import MANIFEST_FILE, NODE_FILE, DataDirectory, Role, check_finished
from understudy.common.errors import CorruptionError, DirectoryError, NotADataDirectory, WrongRole
from understudy.common.files import storage_errors, sync_tree

_OTHER_BACKUP = "use another backup"

# Writes a backup's files below a directory and returns what its manifest says.
Fill = Callable[[Path], Manifest]


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
    unlocking: Unlocking | None = None,
    progress: OnProgress | None = None,
) -> RestoreReport:
    """Makes a data directory of a backup: every file is checked against the manifest as it is written.

    Args:
        backup: a backup's directory, or an archive.
        target: absent, empty, or what an attempt before has left.
        point: how far to go; all of it if not given.
        unlocking: what opens an archive that is encrypted.
        progress: told of bytes done, and in all.

    Raises:
        NotADataDirectory, UnfinishedBackup, WrongRole, DirectoryInUse: of one or the other.
        CorruptionError: the backup is damaged; ``target`` is left marked as unfinished.
        NotPermitted: it does not open.
        UsageError: it does not hold that point.
        DirectoryError: it was made by a machine of another kind.
        DiskFull, StorageFailed.
    """
    check_finished(backup)
    if not backup.exists():
        raise NotADataDirectory(f"there is no backup {backup}")

    def fill(root: Path) -> Manifest:
        if backup.is_dir():
            return _copy_files(backup, root, progress)
        with storage_errors("read", backup):
            file = backup.open("rb")
        with file:
            return _extract(file, str(backup), root, unlocking or Unlocking(), progress)

    return _restore(target, str(backup), fill, None, point)


def restore_stored(
    repository: Repository,
    backup: StoredBackup,
    target: Path,
    *,
    with_log: bool,
    point: Point | None = None,
    unlocking: Unlocking | None = None,
    progress: OnProgress | None = None,
) -> RestoreReport:
    """Makes a data directory of a backup in a repository, and of the log that was shipped after it.

    Args:
        with_log: go on behind the backup, as far as the log in the repository reaches or to ``point``.
        point: how far to go.
        and the others: as of :func:`restore_backup`.

    Raises:
        RepositoryError: the repository can't be read.
        and what :func:`restore_backup` raises.
    """
    unlocking = unlocking or Unlocking()
    name = f"{backup.archive_name} in {repository.url}"

    def fill(root: Path) -> Manifest:
        with repository.download(backup.archive_name) as file:
            manifest = _extract(file, name, root, unlocking, progress)
        if manifest != backup.manifest:
            raise CorruptionError(f"{name} holds another backup than its manifest says", remedy=_OTHER_BACKUP)
        return manifest

    def follow(directory: DataDirectory) -> None:
        append_archived(repository, directory, point=point, unlocking=unlocking, progress=progress)

    return _restore(target, f"{repository.url} {backup.id}", fill, follow if with_log else None, point)


def _restore(
    target: Path,
    origin: str,
    fill: Fill,
    follow: Callable[[DataDirectory], None] | None,
    point: Point | None,
) -> RestoreReport:
    started_s = time.monotonic()
    with DataDirectory.open_unfinished(target) as directory:
        if not directory.is_new and not was_begun_from(target, origin):
            raise WrongRole(
                f"{target} holds data already, its role is {directory.role.value}",
                remedy="restore into an absent or empty directory",
            )
        with in_progress(target, origin):
            # Of an attempt before, which may have been of another backup.
            shutil.rmtree(target / "log", ignore_errors=True)
            manifest = fill(target)
            directory.begin(Role.BACKUP, manifest.cluster_id)
            if follow is not None:
                follow(directory)
            if point is not None:
                cut_log(directory, point)
            if follow is not None or point is not None:
                manifest = _described(directory, manifest)
            sync_tree(target)
            write_manifest(target, manifest)
    return RestoreReport(manifest=manifest, seconds=time.monotonic() - started_s)


def _copy_files(backup: Path, root: Path, progress: OnProgress | None) -> Manifest:
    manifest = read_manifest(backup)
    _check_readable(manifest, str(backup))
    meter = Meter(manifest.total_bytes, progress=progress)
    for entry in manifest.files:
        member = Member(entry.path, entry.bytes, read_blocks(backup / entry.path))
        _check_entry(write_member(root, member, meter), entry, str(backup))
    return manifest


def _extract(
    file: IO[bytes], name: str, root: Path, unlocking: Unlocking, progress: OnProgress | None
) -> Manifest:
    meter = Meter(None, progress=progress)
    found: dict[str, FileEntry] = {}
    manifest = None
    with reading_archive(file, name, unlocking) as members:
        for member in members:
            if member.name == MANIFEST_FILE:
                manifest = decode_manifest(member, name)
            elif member.name == NODE_FILE:
                for _ in member.pieces:  # what is restored gets one of its own
                    pass
            else:
                found[member.name] = write_member(root, member, meter)
    if manifest is None:
        raise CorruptionError(f"{name} has no manifest: it was cut off", remedy=_OTHER_BACKUP)
    _check_readable(manifest, name)
    for entry in manifest.files:
        _check_entry(found.pop(entry.path, None), entry, name)
    if found:
        raise CorruptionError(
            f"{name} holds {min(found)}, which its manifest does not name", remedy=_OTHER_BACKUP
        )
    return manifest


def _check_entry(found: FileEntry | None, expected: FileEntry, name: str) -> None:
    if found != expected:
        raise CorruptionError(
            f"{expected.path} of {name} is not what its manifest says: "
            + ("it is missing" if found is None else f"{found.bytes:,} bytes, SHA-256 {found.sha256}"),
            remedy=_OTHER_BACKUP,
        )


def _check_readable(manifest: Manifest, name: str) -> None:
    """Pages of LMDB are as the machine's memory is: its byte order, and 64 bits."""
    if manifest.byte_order != sys.byteorder or struct.calcsize("P") != 8:
        raise DirectoryError(
            f"{name} was made by a machine of another kind ({manifest.machine}, {manifest.byte_order} endian)",
            remedy="restore it on such a machine",
        )


def _described(directory: DataDirectory, manifest: Manifest) -> Manifest:
    """The manifest of what is in the directory now, once that was found to open."""
    reached = settle(directory)
    known = [entry for entry in manifest.files if not entry.path.startswith(("log/", STORE_FILE))]
    names = [STORE_FILE, *log_files(directory.path)]
    return replace(
        manifest,
        epoch=reached.epoch,
        lsn=reached.place.position.lsn,
        digest=reached.place.position.digest.hex(),
        log_offset=reached.place.offset,
        time=utc_text(reached.time_us / 1e6),
        checkpoint_lsn=reached.checkpoint.lsn,
        state_digest=reached.checkpoint.state_digest.hex(),
        realms=reached.realms,
        files=known + [describe_file(directory.path, name) for name in names],
    )
