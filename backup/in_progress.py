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


def was_begun_from(root: Path, source: str) -> bool:
    """Whether the mark is there, and says that the directory is being made from ``source``."""
    return _note(root).get("source") == source


def must_begin_anew(root: Path) -> bool:
    """Whether the mark is there, and says that what is being made can't be brought up to date."""
    return _note(root).get("anew") is True


def _note(root: Path) -> dict[str, object]:
    try:
        note = json.loads((root / IN_PROGRESS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


@contextlib.contextmanager
def in_progress(root: Path, source: str, *, anew: bool = False) -> Iterator[None]:
    """Marks ``root`` until the block has ended well; all in it must be durable then.

    Args:
        source: what it is made from: a path, or a URL and an id.
        anew: what is cut off can't be gone on with: it may not hold all that its place in the log says.

    Raises:
        DiskFull, StorageFailed.
    """
    mark = root / IN_PROGRESS_FILE
    note = {"source": source, "began": utc_text(time.time()), "anew": anew}
    publish(mark, json.dumps(note).encode() + b"\n")
    yield
    sync_directory(root)
    with storage_errors("remove", mark):
        mark.unlink()
    sync_directory(root)
