"""Small files that are given by name: certificates, keys, tokens."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from understudy.common.errors import NotPermitted, UsageError

FILE_BYTES_MAX = 1 << 20  # more is neither: a device, or a file named by mistake


def read_file(path: Path) -> bytes:
    """All of a small file.

    Raises:
        UsageError: it can't be read, or is not small.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from error
    if len(content) > FILE_BYTES_MAX:
        raise UsageError(f"{path} has more than {FILE_BYTES_MAX:,} bytes")
    return content


def read_private(path: Path) -> bytes:
    """All of a small file that nobody else may read.

    A file of root's may be read by a group: that is how secrets are handed to a service.

    Raises:
        NotPermitted: others may read it.
        UsageError: it can't be read.
    """
    content = read_file(path)
    about = path.stat()
    forbidden = 0o037 if about.st_uid == 0 and os.geteuid() != 0 else 0o077
    if stat.S_IMODE(about.st_mode) & forbidden:
        raise NotPermitted(f"others may read {path}", remedy=f"chmod 600 {path}")
    return content
