"""Runs beside other runs, runs that are cut off again and again, and the operator's programs beside them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Processes, wait_until
from nodes import put

from understudy.backup import history as history_module
from understudy.backup import run as run_module
from understudy.backup.books import Books
from understudy.backup.catalog import BACKUPS, read_catalog
from understudy.backup.history import Entry, Result
from understudy.backup.policy import Policy, read_policies
from understudy.backup.repository import Repository, open_repository
from understudy.backup.run import Cancelled, CutOff, run_policy
from understudy.backup.upkeep import ORPHAN_S, delete_backup
from understudy.backup.worker import Worker
from understudy.common.backup_worker import MODULE
from understudy.common.errors import (
    CorruptionError,
    DiskFull,
    ForeignCluster,
    NewerFormat,
    NotADataDirectory,
    NotPermitted,
    RepositoryBusy,
    RepositoryError,
    RepositoryRefused,
    StorageFailed,
    UsageError,
)
from understudy.v1 import admin_pb2

DAY_S = 86_400.0


def policy_to(folder: Path, **values: object) -> Policy:
    settings: dict[str, object] = {"retries": 0, "archive_log": False, **values}
    return Policy(name="nightly", schedule=None, repositories=(str(folder),), **settings)  # type: ignore[arg-type]


def write_config(path: Path, folder: Path, more: str = "") -> Path:
    path.write_text(
        f'[[backup]]\nname = "nightly"\nrepositories = ["{folder}"]\nretries = 0\narchive_log = false\n{more}'
    )
    return path


def entries(data_dir: Path) -> list[Entry]:
    return Books.of(data_dir).history.entries()


def once(action: Callable[[], object]) -> Callable[..., None]:
    """Does it at the first call only."""
    left = [action]

    def call(*_: object) -> None:
        while left:
            left.pop()()

    return call


# -- beside each other -----------------------------------------------------------------------------------------


def test_runs_on_one_repository_do_not_wait_for_each_others_archives(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """Two are under way at the same time, each under a number of its own, and both are done."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"value"))
    run_policy(policy_to(folder), tmp_path / "a")
    config = write_config(tmp_path / "u.toml", folder)

    def another() -> None:
        processes.run("backup", "run", "nightly", "--config", config, "--data-dir", tmp_path / "a")

    report = run_policy(policy_to(folder), tmp_path / "a", progress=once(another))
    assert report.all_errors == []
    backups = read_catalog(open_repository(str(folder))).backups
    assert sorted(backup.run for backup in backups) == [1, 2, 3]
    assert [(entry.number, entry.result) for entry in entries(tmp_path / "a")] == [
        (number, Result.DONE) for number in (1, 2, 3)
    ]
    assert report.number == 2


def test_what_was_cut_off_is_removed_where_all_backups_are_kept(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G9: half an upload and an archive without a manifest go after a day; a younger one stays."""
    processes.primary(tmp_path / "a")
    made = [run_policy(policy_to(folder), tmp_path / "a").backups[0] for _ in range(3)]
    cut_off, younger, kept = made
    for backup in (cut_off, younger):
        (folder / backup.folder / "manifest.json").unlink()
    half = folder / BACKUPS / ".writing-0123456789abcdef"
    half.touch()
    for path in (half, folder / cut_off.archive_name):
        os.utime(path, (0, path.stat().st_mtime - 2 * ORPHAN_S))
    done = run_policy(policy_to(folder), tmp_path / "a").backups[0]
    assert not half.exists()
    assert not (folder / cut_off.archive_name).exists()
    assert (folder / younger.archive_name).exists()
    assert [backup.id for backup in read_catalog(open_repository(str(folder))).backups] == [kept.id, done.id]


def test_a_run_forgets_backups_that_were_deleted_by_hand(
    processes: Processes, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no retention removes any, the history keeps the runs whose backups exist."""
    monkeypatch.setattr(history_module, "WITHOUT_BACKUP_MAX", 1)
    processes.primary(tmp_path / "a")
    repository = open_repository(str(folder))
    made = [run_policy(policy_to(folder), tmp_path / "a").backups[0] for _ in range(3)]
    for backup in made[:2]:
        delete_backup(repository, backup)
    run_policy(policy_to(folder), tmp_path / "a")
    assert [entry.number for entry in entries(tmp_path / "a")] == [2, 3, 4]


# -- tried again, or not ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "helps"),
    [
        (UsageError, False),
        (ForeignCluster, False),
        (CorruptionError, False),
        (NewerFormat, False),
        (NotPermitted, False),
        (RepositoryRefused, False),
        (RepositoryError, True),
        (RepositoryBusy, True),
        (NotADataDirectory, True),
        (DiskFull, True),
        (StorageFailed, True),
        (ValueError, True),
    ],
)
def test_only_what_may_pass_is_tried_again(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], helps: bool
) -> None:
    """What lasts until somebody has changed something fails at once, without a wait."""
    waits: list[float] = []

    def fail(url: str) -> Repository:
        raise kind("so it is")

    monkeypatch.setattr(run_module, "open_repository", fail)
    (tmp_path / "a").mkdir()
    report = run_policy(policy_to(folder, retries=1, retry_wait_s=60.0), tmp_path / "a", sleep=waits.append)
    assert waits == ([60.0] if helps else [])
    assert report.all_errors == [f"{folder}: so it is"]


def test_another_clusters_repository_is_not_tried_again(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """That is told at once; nobody waits for the owner to leave."""
    for name in ("a", "b"):
        processes.primary(tmp_path / name)
    run_policy(policy_to(folder), tmp_path / "a")
    waits: list[float] = []
    report = run_policy(policy_to(folder, retries=3), tmp_path / "b", sleep=waits.append)
    assert (report.result, waits) == (Result.FAILED, [])


# -- programs of the operator's --------------------------------------------------------------------------------

TELL = """
import shutil, sys, time
shutil.copy(sys.argv[1], sys.argv[2] + ".partly")
shutil.move(sys.argv[2] + ".partly", sys.argv[2])
time.sleep(3600)
"""


class Hook:
    """A program that puts a copy of the history aside, and then takes an hour."""

    def __init__(self, data_dir: Path, told: Path) -> None:
        self.told = told
        self.program = (sys.executable, "-c", TELL, str(data_dir / "backups" / "history.json"), str(told))

    def cancel_once_told(self) -> None:
        """A ``check``."""
        if self.told.exists():
            raise Cancelled("the test ends it")


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    return Hook(tmp_path / "a", tmp_path / "told")


def test_a_run_is_written_down_before_its_hook_is_told(
    processes: Processes, tmp_path: Path, folder: Path, hook: Hook
) -> None:
    """Who is ended in the middle of a hook has its run in the history, and a hook that is ended is noted, too."""
    processes.primary(tmp_path / "a")
    report = run_policy(policy_to(folder, after=hook.program), tmp_path / "a", check=hook.cancel_once_told)
    (known,) = json.loads(hook.told.read_text())["entries"]
    assert (known["number"], known["result"]) == (1, "done")
    assert report.result is Result.PARTIAL
    (entry,) = entries(tmp_path / "a")
    assert (entry.number, entry.result, entry.errors) == (1, Result.PARTIAL, ["the test ends it"])


def test_a_hook_before_a_run_ends_when_the_run_is_cancelled(
    processes: Processes, tmp_path: Path, folder: Path, hook: Hook
) -> None:
    """A cancelled run does not wait for what should have come before it."""
    run_policy(policy_to(folder), ready(processes, tmp_path))
    report = run_policy(policy_to(folder, before=hook.program), tmp_path / "a", check=hook.cancel_once_told)
    assert report.result is Result.CANCELLED
    assert len(read_catalog(open_repository(str(folder))).backups) == 1


def ready(processes: Processes, tmp_path: Path) -> Path:
    processes.primary(tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("reason", [Cancelled, CutOff])
def test_a_hook_hears_of_a_run_that_was_cancelled_but_not_as_the_server_ends(
    processes: Processes, tmp_path: Path, folder: Path, reason: type[Cancelled]
) -> None:
    """A server that ends has no time for programs; its run is written down all the same."""
    processes.primary(tmp_path / "a")
    on_failure = (sys.executable, "-c", "import sys; open(sys.argv[1], 'w')", str(tmp_path / "told"))

    def end(*_: object) -> None:
        raise reason("so it is")

    report = run_policy(policy_to(folder, on_failure=on_failure), tmp_path / "a", progress=end, check=end)
    assert report.all_errors == ["so it is"]
    assert (tmp_path / "told").exists() == (reason is Cancelled)
    assert [entry.result for entry in entries(tmp_path / "a")] == [Result.CANCELLED]


# -- cut off again and again -----------------------------------------------------------------------------------


def test_a_run_that_takes_its_process_with_it_each_time_has_failed(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """Each attempt is noted; after three, it is written down and told, and it is due at its next time only."""
    processes.primary(tmp_path / "a")
    told = tmp_path / "told"
    before = ["/bin/sh", "-c", "kill -ABRT $PPID; sleep 60"]
    on_failure = [
        sys.executable,
        "-c",
        "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())",
        str(told),
    ]
    hooks = f"before = {json.dumps(before)}\non_failure = {json.dumps(on_failure)}\n"
    config = write_config(tmp_path / "u.toml", folder, f'schedule = "0 0 1 1 *"\n{hooks}')
    books = tmp_path / "a" / "backups"
    books.mkdir(exist_ok=True)
    (books / "first-seen.json").write_text('{"nightly": 0.0}')
    for _ in range(3):
        assert run_worker(tmp_path / "a", config) == -signal.SIGABRT
        assert entries(tmp_path / "a") == []
    with subprocess.Popen(
        worker_command(tmp_path / "a", config), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as last:
        wait_until(lambda: entries(tmp_path / "a"))
        wait_until(told.exists)
        assert last.stdin is not None
        last.stdin.close()
        assert last.wait(60) == 0
    (entry,) = entries(tmp_path / "a")
    first, second, failed, *_ = (books / "journal").read_text().splitlines()
    assert "nightly that was due at 1971-01-01T00:00:00.000000Z: attempt 1 was cut off" in first
    assert first.endswith("attempt 2 follows")
    assert second.endswith("attempt 3 follows")
    assert f"run {entry.number} of nightly: failed" in failed
    assert entry.result is Result.FAILED
    assert entry.id
    assert failed.partition(";")[0].endswith(f"id {entry.id}")
    assert "has ended 3 times" in entry.errors[0]
    assert f"understudy verify {tmp_path / 'a'}" in entry.errors[0]
    report = runs_at(
        tmp_path / "a", write_config(tmp_path / "mended.toml", folder, 'schedule = "0 0 1 1 *"\n')
    )
    assert report(entry.start_s + 60) == [Result.FAILED]
    assert report(entry.start_s + 366 * DAY_S) == [Result.FAILED, Result.DONE]


def test_attempts_that_ended_are_not_counted(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """However often a server is stopped in the middle of a run in good order, the run is made up."""
    processes.primary(tmp_path / "a")
    config = write_config(tmp_path / "u.toml", folder, 'schedule = "0 0 1 1 *"\n')
    (tmp_path / "a" / "backups").mkdir(exist_ok=True)
    (tmp_path / "a" / "backups" / "first-seen.json").write_text('{"nightly": 0.0}')
    for _ in range(4):
        stop_in_the_middle(tmp_path / "a", config)
    assert entries(tmp_path / "a")[-1].result is Result.CANCELLED
    assert runs_at(tmp_path / "a", config)(2_000_000_000.0)[-1] is Result.DONE


def stop_in_the_middle(data_dir: Path, config: Path) -> None:
    """A worker that is stopped as soon as a run has begun."""
    ending: list[Worker] = []

    def stop(report: admin_pb2.BackupReport) -> None:
        if report.policies[0].running:
            ending[0].stop()

    ending.append(Worker(data_dir, read_policies(config), tell=stop))
    ending[0].look_once()


def worker_command(data_dir: Path, config: Path) -> list[str]:
    return [sys.executable, "-m", MODULE, str(data_dir), str(config), "console"]


def run_worker(data_dir: Path, config: Path) -> int:
    """Runs the process beside a server until it ends; returns how it did."""
    with subprocess.Popen(
        worker_command(data_dir, config), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        return process.wait(60)


def runs_at(data_dir: Path, config: Path) -> Callable[[float], list[Result]]:
    """How all runs have ended after a new worker has looked once at a time."""

    def look(now_s: float) -> list[Result]:
        Worker(data_dir, read_policies(config), tell=lambda report: None, clock=lambda: now_s).look_once()
        return [entry.result for entry in entries(data_dir)]

    return look
