"""What must not lie within what else."""

from __future__ import annotations

from pathlib import Path

from understudy.backup.repository import folder_of_url
from understudy.common.errors import UsageError


def check_apart(one: Path, other: Path) -> None:
    """Neither of two directories may lie within the other.

    Raises:
        UsageError: it does.
    """
    first, second = one.resolve(), other.resolve()
    if first == second or first in second.parents or second in first.parents:
        raise UsageError(f"{one} and {other} lie within each other", remedy="choose another place")


def check_repository_apart(url: str, directory: Path) -> None:
    """As :func:`check_apart`, of a repository, if that is a folder.

    Raises:
        UsageError.
    """
    folder = folder_of_url(url)
    if folder is not None:
        check_apart(folder, directory)
