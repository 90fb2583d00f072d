"""The process beside a server that runs its policies and ships its log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from google.protobuf import json_format
from harness import Processes, complaint, wait_until
from nodes import children, is_alive, pairs, put, status, wait_until_caught_up, warnings

from understudy.backup.archiver import Archiver
from understudy.backup.books import Books
from understudy.backup.catalog import read_catalog
from understudy.backup.history import Result
from understudy.backup.policy import read_policies
from understudy.backup.repository import Repository, open_repository
from understudy.backup.stretch import list_stretches
from understudy.backup.worker import Worker
from understudy.common.backup_worker import MODULE, BackupWorker
from understudy.common.directory import NODE_FILE, NodeFile
from understudy.common.types import ClusterId
from understudy.v1 import admin_pb2

FAILED, USAGE = 1, 2
DAY_S = 86_400.0


def write_config(path: Path, folder: Path, more: str = "") -> Path:
    path.write_text(f'[[backup]]\nname = "nightly"\nrepositories = ["{folder}"]\nretries = 0\n{more}')
    return path


def shipped(address: str) -> int:
    """Up to where the node's log is in its first repository, as its status says."""
    policies = status(address).backups
    return policies[0].repositories[0].shipped_lsn if policies else 0


def worker_of(address_pid: int) -> int:
    """The id of the process that makes a node's backups."""

    def find() -> int:
        for pid in Path(f"/proc/{address_pid}/task/{address_pid}/children").read_text().split():
            with contextlib.suppress(OSError):  # it has ended just now
                if "understudy.backup.worker" in Path(f"/proc/{pid}/cmdline").read_text():
                    return int(pid)
        return 0

    return wait_until(find)


# -- the log ---------------------------------------------------------------------------------------------------


def test_a_servers_log_is_shipped_while_it_serves(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """G1: what was acknowledged seconds ago is in the repository, the status says how far, and it restores."""
    config = write_config(tmp_path / "u.toml", folder)
    primary = processes.primary(tmp_path / "a", "--config", config)
    processes.run("backup", "run", "nightly", "--config", config, "--data-dir", tmp_path / "a")
    receipt = put(primary.address, "/realm", (b"key", b"value"))
    wait_until(lambda: shipped(primary.address) >= receipt.lsn)
    told = json.loads(processes.run("status", tmp_path / "a", "--json").stdout)["backups"]
    assert told[0]["policy"] == "nightly"
    assert told[0]["repositories"][0]["url"] == str(folder)
    assert str(folder).encode() in processes.run("status", tmp_path / "a").stdout
    processes.run("restore", folder, "--to", tmp_path / "b")
    assert pairs(processes.primary(tmp_path / "b").address, "/realm") == {b"key": b"value"}


def test_a_replica_ships_and_goes_on_once_it_reigns(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """The log is shipped from a replica, and by the same process after `promote --serve`, in the new epoch."""
    primary = processes.primary(tmp_path / "a")
    config = write_config(tmp_path / "u.toml", folder)
    replica = processes.replica(tmp_path / "b", primary.address, "--config", config)
    wait_until_caught_up(primary.address, replica.address)
    wait_until(lambda: shipped(replica.address) >= status(primary.address).lsn)
    primary.kill()
    processes.run("promote", tmp_path / "b", "--serve")
    receipt = put(replica.address, "/realm", (b"key", b"value"))
    wait_until(lambda: shipped(replica.address) >= receipt.lsn)
    assert max(stretch.epoch for stretch in list_stretches(open_repository(str(folder)))) == 2


def test_the_log_waits_for_a_repository_that_is_away(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G9: segments stay until they are shipped, status warns meanwhile, and they go once the repository is back."""
    config = write_config(tmp_path / "u.toml", folder)
    away = folder.rename(tmp_path / "away")
    primary = processes.primary(tmp_path / "a", "--config", config, "--log-floor", "0")
    wait_until(lambda: "is not shipped" in warnings(primary.address))
    value = os.urandom(8 << 20)
    for number in range(18):
        put(primary.address, "/realm", (b"%d" % (number % 2), value))
    processes.run("verify", "--server", primary.address, "--against", primary.address)  # a checkpoint
    segments = list((tmp_path / "a" / "log").iterdir())
    assert len(segments) > 1
    assert min(segments).name.startswith("00000000000000000001.")
    away.rename(folder)
    head = status(primary.address).lsn
    wait_until(lambda: shipped(primary.address) >= head)
    assert "is not shipped" not in warnings(primary.address)
    put(primary.address, "/realm", (b"2", value))

    def pruned() -> bool:
        processes.run("verify", "--server", primary.address, "--against", primary.address)
        return len(list((tmp_path / "a" / "log").iterdir())) < len(segments)

    wait_until(pruned)


def test_a_gap_in_the_log_is_warned_of_until_a_newer_backup_is_there(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """Neither what is shipped behind it nor a new server makes it forgotten; a backup does."""
    primary = processes.primary(tmp_path / "a")
    run = ("backup", "run", "nightly", "--data-dir", tmp_path / "a", "--config")
    processes.run(*run, write_config(tmp_path / "plain.toml", folder, "archive_log = false\n"))
    repository = open_repository(str(folder))
    for number in range(2):
        put(primary.address, "/realm", (b"key", b"%d" % number))
        ship_once(tmp_path / "a", repository)
    lost, _ = list_stretches(repository)
    repository.delete(lost.name)
    assert primary.terminate() == 0
    primary = processes.primary(tmp_path / "a", "--config", write_config(tmp_path / "u.toml", folder))
    missing = f"the log behind LSN {lost.first - 1} is not all there"
    wait_until(lambda: missing in warnings(primary.address))
    receipt = put(primary.address, "/realm", (b"key", b"2"))
    wait_until(lambda: shipped(primary.address) >= receipt.lsn)
    assert missing in warnings(primary.address)
    processes.run("backups", "start", "nightly", "--server", primary.address)
    wait_until(lambda: missing not in warnings(primary.address))


def ship_once(data_dir: Path, repository: Repository) -> None:
    cluster = ClusterId(uuid.UUID(NodeFile.read(data_dir / NODE_FILE).cluster).bytes)
    Archiver(data_dir / "log", cluster, repository, encryption=None).ship()


# -- runs ------------------------------------------------------------------------------------------------------


class Clock:
    """A wall clock that is set by hand."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def test_policies_run_when_they_are_due_and_missed_runs_are_made_up_once(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """A nightly run happens when its time has come, and once after three nights without a server."""
    processes.primary(tmp_path / "a")
    config = write_config(tmp_path / "u.toml", folder, 'schedule = "30 2 * * *"\narchive_log = false\n')
    reports: list[admin_pb2.BackupReport] = []
    books = Books.of(tmp_path / "a")
    clock = Clock(1_760_000_000.0)

    def looks() -> int:
        """How many runs there are after a new worker has looked once."""
        worker = Worker(tmp_path / "a", read_policies(config), tell=reports.append, clock=clock)
        worker.look_once()
        return len(books.history.entries())

    assert looks() == 0
    clock.now_s += DAY_S
    assert looks() == 1
    assert looks() == 1
    assert reports[-1].policies[0].last_success_s == clock.now_s
    clock.now_s += 3 * DAY_S
    assert looks() == 2
    assert looks() == 2
    assert [entry.result for entry in books.history.entries()] == [Result.DONE] * 2
    assert len(read_catalog(open_repository(str(folder))).backups) == 2


def test_a_server_learns_of_runs_and_drills_by_hand(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """What was proven beside a running server shows in its status, without a restart."""
    config = write_config(tmp_path / "u.toml", folder)
    primary = processes.primary(tmp_path / "a", "--config", config)
    wait_until(lambda: shipped(primary.address))
    by_hand = ("nightly", "--config", config, "--data-dir", tmp_path / "a")
    processes.run("backup", "run", *by_hand)
    wait_until(lambda: status(primary.address).backups[0].last_success_s)
    assert not status(primary.address).backups[0].last_proven_s
    processes.run("backup", "drill", *by_hand)
    wait_until(lambda: status(primary.address).backups[0].last_proven_s)


def test_a_status_warns_where_no_backup_was_proven_for_days(tmp_path: Path) -> None:
    """Without a drill in so many days after the last proof there is a warning; with one there is none."""
    worker = BackupWorker(tmp_path, tmp_path / "u.toml")
    policy = admin_pb2.BackupStatus(policy="nightly", drill_warn_days=7, last_success_s=time.time())
    for age_days, warns in ((6.0, False), (8.0, True)):
        policy.last_proven_s = time.time() - age_days * DAY_S
        worker.report = admin_pb2.BackupReport(policies=[policy])
        assert any("proven" in warning for warning in worker.warnings()) == warns


def test_a_status_warns_of_what_is_overdue_and_of_what_does_not_end(tmp_path: Path) -> None:
    """An hour after it was due, and a day after it has begun, there is a warning that names the policy or the run."""
    clock = Clock(1_760_000_000.0)
    worker = BackupWorker(tmp_path, tmp_path / "u.toml", clock)
    due = admin_pb2.BackupStatus(policy="nightly", next_s=clock.now_s - 3 * DAY_S)
    worker.report = admin_pb2.BackupReport(policies=[due])
    assert worker.warnings() == []  # it is made up by a server that has just started
    clock.now_s += 3601
    (warning,) = worker.warnings()
    assert "nightly: was due at 2025-10-06T08:53:20Z, and has not been made" in warning
    run = admin_pb2.BackupRun(
        id="0a1b2c3d", policy="nightly", state=admin_pb2.BackupRun.RUNNING, started_s=clock.now_s
    )
    worker.runs.take([run])
    assert worker.warnings() == []
    clock.now_s += DAY_S + 1
    (warning,) = worker.warnings()
    assert "understudy backups cancel 0a1b2c3d" in warning


def test_a_run_that_the_servers_end_cuts_off_is_made_up(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """A run that is cancelled leaves no backup and no lock, and the next worker does it."""
    processes.primary(tmp_path / "a")
    config = write_config(tmp_path / "u.toml", folder, 'schedule = "30 2 * * *"\narchive_log = false\n')
    clock = Clock(1_760_000_000.0)
    Worker(tmp_path / "a", read_policies(config), tell=lambda report: None, clock=clock).look_once()
    clock.now_s += DAY_S
    ending: list[Worker] = []

    def end(report: admin_pb2.BackupReport) -> None:
        if report.policies[0].running:
            ending[0].stop()

    ending.append(Worker(tmp_path / "a", read_policies(config), tell=end, clock=clock))
    ending[0].look_once()
    repository = open_repository(str(folder))
    assert read_catalog(repository).backups == []
    Worker(tmp_path / "a", read_policies(config), tell=lambda report: None, clock=clock).look_once()
    results = [entry.result for entry in Books.of(tmp_path / "a").history.entries()]
    assert results == [Result.CANCELLED, Result.DONE]
    assert len(read_catalog(repository).backups) == 1


# -- bad luck --------------------------------------------------------------------------------------------------


def test_a_policy_that_can_not_be_keeps_the_server_from_starting(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """An unknown key, a bad schedule, or encryption that is impossible is refused at once, by name (G10)."""
    for more, says in (
        ("colour = 1\n", "colour"),
        ('schedule = "every day"\n', "every day"),
        ('recipients = ["age1nobody"]\n', "age1nobody"),
        ("retention = { yearly = 1 }\n", "yearly"),
    ):
        config = write_config(tmp_path / "u.toml", folder, more)
        refused = processes.run(
            "primary", "--data-dir", tmp_path / "a", "--config", config, "--listen", "127.0.0.1:0", code=USAGE
        )
        assert says in complaint(refused)
        assert not (tmp_path / "a").exists()


def test_the_process_is_started_again_and_ends_with_its_server(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """Killed, it is replaced, and commits go on; when the server is killed, it ends by itself."""
    primary = processes.primary(tmp_path / "a", "--config", write_config(tmp_path / "u.toml", folder))
    first = worker_of(primary.pid)
    wait_until(lambda: shipped(primary.address) > 0)
    os.kill(first, signal.SIGKILL)
    put(primary.address, "/realm", (b"key", b"value"))
    wait_until(lambda: not is_alive(first))
    second = wait_until(lambda: next((pid for pid in [worker_of(primary.pid)] if pid != first), 0))
    receipt = put(primary.address, "/realm", (b"key", b"again"))
    wait_until(lambda: shipped(primary.address) >= receipt.lsn)
    assert children(primary)
    primary.kill()
    wait_until(lambda: not is_alive(second))


def test_a_process_whose_server_was_killed_ends_quietly(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """Nobody is left who listens, which is no failure: it ends in order, without a traceback."""
    processes.primary(tmp_path / "a")
    config = write_config(tmp_path / "u.toml", folder, "archive_log = false\n")
    command = [sys.executable, "-m", MODULE, str(tmp_path / "a"), str(config), "console"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stdout.readline()
        worker.stdout.close()
        order = admin_pb2.BackupOrder(start=admin_pb2.BackupOrder.Start(id="0a1b2c3d", policy="nightly"))
        worker.stdin.write(json_format.MessageToJson(order, indent=None).encode() + b"\n")
        worker.stdin.flush()
        wait_until(lambda: Books.of(tmp_path / "a").history.entries())
        _, said = worker.communicate(timeout=60)
    assert (worker.returncode, said) == (0, b"")


def test_a_run_that_was_cut_off_is_told_by_the_next_server(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """A run by order that its server's end cut off is not made up, and the next server still says what came of it."""
    before = json.dumps([sys.executable, "-c", "import time; time.sleep(3600)"])
    config = write_config(tmp_path / "u.toml", folder, f"before = {before}\n")
    primary = processes.primary(tmp_path / "a", "--config", config)
    start = ("backups", "start", "nightly", "--server", primary.address, "--json")
    run_id = json.loads(processes.run(*start).stdout)["id"]
    wait_until(lambda: status(primary.address).backups[0].run == run_id)
    assert primary.terminate() == 0
    again = processes.primary(tmp_path / "a", "--config", config)
    watch = ("backups", "watch", run_id, "--server", again.address, "--json")
    told = json.loads(processes.run(*watch, code=FAILED).stdout)
    assert (told["id"], told["state"], told["errors"]) == (run_id, "cancelled", ["the server ends"])
    assert not status(again.address).backups[0].running
