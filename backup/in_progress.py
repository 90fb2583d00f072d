"""The mark of a directory that is not a whole backup yet, or not any more: see :data:`IN_PROGRESS_FILE`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from understudy.backup.manifest import utc_text
from understudy.common.directory import IN_PROGRESS_FILE
from understudy.common.files import publish, storage_errors, sync_directory


def is_in_progress(root: Path) -> bool:
    """Whether the mark is there."""
    return (root / IN_PROGRESS_FILE).exists()


def begun_from(root: Path) -> str:
    """What the mark says that the directory is being made from; empty where there is none."""
    return str(_note(root).get("source", ""))


def read_filled(root: Path, source: str) -> str | None:
    """The goal that :func:`note_filled` has noted, where the directory is being made from ``source``."""
    note = _note(root)
    filled = note.get("filled")
    return filled if note.get("source") == source and isinstance(filled, str) else None


def note_filled(root: Path, goal: str | None) -> None:
    """Adds to the mark that the backup itself is in place, and all in the directory durable; or that it is not.

    Args:
        goal: how far the restore is to go, or what it is to be: whoever goes on must want the same.

    Raises:
        DiskFull, StorageFailed.
    """
    note = {**_note(root), "filled": goal}
    publish(root / IN_PROGRESS_FILE, json.dumps(note).encode() + b"\n")


def _note(root: Path) -> dict[str, object]:
    try:
        note = json.loads((root / IN_PROGRESS_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


@contextlib.contextmanager
def in_progress(root: Path, source: str, *, anew: bool = False, goes_on: bool = False) -> Iterator[None]:
    """Marks ``root`` until the block has ended well; all in it must be durable then.

    Args:
        source: what it is made from: a path, or a URL and an id.
        anew: what is cut off can't be gone on with: it may not hold all that its place in the log says.
        goes_on: the mark is there, and stays what it is.

    Raises:
        DiskFull, StorageFailed.
    """
    mark = root / IN_PROGRESS_FILE
    if not goes_on:
        note = {"source": source, "began": utc_text(time.time()), "anew": anew}
        publish(mark, json.dumps(note).encode() + b"\n")
    yield
    sync_directory(root)
    with storage_errors("remove", mark):
        mark.unlink()
    sync_directory(root)
