"""The directory that a restore makes: a new one, or what an attempt before has left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from understudy.backup.contents import STORE_FILE
from understudy.backup.in_progress import begun_from, is_in_progress
from understudy.common.directory import MANIFEST_FILE, NODE_FILE, DataDirectory
from understudy.common.errors import CorruptionError, UnfinishedBackup, WrongRole


@contextlib.contextmanager
def open_target(target: Path, name: str) -> Iterator[DataDirectory]:
    """Opens a new directory, or the one of an attempt before, which gets another ``node.json`` if its own is damaged.

    Args:
        name: what is restored, as the mark says it.

    Raises:
        UnfinishedBackup: something else is being made there.
        WrongRole, NotADataDirectory: it holds data.
        DirectoryInUse, DirectoryError, NewerFormat, CorruptionError, DiskFull.
    """
    try:
        directory = DataDirectory.open_unfinished(target)
    except CorruptionError:
        if begun_from(target) != name:
            raise
        (target / NODE_FILE).unlink()
        directory = DataDirectory.open_unfinished(target)
    with directory:
        _check_free(directory, name)
        yield directory


def _check_free(directory: DataDirectory, origin: str) -> None:
    begun = begun_from(directory.path)
    if directory.is_new or begun == origin:
        return
    if begun:
        raise UnfinishedBackup(
            f"{directory.path} is not finished: it was begun from {begun}",
            remedy="name that backup to go on with it, or restore into another directory",
        )
    raise WrongRole(
        f"{directory.path} holds data already, its role is {directory.role.value}",
        remedy="restore into an absent or empty directory",
    )


def is_whole_copy(path: Path) -> bool:
    """Whether an attempt before has restored all that is wanted there."""
    return holds_copy(path) and not is_in_progress(path)


def holds_copy(path: Path) -> bool:
    """Whether all parts of a directory are there; whether they are sound is found out when it is opened."""
    return all((path / name).exists() for name in (NODE_FILE, MANIFEST_FILE, STORE_FILE, "log"))
