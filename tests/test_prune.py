"""What pruning takes, what is said of that, and what it leaves to backups that are still being stored."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import Process, Processes
from nodes import assert_sound, offline_status, put
from repositories import age_log, done, policy_to, ship

from understudy.backup import run as run_module
from understudy.backup import upkeep
from understudy.backup.books import Books
from understudy.backup.catalog import StoredBackup, manifest_name, read_catalog
from understudy.backup.folder_repository import FolderRepository
from understudy.backup.make import make_backup
from understudy.backup.repository import SIZE_MAX, open_repository
from understudy.backup.repository_lock import locked
from understudy.backup.retention import Retention
from understudy.backup.run import run_policy
from understudy.backup.run_report import RunReport, run_line
from understudy.backup.stretch import list_stretches
from understudy.backup.upkeep import ORPHAN_S, prune
from understudy.common.errors import RepositoryError


@pytest.fixture
def primary(processes: Processes, tmp_path: Path) -> Process:
    """A server with an entry."""
    process = processes.primary(tmp_path / "a")
    put(process.address, "/realm", (b"key", b"0"))
    return process


# -- beside a backup that is being stored ----------------------------------------------------------------------


def overtaken(
    processes: Processes, primary: Process, tmp_path: Path, folder: Path, *, days: bool, **settings: object
) -> tuple[RunReport, int]:
    """A run in whose middle another policy makes a backup of what has come since, and keeps no other.

    Args:
        days: as if it took that long.
        settings: of its policy.

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

    slow = replace(policy_to(folder, **settings), name="slow")
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


@pytest.mark.parametrize("archive_log", [True, False])
def test_a_backup_whose_log_was_removed_meanwhile_says_so(
    processes: Processes, primary: Process, tmp_path: Path, folder: Path, archive_log: bool
) -> None:
    """G8: what took more than a day to store is a backup, and its run is partial, whoever ships the log behind it."""
    report, _ = overtaken(processes, primary, tmp_path, folder, days=True, archive_log=archive_log)
    (backup,) = report.backups
    assert report.result == "partial"
    (error,) = report.all_errors
    assert f"the log behind LSN {backup.manifest.lsn} is not all there" in error
    processes.run("restore", folder, backup.id, "--to", tmp_path / "b")
    assert_sound(tmp_path / "b")


def test_a_backup_of_chosen_realms_misses_no_log(
    processes: Processes, primary: Process, tmp_path: Path, folder: Path
) -> None:
    """None is ever applied to such a backup, so that its run is done, wherever the log begins."""
    chosen = {"archive_log": False, "realms": ("/realm",)}
    done(overtaken(processes, primary, tmp_path, folder, days=True, **chosen)[0])


@pytest.mark.parametrize("days_off", [-3, 3])
def test_what_is_old_is_told_by_the_clock_of_the_storage(
    primary: Process, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, days_off: int
) -> None:
    """G8: whatever the pruner's clock says, log and what was cut off go when they are old, and not before."""
    old, young = [done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a")) for _ in range(2)]
    repository = open_repository(str(folder))
    for number in range(2):
        put(primary.address, "/realm", (b"key", b"%d" % number))
        ship(tmp_path / "a", repository)
    done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a"))
    for backup in (old, young):
        (folder / manifest_name(backup.folder)).unlink()
    first, _ = list_stretches(repository)
    for name in (old.archive_name, first.name):
        os.utime(folder / name, (0, 0))
    clock = SimpleNamespace(time=lambda: time.time() + days_off * ORPHAN_S)
    monkeypatch.setattr(upkeep, "time", clock)
    with locked(repository, "test") as lock:
        report = prune(repository, lock, Retention())
    assert (report.orphans, report.stretches) == ([old.folder], [first.name])


def test_a_run_by_a_wrong_clock_costs_no_other_backup(
    primary: Process, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: one that was dated back by two months makes none worth nothing, and the minimum is kept of all."""
    policy, now = policy_to(folder, retention=Retention(last=1, minimum=5)), time.time
    made = []
    for number, days_off in enumerate((0, 0, 0, -60, 0)):
        put(primary.address, "/realm", (b"key", b"%d" % number))
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda: now() + days_off * ORPHAN_S)  # noqa: B023  # called in this round
            made.append(done(run_policy(policy, tmp_path / "a")).id)
    assert {backup.id for backup in read_catalog(open_repository(str(folder))).backups} == set(made)
    newest = done(run_policy(policy, tmp_path / "a")).id
    left = {backup.id for backup in read_catalog(open_repository(str(folder))).backups}
    assert newest in left
    assert len(left) >= 5


# -- of a node that was superseded -----------------------------------------------------------------------------


@pytest.fixture
def superseded(processes: Processes, primary: Process, tmp_path: Path, folder: Path) -> Path:
    """A node with more entries than the one that has taken over, which has a backup and log in the repository."""
    primary.terminate()
    make_backup(tmp_path / "a", tmp_path / "b")
    successor = processes.primary(tmp_path / "b")
    put(successor.address, "/realm", (b"key", b"1"))
    done(run_policy(policy_to(folder), tmp_path / "b"))
    put(successor.address, "/realm", (b"key", b"2"))
    ship(tmp_path / "b", open_repository(str(folder)))
    old = processes.primary(tmp_path / "a")
    for number in range(20):
        put(old.address, "/realm", (b"key", b"%d" % number))
    return tmp_path / "a"


def test_the_log_behind_a_superseded_nodes_backup_is_not_missed(superseded: Path, folder: Path) -> None:
    """G3: that another node has taken over is said, and nothing of a backup that took too long."""
    (error,) = run_policy(policy_to(folder), superseded).all_errors
    assert error.endswith("another node has taken over, and this one does not follow it")


@pytest.mark.parametrize("what", ["Archiver", "prune"])
def test_that_a_node_was_superseded_is_said_whatever_fails(
    superseded: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """G3: neither shipping nor pruning has to go well for it."""

    def fail(*_: object, **__: object) -> None:
        raise RepositoryError("not now")

    monkeypatch.setattr(run_module, what, fail)
    failed, taken_over = run_policy(policy_to(folder), superseded).all_errors
    assert failed.endswith("not now")
    assert taken_over.endswith("another node has taken over, and this one does not follow it")


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
    assert f", 3 older backups and {before} stretches of log removed, " in line


def test_a_run_counts_one_in_the_singular(primary: Process, tmp_path: Path, folder: Path) -> None:
    """A line in the journal is a sentence."""
    run_policy(policy_to(folder), tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"1"))
    ship(tmp_path / "a", open_repository(str(folder)))
    age_log(folder)
    report = run_policy(policy_to(folder, retention=Retention(last=1), archive_log=False), tmp_path / "a")
    assert ", 1 older backup and 1 stretch of log removed, " in run_line(report)


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
