"""The directory that a restore makes: a new one, or what an attempt before has left."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from understudy.backup.contents import STORE_FILE
from understudy.backup.in_progress import begun_from, is_in_progress, read_filled
from understudy.backup.manifest import read_manifest
from understudy.backup.writing import describe_file
from understudy.common.directory import (
    ADMIN_TOKEN_FILE,
    IN_PROGRESS_FILE,
    MANIFEST_FILE,
    NODE_FILE,
    DataDirectory,
    NodeFile,
    locked,
)
from understudy.common.errors import (
    CorruptionError,
    DiskFull,
    StorageFailed,
    UnderstudyError,
    UnfinishedBackup,
    WrongRole,
)
from understudy.common.files import storage_errors


@contextlib.contextmanager
def open_target(target: Path, name: str) -> Iterator[DataDirectory]:
    """Opens a new directory, or the one of an attempt before, which gets another ``node.json`` if its own is damaged.

    One that was made for a restore which fails before anything of use is in it is removed again, unless its disk is
    what fails.

    Args:
        name: what is restored, as the mark says it.

    Raises:
        UnfinishedBackup: something else is being made there.
        WrongRole, NotADataDirectory: it holds data.
        DirectoryInUse, DirectoryError, NewerFormat, CorruptionError, DiskFull, StorageFailed.
    """
    was_absent = not target.exists()
    try:
        directory = DataDirectory.open_unfinished(target)
    except CorruptionError:
        if begun_from(target) != name:
            raise
        _remove_damaged(target / NODE_FILE)
        directory = DataDirectory.open_unfinished(target)
    with directory:
        _check_free(directory, name)
        try:
            yield directory
        except UnderstudyError as error:
            is_of_use = read_filled(target, name) is not None or directory.incoming.exists()
            if was_absent and not is_of_use and not isinstance(error, StorageFailed | DiskFull):
                _remove_made(target)
            raise


def _remove_made(target: Path) -> None:
    """The mark goes late, so that nobody takes what is left for a copy; then the lock, which is held until then."""
    last = [target / name for name in (IN_PROGRESS_FILE, "lock")]
    with contextlib.suppress(OSError):  # what stays is marked, and the next attempt begins anew
        for path in [*(path for path in target.iterdir() if path not in last), *last]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        target.rmdir()


def _remove_damaged(node_file: Path) -> None:
    """Unless another attempt has written a sound one since it was read."""
    with locked(node_file.parent), storage_errors("replace", node_file):
        try:
            if node_file.exists():
                NodeFile.read(node_file)
        except CorruptionError:
            node_file.unlink()


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
    """Whether all parts of a directory are there; whether log and store are sound is found out when it is opened."""
    names = (NODE_FILE, MANIFEST_FILE, STORE_FILE, "log")
    return all((path / name).exists() for name in names) and _is_token_right(path)


def _is_token_right(path: Path) -> bool:
    """Nobody else compares the operators' token with the manifest."""
    try:
        entries = [entry for entry in read_manifest(path).files if entry.path == ADMIN_TOKEN_FILE]
        return all(describe_file(path, entry.path) == entry for entry in entries)
    except (CorruptionError, StorageFailed):
        return False
