"""What pruning takes, what is said of that, and what it leaves to backups that are still being stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from harness import Process, Processes
from nodes import assert_sound, offline_status, put
from repositories import age_log, done, policy_to, ship

from understudy.backup import run as run_module
from understudy.backup.books import Books
from understudy.backup.catalog import StoredBackup, manifest_name
from understudy.backup.folder_repository import FolderRepository
from understudy.backup.repository import SIZE_MAX, open_repository
from understudy.backup.retention import Retention
from understudy.backup.run import run_policy
from understudy.backup.run_report import RunReport
from understudy.backup.stretch import list_stretches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository in a folder."""
    path = tmp_path / "repository"
    path.mkdir()
    return path


@pytest.fixture
def primary(processes: Processes, tmp_path: Path) -> Process:
    """A server with an entry."""
    process = processes.primary(tmp_path / "a")
    put(process.address, "/realm", (b"key", b"0"))
    return process


# -- beside a backup that is being stored ----------------------------------------------------------------------


def overtaken(
    processes: Processes, primary: Process, tmp_path: Path, folder: Path, *, days: bool
) -> tuple[RunReport, int]:
    """A run in whose middle another policy makes a backup of what has come since, and keeps no other.

    Args:
        days: as if it took that long.

    Returns:
        The run's report, and the LSN of an entry that lies between the two backups.
    """
    config = tmp_path / "u.toml"
    config.write_text(
        f'[[backup]]\nname = "nightly"\nrepositories = ["{folder}"]\nretention = {{ last = 1 }}\n'
    )
    between: list[int] = []

    def overtake(*_: object) -> None:
        if between:
            return
        between.append(put(primary.address, "/realm", (b"key", b"1")).lsn)
        put(primary.address, "/realm", (b"key", b"2"))
        ship(tmp_path / "a", open_repository(str(folder)))
        if days:
            age_log(folder)
        processes.run("backup", "run", "nightly", "--config", config, "--data-dir", tmp_path / "a")
        put(primary.address, "/realm", (b"key", b"3"))
        ship(tmp_path / "a", open_repository(str(folder)))

    slow = replace(policy_to(folder), name="slow")
    return run_policy(slow, tmp_path / "a", progress=overtake), between[0]


def test_the_log_behind_a_backup_that_is_being_stored_stays(
    processes: Processes, primary: Process, tmp_path: Path, folder: Path
) -> None:
    """G8: a policy that prunes takes no log that a slower one's backup will need, though no catalog shows that yet."""
    report, between = overtaken(processes, primary, tmp_path, folder, days=False)
    assert done(report).manifest.lsn < between
    processes.run("restore", folder, "--to", tmp_path / "b", "--lsn", str(between))
    assert offline_status(tmp_path / "b").lsn == between
    assert_sound(tmp_path / "b")


def test_a_backup_whose_log_was_removed_meanwhile_says_so(
    processes: Processes, primary: Process, tmp_path: Path, folder: Path
) -> None:
    """G8: what took more than a day to store is a backup, and its run is partial, as moments behind it are lost."""
    report, _ = overtaken(processes, primary, tmp_path, folder, days=True)
    (backup,) = report.backups
    assert report.result == "partial"
    (error,) = report.all_errors
    assert f"the log behind LSN {backup.manifest.lsn} is not there any more" in error
    processes.run("restore", folder, backup.id, "--to", tmp_path / "b")
    assert_sound(tmp_path / "b")


# -- what is said ----------------------------------------------------------------------------------------------


def old_backups(primary: Process, tmp_path: Path, folder: Path) -> list[StoredBackup]:
    """Three backups with log between them that is two days old."""
    made = []
    for number in range(3):
        made.append(done(run_policy(policy_to(folder), tmp_path / "a")))
        put(primary.address, "/realm", (b"key", b"%d" % number))
    age_log(folder)
    return made


def test_a_run_says_what_it_has_removed(primary: Process, tmp_path: Path, folder: Path) -> None:
    """Its line in the journal and its report have the numbers of backups and of stretches of log."""
    old_backups(primary, tmp_path, folder)
    before = len(list_stretches(open_repository(str(folder))))
    report = run_policy(policy_to(folder, retention=Retention(last=1)), tmp_path / "a")
    assert before > 0
    (told,) = report.facts()["repositories"]
    assert (told["pruned"], told["pruned_stretches"]) == (3, before)
    line = (tmp_path / "a" / "backups" / "journal").read_text().splitlines()[-1]
    assert f"3 older backups and {before} stretches of log removed" in line


def test_prune_says_what_goes_and_which_moments_with_it(
    processes: Processes, primary: Process, tmp_path: Path, folder: Path
) -> None:
    """G8: a dry run names the moments that would be lost and takes nothing; the real one says the same of itself."""
    first, _, last = old_backups(primary, tmp_path, folder)
    stretches = len(list_stretches(open_repository(str(folder))))
    prune = ("backups", "prune", folder, "--last", "1")
    moment = f"moments before {last.manifest.time} (LSN {last.manifest.lsn})"
    told = json.loads(processes.run(*prune, "--dry-run", "--json").stdout)
    assert told["restorable_from"] == {
        "before": {"time": first.manifest.time, "lsn": first.manifest.lsn},
        "after": {"time": last.manifest.time, "lsn": last.manifest.lsn},
    }
    shown = processes.run(*prune, "--dry-run").stdout.decode()
    assert f"2 backups and {stretches} stretch" in shown
    assert f"restores to {moment} would not be possible any more" in shown
    processes.run("restore", folder, "--to", tmp_path / "b", "--lsn", str(first.manifest.lsn))
    shown = processes.run(*prune).stdout.decode()
    assert f"2 backups and {stretches} stretch" in shown
    assert f"restores to {moment} are not possible any more" in shown
    again = processes.run(*prune).stdout.decode()
    assert "0 backups and 0 stretches of log were removed" in again
    assert "any more" not in again


def test_a_run_reads_the_catalog_once(
    primary: Process, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many backups there are, each one's manifest is fetched once, when the lock is held."""
    made = old_backups(primary, tmp_path, folder)
    fetched: list[str] = []

    class Counting(FolderRepository):
        def read(self, name: str, size_max: int = SIZE_MAX) -> bytes:
            fetched.append(name)
            return super().read(name, size_max)

    monkeypatch.setattr(run_module, "open_repository", lambda url: Counting(url, folder))
    done(run_policy(policy_to(folder), tmp_path / "a"))
    for backup in made:
        assert fetched.count(manifest_name(backup.folder)) == 1


def test_the_history_knows_runs_by_the_ids_of_their_reports(
    primary: Process, tmp_path: Path, folder: Path
) -> None:
    """Whether a run was given an id or takes one of its own, report, history and journal have the same."""
    given = run_policy(policy_to(folder), tmp_path / "a", run_id="3fa9c1d0")
    own = run_policy(policy_to(folder), tmp_path / "a")
    ids = ["3fa9c1d0", own.id]
    assert [given.facts()["id"], own.facts()["id"]] == ids
    assert [entry.id for entry in Books.of(tmp_path / "a").history.entries()] == ids
    lines = (tmp_path / "a" / "backups" / "journal").read_text().splitlines()
    assert all(f"id {run_id}" in line for line, run_id in zip(lines, ids, strict=True))
