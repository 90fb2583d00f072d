"""Runs of a server's policies that an operator starts, follows and cancels from elsewhere."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Process, Processes, complaint, wait_until
from nodes import put, status, wait_until_caught_up

from understudy.backup.books import Books
from understudy.backup.catalog import read_catalog
from understudy.backup.history import Result
from understudy.backup.policy import read_policies
from understudy.backup.repository import open_repository
from understudy.backup.repository_lock import locked
from understudy.backup.worker import Worker
from understudy.common import portal
from understudy.common.rpc import open_channel
from understudy.v1 import admin_pb2, admin_pb2_grpc

FAILED, USAGE, NOT_PERMITTED = 1, 2, 7
DAY_S = 86_400.0
VALUE_BYTES = 4 << 20
NONE = "0a1b2c3d"  # an id that no run has

POLICIES = """
[[backup]]
name = "quick"
repositories = ["{folder}"]
archive_log = false
retries = 0

[[backup]]
name = "slow"
repositories = ["{folder}"]
archive_log = false
retries = 0
rate = "5kB/s"
"""


@pytest.fixture
def config(tmp_path: Path, folder: Path) -> Path:
    """Two policies, one of which takes minutes."""
    path = tmp_path / "understudy.toml"
    path.write_text(POLICIES.format(folder=folder))
    return path


@pytest.fixture
def primary(processes: Processes, tmp_path: Path, config: Path) -> Process:
    """One with these policies, and some megabytes."""
    process = processes.primary(tmp_path / "a", "--config", config)
    put(process.address, "/realm", (b"key", os.urandom(VALUE_BYTES)))
    return process


class Remote:
    """The commands, as an operator gives them."""

    def __init__(self, processes: Processes, address: str) -> None:
        self._processes = processes
        self.address = address

    def start(self, policy: str) -> dict[str, Any]:
        return self._asked("start", policy)

    def cancel(self, run_id: str) -> dict[str, Any]:
        return self._asked("cancel", run_id)

    def watch(self, run_id: str, *, code: int = 0) -> dict[str, Any]:
        return self._asked("watch", run_id, code=code)

    def refusal(self, command: str, argument: str, *, code: int = USAGE) -> str:
        done = self._processes.run("backups", command, argument, "--server", self.address, code=code)
        return complaint(done)

    def _asked(self, command: str, argument: str, *, code: int = 0) -> dict[str, Any]:
        words = ("backups", command, argument, "--server", self.address, "--json")
        told: dict[str, Any] = json.loads(self._processes.run(*words, code=code).stdout)
        return told

    def under_way(self, policy: str) -> str:
        """The id of the policy's run, once its bytes flow."""
        return wait_until(
            lambda: next((o.run for o in status(self.address).backups if o.policy == policy), "")
        )


@pytest.fixture
def remote(processes: Processes, primary: Process) -> Remote:
    return Remote(processes, primary.address)


def results(directory: Path) -> list[tuple[str, Result]]:
    return [(entry.policy, entry.result) for entry in Books.of(directory).history.entries()]


def journal(directory: Path) -> str:
    return (directory / "backups" / "journal").read_text()


def assert_untouched(folder: Path) -> None:
    """There is no backup, no half of one that a listing shows, and nobody holds the lock."""
    repository = open_repository(str(folder))
    assert read_catalog(repository).backups == []
    with locked(repository, "test", wait_s=0):
        pass


# -- to the end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["primary", "replica"])
def test_a_run_is_started_and_followed_to_its_end(
    processes: Processes, tmp_path: Path, folder: Path, config: Path, role: str
) -> None:
    """A primary or a replica answers at once with an id, and who watches hears of the backup that was made."""
    flags = ("--config", config)
    node = primary = processes.primary(tmp_path / "a", *(flags if role == "primary" else ()))
    put(primary.address, "/realm", (b"key", b"value"))
    if role == "replica":
        node = processes.replica(tmp_path / "b", primary.address, *flags)
        wait_until_caught_up(primary.address, node.address)
    remote = Remote(processes, node.address)
    started = remote.start("quick")
    assert started == {"id": started["id"], "policy": "quick", "was_under_way": False}
    told = remote.watch(started["id"])
    (backup,) = read_catalog(open_repository(str(folder))).backups
    assert told["state"] == "done"
    assert told["backups"] == [f"{folder}/{backup.folder}"]
    assert told["bytes"] == told["total_bytes"] == backup.manifest.total_bytes
    shown = processes.run("backups", "watch", started["id"], "--server", node.address)
    assert f"run {started['id']} of quick: done".encode() in shown.stdout
    assert shown.stderr == b""


def test_a_run_that_fails_says_why(processes: Processes, remote: Remote, folder: Path) -> None:
    """Whoever watches gets the errors, and exit code 1."""
    folder.rmdir()
    run_id = remote.start("quick")["id"]
    told = remote.watch(run_id, code=FAILED)
    assert told["state"] == "failed"
    assert str(folder) in told["errors"][0]


# -- cancelled -------------------------------------------------------------------------------------------------


def test_a_run_under_way_is_cancelled(
    processes: Processes, tmp_path: Path, folder: Path, remote: Remote
) -> None:
    """It leaves no backup and no lock, whoever watches hears of it, and it is written down."""
    run_id = remote.start("slow")["id"]
    assert remote.under_way("slow") == run_id
    assert run_id.encode() in processes.run("status", "--server", remote.address).stdout
    watching = processes.start("backups", "watch", run_id, "--server", remote.address, "--json")
    assert remote.cancel(run_id)["was"] == "running"
    assert watching.wait() == FAILED
    assert json.loads(watching.stdout)["state"] == "cancelled"
    assert_untouched(folder)
    assert results(tmp_path / "a") == [("slow", Result.CANCELLED)]
    assert "run 1 of slow: cancelled" in journal(tmp_path / "a")
    assert f"id {run_id}" in journal(tmp_path / "a")
    assert "over already: cancelled" in remote.refusal("cancel", run_id)
    assert remote.watch(remote.start("quick")["id"])["state"] == "done"


def test_a_run_that_waits_is_known_and_cancelled(tmp_path: Path, folder: Path, remote: Remote) -> None:
    """A policy that waits or is under way is not started twice; one that waits is cancelled at once."""
    slow, quick = remote.start("slow")["id"], remote.start("quick")["id"]
    remote.under_way("slow")
    for policy, run_id in (("slow", slow), ("quick", quick)):
        assert remote.start(policy) == {"id": run_id, "policy": policy, "was_under_way": True}
    assert remote.cancel(quick)["was"] == "waiting"
    assert remote.watch(quick, code=FAILED)["state"] == "cancelled"
    assert remote.under_way("slow") == slow
    remote.cancel(slow)
    remote.watch(slow, code=FAILED)
    assert results(tmp_path / "a") == [("slow", Result.CANCELLED), ("quick", Result.CANCELLED)]
    assert "of quick: cancelled" in journal(tmp_path / "a")
    assert [entry.id for entry in Books.of(tmp_path / "a").history.entries()] == [slow, quick]
    assert_untouched(folder)


class Working:
    """A worker in this process, and how its runs stand as it has told."""

    def __init__(self, data_dir: Path, config: Path, now_s: float) -> None:
        self.report = admin_pb2.BackupReport()
        self.now_s = now_s
        self._worker = Worker(data_dir, read_policies(config), tell=self._take, clock=lambda: self.now_s)
        self._thread = threading.Thread(target=self._worker.run_when_due)

    def __enter__(self) -> Working:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.stop()
        self._thread.join()

    def _take(self, report: admin_pb2.BackupReport) -> None:
        self.report = report

    def cancel(self, run_id: str) -> None:
        self._worker.take(json.dumps({"cancel": run_id}).encode() + b"\n")

    def in_state(self, state: admin_pb2.BackupRun.State.ValueType) -> admin_pb2.BackupRun | None:
        return next((run for run in self.report.runs if run.state == state), None)


@pytest.fixture
def working(processes: Processes, tmp_path: Path, folder: Path) -> Iterator[Working]:
    """A worker with a nightly policy whose repository is away, and which waits for an hour before it tries again."""
    processes.primary(tmp_path / "a")
    folder.rmdir()
    config = tmp_path / "nightly.toml"
    config.write_text(
        f'[[backup]]\nname = "nightly"\nrepositories = ["{folder}"]\nschedule = "30 2 * * *"\nretry_wait_s = 3600\n'
    )
    with Working(tmp_path / "a", config, 1_760_000_000.0) as worker:
        yield worker


def test_a_scheduled_run_is_cancelled_while_it_waits_for_another_attempt(
    tmp_path: Path, working: Working
) -> None:
    """It has an id as well, ends at once though its pause is an hour, and is not made again before its next time."""
    working.now_s += DAY_S
    run = wait_until(lambda: working.in_state(admin_pb2.BackupRun.RUNNING))
    working.cancel(run.id)
    ended = wait_until(lambda: working.in_state(admin_pb2.BackupRun.CANCELLED))
    assert ended.id == run.id
    assert ended.errors == ["an operator has cancelled it"]
    assert working.report.policies[0].next_s > working.now_s
    working.now_s += DAY_S
    again = wait_until(lambda: working.in_state(admin_pb2.BackupRun.RUNNING))
    assert again.id != run.id
    assert results(tmp_path / "a") == [("nightly", Result.CANCELLED)]


def test_a_server_that_ends_says_so_to_whoever_watches(
    tmp_path: Path, folder: Path, primary: Process, remote: Remote
) -> None:
    """A run under way is cancelled with its server, and that is heard before the connection ends."""
    run_id = remote.start("slow")["id"]
    remote.under_way("slow")

    async def watch() -> admin_pb2.BackupRun:
        async with open_channel(remote.address) as channel:
            call = admin_pb2_grpc.AdminStub(channel).WatchBackup(admin_pb2.WatchBackupRequest(id=run_id))
            is_told = False
            async for run in call:
                if run.state != admin_pb2.BackupRun.RUNNING:
                    return run
                if not is_told:  # a second signal would end it at once
                    is_told = True
                    primary.send(signal.SIGTERM)
        raise AssertionError("it has not ended")

    told = portal.call(watch())
    assert (told.state, list(told.errors)) == (admin_pb2.BackupRun.CANCELLED, ["the server ends"])
    assert primary.wait() == 0
    assert results(tmp_path / "a") == [("slow", Result.CANCELLED)]
    assert_untouched(folder)


# -- refused, and bad luck ---------------------------------------------------------------------------------------


def test_what_is_not_known_is_refused(processes: Processes, tmp_path: Path, remote: Remote) -> None:
    """An unknown policy or run, and a server without policies, are told as such, with what can be done."""
    assert "known: quick, slow" in remote.refusal("start", "yearly")
    for command in ("cancel", "watch"):
        assert "understudy status" in remote.refusal(command, NONE)
    plain = Remote(processes, processes.primary(tmp_path / "plain").address)
    for command, argument in (("start", "quick"), ("cancel", NONE), ("watch", NONE)):
        assert "--config" in plain.refusal(command, argument)


def test_g10_only_operators_start_follow_and_cancel(
    processes: Processes, tmp_path: Path, remote: Remote
) -> None:
    """G10: as soon as there are users, these calls take an operator's token, as others of operators do."""
    processes.run(
        "user", "add", "ann", "--password-stdin", "--data-dir", tmp_path / "a", stdin=b"a long password"
    )
    for command, argument in (("start", "quick"), ("cancel", NONE), ("watch", NONE)):
        remote.refusal(command, argument, code=NOT_PERMITTED)
    processes.environment["UNDERSTUDY_TOKEN"] = f"@{tmp_path / 'a' / 'admin-token'}"
    assert remote.watch(remote.start("quick")["id"])["state"] == "done"


def test_a_run_whose_process_is_killed_has_failed(
    processes: Processes, primary: Process, remote: Remote
) -> None:
    """Whoever watches hears of it at once; another process takes its place, and runs what it is asked to."""
    run_id = remote.start("slow")["id"]
    remote.under_way("slow")
    watching = processes.start("backups", "watch", run_id, "--server", remote.address, "--json")
    os.kill(worker_of(primary.pid), signal.SIGKILL)
    assert watching.wait() == FAILED
    told = json.loads(watching.stdout)
    assert told["state"] == "failed"
    assert "code -9" in told["errors"][0]
    assert not any(policy.running for policy in status(remote.address).backups)

    def starts() -> str:
        done = processes.start("backups", "start", "slow", "--server", remote.address, "--json")
        return json.loads(done.stdout)["id"] if done.wait() == 0 else ""

    second = wait_until(starts)
    assert remote.under_way("slow") == second
    remote.cancel(second)
    assert remote.watch(second, code=FAILED)["state"] == "cancelled"


def worker_of(server: int) -> int:
    """The id of the process that makes a server's backups."""
    for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split():
        if "understudy.backup.worker" in Path(f"/proc/{pid}/cmdline").read_text():
            return int(pid)
    raise AssertionError("there is none")
