"""What a restore says of points that are not, or not quite, what somebody is after; and what is left where it fails."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from harness import Processes, complaint
from nodes import put, settle
from repositories import done, policy_to, ship

from understudy.backup.archive import write_archive
from understudy.backup.archive_options import ArchiveOptions
from understudy.backup.catalog import Finding, StoredBackup, note_check
from understudy.backup.encryption import Encryption
from understudy.backup.make import make_backup
from understudy.backup.manifest import read_manifest, utc_text
from understudy.backup.repository import open_repository
from understudy.backup.run import run_policy

USAGE, CORRUPT, NOT_PERMITTED = 2, 4, 7
FUTURE = "2100-01-01T00:00:00Z"


def stored(processes: Processes, tmp_path: Path, folder: Path) -> StoredBackup:
    """A backup, and log behind it."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"0"))
    backup = done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a"))
    for number in range(5):
        put(primary.address, "/realm", (b"key", b"%d" % number))
    settle(primary.address)
    primary.terminate()
    ship(tmp_path / "a", open_repository(str(folder)))
    return backup


def now() -> str:
    return utc_text(time.time())


def test_a_moment_that_a_later_epoch_has_given_up_is_told(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G3: a restored server's epoch goes on from an earlier entry; which older one reaches further is said, and how."""
    backup = stored(processes, tmp_path, folder)
    last = ship(tmp_path / "a", open_repository(str(folder)))
    fork = backup.manifest.lsn + 1
    moment = now()
    processes.run("restore", folder, "--to", tmp_path / "b", "--lsn", str(fork))
    second = processes.primary(tmp_path / "b")
    put(second.address, "/realm", (b"key", b"second"))
    settle(second.address)
    second.terminate()
    ship(tmp_path / "b", open_repository(str(folder)))
    made = processes.run("restore", folder, "--to", tmp_path / "c", "--at", moment, "--json")
    facts = json.loads(made.stdout)
    assert facts["lsn"] == fork
    assert not facts["ended"]
    (note,) = facts["notes"]
    assert f"note: {note}" in made.stderr.decode()
    assert f"epoch 1 has entries up to LSN {last}, and epoch 2 has given up those behind LSN {fork}" in note
    assert "--epoch 1 restores them" in note
    made = processes.run("restore", folder, "--to", tmp_path / "d", "--at", moment, "--epoch", "1", "--json")
    assert json.loads(made.stdout)["lsn"] == last
    assert not any("given up" in note for note in json.loads(made.stdout)["notes"])
    before = read_manifest(tmp_path / "c").time
    made = processes.run("restore", folder, "--to", tmp_path / "e", "--at", before, "--epoch", "1", "--json")
    assert json.loads(made.stdout)["notes"] == []


@pytest.mark.parametrize("point", [(), ("--lsn", "4"), ("--at", FUTURE)], ids=" ".join)
def test_a_dry_run_says_its_facts(
    processes: Processes, tmp_path: Path, folder: Path, point: tuple[str, ...]
) -> None:
    """As JSON, too: the backup, where it stands, and how far the log leads, without anything made."""
    backup = stored(processes, tmp_path, folder)
    last = ship(tmp_path / "a", open_repository(str(folder)))
    command = ("restore", folder, "--to", tmp_path / "b", "--dry-run", "--json", *point)
    assert json.loads(processes.run(*command).stdout) == {
        "backup": backup.id,
        "lsn": backup.manifest.lsn,
        "time": backup.manifest.time,
        "epoch": 1,
        "with_log": True,
        "to_lsn": 4 if "--lsn" in point else None,
        "to_time": "2100-01-01T00:00:00.000000Z" if "--at" in point else None,
        "log_epoch": 1,
        "log_lsn": last,
        "ended": False,
    }
    assert not (tmp_path / "b").exists()


def test_a_dry_run_says_where_the_log_is_known_to_end(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """Where none follows a backup, nothing later than that is there."""
    processes.primary(tmp_path / "a").terminate()
    backup = done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a"))
    command = ("restore", folder, "--to", tmp_path / "b", "--dry-run", "--json", "--at", FUTURE)
    said = processes.run(*command)
    assert json.loads(said.stdout)["ended"]
    assert f"ends with LSN {backup.manifest.lsn} of epoch 1" in said.stderr.decode()


@pytest.mark.parametrize("name", ["directory", "archive.tar.zst"])
def test_a_backup_that_ends_before_the_moment_says_so(
    processes: Processes, tmp_path: Path, name: str
) -> None:
    """As the log of a repository does; where something lies behind the moment, there is nothing to say."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"0"))
    settle(primary.address)
    put(primary.address, "/realm", (b"key", b"1"))
    moment = now()
    put(primary.address, "/realm", (b"key", b"2"))
    primary.kill()
    make = make_backup if name == "directory" else write_archive
    lsn = make(tmp_path / "a", tmp_path / name).manifest.lsn
    made = processes.run("restore", tmp_path / name, "--to", tmp_path / "b", "--at", FUTURE, "--json")
    assert json.loads(made.stdout)["ended"]
    assert f"note: the backup ends with LSN {lsn} of " in made.stderr.decode()
    made = processes.run("restore", tmp_path / name, "--to", tmp_path / "c", "--at", moment, "--json")
    assert not json.loads(made.stdout)["ended"]
    assert "note:" not in made.stderr.decode()


def test_a_damaged_backup_that_was_passed_over_is_named(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """And the earliest moment that can be restored, where the point lies before it."""
    primary = processes.primary(tmp_path / "a")
    policy = policy_to(folder, archive_log=False)
    put(primary.address, "/realm", (b"key", b"0"))
    first, moment = done(run_policy(policy, tmp_path / "a")), now()
    put(primary.address, "/realm", (b"key", b"1"))
    second = done(run_policy(policy, tmp_path / "a"))
    note_check(open_repository(str(folder)), first, Finding.DAMAGED, "its digest is another", time.time())
    refused = processes.run("restore", folder, "--to", tmp_path / "b", "--at", moment, code=USAGE)
    assert f"{first.id}, of {first.manifest.time}, is known to be damaged" in complaint(refused)
    earliest = f"the earliest moment that can be restored is that of LSN {second.manifest.lsn}, "
    assert earliest + second.manifest.time in complaint(refused)
    refused = processes.run("restore", folder, "--to", tmp_path / "b", "--lsn", "1", code=USAGE)
    assert earliest in complaint(refused)
    assert "known to be damaged" not in complaint(refused)


@pytest.mark.parametrize("choice", [(), ("--realm", "/realm")])
def test_what_fails_before_anything_is_in_place_leaves_nothing(
    processes: Processes, tmp_path: Path, choice: tuple[str, ...]
) -> None:
    """A wrong passphrase, or a damaged backup; a directory that was there before stays, and the command says so."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"0"))
    primary.terminate()
    encrypted = ArchiveOptions(encryption=Encryption(passphrase="right"))
    write_archive(tmp_path / "a", tmp_path / "a.tar.zst.age", encrypted)
    (tmp_path / "wrong").write_text("wrong\n")
    (tmp_path / "wrong").chmod(0o600)
    command = ("restore", tmp_path / "a.tar.zst.age", "--passphrase-file", tmp_path / "wrong", *choice)
    refused = processes.run(*command, "--to", tmp_path / "b", code=NOT_PERMITTED)
    assert not (tmp_path / "b").exists()
    assert "not finished" not in refused.stderr.decode()
    (tmp_path / "there").mkdir()
    refused = processes.run(*command, "--to", tmp_path / "there", code=NOT_PERMITTED)
    assert f"{tmp_path / 'there'} is not finished" in refused.stderr.decode()
    make_backup(tmp_path / "a", tmp_path / "damaged")
    (tmp_path / "damaged" / "store" / "data.mdb").write_bytes(b"damage")
    command = ("restore", tmp_path / "damaged", "--to", tmp_path / "c", *choice)
    processes.run(*command, code=CORRUPT)
    assert not (tmp_path / "c").exists()
