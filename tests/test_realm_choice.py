"""Realms that a backup is to hold and that are not there: a mistyped name is no backup of nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from backup_helpers import contents
from harness import Processes, complaint
from nodes import assert_sound, put

from understudy.backup.catalog import read_catalog
from understudy.backup.history import Result
from understudy.backup.manifest import read_manifest
from understudy.backup.policy import Policy, parse_policy
from understudy.backup.repository import open_repository
from understudy.backup.run import run_policy
from understudy.client import connect
from understudy.common.types import SYSTEM_REALMS

FAILED, USAGE = 1, 2


@pytest.fixture
def source(processes: Processes, tmp_path: Path) -> Path:
    """A server's directory with three realms, of which one was dropped again."""
    primary = processes.primary(tmp_path / "a")
    for realm in ("/orders", "/~/notes", "/gone"):
        put(primary.address, realm, (b"key", b"value"))
    with connect(primary.address) as server:
        server.drop_realm("/gone")
    primary.terminate()
    return tmp_path / "a"


def realms_of(path: Path) -> set[str]:
    return set(contents(path)) - set(SYSTEM_REALMS)


@pytest.mark.parametrize("name", ["directory", "archive.tar.zst", "-"])
@pytest.mark.parametrize(
    "choice",
    [
        ("--realm", "/nope"),
        ("--realm", "/gone"),
        ("--realm", "/nope", "--portable"),
        ("--realm", "/orders", "--exclude", "/orders"),
        ("--exclude", "/**"),
    ],
    ids=" ".join,
)
def test_a_choice_of_nothing_makes_nothing(
    processes: Processes, tmp_path: Path, source: Path, name: str, choice: tuple[str, ...]
) -> None:
    """G8: it is a mistake, and the error names what is there."""
    target = name if name == "-" else tmp_path / name
    refused = processes.run("backup", "-f", source, "-t", target, *choice, code=USAGE)
    assert f"holds no realm that {' '.join(choice[:2])}" in complaint(refused)
    assert "/orders" in complaint(refused)
    assert refused.stdout == b""
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["directory", "archive.tar.zst"])
def test_a_pattern_that_matches_nothing_is_named(
    processes: Processes, tmp_path: Path, source: Path, name: str
) -> None:
    """G8: the other realms are saved, the exit code is 1, and the backup itself says what it lacks."""
    target, problem = tmp_path / name, "the backup has no realm /nope"
    choice = ("--realm", "/orders", "--realm", "/nope")
    made = processes.run("backup", "-f", source, "-t", target, *choice, "--json", code=FAILED)
    assert f"problem: {problem}" in made.stderr.decode()
    assert json.loads(made.stdout)["problems"] == [problem]
    restored = processes.run("restore", target, "--to", tmp_path / "b", *choice, "--json", code=FAILED)
    assert json.loads(restored.stdout)["problems"] == [problem]
    assert_sound(tmp_path / "b")
    assert realms_of(tmp_path / "b") == {"/orders"}
    assert read_manifest(tmp_path / "b").realms_unmatched == ["/nope"]


@pytest.mark.parametrize("choice", [("--exclude", "/nope"), ("--realm", "/**", "--exclude", "/nope")])
def test_what_is_not_wanted_need_not_be_there(
    processes: Processes, tmp_path: Path, source: Path, choice: tuple[str, ...]
) -> None:
    """An --exclude that matches nothing is no mistake."""
    processes.run("backup", "-f", source, "-t", tmp_path / "b", *choice)
    assert realms_of(tmp_path / "b") == {"/orders", "/~/notes"}


def policy_of(folder: Path, *realms: str) -> Policy:
    folder.mkdir(exist_ok=True)
    table = {"name": "n", "repositories": [str(folder)], "realms": list(realms), "retries": 3}
    return parse_policy(table, "u.toml")


def test_a_policy_that_chooses_nothing_fails(tmp_path: Path, source: Path) -> None:
    """G8: at once, with the reason, and nothing is in the repository."""
    folder = tmp_path / "repository"
    report = run_policy(policy_of(folder, "/nope"), source, sleep=pytest.fail)
    assert report.result is Result.FAILED
    assert "holds no realm that --realm /nope chooses" in report.all_errors[0]
    assert read_catalog(open_repository(str(folder))).backups == []
    assert list((folder / "backups").rglob("*.zst")) == []


def test_a_policy_with_a_realm_that_is_not_there_is_done_in_part(tmp_path: Path, source: Path) -> None:
    """G8: perhaps the realm is made later; until then each run says so, and its backups count."""
    folder = tmp_path / "repository"
    report = run_policy(policy_of(folder, "/orders", "/nope"), source)
    assert report.result is Result.PARTIAL
    assert report.all_errors == [f"{folder}: the backup has no realm /nope"]
    (stored,) = read_catalog(open_repository(str(folder))).backups
    assert stored.manifest.problems == ["the backup has no realm /nope"]
    assert stored.is_restorable


def test_a_realm_with_a_tilde_can_be_chosen(processes: Processes, tmp_path: Path, source: Path) -> None:
    """While there are no users it is a segment like any other, in a backup and in a restore."""
    processes.run("backup", "-f", source, "-t", tmp_path / "b", "--realm", "/~/*")
    assert realms_of(tmp_path / "b") == {"/~/notes"}
    processes.run("backup", "-f", source, "-t", tmp_path / "c")
    processes.run("restore", tmp_path / "c", "--to", tmp_path / "d", "--realm", "/~/notes")
    assert realms_of(tmp_path / "d") == {"/~/notes"}
