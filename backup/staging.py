"""The directory that a policy keeps its last proven backup in, ready for a server to be started on it.

The new one is built beside it and takes its place by renaming; the one before is called ``.NAME.replaced-by-drill``
meanwhile, so that a crash leaves one of the two, and the next drill puts that in order. Nothing is replaced or removed
but what a drill has put there, and only while nobody has written anything into it since.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

from understudy.backup.catalog import StoredBackup
from understudy.backup.manifest import utc_text
from understudy.backup.target_log import read_head
from understudy.common.directory import DataDirectory
from understudy.common.entries import parse_change, parse_entry
from understudy.common.errors import CorruptionError, UnderstudyError, WrongRole
from understudy.common.files import publish, storage_errors, sync_directory
from understudy.common.log_reader import read_records
from understudy.common.types import Lsn, is_system_realm

NOTE_FILE = "drill.json"


def check_staging(staging: Path) -> None:
    """Finishes what a crash has left of a swap, and refuses what must not be replaced.

    Raises:
        WrongRole: it holds what no drill has put there, or what was written since.
        DirectoryInUse: a server runs on it.
        CorruptionError, NotADataDirectory, StorageFailed.
    """
    replaced = _replaced(staging)
    with storage_errors("replace", staging):
        shutil.rmtree(_discarded(staging), ignore_errors=True)
        if replaced.exists() and not staging.exists():
            os.rename(replaced, staging)
        elif replaced.exists():
            with DataDirectory.open(replaced) as directory:
                _check_replaceable(directory)
                _discard(staging)
    if staging.exists():
        with DataDirectory.open(staging) as directory:
            _check_replaceable(directory)


def _check_replaceable(directory: DataDirectory) -> None:
    if directory.is_new:
        return
    proven_lsn = _read_note(directory.path)
    if proven_lsn is None:
        raise WrongRole(
            f"{directory.path} holds data that no drill has put there",
            remedy="give an absent or empty directory as staging",
        )
    try:
        is_touched = _was_written_to(directory, proven_lsn)
    except UnderstudyError as error:
        raise CorruptionError(
            f"{directory.path} can't be read, nobody knows what is in it: {error}", remedy="move it away"
        ) from error
    if is_touched:
        raise WrongRole(
            f"{directory.path} has been written to since its drill",
            remedy="move it away if that is to stay, or remove it",
        )


def _was_written_to(directory: DataDirectory, proven_lsn: Lsn) -> bool:
    if read_head(directory)[0].position.lsn == proven_lsn:
        return False
    for record in read_records(directory.log, directory.cluster, proven_lsn):
        entry = parse_entry(record.payload, record.lsn)
        if entry.HasField("realm_dropped"):
            return True
        if entry.HasField("change") and not is_system_realm(parse_change(entry.change, record.lsn).realm):
            return True
    return False


def _read_note(directory: Path) -> Lsn | None:
    """Up to where the drill had brought it; None where no drill has."""
    try:
        return Lsn(int(json.loads((directory / NOTE_FILE).read_bytes())["lsn"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_proven(directory: Path, url: str, backup: StoredBackup) -> None:
    """Writes down in a directory that a drill has proven what it is.

    Raises:
        CorruptionError, DiskFull, StorageFailed.
    """
    with DataDirectory.open_existing(directory) as opened:
        lsn = read_head(opened)[0].position.lsn
    facts = {"repository": url, "backup": backup.id, "proven": utc_text(time.time()), "lsn": lsn}
    publish(directory / NOTE_FILE, json.dumps(facts, indent=2).encode() + b"\n")


def replace_staging(staging: Path, proven: Path) -> None:
    """Puts a proven directory, which lies on the same file system, in the place of the one before.

    Raises:
        what :func:`check_staging` raises; what was there stays then.
        DiskFull, StorageFailed.
    """
    check_staging(staging)
    with contextlib.ExitStack() as held, storage_errors("replace", staging):
        if staging.exists():
            _check_replaceable(
                held.enter_context(DataDirectory.open(staging))
            )  # and no server starts on it now
            os.rename(staging, _replaced(staging))
        os.rename(proven, staging)
        sync_directory(staging.parent)
        if _replaced(staging).exists():
            _discard(staging)


def _discard(staging: Path) -> None:
    """Removes the one before, which was checked: under another name, as what is half removed can't be checked again."""
    os.rename(_replaced(staging), _discarded(staging))
    shutil.rmtree(_discarded(staging), ignore_errors=True)


# Names that nobody gives a directory that is to stay.
def _replaced(staging: Path) -> Path:
    return staging.with_name(f".{staging.name}.replaced-by-drill")


def _discarded(staging: Path) -> Path:
    return staging.with_name(f".{staging.name}.discarded-by-drill")
