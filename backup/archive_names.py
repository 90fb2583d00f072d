"""What an archive's name says; apart from archives, since looking at a name should load none of their code."""

from __future__ import annotations

from pathlib import Path

SUFFIX = ".tar.zst"
ENCRYPTED_SUFFIX = ".tar.zst.age"


def is_archive_name(path: Path) -> bool:
    """Whether a target or a source of that name is an archive, not a directory."""
    return path.name.endswith((SUFFIX, ENCRYPTED_SUFFIX))
