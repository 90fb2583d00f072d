"""Backups of a policy, and the log behind them, put into repositories by the test's own process."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from understudy.backup.archiver import Archiver
from understudy.backup.catalog import StoredBackup
from understudy.backup.policy import Policy
from understudy.backup.repository import Repository
from understudy.backup.run_report import RunReport
from understudy.backup.upkeep import ORPHAN_S
from understudy.common.directory import NODE_FILE, NodeFile
from understudy.common.types import ClusterId


def policy_to(*folders: Path, **values: object) -> Policy:
    settings: dict[str, object] = {"retries": 0, **values}
    return Policy(name="nightly", schedule=None, repositories=tuple(map(str, folders)), **settings)  # type: ignore[arg-type]


def done(report: RunReport) -> StoredBackup:
    """The one backup of a run in which nothing went wrong."""
    assert report.all_errors == []
    (backup,) = report.backups
    return backup


def archiver_of(data_dir: Path, repository: Repository) -> Archiver:
    cluster = ClusterId(uuid.UUID(NodeFile.read(data_dir / NODE_FILE).cluster).bytes)
    return Archiver(data_dir / "log", cluster, repository, encryption=None)


def age_log(folder: Path) -> None:
    """Dates the log in a folder from two days ago."""
    for path in (folder / "log").glob("*"):
        os.utime(path, (0, path.stat().st_mtime - 2 * ORPHAN_S))


def ship(data_dir: Path, repository: Repository) -> int:
    """Ships what there is of a node's log."""
    return archiver_of(data_dir, repository).ship()
