"""The change-log in a repository: stretches of it, each an object. How a restore goes along them: `log_following.py`.

An object is a segment of the log, as in a data directory, compressed and perhaps encrypted; see
:mod:`understudy.backup.stretch` for its name.
"""

from __future__ import annotations

from typing import Any

import zstandard

from understudy.backup.archive_options import DEFAULT_LEVEL
from understudy.backup.encryption import Encryption
from understudy.backup.log_files import LogPart
from understudy.backup.repository import Repository
from understudy.backup.stretch import Stretch, short_digest
from understudy.common.errors import AlreadyStored
from understudy.common.types import Epoch


def ship(
    repository: Repository,
    part: LogPart,
    *,
    epoch: Epoch,
    encryption: Encryption | None,
    level: int = DEFAULT_LEVEL,
) -> Stretch:
    """Stores a stretch of the log; one that is there already is fine.

    Args:
        part: at least one entry, whole and durable.
        epoch: of its last entry.

    Raises:
        RepositoryError, CorruptionError, StorageFailed, UsageError.
    """
    stretch = Stretch(
        epoch=epoch,
        first=part.header.first_lsn,
        last=part.end.position.lsn,
        before=short_digest(part.header.previous),
        digest=short_digest(part.end.position.digest),
        is_encrypted=encryption is not None,
    )
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
    try:
        with repository.upload(stretch.name) as out:
            if encryption is None:
                _compress(compressor, part, out)
            else:
                with encryption.encrypting(out) as encrypted:
                    _compress(compressor, part, encrypted)
    except AlreadyStored:
        pass
    return stretch


def _compress(compressor: zstandard.ZstdCompressor, part: LogPart, out: Any) -> None:
    with compressor.stream_writer(out, closefd=False) as compressed:
        for piece in part.content():
            compressed.write(piece)
