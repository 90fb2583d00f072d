"""``understudy backups`` and ``backup run`` at the wrong place, and where there is nothing to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from harness import Process, Processes, complaint
from nodes import put
from repositories import policy_to

from understudy.backup.catalog import StoredBackup, read_catalog
from understudy.backup.repository import IDENTITY, claim, open_repository
from understudy.backup.run import run_policy
from understudy.common.types import ClusterId

USAGE, DIRECTORY = 2, 6


@pytest.fixture
def primary(processes: Processes, tmp_path: Path) -> Process:
    """A server with an entry."""
    process = processes.primary(tmp_path / "a")
    put(process.address, "/realm", (b"key", b"0"))
    return process


def made(tmp_path: Path, folder: Path) -> StoredBackup:
    return run_policy(policy_to(folder), tmp_path / "a").backups[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


# -- where there is no repository ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [("list",), ("verify",), ("verify", "--all", "--json"), ("prune", "--last", "1")]
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_folder_that_is_no_repository_is_refused(
    processes: Processes, folder: Path, command: tuple[str, ...], dry_run: bool
) -> None:
    """G10: a cron job on the wrong folder fails, and nothing is written there."""
    name, *options = command
    options += ["--dry-run"] if dry_run and name == "prune" else []
    (folder / "mine.tar.zst").touch()
    refused = processes.run("backups", name, folder, *options, code=USAGE)
    assert f"{folder} is no repository of backups: it has no {IDENTITY}" in complaint(refused)
    assert names(folder) == ["mine.tar.zst"]


def test_a_data_directory_is_no_repository(primary: Process, processes: Processes, tmp_path: Path) -> None:
    """G10: nor is a server's directory taken for one that is empty."""
    refused = processes.run("backups", "list", tmp_path / "a", code=USAGE)
    assert "is no repository of backups" in complaint(refused)


def test_a_repository_without_backups_is_one(processes: Processes, folder: Path) -> None:
    """What a run has begun with is listed and checked, with nothing in it."""
    claim(open_repository(str(folder)), ClusterId(bytes(16)))
    for name in ("list", "verify"):
        assert processes.run("backups", name, folder).stdout.decode() == f"no backup in {folder}\n"


def test_a_dry_run_of_prune_writes_nothing(
    primary: Process, processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """It needs no lock, and so works where nothing may be written."""
    first, _ = (made(tmp_path, folder) for _ in range(2))
    (folder / "lock.json").unlink()
    before = names(folder)
    said = processes.run("backups", "prune", folder, "--last", "1", "--dry-run").stdout.decode()
    assert f"would remove {first.id}" in said
    assert names(folder) == before
    processes.run("backups", "prune", folder, "--last", "1")
    assert len(read_catalog(open_repository(str(folder))).backups) == 1


@pytest.mark.parametrize("command", ["run", "drill"])
def test_a_policy_of_no_data_directory_fails_at_once(
    processes: Processes, tmp_path: Path, folder: Path, command: str
) -> None:
    """Nothing is tried again, and nothing is written, whether the directory is there or not."""
    config = tmp_path / "u.toml"
    config.write_text(f'[[backup]]\nname = "nightly"\nrepositories = ["{folder}"]\n')
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        arguments = ("nightly", "--config", config, "--data-dir", tmp_path / name)
        refused = processes.run("backup", command, *arguments, code=DIRECTORY)
        assert f"{tmp_path / name} is not a data directory" in complaint(refused)
    assert names(tmp_path / "empty") == names(folder) == []
    assert not (tmp_path / "absent").exists()


# -- what is said ----------------------------------------------------------------------------------------------


def test_a_copy_to_where_it_is_says_so(
    primary: Process, processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """Nothing is copied to the repository itself, nor a second time to another one; JSON tells it apart."""
    backup = made(tmp_path, folder)
    (tmp_path / "other").mkdir()

    def copied(to: str) -> str:
        return processes.run("backups", "copy", folder, backup.id, "--to", tmp_path / to).stdout.decode()

    assert copied("repository") == f"{backup.id} is in {folder} already, intact\n"
    assert copied("other") == f"copied {backup.id} to {tmp_path / 'other'}\n"
    again = ("backups", "copy", folder, backup.id, "--to", tmp_path / "other", "--json")
    told = json.loads(processes.run(*again).stdout)
    assert told == {"backup": backup.id, "to": str(tmp_path / "other"), "was_there": True}
    removed = processes.run("backups", "delete", tmp_path / "other", backup.id, "--force", "--json")
    assert json.loads(removed.stdout) == {"removed": backup.id}


def test_one_backup_or_all_are_checked(
    primary: Process, processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """Who names one and asks for all is told, and nothing is read."""
    backup = made(tmp_path, folder)
    refused = processes.run("backups", "verify", folder, backup.id, "--all", code=USAGE)
    assert "not both" in refused.stderr.decode()
    assert not (folder / backup.folder / "checks").exists()


@pytest.mark.parametrize("setting", ["before", "after", "on_failure"])
def test_a_hook_that_fails_is_named_as_the_policy_names_it(
    primary: Process, tmp_path: Path, folder: Path, setting: str
) -> None:
    """The same program may stand in several settings."""
    program = shutil.which("false")
    assert program is not None
    if setting == "on_failure":
        folder.rmdir()
    report = run_policy(policy_to(folder, **{setting: (program,)}), tmp_path / "a")
    assert report.errors == [f"the hook {program} ({setting}) ended with status 1"]
