"""A backup becomes a data directory again: checked while it is written, up to a moment of one's choice.

What comes out is a backup itself until a server starts on it: that begins a new epoch of the same cluster, so that
clients who saw later things are told apart, and heal or reset.
"""

from __future__ import annotations

import shutil
import struct
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from understudy.backup.archive import decode_manifest, reading_archive
from understudy.backup.contents import Member
from understudy.backup.encryption import Unlocking
from understudy.backup.in_progress import in_progress, was_begun_from
from understudy.backup.manifest import FileEntry, Manifest, read_manifest, utc_text, write_manifest
from understudy.backup.point import Point, cut_log
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.target_log import log_files
from understudy.backup.writing import describe_file, read_blocks, write_member
from understudy.common.directory import MANIFEST_FILE, NODE_FILE, DataDirectory, Role, check_finished
from understudy.common.errors import CorruptionError, DirectoryError, NotADataDirectory, WrongRole
from understudy.common.files import sync_tree
from understudy.common.types import ClusterId

_OTHER_BACKUP = "use another backup"


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
        progress: told of bytes done and in all.

    Raises:
        NotADataDirectory, UnfinishedBackup, WrongRole, DirectoryInUse: of one or the other.
        CorruptionError: the backup is damaged; ``target`` is left marked as unfinished.
        NotPermitted: it does not open.
        UsageError: it does not hold that point.
        DirectoryError: it was made by a machine of another kind.
        DiskFull, StorageFailed.
    """
    started_s = time.monotonic()
    check_finished(backup)
    with DataDirectory.open_unfinished(target) as directory:
        if not directory.is_new and not was_begun_from(target, backup):
            raise WrongRole(
                f"{target} holds data already, its role is {directory.role.value}",
                remedy="restore into an absent or empty directory",
            )
        with in_progress(target, backup):
            manifest = _copy(backup, target, unlocking or Unlocking(), progress)
            if point is not None:
                manifest = _cut(directory, manifest, point)
            sync_tree(target)
            write_manifest(target, manifest)
            directory.begin(Role.BACKUP, ClusterId(manifest.cluster_id))
    return RestoreReport(manifest=manifest, seconds=time.monotonic() - started_s)


def _copy(backup: Path, target: Path, unlocking: Unlocking, progress: OnProgress | None) -> Manifest:
    """All files of the backup, checked."""
    shutil.rmtree(
        target / "log", ignore_errors=True
    )  # of an attempt before, which may have been of another backup
    if backup.is_dir():
        manifest = read_manifest(backup)
        _check_readable(manifest, backup)
        meter = Meter(manifest.total_bytes, progress=progress)
        for entry in manifest.files:
            member = Member(entry.path, entry.bytes, read_blocks(backup / entry.path))
            _check_entry(write_member(target, member, meter), entry, backup)
        return manifest
    if not backup.exists():
        raise NotADataDirectory(f"there is no backup {backup}")
    return _extract(backup, target, unlocking, progress)


def _extract(backup: Path, target: Path, unlocking: Unlocking, progress: OnProgress | None) -> Manifest:
    meter = Meter(None, progress=progress)
    found: dict[str, FileEntry] = {}
    manifest = None
    with reading_archive(backup, unlocking) as members:
        for member in members:
            if member.name == MANIFEST_FILE:
                manifest = decode_manifest(member, backup)
            elif member.name == NODE_FILE:
                for _ in member.pieces:  # what is restored gets one of its own
                    pass
            else:
                found[member.name] = write_member(target, member, meter)
    if manifest is None:
        raise CorruptionError(f"{backup} has no manifest: it was cut off", remedy=_OTHER_BACKUP)
    _check_readable(manifest, backup)
    for entry in manifest.files:
        _check_entry(found.pop(entry.path, None), entry, backup)
    if found:
        raise CorruptionError(
            f"{backup} holds {min(found)}, which its manifest does not name", remedy=_OTHER_BACKUP
        )
    return manifest


def _check_entry(found: FileEntry | None, expected: FileEntry, backup: Path) -> None:
    if found != expected:
        raise CorruptionError(
            f"{expected.path} of {backup} is not what its manifest says: "
            + ("it is missing" if found is None else f"{found.bytes:,} bytes, SHA-256 {found.sha256}"),
            remedy=_OTHER_BACKUP,
        )


def _check_readable(manifest: Manifest, backup: Path) -> None:
    """Pages of LMDB are as the machine's memory is: its byte order, and 64 bits."""
    if manifest.byte_order != sys.byteorder or struct.calcsize("P") != 8:
        raise DirectoryError(
            f"{backup} was made by a machine of another kind ({manifest.machine}, {manifest.byte_order} endian)",
            remedy="restore it on such a machine",
        )


def _cut(directory: DataDirectory, manifest: Manifest, point: Point) -> Manifest:
    """Takes what is behind ``point`` out of the log."""
    reached = cut_log(directory.path, manifest, point)
    known = [entry for entry in manifest.files if not entry.path.startswith("log/")]
    return replace(
        manifest,
        epoch=reached.epoch,
        lsn=reached.place.position.lsn,
        digest=reached.place.position.digest.hex(),
        log_offset=reached.place.offset,
        time=utc_text(reached.time_us / 1e6),
        realms=reached.realms,
        files=known + [describe_file(directory.path, name) for name in log_files(directory.path)],
    )
