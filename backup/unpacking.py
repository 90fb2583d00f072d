"""The files of a backup on their way into a directory, each compared with what the manifest says."""

from __future__ import annotations

import contextlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

from understudy.backup.archive import check_entry, unpack
from understudy.backup.contents import Member
from understudy.backup.encryption import Unlocking
from understudy.backup.in_progress import is_in_progress
from understudy.backup.load_records import Loading
from understudy.backup.manifest import FileEntry, Form, Manifest, read_manifest
from understudy.backup.point import Point
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.rows import FOLDER
from understudy.backup.writing import read_blocks, write_member
from understudy.common.directory import DataDirectory
from understudy.common.errors import CorruptionError, DirectoryError, DirectoryInUse, StorageFailed


class Unpacking:
    """The files of a backup on their way into a directory: pages as they are, records as rows.

    Args:
        point: records that lie behind it are left out.
    """

    def __init__(self, directory: DataDirectory, point: Point | None, progress: OnProgress | None) -> None:
        self._directory = directory
        self._point = point
        self.meter = Meter(None, progress=progress)
        self._loading: Loading | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *of_error: object) -> None:
        if self._loading is not None:
            self._loading.__exit__(*of_error)

    def take(self, member: Member) -> FileEntry:
        """One file; says what it was."""
        if not member.name.startswith(FOLDER):
            return write_member(self._directory.path, member, self.meter)
        self._loading = self._loading or Loading(self._directory, self._point)
        return self._loading.take(member, self.meter)

    def finish(self, manifest: Manifest) -> bool:
        """All were taken, and are what the manifest says.

        Returns:
            Whether the point is reached: it lies before the end, and the log behind it was left out. Of pages, that is
            not looked at here.
        """
        if manifest.form is not Form.RECORDS:
            return False
        return (self._loading or Loading(self._directory, self._point)).finish(manifest)


def copy_files(backup: Path, unpacking: Unpacking) -> tuple[Manifest, bool]:
    """All files of a backup's directory; returns what its manifest says, and what :meth:`Unpacking.finish` does.

    Raises:
        DirectoryInUse: the backup was updated while it was read.
        CorruptionError: it is damaged.
        DirectoryError: it was made by a machine of another kind.
        UsageError: it is of records, and its state is behind the point.
        DiskFull, StorageFailed.
    """
    manifest = read_manifest(backup)
    _check_readable(manifest, str(backup))
    unpacking.meter.total = manifest.total_bytes
    with _unchanged(backup, manifest), unpacking:
        for entry in manifest.files:
            member = Member(entry.path, entry.bytes, read_blocks(backup / entry.path))
            check_entry(unpacking.take(member), entry, str(backup))
        return manifest, unpacking.finish(manifest)


@contextlib.contextmanager
def _unchanged(backup: Path, manifest: Manifest) -> Iterator[None]:
    """Tells a backup that is brought up to date while it is read from a damaged one.

    Raises:
        DirectoryInUse: somebody does that.
    """
    try:
        yield
    except (CorruptionError, StorageFailed) as error:
        if is_in_progress(backup) or read_manifest(backup) != manifest:
            raise DirectoryInUse(
                f"{backup} was changed meanwhile", remedy="give the command again when that has ended"
            ) from error
        raise


def extract(file: IO[bytes], name: str, unpacking: Unpacking, unlocking: Unlocking) -> tuple[Manifest, bool]:
    """As :func:`copy_files`, of an archive.

    Raises:
        NotPermitted: it does not open.
        and the others.
    """
    with unpacking:
        manifest = unpack(file, name, unlocking, unpacking.take)
        _check_readable(manifest, name)
        return manifest, unpacking.finish(manifest)


def _check_readable(manifest: Manifest, name: str) -> None:
    """Pages of LMDB are as the machine's memory is: its byte order, and 64 bits."""
    if manifest.form is Form.RECORDS:
        return
    if manifest.byte_order != sys.byteorder or struct.calcsize("P") != 8:
        raise DirectoryError(
            f"{name} was made by a machine of another kind ({manifest.machine}, {manifest.byte_order} endian)",
            remedy="restore it on such a machine; a backup that was made with --portable is restored on any",
        )
