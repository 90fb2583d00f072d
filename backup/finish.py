"""A backup that was cut off while it was brought up to date becomes whole again, without its source.

What it has got is a beginning of what was to come: the entries that are whole are kept, and it ends with the last.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from understudy.backup.in_progress import is_in_progress
from understudy.backup.make import BackupReport
from understudy.backup.manifest import Manifest, read_manifest, write_manifest
from understudy.backup.target_log import describe_reached, settle
from understudy.backup.writing import describe_file
from understudy.common.directory import (
    ADMIN_TOKEN_FILE,
    IN_PROGRESS_FILE,
    MANIFEST_FILE,
    DataDirectory,
    must_begin_anew,
)
from understudy.common.errors import OTHER_BACKUP, CorruptionError, NotADataDirectory, UnfinishedBackup
from understudy.common.files import storage_errors, sync_directory, sync_tree
from understudy.common.verify import verify_opened


def finish_backup(target: Path) -> BackupReport:
    """Finishes a backup with what is there, after everything in it was verified.

    Raises:
        NotADataDirectory: there is nothing to finish.
        UnfinishedBackup: it never was whole.
        CorruptionError: it is damaged; it stays marked as unfinished.
        DirectoryInUse, DiskFull, StorageFailed.
    """
    started_s = time.monotonic()
    if not is_in_progress(target):
        raise NotADataDirectory(
            f"{target} is no backup that was cut off", remedy="there is nothing to finish"
        )
    if must_begin_anew(target) or not (target / MANIFEST_FILE).exists():
        raise UnfinishedBackup(
            f"{target} was cut off before it was whole for the first time",
            remedy="finish it with the command that began it, or remove it",
        )
    with DataDirectory.open_unfinished(target) as directory:
        shutil.rmtree(directory.incoming, ignore_errors=True)
        manifest = _with_token(target, read_manifest(target))
        manifest = describe_reached(directory, manifest, settle(directory))
        found = verify_opened(directory)
        if found.problems:
            raise CorruptionError(f"{target} is damaged: {'; '.join(found.problems)}", remedy=OTHER_BACKUP)
        sync_tree(target)
        write_manifest(target, manifest)
        mark = target / IN_PROGRESS_FILE
        with storage_errors("remove", mark):
            mark.unlink()
        sync_directory(target)
    return BackupReport(manifest=manifest, bytes_copied=0, seconds=time.monotonic() - started_s)


def _with_token(target: Path, manifest: Manifest) -> Manifest:
    """With the operators' token as it is now: an update may have brought a new one."""
    others = [entry for entry in manifest.files if entry.path != ADMIN_TOKEN_FILE]
    token = [ADMIN_TOKEN_FILE] if (target / ADMIN_TOKEN_FILE).exists() else []
    return replace(manifest, files=others + [describe_file(target, name) for name in token])
