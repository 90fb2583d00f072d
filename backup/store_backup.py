"""Puts one backup of a source into a repository: the archive, then the manifest that makes it a backup."""

from __future__ import annotations

import hashlib
import time
from typing import IO

from understudy.backup.archive import stream_archive
from understudy.backup.archive_names import ENCRYPTED_SUFFIX, SUFFIX
from understudy.backup.catalog import StoredBackup, folder_of, new_backup_id, publish_backup
from understudy.backup.encryption import Encryption
from understudy.backup.progress import OnProgress
from understudy.backup.repository import Repository
from understudy.backup.repository_lock import RepositoryLock
from understudy.backup.selection import EVERYTHING, Selection
from understudy.backup.source import Source

_ARCHIVE = "backup"


def store_backup(
    source: Source,
    repository: Repository,
    lock: RepositoryLock,
    *,
    policy: str,
    run: int,
    selection: Selection = EVERYTHING,
    encryption: Encryption | None,
    level: int,
    rate: int | None = None,
    progress: OnProgress | None = None,
) -> StoredBackup:
    """Stores a backup of a pinned source.

    Args:
        lock: of the repository, held.
        policy: whose backup it is; empty for none.
        run: the number of the run.
        selection: what of the source, and in which form.
        level: of zstd.
        rate: bytes a second at the most that are read.

    Raises:
        RepositoryError: the repository does not take it, or the lock was lost; nothing is visible then.
        CorruptionError, StorageFailed, UsageError: of the source, or of what encrypts.
    """
    backup_id = new_backup_id(time.time(), source.end.position.lsn)
    archive = _ARCHIVE + (ENCRYPTED_SUFFIX if encryption is not None else SUFFIX)
    begin, end = source.begin.offset, source.end.offset
    expected_bytes = source.snapshot.file_bytes + end - begin
    with repository.upload(folder_of(backup_id) + archive, expected_bytes=expected_bytes) as out:
        counted = _Counted(out)
        made = stream_archive(
            source,
            counted,
            selection=selection,
            encryption=encryption,
            level=level,
            rate=rate,
            progress=progress,
        )
    backup = StoredBackup(
        id=backup_id,
        run=run,
        policy=policy,
        archive=archive,
        size=counted.size,
        sha256=counted.sha256.hexdigest(),
        manifest=made.manifest,
    )
    lock.check()
    publish_backup(repository, backup)
    return backup


class _Counted:
    """Writes on, and knows how much and what it was."""

    def __init__(self, out: IO[bytes]) -> None:
        self.size = 0  # bytes
        self.sha256 = hashlib.sha256()
        self._out = out

    def write(self, data: bytes) -> int:
        """Writes all of ``data``."""
        self.size += len(data)
        self.sha256.update(data)
        return self._out.write(data)

    def flush(self) -> None:
        """Flushes."""
        self._out.flush()
