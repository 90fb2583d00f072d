"""Backups into a directory: made of servers that go on, started on, brought up to date, cut off."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner
from harness import Process, Processes, complaint, wait_until
from killing import KILLED, Nursery
from nodes import (
    DIRECTORY,
    RESET_NEEDED,
    Load,
    Pair,
    assert_sound,
    checkpoint,
    copy_node,
    offline_status,
    pairs,
    put,
    status,
    wait_until_caught_up,
)

from understudy.backup import make
from understudy.backup.contents import STORE_FILE, Member
from understudy.backup.make import make_backup
from understudy.backup.manifest import FileEntry, read_manifest
from understudy.backup.progress import Meter
from understudy.backup.restore import restore_backup
from understudy.backup.writing import describe_file, write_member
from understudy.cli.main import cli
from understudy.common.directory import IN_PROGRESS_FILE, MANIFEST_FILE, DataDirectory, Role
from understudy.common.errors import CorruptionError, DiskFull

CORRUPT = 4
INTERRUPTED = 130


def backed_up(source: Path, target: Path, *, update: bool = False) -> int:
    """Backs up, checks that the result is sound, and returns its LSN."""
    lsn = make_backup(source, target, update=update).manifest.lsn
    assert_sound(target)
    return lsn


def serve(processes: Processes, backup: Path, to: Path) -> Process:
    """A primary on a copy of a backup."""
    return processes.primary(copy_node(backup, to))


def filled(processes: Processes, path: Path, count: int = 200) -> Process:
    """A primary with so many keys in each of two realms, half of them in its store."""
    primary = processes.primary(path)
    for realm in ("/one", "/two"):
        put(primary.address, realm, *((b"%06d" % number, b"v" * 100) for number in range(count)))
    checkpoint(primary.address)
    put(primary.address, "/one", *((b"late%06d" % number, b"v") for number in range(count)))
    return primary


# -- made of servers that go on --------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["primary", "replica"])
def test_a_backup_under_load_holds_all_that_was_acknowledged_before_it_began(
    processes: Processes, tmp_path: Path, of: str
) -> None:
    """G1, G2, G8: made of a running primary or replica, it is whole, at one LSN, and a server starts on it."""
    pair = Pair(processes, tmp_path, "--durability", "applied")
    with Load(pair.addresses) as load:
        for number in range(3):
            load.wait_for(100)
            before = dict(load.acknowledged)
            lsn = backed_up(pair.a if of == "primary" else pair.b, tmp_path / f"backup{number}")
            assert lsn >= max(receipt.lsn for receipt in before.values())
            load.wait_for(10)
    assert load.errors == []
    server = serve(processes, tmp_path / "backup2", tmp_path / "served")
    found = pairs(server.address, "/load")
    assert before.keys() <= found.keys()
    counted = sum(int(value) for key, value in found.items() if key.startswith(b"count/"))
    assert counted == sum(
        not key.startswith(b"count/") for key in found
    )  # no transaction in part, none twice


def test_a_server_on_a_backup_begins_a_new_epoch_under_a_name_of_its_own(
    processes: Processes, tmp_path: Path
) -> None:
    """G3: it is a primary of the same cluster, in the next epoch, with a node id that no other copy has."""
    primary = filled(processes, tmp_path / "a")
    backed_up(tmp_path / "a", tmp_path / "backup")
    first = serve(processes, tmp_path / "backup", tmp_path / "first")
    second = serve(processes, tmp_path / "backup", tmp_path / "second")
    was, one, other = status(primary.address), status(first.address), status(second.address)
    assert one.cluster == other.cluster == was.cluster
    assert (one.role, one.epoch, one.lsn) == ("primary", was.epoch + 1, was.lsn + 1)
    assert len({was.node, one.node, other.node}) == 3
    assert pairs(first.address, "/one") == pairs(primary.address, "/one")
    assert not (tmp_path / "first" / MANIFEST_FILE).exists()
    assert (tmp_path / "first" / "admin-token").read_text() == (tmp_path / "a" / "admin-token").read_text()


def test_a_replica_of_the_old_primary_follows_the_server_on_a_backup_only_without_a_fork(
    processes: Processes, tmp_path: Path
) -> None:
    """G3: who holds entries that the backup does not have is told so by the server on it, and keeps them."""
    pair = Pair(processes, tmp_path)
    put(pair.primary.address, "/realm", (b"in", b"the backup"))
    backed_up(pair.a, tmp_path / "backup")
    put(pair.primary.address, "/realm", (b"after", b"it"))
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    pair.stop()
    server = serve(processes, tmp_path / "backup", tmp_path / "served")
    replica = processes.start(
        "replica", "--data-dir", pair.b, "--primary", server.address, "--id", "b", "--listen", "127.0.0.1:0"
    )
    assert replica.wait() == RESET_NEEDED
    assert offline_status(pair.b).lsn > read_manifest(tmp_path / "backup").lsn


def test_a_stopped_servers_directory_and_a_backup_can_be_backed_up(
    processes: Processes, tmp_path: Path
) -> None:
    """G8: what a server that was killed has in its log only is in the backup, and in the backup of the backup."""
    primary = filled(processes, tmp_path / "a")
    expected = pairs(primary.address, "/one")
    primary.kill()
    lsn = backed_up(tmp_path / "a", tmp_path / "b")
    assert backed_up(tmp_path / "b", tmp_path / "c") == lsn
    assert pairs(serve(processes, tmp_path / "c", tmp_path / "served").address, "/one") == expected


def test_the_line_that_people_see_says_how_much_at_which_lsn(processes: Processes, tmp_path: Path) -> None:
    """The command prints realms, size, LSN and time, and the same as JSON."""
    primary = filled(processes, tmp_path / "a")
    lsn = status(primary.address).lsn
    said = processes.run("backup", "-f", tmp_path / "a", "-t", tmp_path / "b").stdout.decode()
    assert said.startswith("2 realms, ")
    assert f", at LSN {lsn}, in " in said
    told = json.loads(
        processes.run("backup", "-f", tmp_path / "a", "-t", tmp_path / "b", "--update", "--json").stdout
    )
    assert (told["realms"], told["lsn"], told["epoch"]) == (2, lsn, 1)


def test_the_manifest_has_the_digest_of_each_file(processes: Processes, tmp_path: Path) -> None:
    """G11: read again, each file is what the manifest says."""
    filled(processes, tmp_path / "a")
    backed_up(tmp_path / "a", tmp_path / "b")
    manifest = read_manifest(tmp_path / "b")
    assert {entry.path.partition("/")[0] for entry in manifest.files} == {"store", "log", "admin-token"}
    for entry in manifest.files:
        assert describe_file(tmp_path / "b", entry.path) == entry


# -- refusals --------------------------------------------------------------------------------------------------


def test_what_is_no_data_directory_is_no_source(processes: Processes, tmp_path: Path) -> None:
    """A wrong source is refused by name, and nothing is made (G4)."""
    (tmp_path / "other").mkdir()
    done = processes.run("backup", "-f", tmp_path / "other", "-t", tmp_path / "b", code=DIRECTORY)
    assert "is not a data directory" in complaint(done)
    assert not (tmp_path / "b").exists()


def test_a_target_that_holds_anything_is_left_as_it_is(processes: Processes, tmp_path: Path) -> None:
    """G4: neither foreign files, nor a server's directory, nor a backup is written into without being asked to."""
    filled(processes, tmp_path / "a").terminate()
    other = copy_node(tmp_path / "a", tmp_path / "other")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "notes.txt").write_text("mine")
    backed_up(tmp_path / "a", tmp_path / "b")
    for target in (other, tmp_path / "files", tmp_path / "b"):
        before = {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.name != "lock"}
        processes.run("backup", "-f", tmp_path / "a", "-t", target, code=DIRECTORY)
        assert {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.name != "lock"} == before
    done = processes.run("backup", "-f", tmp_path / "a", "-t", other, "--update", code=DIRECTORY)
    assert "is no backup" in complaint(done)


def test_source_and_target_must_not_lie_within_each_other(processes: Processes, tmp_path: Path) -> None:
    """A backup into its own source is refused."""
    filled(processes, tmp_path / "a").terminate()
    done = processes.run("backup", "-f", tmp_path / "a", "-t", tmp_path / "a" / "backup", code=2)
    assert "lie within each other" in complaint(done)


def test_an_unfinished_backup_is_opened_by_nobody_but_an_update(processes: Processes, tmp_path: Path) -> None:
    """G8: while the file BACKUP_IN_PROGRESS is there, servers, verify, promote and another backup refuse it."""
    filled(processes, tmp_path / "a").terminate()
    backed_up(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / IN_PROGRESS_FILE).touch()
    for arguments in (
        ("primary", "--data-dir", tmp_path / "b", "--listen", "127.0.0.1:0"),
        ("verify", tmp_path / "b"),
        ("promote", tmp_path / "b"),
        ("status", tmp_path / "b"),
        ("backup", "-f", tmp_path / "b", "-t", tmp_path / "c"),
        ("backup", "-f", tmp_path / "a", "-t", tmp_path / "b"),
    ):
        assert "not finished" in complaint(processes.run(*arguments, code=DIRECTORY))
    backed_up(tmp_path / "a", tmp_path / "b", update=True)


def test_a_backup_is_not_promoted_and_no_replica_runs_in_it(processes: Processes, tmp_path: Path) -> None:
    """Each command that needs another role names the one that starts a server on a backup."""
    filled(processes, tmp_path / "a").terminate()
    backed_up(tmp_path / "a", tmp_path / "b")
    for arguments in (
        ("promote", tmp_path / "b"),
        ("replica", "--data-dir", tmp_path / "b", "--primary", "127.0.0.1:1", "--listen", "127.0.0.1:0"),
    ):
        assert "understudy primary --data-dir" in complaint(processes.run(*arguments, code=DIRECTORY))
    assert offline_status(tmp_path / "b").role == Role.BACKUP


# -- brought up to date ----------------------------------------------------------------------------------------


def test_an_update_brings_what_has_come_since(processes: Processes, tmp_path: Path) -> None:
    """G8: the log behind the backup is appended; the store is not copied again, and a server starts on the result."""
    primary = filled(processes, tmp_path / "a")
    first = backed_up(tmp_path / "a", tmp_path / "b")
    put(primary.address, "/three", (b"key", b"new"))
    report = make_backup(tmp_path / "a", tmp_path / "b", update=True)
    assert report.bytes_copied < 10_000
    assert report.manifest.lsn > first
    assert report.manifest.realms == 3
    assert_sound(tmp_path / "b")
    assert backed_up(tmp_path / "a", tmp_path / "b", update=True) == report.manifest.lsn  # nothing to do
    served = serve(processes, tmp_path / "b", tmp_path / "served")
    assert pairs(served.address, "/three") == {b"key": b"new"}
    assert pairs(served.address, "/one") == pairs(primary.address, "/one")


def test_behind_a_long_log_the_store_is_copied_anew(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9, G11: what a server would have to replay stays bounded, and the store is the source's own."""
    primary = filled(processes, tmp_path / "a")
    first = read_manifest_after(tmp_path / "a", tmp_path / "b")
    put(primary.address, "/two", *((b"more%06d" % number, b"w" * 100) for number in range(500)))
    checkpoint(primary.address)
    put(primary.address, "/two", (b"last", b"one"))
    backed_up(tmp_path / "a", tmp_path / "b", update=True)
    assert read_manifest(tmp_path / "b").checkpoint_lsn == first
    copy_anew(monkeypatch)
    backed_up(tmp_path / "a", tmp_path / "b", update=True)
    manifest = read_manifest(tmp_path / "b")
    assert manifest.checkpoint_lsn == status(primary.address).checkpoint_lsn > first
    assert_sound(tmp_path / "b")
    for entry in manifest.files:
        assert describe_file(tmp_path / "b", entry.path) == entry
    put(primary.address, "/two", (b"no checkpoint", b"since"))
    assert make_backup(tmp_path / "a", tmp_path / "b", update=True).bytes_copied < 1_000  # no copy would help
    assert pairs(serve(processes, tmp_path / "b", tmp_path / "s").address, "/two") == pairs(
        primary.address, "/two"
    )


def test_many_segments_are_read_only_as_far_as_they_have_grown(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G11: what the manifest says of each file is true, though those that are as they were are not read again."""
    primary = filled(processes, tmp_path / "a")
    backed_up(tmp_path / "a", tmp_path / "b")
    described: list[str] = []

    def describe(root: Path, name: str) -> FileEntry:
        described.append(name)
        return describe_file(root, name)

    monkeypatch.setattr(make, "describe_file", describe)
    monkeypatch.setattr(make, "REPLAYED_BYTES", 1 << 30)
    for _ in range(7):
        value = os.urandom(15 << 20)
        put(primary.address, "/two", (b"large", value[: 8 << 20]), (b"larger", value[8 << 20 :]))
        described.clear()
        backed_up(tmp_path / "a", tmp_path / "b", update=True)
    segments = sorted(path.name for path in (tmp_path / "b" / "log").iterdir())
    assert len(segments) > 1
    assert f"log/{segments[0]}" not in described
    for entry in read_manifest(tmp_path / "b").files:
        assert describe_file(tmp_path / "b", entry.path) == entry
    assert_sound(tmp_path / "b")


def copy_anew(patched: pytest.MonkeyPatch) -> None:
    """Any log behind a backup's store is too much."""
    patched.setattr(make, "REPLAYED_BYTES", 1)
    patched.setattr(make, "_REPLAYED_SHARE", 0)


def read_manifest_after(source: Path, target: Path) -> int:
    """Backs up; where the backup's store stands."""
    backed_up(source, target)
    return read_manifest(target).checkpoint_lsn


def test_a_backup_that_the_log_no_longer_reaches_is_made_anew_in_its_place(
    processes: Processes, tmp_path: Path
) -> None:
    """G8: where the source has pruned what the backup lacks, all is copied, and replaces the old when it is whole."""
    flags = ("--log-floor", "0")
    primary = processes.primary(tmp_path / "a", *flags)
    put(primary.address, "/realm", (b"key", b"old"))
    backed_up(tmp_path / "a", tmp_path / "b")
    value = os.urandom(8 << 20)
    for number in range(18):
        put(primary.address, "/realm", (b"large%d" % (number % 2), value))
        checkpoint(primary.address)
    wait_until(lambda: len(list((tmp_path / "a" / "log").iterdir())) == 1)
    report = make_backup(tmp_path / "a", tmp_path / "b", update=True)
    assert report.bytes_copied > len(value)
    assert_sound(tmp_path / "b")
    assert not (tmp_path / "b" / "incoming").exists()
    served = serve(processes, tmp_path / "b", tmp_path / "served")
    assert pairs(served.address, "/realm") == pairs(primary.address, "/realm")


@pytest.mark.parametrize("behind", [True, False])
def test_a_backup_that_knows_more_than_its_source_is_kept(
    processes: Processes, tmp_path: Path, behind: bool
) -> None:
    """G4: neither a source that lags, nor one that went another way, takes entries from a backup."""
    primary = filled(processes, tmp_path / "a")
    primary.terminate()
    other = copy_node(tmp_path / "a", tmp_path / "other")
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/one", (b"only", b"here"))
    lsn = backed_up(tmp_path / "a", tmp_path / "b")
    if not behind:
        forked = processes.primary(other)
        for number in range(20):
            put(forked.address, "/one", (b"%d" % number, b"there"))
    done = processes.run("backup", "-f", other, "-t", tmp_path / "b", "--update", code=RESET_NEEDED)
    assert "keep this backup" in complaint(done)
    assert not (tmp_path / "b" / IN_PROGRESS_FILE).exists()
    assert backed_up(tmp_path / "a", tmp_path / "b", update=True) == lsn


def test_a_backup_of_an_epoch_that_its_source_does_not_know_is_kept(
    processes: Processes, tmp_path: Path
) -> None:
    """G4: nor does a source take them that has pruned the log which would show that it went another way."""
    filled(processes, tmp_path / "a").terminate()
    copy_node(tmp_path / "a", tmp_path / "other")
    backed_up(tmp_path / "a", tmp_path / "b")
    restored = copy_node(tmp_path / "b", tmp_path / "restored")
    successor = processes.primary(restored)
    for value in (
        b"1",
        b"2",
    ):  # so that it ends where the source has no checkpoint, whose position it would know
        put(successor.address, "/one", (b"only", value))
    lsn = backed_up(restored, tmp_path / "b", update=True)
    old = processes.primary(tmp_path / "other", "--log-floor", "0")
    value = os.urandom(8 << 20)
    for number in range(18):
        put(old.address, "/one", (b"large%d" % (number % 2), value))
        checkpoint(old.address)
    wait_until(lambda: len(list((tmp_path / "other" / "log").iterdir())) == 1)
    arguments = ("backup", "-f", tmp_path / "other", "-t", tmp_path / "b", "--update")
    assert "keep this backup" in complaint(processes.run(*arguments, code=RESET_NEEDED))
    assert_sound(tmp_path / "b")
    assert read_manifest(tmp_path / "b").lsn == lsn


def test_another_clusters_backup_is_not_overwritten(processes: Processes, tmp_path: Path) -> None:
    """G4: a source of another cluster is refused."""
    filled(processes, tmp_path / "a").terminate()
    filled(processes, tmp_path / "other").terminate()
    backed_up(tmp_path / "a", tmp_path / "b")
    done = processes.run(
        "backup", "-f", tmp_path / "other", "-t", tmp_path / "b", "--update", code=RESET_NEEDED
    )
    assert "another cluster" in complaint(done)


def test_an_update_goes_on_across_a_promotion(processes: Processes, tmp_path: Path) -> None:
    """A backup made of the primary is brought up to date from the replica that was promoted in its place."""
    pair = Pair(processes, tmp_path, "--durability", "replica")
    put(pair.addresses, "/realm", (b"key", b"1"))
    backed_up(pair.a, tmp_path / "b1")
    primary = pair.fail_over()
    put(primary.address, "/realm", (b"key", b"2"))
    make_backup(pair.b, tmp_path / "b1", update=True)
    assert read_manifest(tmp_path / "b1").epoch == 2
    assert_sound(tmp_path / "b1")
    assert pairs(serve(processes, tmp_path / "b1", tmp_path / "s").address, "/realm") == {b"key": b"2"}


# -- bad luck --------------------------------------------------------------------------------------------------


def test_a_backup_killed_at_any_step_is_refused_until_it_is_finished(
    processes: Processes, tmp_path: Path
) -> None:
    """G8: whichever step a kill comes before, either there is no backup, or it is marked, or it is whole."""
    filled(processes, tmp_path / "a", count=50).terminate()
    lsn = offline_status(tmp_path / "a").lsn
    with Nursery(processes.environment) as nursery:
        for step in itertools.count(1):
            target = tmp_path / f"b{step}"
            process = processes.start(
                "backup", "-f", tmp_path / "a", "-t", target, launch=nursery.dying_at(step)
            )
            ended = process.wait()
            assert ended in (0, KILLED)
            if not (target / IN_PROGRESS_FILE).exists() and (target / MANIFEST_FILE).exists():
                assert_sound(target)
            elif target.exists() and any(target.iterdir()):
                processes.run("verify", target, code=DIRECTORY)
            assert backed_up(tmp_path / "a", target, update=True) == lsn
            shutil.rmtree(target)
            if ended == 0:
                break
    assert step > 10


@pytest.mark.parametrize("anew", [True, False])
def test_an_update_killed_at_any_step_is_finished_by_the_next(
    processes: Processes, tmp_path: Path, anew: bool
) -> None:
    """G8: an update that appends or copies all again can be cut off anywhere; the next, or --finish, makes it whole."""
    primary = filled(processes, tmp_path / "a", count=50)
    first = backed_up(tmp_path / "a", tmp_path / "b")
    put(primary.address, "/three", (b"key", b"new"))
    checkpoint(primary.address)
    primary.terminate()
    if anew:
        forget_the_log(tmp_path / "a")
    lsn = offline_status(tmp_path / "a").lsn
    with Nursery(processes.environment) as nursery:
        for step in itertools.count(1):
            target = copy_node(tmp_path / "b", tmp_path / f"b{step}")
            process = processes.start(
                "backup", "-f", tmp_path / "a", "-t", target, "--update", launch=nursery.dying_at(step)
            )
            ended = process.wait()
            assert ended in (0, KILLED)
            if not (target / IN_PROGRESS_FILE).exists():
                assert_sound(target)
            else:
                assert first <= finished(processes, copy_node(target, tmp_path / "finished")) <= lsn
            assert backed_up(tmp_path / "a", target, update=True) == lsn
            shutil.rmtree(target)
            if ended == 0:
                break
    assert step > 4


def finished(processes: Processes, cut_off: Path) -> int:
    """Finishes a backup without its source, and removes it; up to where it had reached."""
    told = json.loads(processes.run("backup", "-t", cut_off, "--finish", "--json").stdout)
    assert_sound(cut_off)
    lsn = offline_status(cut_off).lsn
    assert told["lsn"] == lsn
    shutil.rmtree(cut_off)
    return lsn


def test_only_what_was_whole_once_is_finished_without_its_source(
    processes: Processes, tmp_path: Path
) -> None:
    """G8: neither a first backup that was cut off, nor one that is damaged, nor one that is whole."""
    finish = ("backup", "-t", tmp_path / "b", "--finish")
    primary = filled(processes, tmp_path / "a", count=50)
    checkpoint(primary.address)
    primary.terminate()
    process = processes.start("backup", "-f", tmp_path / "a", "-t", tmp_path / "b", "--rate", "1kB/s")
    wait_until((tmp_path / "b" / "store" / "data.mdb").exists)
    process.send(signal.SIGINT)
    assert process.wait() == INTERRUPTED
    assert "before it was whole" in complaint(processes.run(*finish, code=DIRECTORY))
    backed_up(tmp_path / "a", tmp_path / "b", update=True)
    assert "cut off" in complaint(processes.run(*finish, code=DIRECTORY))
    (tmp_path / "b" / IN_PROGRESS_FILE).write_text("{}")
    spoil(tmp_path / "b", b"late000007")
    assert "damaged" in complaint(processes.run(*finish, code=CORRUPT))
    processes.run("verify", tmp_path / "b", code=DIRECTORY)


def spoil(directory: Path, key: bytes) -> None:
    """Changes a key in a directory's store, wherever it is."""
    store = directory / "store" / "data.mdb"
    data = store.read_bytes()
    assert key in data
    store.write_bytes(data.replace(key, key[:-1] + b"x"))


def test_damage_is_not_taken_into_a_new_digest(processes: Processes, tmp_path: Path) -> None:
    """G11: a store that is not as it was written is found by whoever looks, updated or not."""
    update_damaged(processes, tmp_path)
    with pytest.raises(CorruptionError, match=r"data\.mdb"):
        restore_backup(tmp_path / "b", tmp_path / "restored")


def test_an_update_after_one_that_was_cut_off_replaces_a_damaged_store(
    processes: Processes, tmp_path: Path
) -> None:
    """G8, G11: whatever the one before has left, what the manifest says of the store is true in the end."""
    update_damaged(processes, tmp_path, was_cut_off=True)
    assert_sound(tmp_path / "b")
    restore_backup(tmp_path / "b", tmp_path / "restored")


def update_damaged(processes: Processes, folder: Path, *, was_cut_off: bool = False) -> None:
    """Makes a backup, changes its store, and brings it up to date."""
    primary = filled(processes, folder / "a")
    checkpoint(primary.address)
    backed_up(folder / "a", folder / "b")
    put(primary.address, "/two", (b"more", b"1"))
    checkpoint(primary.address)
    spoil(folder / "b", b"late000007")
    if was_cut_off:
        (folder / "b" / IN_PROGRESS_FILE).write_text("{}")
    make_backup(folder / "a", folder / "b", update=True)


def test_a_replacement_that_was_cut_off_is_not_described_by_the_old_manifest(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: where the manifest is of another copy than the one in its place, the next update makes both fit."""
    primary = filled(processes, tmp_path / "a")
    backed_up(tmp_path / "a", tmp_path / "b")
    put(primary.address, "/two", (b"more", b"1"))
    checkpoint(primary.address)
    with monkeypatch.context() as patched:
        copy_anew(patched)
        patched.setattr(DataDirectory, "install", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_backup(tmp_path / "a", tmp_path / "b", update=True)
    assert (tmp_path / "b" / IN_PROGRESS_FILE).exists()
    backed_up(tmp_path / "a", tmp_path / "b", update=True)
    for entry in read_manifest(tmp_path / "b").files:
        assert describe_file(tmp_path / "b", entry.path) == entry
    assert_sound(tmp_path / "b")


def test_a_backup_stays_one_while_it_is_copied_anew(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: what was cut off then is gone on with, or removed by a server that starts on the backup."""
    primary = filled(processes, tmp_path / "a")
    first = backed_up(tmp_path / "a", tmp_path / "b")
    put(primary.address, "/two", (b"more", b"1"))
    checkpoint(primary.address)
    copy_anew(monkeypatch)

    with monkeypatch.context() as patched:
        patched.setattr(make, "sync_tree", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_backup(tmp_path / "a", tmp_path / "b", update=True)
    assert (tmp_path / "b" / "incoming" / "store").exists()
    (tmp_path / "b" / "incoming" / "admin-token").write_text("of another source")
    assert_sound(tmp_path / "b")
    assert read_manifest(tmp_path / "b").lsn == first
    served = copy_node(tmp_path / "b", tmp_path / "served")
    assert pairs(processes.primary(served).address, "/one") == pairs(primary.address, "/one")
    assert not (served / "incoming").exists()
    (tmp_path / "a" / "admin-token").unlink()
    (tmp_path / "b" / "admin-token").unlink()
    assert backed_up(tmp_path / "a", tmp_path / "b", update=True) > first
    assert not (tmp_path / "b" / "admin-token").exists()


def test_a_rate_without_a_unit_is_refused(processes: Processes, tmp_path: Path) -> None:
    """At 50 bytes a second a backup would never end."""
    done = processes.run("backup", "-f", tmp_path / "a", "-t", tmp_path / "b", "--rate", "50", code=2)
    assert b"such as 50MB/s" in done.stderr


def test_ctrl_c_tells_a_backup_that_is_whole_from_one_that_is_not(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is advised to remove the only copy there is."""
    filled(processes, tmp_path / "a").terminate()
    backed_up(tmp_path / "a", tmp_path / "b")
    words = ["backup", "-f", str(tmp_path / "a"), "-t"]
    with monkeypatch.context() as patched:
        patched.setattr(make, "open_source", _interrupted)
        updated = CliRunner().invoke(cli, [*words, str(tmp_path / "b"), "--update"])
    with monkeypatch.context() as patched:
        patched.setattr(make, "sync_tree", _interrupted)
        new = CliRunner().invoke(cli, [*words, str(tmp_path / "new")])
    assert updated.exit_code == new.exit_code == INTERRUPTED
    assert "is as it was" in updated.stderr
    assert "is not finished: go on with --update" in new.stderr


def test_a_disk_without_room_for_a_second_copy_keeps_the_first(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: a backup stays one while its successor is made beside it; where that has no room, nothing of it is left."""
    primary = filled(processes, tmp_path / "a")
    first = backed_up(tmp_path / "a", tmp_path / "b")
    put(primary.address, "/two", (b"more", b"1"))
    checkpoint(primary.address)
    copy_anew(monkeypatch)

    def fill_up(root: Path, member: Member, meter: Meter) -> FileEntry:
        entry = write_member(root, member, meter)
        if member.name == STORE_FILE:
            raise DiskFull("no space")
        return entry

    with monkeypatch.context() as patched:
        patched.setattr(make, "write_member", fill_up)
        with pytest.raises(DiskFull, match="stays as it was"):
            make_backup(tmp_path / "a", tmp_path / "b", update=True)
    assert not (tmp_path / "b" / "incoming").exists()
    assert_sound(tmp_path / "b")
    assert read_manifest(tmp_path / "b").lsn == first
    backed_up(tmp_path / "a", tmp_path / "b", update=True)
    assert_sound(tmp_path / "b")


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def forget_the_log(path: Path) -> None:
    """Leaves a node's log as pruning would once it is long: it begins at the store's checkpoint."""
    pruned = path.with_name("pruned")
    make_backup(path, pruned)
    shutil.rmtree(path / "log")
    os.rename(pruned / "log", path / "log")
    shutil.rmtree(pruned)


def test_ctrl_c_leaves_a_backup_that_can_be_finished(processes: Processes, tmp_path: Path) -> None:
    """An interrupted backup says so, ends with 130, is marked, and goes on with --update; --rate slows it down."""
    filled(processes, tmp_path / "a").terminate()
    process = processes.start("backup", "-f", tmp_path / "a", "-t", tmp_path / "b", "--rate", "1kB/s")
    wait_until((tmp_path / "b" / "log").exists)
    process.send(signal.SIGINT)
    assert process.wait() == INTERRUPTED
    assert "interrupted" in process.stderr
    assert "Traceback" not in process.stderr
    assert (tmp_path / "b" / IN_PROGRESS_FILE).exists()
    backed_up(tmp_path / "a", tmp_path / "b", update=True)


def test_a_damaged_log_is_found_while_it_is_copied(processes: Processes, tmp_path: Path) -> None:
    """G11: a flipped bit in the log behind the source's checkpoint ends the backup with the place of the damage."""
    filled(processes, tmp_path / "a").kill()
    (segment,) = (tmp_path / "a" / "log").iterdir()
    data = bytearray(segment.read_bytes())
    data[len(data.rstrip(b"\0")) - 5] ^= 1
    segment.write_bytes(data)
    done = processes.run("backup", "-f", tmp_path / "a", "-t", tmp_path / "b", code=CORRUPT)
    assert str(segment) in complaint(done)
    assert not (tmp_path / "b").exists()
