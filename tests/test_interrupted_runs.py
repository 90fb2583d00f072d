"""What Ctrl-C and SIGTERM do to a run of a policy, and to who only watches one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from harness import Process, Processes, wait_until
from nodes import put

from understudy.backup.books import Books
from understudy.backup.catalog import read_catalog
from understudy.backup.history import Result
from understudy.backup.repository import open_repository
from understudy.backup.repository_lock import locked

INTERRUPTED = 130
VALUE_BYTES = 4 << 20


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two repositories."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.fixture
def config(tmp_path: Path, folders: list[Path]) -> Path:
    """A policy that takes minutes for each."""
    path = tmp_path / "u.toml"
    path.write_text(
        f'[[backup]]\nname = "slow"\nrepositories = ["{folders[0]}", "{folders[1]}"]\narchive_log = false\n'
        f'retries = 0\nrate = "5kB/s"\non_failure = ["/bin/sh", "-c", "cat > {tmp_path}/told"]\n'
    )
    return path


@pytest.fixture
def primary(processes: Processes, tmp_path: Path, config: Path) -> Process:
    """One with some megabytes."""
    process = processes.primary(tmp_path / "a", "--config", config)
    put(process.address, "/realm", (b"key", os.urandom(VALUE_BYTES)))
    return process


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_ctrl_c_cancels_a_run_and_says_so(
    processes: Processes,
    tmp_path: Path,
    folders: list[Path],
    config: Path,
    primary: Process,
    number: signal.Signals,
    name: str,
) -> None:
    """It ends with 130 and one line of what that means, leaves no backup and no lock, and is written down and told."""
    process = processes.start(
        "backup", "run", "slow", "--config", config, "--data-dir", tmp_path / "a", "--json"
    )
    wait_until(lambda: (folders[0] / "understudy.json").exists())
    process.send(number)
    assert process.wait() == INTERRUPTED
    (line,) = process.stderr.splitlines()
    assert line.startswith("understudy: the run was cancelled; what it had finished stays")
    facts = json.loads(process.stdout)
    assert facts["result"] == "cancelled"
    assert facts["errors"] == [f"{name} has cancelled it"]
    assert json.loads((tmp_path / "told").read_bytes())["result"] == "cancelled"
    assert [entry.result for entry in Books.of(tmp_path / "a").history.entries()] == [Result.CANCELLED]
    repository = open_repository(str(folders[0]))
    assert read_catalog(repository).backups == []
    with locked(repository, "test", wait_s=0):
        pass


def test_ctrl_c_on_who_watches_ends_the_watching_alone(
    processes: Processes, primary: Process, folders: list[Path]
) -> None:
    """It ends with 130 and says that the run goes on, and how it is followed again and ended; both is true."""
    started = processes.run("backups", "start", "slow", "--server", primary.address, "--json")
    run_id = json.loads(started.stdout)["id"]
    watching = processes.start("backups", "watch", run_id, "--server", primary.address)
    wait_until(lambda: (folders[0] / "understudy.json").exists())
    wait_until(lambda: is_connected(watching))
    watching.send(signal.SIGINT)
    assert watching.wait() == INTERRUPTED
    (line,) = watching.stderr.splitlines()
    assert line.startswith(f"understudy: run {run_id} goes on; ")
    for command in ("watch", "cancel"):
        assert f"`understudy backups {command} {run_id} --server {primary.address}`" in line
    cancelled = processes.run("backups", "cancel", run_id, "--server", primary.address, "--json")
    assert json.loads(cancelled.stdout)["was"] == "running"


def is_connected(process: Process) -> bool:
    """Whether it has a connection over TCP."""
    sockets = {f"socket:[{row[9]}]" for row in connections(process.pid)}
    with contextlib.suppress(OSError):  # a file that was closed just now
        return any(os.readlink(each) in sockets for each in Path(f"/proc/{process.pid}/fd").iterdir())
    return False


def connections(pid: int) -> list[list[str]]:
    """The established ones of the process's network, as the kernel tells them."""
    tables = (Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6"))
    return [row for table in tables for line in table if (row := line.split())[3] == "01"]
