"""Programs of others that rows are compared with: whether they are installed, and what they take."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from processes import BenchFailed

PACKAGES: Mapping[str, str] = {
    "mdb_copy": "lmdb-utils",
    "zstd": "zstd",
    "age": "age",
    "age-keygen": "age",
    "tar": "tar",
    "cp": "coreutils",
}


def missing(*programs: str) -> str:
    """What to say of those that are not there; empty if all are."""
    packages = sorted({PACKAGES[program] for program in programs if shutil.which(program) is None})
    return f"not measured: `apt-get install {' '.join(packages)}` on Debian" if packages else ""


def timed(work: Callable[[], object]) -> float:
    """The seconds that ``work`` takes."""
    began_s = time.monotonic()
    work()
    return time.monotonic() - began_s


def shell_seconds(command: str, target: Path) -> float:
    """What a shell's command takes that writes below ``target``, until that is on disk.

    Every file and directory is synced by itself: syncing the file system would wait for what others have written.
    """

    def run() -> None:
        if subprocess.run(["bash", "-o", "pipefail", "-c", command]).returncode:
            raise BenchFailed(f"failed: {command}")
        for path in [target, *target.rglob("*")]:
            _sync(path)

    return timed(run)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
