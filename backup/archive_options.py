"""What an archive's name says, and what one is to be; apart from archives, whose code takes long to load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.backup.selection import EVERYTHING, Selection

if TYPE_CHECKING:
    from understudy.backup.encryption import Encryption

DEFAULT_LEVEL = 3
SUFFIX = ".tar.zst"
ENCRYPTED_SUFFIX = ".tar.zst.age"


def is_archive_name(path: Path) -> bool:
    """Whether a target or a source of that name is an archive, not a directory."""
    return path.name.endswith((SUFFIX, ENCRYPTED_SUFFIX))


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveOptions:
    """What an archive is to be."""

    selection: Selection = EVERYTHING  # what of the source, and in which form
    encryption: Encryption | None = None
    level: int = DEFAULT_LEVEL  # of zstd
    rate: int | None = None  # bytes a second at the most that are read

    @property
    def suffix(self) -> str:
        """What its name ends in."""
        return SUFFIX if self.encryption is None else ENCRYPTED_SUFFIX
