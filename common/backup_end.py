"""Where a backup ends, as its manifest says it. That the end of its log was lost shows nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

from understudy.common.directory import MANIFEST_FILE
from understudy.common.errors import CorruptionError, UsageError
from understudy.common.files import storage_errors
from understudy.common.log_reader import segments_behind
from understudy.common.segment import Segment
from understudy.common.types import ClusterId, Digest, Lsn, Position


def check_end(path: Path, cluster: ClusterId) -> None:
    """Looks for a backup's last entry in its log; one without a manifest is taken as it is.

    Args:
        path: the directory of a finished backup.

    Raises:
        CorruptionError: it is not there, or the manifest is damaged.
        NewerFormat, StorageFailed.
    """
    expected = _expected_end(path / MANIFEST_FILE)
    if expected is None:
        return
    found = _position_at(path / "log", cluster, expected.lsn)
    if found != expected:
        raise CorruptionError(
            f"{path} is a backup up to entry {expected}, as its {MANIFEST_FILE} says, but its log does not hold that: "
            "the end of it was lost",
            remedy=f"use another backup; or remove {MANIFEST_FILE} to take what is left",
        )


def _expected_end(manifest: Path) -> Position | None:
    with storage_errors("read", manifest):
        try:
            data = manifest.read_bytes()
        except FileNotFoundError:
            return None
    try:
        raw = json.loads(data)
        return Position(Lsn(int(raw["lsn"])), Digest(bytes.fromhex(raw["digest"])))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptionError(
            f"{manifest} is damaged: {error!r}", remedy=f"use another backup; or remove {manifest.name}"
        ) from error


def _position_at(log: Path, cluster: ClusterId, lsn: Lsn) -> Position | None:
    try:
        segment = segments_behind(log, cluster, lsn)[0]
    except UsageError:
        return None  # it begins behind it
    if segment.header.before.lsn == lsn:  # it goes on there
        return segment.header.before
    try:
        return segment.find(lsn, lambda offset, count: _read(segment, offset, count))[0]
    except CorruptionError:
        return None  # it ends before, or is damaged there


def _read(segment: Segment, offset: int, count: int) -> bytes:
    with storage_errors("read", segment.path), segment.path.open("rb") as file:
        file.seek(segment.byte_of(offset))
        return file.read(count)
