"""The log on its way to a policy's repositories: storages that hang or fail, and logs that are long."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
from harness import Process, Processes, wait_until
from nodes import offline_status, put, settle, status

from understudy.backup import archiver as archiver_module
from understudy.backup import watched_repository as watched_module
from understudy.backup.drill import drill_newest
from understudy.backup.drill_server import read_all
from understudy.backup.folder_repository import FolderRepository
from understudy.backup.policy import Policy
from understudy.backup.repository import Repository, open_repository
from understudy.backup.run import run_policy
from understudy.backup.stretch import list_stretches
from understudy.backup.watched_repository import WatchedRepository
from understudy.backup.worker import Worker
from understudy.common.backup_worker import BackupWorker
from understudy.common.errors import RepositoryError
from understudy.v1 import admin_pb2


@pytest.fixture
def primary(processes: Processes, tmp_path: Path) -> Process:
    """One with a log."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"value"))
    return primary


def policy_to(*folders: Path) -> Policy:
    return Policy(name="nightly", schedule=None, repositories=tuple(map(str, folders)))


def watched_at(data_dir: Path, folder: Path) -> WatchedRepository:
    return WatchedRepository(policy_to(folder), str(folder), data_dir, lambda: 1_760_000_000.0)


def fill(primary: Process, *, segments: int) -> None:
    """Writes so many segments and somewhat more."""
    for number in range(8 * segments + 1):
        put(primary.address, "/realm", (b"%d" % (number % 2), os.urandom(8 << 20)))
    settle(primary.address)  # so much that checkpoints are taken, whose marks come when they will


# -- storages --------------------------------------------------------------------------------------------------


class Hanging(FolderRepository):
    """A network folder whose server is gone: whoever writes waits."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), path)
        self.hangs = threading.Event()
        self.goes_on = threading.Event()

    def upload(self, name: str, *, expected_bytes: int = 0) -> AbstractContextManager[IO[bytes]]:
        self.hangs.set()
        self.goes_on.wait()
        return super().upload(name, expected_bytes=expected_bytes)


def test_a_storage_that_hangs_holds_up_no_other(
    primary: Process, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log goes on to the other repositories meanwhile."""
    (tmp_path / "hanging").mkdir()
    hanging = Hanging(tmp_path / "hanging")

    def opened(url: str) -> Repository:
        return hanging if url == hanging.url else open_repository(url)

    monkeypatch.setattr(watched_module, "open_repository", opened)
    reports: list[admin_pb2.BackupReport] = []
    policies = {"nightly": policy_to(tmp_path / "hanging", folder)}
    worker = Worker(tmp_path / "a", policies, tell=reports.append)
    worker.report()
    threads = [threading.Thread(target=watch) for watch in worker.watchers()]
    for thread in threads:
        thread.start()
    try:
        assert hanging.hangs.wait(60)
        head = put(primary.address, "/realm", (b"key", b"again")).lsn
        wait_until(lambda: reports[-1].policies[0].repositories[1].shipped_lsn >= head)
        assert reports[-1].policies[0].repositories[0].shipped_lsn < head
        assert reports[-1].keep_from_lsn <= head
    finally:
        worker.stop()
        hanging.goes_on.set()
        for thread in threads:
            thread.join()


def test_a_status_warns_of_a_storage_that_hangs(tmp_path: Path) -> None:
    """Where for a quarter of an hour neither anything was shipped nor an error came."""
    now_s = [1_760_000_000.0]
    worker = BackupWorker(tmp_path, tmp_path / "u.toml", lambda: now_s[0])
    repository = admin_pb2.RepositoryStatus(url="/mnt/nas", shipped_s=now_s[0])
    policy = admin_pb2.BackupStatus(policy="nightly", repositories=[repository])
    worker.report = admin_pb2.BackupReport(policies=[policy])
    now_s[0] += 899
    assert worker.warnings() == []
    now_s[0] += 2
    (warning,) = worker.warnings()
    assert "/mnt/nas since 2025-10-09T08:53:20Z" in warning
    policy.repositories[0].problem = "it is full"
    worker.report = admin_pb2.BackupReport(policies=[policy])
    (warning,) = worker.warnings()
    assert "it is full" in warning


class Counted:
    """``list_stretches`` of the archiver."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        monkeypatch.setattr(archiver_module, "list_stretches", self)

    def __call__(self, repository: Repository) -> Any:
        self.calls += 1
        return list_stretches(repository)


def test_a_storage_that_takes_nothing_is_not_read_again_and_again(
    primary: Process, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1: where it goes on is known, the pauses become longer, and what could not be shipped is shipped later."""
    watched, listed = watched_at(tmp_path / "a", folder), Counted(monkeypatch)
    pauses = []
    with monkeypatch.context() as patched:
        patched.setattr(archiver_module, "ship", fail)
        patched.setattr("random.random", lambda: 0.5)
        for _ in range(4):
            list(watched.steps())
            pauses.append(watched.pause_s)
    assert watched.problem == "the repository is full"
    assert pauses == [5.0, 10.0, 20.0, 30.0]
    assert listed.calls == 1
    list(watched.steps())
    assert (watched.problem, watched.pause_s) == ("", 5.0)
    assert watched.shipped_lsn == status(primary.address).lsn
    assert listed.calls == 1


def fail(*_: object, **__: object) -> None:
    raise RepositoryError("the repository is full")


# -- long logs -------------------------------------------------------------------------------------------------


def test_a_long_log_counts_as_shipped_segment_by_segment(
    primary: Process, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: what is there already is told and may go here, also after an error; no segment is shipped twice."""
    fill(primary, segments=2)
    firsts = sorted(int(path.stem) for path in (tmp_path / "a" / "log").iterdir())
    assert len(firsts) > 2
    watched, listed = watched_at(tmp_path / "a", folder), Counted(monkeypatch)
    parts = iter(range(10))
    shipping = archiver_module.ship

    def ship(*arguments: Any, **options: Any) -> Any:
        return fail() if next(parts) == 1 else shipping(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(archiver_module, "ship", ship)
        list(watched.steps())
        assert watched.problem
        assert watched.shipped_lsn == firsts[1] - 1
    steps: Iterator[None] = watched.steps()
    reached = sorted({watched.shipped_lsn for _ in steps})
    assert reached[:2] == [firsts[1] - 1, firsts[2] - 1]
    assert reached[-1] == status(primary.address).lsn
    assert listed.calls == 3  # to find where it goes on, and once in each attempt
    assert [stretch.first for stretch in list_stretches(open_repository(str(folder)))] == firsts


# -- secrets ---------------------------------------------------------------------------------------------------


def test_a_new_passphrase_counts_for_the_log_too(
    processes: Processes, tmp_path: Path, folder: Path, primary: Process
) -> None:
    """G10: after a change the newest state opens with the new one; a way across the change takes both."""
    secret, old, new = (tmp_path / name for name in ("secret", "old", "new"))
    for path, words in ((old, "old words"), (new, "new words"), (secret, "old words")):
        path.touch(mode=0o600)
        path.write_text(words)
    policy = replace(policy_to(folder), passphrase_file=secret, retries=0)
    watched = WatchedRepository(policy, str(folder), tmp_path / "a", lambda: 1_760_000_000.0)
    (first,) = run_policy(policy, tmp_path / "a").backups
    put(primary.address, "/realm", (b"key", b"second"))
    list(watched.steps())
    secret.write_text("new words")
    run_policy(policy, tmp_path / "a")
    receipt = put(primary.address, "/realm", (b"key", b"third"))
    list(watched.steps())
    restore = ("restore", folder, "--passphrase-file", new)
    processes.run(*restore, "--to", tmp_path / "b")
    assert offline_status(tmp_path / "b").lsn == receipt.lsn
    across = (*restore, first.id, "--epoch", "1", "--to", tmp_path / "c")
    assert "give both" in processes.run(*across, code=7).stderr.decode()
    processes.run(*across, "--passphrase-file", old)
    assert offline_status(tmp_path / "c").lsn == receipt.lsn


# -- what was proven -------------------------------------------------------------------------------------------


def proven_at(data_dir: Path, policies: dict[str, Policy]) -> dict[str, bool]:
    """Whether each policy is proven, as a new worker tells after a look at each repository."""
    reports: list[admin_pb2.BackupReport] = []
    worker = Worker(data_dir, policies, tell=reports.append)
    worker.stop()  # so that each looks once
    for watch in worker.watchers():
        watch()
    worker.report()
    return {one.policy: bool(one.last_proven_s) for one in reports[-1].policies}


def test_a_policy_is_proven_once_its_own_backups_are_in_all_its_repositories(
    primary: Process, tmp_path: Path, folder: Path
) -> None:
    """G8: neither another policy's drill in the same repository nor one of another repository's backup counts."""
    (tmp_path / "second").mkdir()
    nightly = replace(policy_to(folder, tmp_path / "second"), archive_log=False)
    weekly = replace(nightly, name="weekly", repositories=(str(folder),))
    for policy in (nightly, weekly):
        assert run_policy(policy, tmp_path / "a").all_errors == []
    policies = {"nightly": nightly, "weekly": weekly}

    def prove(policy: Policy, url: Path) -> None:
        drill = drill_newest(policy, str(url), tmp_path, read_all=read_all)
        assert drill.is_proven

    prove(nightly, tmp_path / "second")
    assert proven_at(tmp_path / "a", policies) == {"nightly": False, "weekly": False}
    prove(weekly, folder)
    assert proven_at(tmp_path / "a", policies) == {"nightly": False, "weekly": True}
    prove(nightly, folder)
    assert proven_at(tmp_path / "a", policies) == {"nightly": True, "weekly": True}
