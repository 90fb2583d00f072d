"""What the status of a node that does not run says of its backups, from what its directory remembers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import Processes, wait_until
from nodes import offline_status, put, warnings

from understudy.backup.books import FOLDER, Books
from understudy.backup.history import Result

START_S = 1_795_262_400.0


def note(data_dir: Path, policy: str, start_s: float, result: Result, *errors: str) -> None:
    """Writes down a run."""
    history = Books.of(data_dir).history
    history.add(
        number=history.reserve(),
        policy=policy,
        start_s=start_s,
        seconds=1.0,
        result=result,
        realms=1,
        bytes=1,
        lsn=1,
        errors=errors,
    )


def told(processes: Processes, data_dir: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(processes.run("status", data_dir, "--json").stdout)
    return facts


def test_the_status_of_a_stopped_node_says_how_its_backups_went(processes: Processes, tmp_path: Path) -> None:
    """The same times, table and warning as of the running node, from the history alone."""
    data_dir, config = tmp_path / "a", tmp_path / "u.toml"
    (tmp_path / "repository").mkdir()
    config.write_text(
        f'[[backup]]\nname = "nightly"\nrepositories = ["{tmp_path}/repository"]\nretries = 0\n'
    )
    run = ("backup", "run", "nightly", "--config", config, "--data-dir", data_dir)
    primary = processes.primary(data_dir, "--config", config)
    put(primary.address, "/realm", (b"key", b"value"))
    processes.run(*run)
    (tmp_path / "repository").rename(tmp_path / "away")
    processes.run(*run, code=1)
    wait_until(lambda: "did not go well" in warnings(primary.address))  # another process tells it
    running = told(processes, data_dir)
    assert primary.terminate() == 0
    stopped = told(processes, data_dir)
    for key in ("policy", "last_success", "last_failure", "last_error", "running", "next", "run"):
        assert stopped["backups"][0][key] == running["backups"][0][key]
    (warning,) = (each for each in running["warnings"] if "did not go well" in each)
    assert stopped["warnings"] == [warning]
    shown = processes.run("status", data_dir).stdout.decode()
    assert f"warning: {warning}" in shown
    (row,) = (line for line in shown.splitlines() if line.startswith("nightly"))
    assert row.split() == [
        "nightly",
        running["backups"][0]["last_success"],
        running["backups"][0]["last_failure"],
    ]


def test_each_policy_that_was_run_has_its_row_and_its_warning(processes: Processes, tmp_path: Path) -> None:
    """By name; a failure that a success came after is not warned of, and cancelled runs are neither."""
    data_dir = tmp_path / "a"
    processes.primary(data_dir).terminate()
    assert not offline_status(data_dir).backups
    assert not (data_dir / FOLDER).exists()
    note(data_dir, "weekly", START_S, Result.PARTIAL, "no \ud800 space")
    note(data_dir, "nightly", START_S, Result.FAILED, "no route")
    note(data_dir, "nightly", START_S + 60, Result.DONE)
    note(data_dir, "nightly", START_S + 120, Result.CANCELLED, "an operator")
    found = offline_status(data_dir)
    assert [(each.policy, each.last_success_s, each.last_failure_s) for each in found.backups] == [
        ("nightly", START_S + 60, START_S),
        ("weekly", 0, START_S),
    ]
    assert list(found.warnings) == ["backup weekly: the last run did not go well: no \\ud800 space"]
    assert "never" in processes.run("status", data_dir).stdout.decode()


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"format": 99}', "was written by a newer version"), ('{"format": 1}', "history.json can't be read")],
)
def test_a_history_that_can_not_be_read_is_a_warning(
    processes: Processes, tmp_path: Path, content: str, said: str
) -> None:
    """The rest of the status is told, and nothing is changed: it is what people look at when something is wrong."""
    data_dir = tmp_path / "a"
    processes.primary(data_dir).terminate()
    note(data_dir, "nightly", START_S, Result.DONE)
    (data_dir / FOLDER / "history.json").write_text(content)
    found = offline_status(data_dir)
    assert found.role == "primary"
    assert not found.backups
    assert said in found.warnings[0]
    assert (data_dir / FOLDER / "history.json").read_text() == content
