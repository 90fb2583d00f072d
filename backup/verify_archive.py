"""Verifies an archive without restoring it: that it is as it was written, not what it says of the state in it (G11)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import xxhash

from understudy.backup.archive import unpack
from understudy.backup.contents import Member
from understudy.backup.encryption import Unlocking
from understudy.backup.manifest import FileEntry, Manifest
from understudy.backup.progress import OnProgress
from understudy.common.errors import CorruptionError, NotADataDirectory
from understudy.common.files import storage_errors


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveReport:
    """What was found."""

    manifest: Manifest | None  # None where there is a problem
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def verify_archive(path: Path, unlocking: Unlocking, progress: OnProgress | None = None) -> ArchiveReport:
    """Reads all of an archive, and compares each file in it with the digest that its manifest says.

    Args:
        unlocking: what opens it if it is encrypted.
        progress: told of bytes of the archive that were read, and in all.

    Raises:
        NotADataDirectory: it is not there.
        NotPermitted, NewerFormat, StorageFailed: it can't be checked at all.
    """
    if not path.exists():
        raise NotADataDirectory(f"there is no backup {path}")
    with storage_errors("read", path), path.open("rb") as file:
        size = path.stat().st_size

        def take(member: Member) -> FileEntry:
            digest = xxhash.xxh3_128()
            for piece in member.pieces:
                digest.update(piece)
                if progress is not None:
                    progress(file.tell(), size)
            return FileEntry(path=member.name, bytes=member.size, xxh3=digest.hexdigest())

        try:
            return ArchiveReport(manifest=unpack(file, str(path), unlocking, take), problems=[])
        except CorruptionError as error:
            return ArchiveReport(manifest=None, problems=[str(error)])
