"""What tests of backups under bad luck share: what a directory holds, whether it was touched, small disks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from understudy.backup.catalog import read_catalog
from understudy.backup.repository import open_repository
from understudy.backup.source import open_source
from understudy.common.directory import IN_PROGRESS_FILE, MANIFEST_FILE
from understudy.common.errors import UnderstudyError
from understudy.common.store_layout import LOCK_FILE
from understudy.common.verify import verify_directory

_ALL = 1 << 62

# What a realm's clients can tell it by: version, head, and its pairs.
RealmContent = tuple[int, bytes, list[tuple[bytes, bytes]]]


def contents(path: Path) -> dict[str, RealmContent]:
    """Every realm of a directory at the end of its log."""
    found = {}
    with open_source(path) as opened:
        for name, head in opened.state.realms().items():
            with opened.state.scan(name) as scan:
                keys, values, is_end = scan.page(bytes_max=_ALL, pairs_max=_ALL)
            assert is_end
            found[name] = (head.version, head.head, list(zip(keys, values, strict=True)))
    return found


def files_of(folder: Path) -> dict[str, str]:
    """Each file with the digest of its bytes, but for LMDB's table of readers."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK_FILE
    }


def looks_whole(target: Path) -> bool:
    """Whether somebody would take what a command has left there for a copy; if not, nobody can use it by mistake."""
    if target.name == "repository":
        return bool(read_catalog(open_repository(str(target))).backups)
    if target.suffixes:
        return target.exists()
    if (target / MANIFEST_FILE).exists() and not (target / IN_PROGRESS_FILE).exists():
        return True
    if target.exists():
        with pytest.raises(UnderstudyError):
            verify_directory(target)
    return False


def remount(disk: Path, how: str) -> bool:
    """``ro`` or ``rw``; False where that can't be now."""
    return subprocess.run(["mount", "-o", f"remount,{how}", disk], capture_output=True).returncode == 0


def take_space(disk: Path, *, leaving: int) -> None:
    """Takes all space on a disk but so many bytes."""
    found = os.statvfs(disk)
    with open(disk / "ballast", "wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, max(found.f_bavail * found.f_bsize - leaving, 1))
        if leaving == 0:  # nor what is reserved for root
            file.seek(0, os.SEEK_END)
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(found.f_bsize))


def give_space(disk: Path) -> None:
    """Gives it back."""
    (disk / "ballast").unlink()
