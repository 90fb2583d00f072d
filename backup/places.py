"""What must not lie within what else."""

from __future__ import annotations

from pathlib import Path

from understudy.backup.repository import folder_of_url
from understudy.common.errors import UsageError


def are_apart(one: Path, other: Path) -> bool:
    """Whether neither of two paths is the other, or lies within it, wherever links lead to."""
    first, second = one.resolve(), other.resolve()
    return first != second and first not in second.parents and second not in first.parents


def place_of(url: str) -> str:
    """The same for all ways to name one repository, wherever links lead to.

    Raises:
        UsageError: it is no repository's.
    """
    folder = folder_of_url(url)
    return url.rstrip("/") if folder is None else str(folder.resolve())


def check_apart(one: Path, other: Path) -> None:
    """Neither of two paths may lie within the other.

    Raises:
        UsageError: it does.
    """
    if not are_apart(one, other):
        raise UsageError(f"{one} and {other} lie within each other", remedy="choose another place")


def check_repository_apart(url: str, directory: Path) -> None:
    """As :func:`check_apart`, of a repository, if that is a folder.

    Raises:
        UsageError.
    """
    folder = folder_of_url(url)
    if folder is not None:
        check_apart(folder, directory)
