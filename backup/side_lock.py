"""A lock around a file that several processes write, and that may be replaced by another of the same name."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from understudy.common.files import storage_errors


@contextlib.contextmanager
def side_lock(path: Path) -> Iterator[None]:
    """Keeps everybody else, thread or process, out of the block; ends with the process that holds it.

    What is locked is ``path`` + ``.lock``, which stays: a lock on ``path`` itself would go with it when it is replaced.

    Raises:
        DiskFull, StorageFailed.
    """
    beside = path.with_name(path.name + ".lock")
    with storage_errors("lock", beside):
        fd = os.open(beside, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with storage_errors("lock", beside):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
