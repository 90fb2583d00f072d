"""Plain copies of an LMDB environment, against which a new replica is held: what the disk and LMDB alone take."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from peers.system import find, run

PACKAGES: Mapping[str, str] = {"cp": "coreutils", "mdb_copy": "lmdb-utils"}


def installed() -> list[str]:
    """Those programs that are there."""
    return [program for program in PACKAGES if find(program)]


def missing() -> list[str]:
    """Debian packages of those that are not."""
    return [package for program, package in PACKAGES.items() if not find(program)]


def seconds(program: str, environment: Path, target: Path) -> float:
    """What a copy of the environment into ``target`` takes, until it is on disk; removes it again."""
    target.mkdir()
    sources = [environment / "data.mdb"] if program == "cp" else [environment]
    began_s = time.monotonic()
    run([program, *map(str, sources), str(target)])
    for path in (target / "data.mdb", target):
        _sync(path)
    taken_s = time.monotonic() - began_s
    shutil.rmtree(target)
    os.sync()
    return taken_s


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
