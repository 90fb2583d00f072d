"""Puts one backup of a source into a repository: the archive, then the manifest that makes it a backup.

An archive has a name of its own, so it is stored without the repository's lock, however long that takes: nobody else
waits for it. Only to publish it is the lock needed, since who holds that may be removing what was cut off.
"""

from __future__ import annotations

import hashlib
import time
from typing import IO

from understudy.backup.archive import stream_archive
from understudy.backup.archive_options import ArchiveOptions
from understudy.backup.catalog import StoredBackup, folder_of, new_backup_id, publish_backup
from understudy.backup.progress import OnProgress
from understudy.backup.repository import Repository
from understudy.backup.repository_lock import RepositoryLock
from understudy.backup.source import Source
from understudy.common.errors import NotStored, RepositoryError

_ARCHIVE = "backup"


def store_archive(
    source: Source,
    repository: Repository,
    *,
    policy: str,
    run: int,
    options: ArchiveOptions,
    progress: OnProgress | None = None,
) -> StoredBackup:
    """Stores the archive of a pinned source; no backup yet, but what :func:`publish_stored` makes one of.

    Args:
        policy: whose backup it is; empty for none.
        run: the number of the run.

    Raises:
        RepositoryError: the repository does not take it.
        CorruptionError, StorageFailed, UsageError: of the source, or of what encrypts.
    """
    backup_id = new_backup_id(time.time(), source.end.position.lsn)
    archive = _ARCHIVE + options.suffix
    begin, end = source.begin.offset, source.end.offset
    expected_bytes = source.snapshot.file_bytes + end - begin
    with repository.upload(folder_of(backup_id) + archive, expected_bytes=expected_bytes) as out:
        counted = _Counted(out)
        made = stream_archive(source, counted, options, progress=progress)
    return StoredBackup(
        id=backup_id,
        run=run,
        policy=policy,
        archive=archive,
        size=counted.size,
        sha256=counted.sha256.hexdigest(),
        manifest=made.manifest,
    )


def publish_stored(repository: Repository, lock: RepositoryLock, backup: StoredBackup) -> None:
    """Makes a backup of an archive that was stored.

    Args:
        lock: of the repository, held.

    Raises:
        RepositoryError: the archive is gone, the lock was lost, or the repository does not take it; nothing is visible
            then.
    """
    try:
        with repository.download(backup.archive_name):
            pass
    except NotStored as error:  # an object storage may date it from when the upload began
        raise RepositoryError(
            f"{backup.archive_name} in {repository.url} was removed before it could be published",
            remedy="run it again; a backup has to be stored within a day, or it is taken for one that was cut off",
        ) from error
    lock.check()
    publish_backup(repository, backup)


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
