"""A restore along the log behind its backup: cut off anywhere, along a wrong way, to another state than was logged."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from backup_helpers import RealmContent, contents
from harness import Processes
from killing import KILLED, Nursery
from nodes import (
    DIRECTORY,
    Pair,
    assert_sound,
    checkpoint,
    copy_node,
    offline_status,
    pairs,
    put,
    settle,
    status,
    wait_until_caught_up,
)
from repositories import done, policy_to, ship

from understudy.backup.archive import write_archive
from understudy.backup.catalog import StoredBackup
from understudy.backup.in_progress import read_filled
from understudy.backup.log_following import Following
from understudy.backup.make import make_backup
from understudy.backup.manifest import Manifest, read_manifest
from understudy.backup.point import Point
from understudy.backup.records import Records
from understudy.backup.replay import Replay
from understudy.backup.repository import open_repository
from understudy.backup.restore import restore_backup, restore_stored
from understudy.backup.run import run_policy
from understudy.backup.selection import Selection
from understudy.backup.stretch import list_stretches
from understudy.backup.target_log import open_log
from understudy.common.directory import IN_PROGRESS_FILE, DataDirectory
from understudy.common.entries import digest_entry, freeze_entry
from understudy.common.errors import CorruptionError, StorageFailed
from understudy.common.records import encode_record
from understudy.common.store import Store
from understudy.common.types import Epoch, Lsn, Position
from understudy.v1 import log_pb2

CORRUPT = 4


def stored_with_log(
    processes: Processes, tmp_path: Path, folder: Path
) -> tuple[StoredBackup, dict[str, RealmContent]]:
    """A backup, and behind it a log with a checkpoint in it; and what the realms hold at the log's end."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"0"), (b"gone", b"0"))
    backup = done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a"))
    put(primary.address, "/realm", (b"key", b"1"))
    checkpoint(primary.address)
    put(primary.address, "/realm", (b"key", b"2"))
    settle(primary.address)
    put(primary.address, "/realm", (b"other", b"3"))
    primary.terminate()
    ship(tmp_path / "a", open_repository(str(folder)))
    return backup, contents(tmp_path / "a")


def test_a_restore_with_log_goes_on_where_it_was_killed(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G8: killed before any step, the same command finishes it, and needs the backup no more once that was in place."""
    backup, expected = stored_with_log(processes, tmp_path, folder)
    archive, aside = folder / backup.archive_name, tmp_path / "aside"
    were_filled = 0
    with Nursery(processes.environment) as nursery:
        for step in itertools.count(1):
            target = tmp_path / f"b{step}"
            command = ("restore", folder, "--to", target)
            ended = processes.start(*command, launch=nursery.dying_at(step)).wait()
            assert ended in (0, KILLED)
            if ended == 0:
                break
            is_filled = read_filled(target, f"{folder} {backup.id}") is not None
            if is_filled:
                were_filled += 1
                archive.rename(aside)
            if not (target / "node.json").exists() or (target / IN_PROGRESS_FILE).exists():
                again = processes.start(*command, launch=nursery.dying_at(0))
                assert again.wait() == 0, again.describe()
            if is_filled:
                aside.rename(archive)
            assert_sound(target)
            assert contents(target) == expected
            shutil.rmtree(target)
    assert were_filled > 5


def test_a_restore_that_was_killed_begins_anew_where_another_point_is_asked_for(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G8: what the first attempt had taken from the log lies behind the second one's point, and goes."""
    backup, _ = stored_with_log(processes, tmp_path, folder)
    before = backup.manifest.lsn
    were_filled = 0
    with Nursery(processes.environment) as nursery:
        for step in itertools.count(1):
            target = tmp_path / f"b{step}"
            if processes.start("restore", folder, "--to", target, launch=nursery.dying_at(step)).wait() == 0:
                break
            if read_filled(target, f"{folder} {backup.id}") is None:
                continue
            were_filled += 1
            command = ("restore", folder, "--to", target, "--lsn", str(before + 1))
            again = processes.start(*command, launch=nursery.dying_at(0))
            assert again.wait() == 0, again.describe()
            assert_sound(target)
            assert read_manifest(target).lsn == before + 1
    assert were_filled > 5


def cut_off(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, restore: Callable[[], object]) -> None:
    """Restores up to the call of a method, which fails as a disk may."""

    def fail(*_: object, **__: object) -> None:
        raise StorageFailed("cut off")

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        with pytest.raises(StorageFailed, match="cut off"):
            restore()


def test_a_backup_alone_is_not_what_was_cut_off_with_log(
    processes: Processes, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: the same backup is asked for, now without the log of which the first attempt has taken some."""
    backup, _ = stored_with_log(processes, tmp_path, folder)
    repository = open_repository(str(folder))
    target = tmp_path / "b"
    cut_off(monkeypatch, Replay, "finish", lambda: restore_stored(repository, backup, target, with_log=True))
    assert restore_stored(repository, backup, target, with_log=False).manifest == backup.manifest
    assert_sound(target)
    assert offline_status(target).lsn == backup.manifest.lsn


def test_another_backup_is_not_mixed_with_one_that_was_cut_off(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G4: an unfinished restore is gone on with only from its own backup, and the error says which that is."""
    backup, _ = stored_with_log(processes, tmp_path, folder)
    newer = done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a"))
    target = tmp_path / "b"
    with Nursery(processes.environment) as nursery:
        command = ("restore", folder, backup.id, "--to", target)
        for step in itertools.count(1):
            processes.start(*command, launch=nursery.dying_at(step)).wait()
            if (target / "node.json").exists():
                break
            shutil.rmtree(target, ignore_errors=True)
    assert (target / IN_PROGRESS_FILE).exists()
    refused = processes.run("restore", folder, newer.id, "--to", target, code=DIRECTORY)
    assert f"begun from {folder} {backup.id}" in refused.stderr.decode()
    done_at_last = processes.run("restore", folder, "--to", target)
    assert f"from {backup.id}" in done_at_last.stderr.decode()
    assert_sound(target)


def test_another_archive_of_the_same_name_is_not_what_was_cut_off(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: what was taken of the one that has gone is not given for the one that is there."""
    latest = tmp_path / "latest.tar.zst"
    for number in (1, 2):
        primary = processes.primary(tmp_path / f"a{number}")
        put(primary.address, "/realm", (b"key", b"%d" % number))
        primary.terminate()
        write_archive(tmp_path / f"a{number}", tmp_path / f"{number}.tar.zst")

    def restore() -> object:
        return restore_backup(latest, tmp_path / "b")

    (tmp_path / "1.tar.zst").rename(latest)
    cut_off(monkeypatch, DataDirectory, "raise_epoch_floor", restore)
    (tmp_path / "2.tar.zst").rename(latest)
    restore()
    assert_sound(tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "a2")


def test_an_epoch_that_began_between_two_attempts_is_not_begun_again(
    processes: Processes, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G7: a server on the restored directory is of a higher epoch than all that the repository knows of by then."""
    pair = Pair(processes, tmp_path)
    put(pair.primary.address, "/realm", (b"key", b"1"))
    backup = done(run_policy(policy_to(folder, archive_log=False), pair.a))
    lsn = put(pair.primary.address, "/realm", (b"key", b"2")).lsn
    repository = open_repository(str(folder))
    ship(pair.a, repository)

    def restore() -> object:
        return restore_stored(repository, backup, tmp_path / "c", with_log=True, point=Point(lsn=lsn))

    cut_off(monkeypatch, Following, "follow", restore)
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    put(pair.fail_over().address, "/realm", (b"key", b"3"))
    ship(pair.b, repository)
    restore()
    assert status(processes.primary(tmp_path / "c").address).epoch == 3


def two_histories(processes: Processes, tmp_path: Path, folder: Path, *, wrong_puts: int) -> StoredBackup:
    """A backup, and behind it the logs of two servers of one epoch, of which the next epoch has followed one."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"both", b"0"))
    backup = done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a"))
    primary.terminate()
    repository = open_repository(str(folder))
    wrong = processes.primary(copy_node(tmp_path / "a", tmp_path / "wrong"))
    for number in range(wrong_puts):
        put(wrong.address, "/realm", (b"key", b"wrong %d" % number))
    ship(tmp_path / "wrong", repository)
    right = processes.primary(tmp_path / "a")
    put(right.address, "/realm", (b"key", b"right"))
    settle(right.address)  # so that the replica's own log begins here
    replica = processes.replica(tmp_path / "r", right.address)
    wait_until_caught_up(right.address, replica.address)
    replica.kill()
    for number in range(8):
        put(right.address, "/realm", (b"key", b"given up %d" % number))
    ship(tmp_path / "a", repository)
    right.kill()
    processes.run("promote", tmp_path / "r")
    promoted = processes.primary(tmp_path / "r")
    put(promoted.address, "/realm", (b"new", b"1"))
    ship(tmp_path / "r", repository)
    return backup


@pytest.mark.parametrize("wrong_puts", [6, 12])
def test_a_way_that_turns_out_to_be_wrong_once_it_was_gone_is_left(
    processes: Processes, tmp_path: Path, folder: Path, wrong_puts: int
) -> None:
    """G3: of two histories of one epoch, only the one that the next epoch follows from is restored."""
    backup = two_histories(processes, tmp_path, folder, wrong_puts=wrong_puts)
    repository = open_repository(str(folder))
    manifest = restore_stored(repository, backup, tmp_path / "d", with_log=True).manifest
    assert_sound(tmp_path / "d")
    assert manifest.epoch == 2
    expected = {b"both": b"0", b"key": b"right", b"new": b"1"}
    assert pairs(processes.primary(tmp_path / "d").address, "/realm") == expected


def test_a_way_that_nobody_has_seen_the_end_of_is_not_trusted(
    processes: Processes, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G3: cut off at its point, before the end of the way there was compared, an attempt may have gone a wrong one."""
    backup = two_histories(processes, tmp_path, folder, wrong_puts=12)
    repository = open_repository(str(folder))
    point = Point(lsn=Lsn(backup.manifest.lsn + 1))

    def restore() -> object:
        return restore_stored(repository, backup, tmp_path / "d", with_log=True, point=point)

    cut_off(monkeypatch, Following, "_joins", restore)
    restore()
    assert pairs(processes.primary(tmp_path / "d").address, "/realm") == {b"both": b"0", b"key": b"right"}


def test_a_point_in_a_history_that_may_have_been_given_up_is_not_restored(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G3: reached along an old primary's stretches, while what its successor shipped at first is gone."""
    pair = Pair(processes, tmp_path)
    large = bytes(100_000)
    put(pair.primary.address, "/realm", (b"both", b"0"))
    repository = open_repository(str(folder))
    done(run_policy(policy_to(folder, archive_log=False), pair.a))
    fork = put(pair.primary.address, "/realm", (b"both", b"1")).lsn
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    pair.replica.kill()
    for _ in range(2):
        put(pair.primary.address, "/realm", (b"only", large))
    ship(pair.a, repository)
    for number in range(9):
        put(pair.primary.address, "/realm", (b"only", b"%d" % number))
    ship(pair.a, repository)
    pair.primary.kill()
    processes.run("promote", pair.b)
    promoted = processes.primary(pair.b)
    for _ in range(4):
        put(promoted.address, "/realm", (b"new", large))
    ship(pair.b, repository)
    put(promoted.address, "/realm", (b"new", b"1"))
    ship(pair.b, repository)
    first = min((one for one in list_stretches(repository) if one.epoch == 2), key=lambda one: one.first)
    command = ("restore", folder, "--lsn", str(fork + 2), "--to")
    processes.run(*command, tmp_path / "whole")
    assert b"only" not in pairs(processes.primary(tmp_path / "whole").address, "/realm")
    repository.delete(first.name)
    refused = processes.run(*command, tmp_path / "c", code=CORRUPT)
    assert "--epoch" in refused.stderr.decode()


def test_damage_behind_the_point_is_no_obstacle(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """G9: what comes before the damage in a stretch is restored; the error of a restore beyond it names the stretch."""
    backup, _ = stored_with_log(processes, tmp_path, folder)
    repository = open_repository(str(folder))
    (stretch,) = list_stretches(repository)
    with repository.download(stretch.name) as file:
        data = bytearray(zstandard.ZstdDecompressor().decompressobj().decompress(file.read()))
    data[-1] ^= 1  # within the last entry
    repository.delete(stretch.name)
    with repository.upload(stretch.name) as out:
        out.write(zstandard.compress(data))
    lsn = stretch.last - 1
    processes.run("restore", folder, backup.id, "--to", tmp_path / "b", "--lsn", str(lsn))
    assert_sound(tmp_path / "b")
    assert offline_status(tmp_path / "b").lsn == lsn
    refused = processes.run("restore", folder, "--to", tmp_path / "c", code=CORRUPT)
    assert f"entry {stretch.last} of the change-log is damaged" in refused.stderr.decode()


def test_a_log_that_leads_to_another_state_than_it_says_is_not_restored(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G11: each digest mark on the way is compared with the state that the entries before it have led to."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"0"))
    done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a"))
    primary.terminate()
    with DataDirectory.open_existing(tmp_path / "a") as directory:
        append_false_mark(directory)
    ship(tmp_path / "a", open_repository(str(folder)))
    refused = processes.run("restore", folder, "--to", tmp_path / "b", code=CORRUPT)
    assert "this copy's state is not the primary's" in refused.stderr.decode()
    processes.run("primary", "--data-dir", tmp_path / "b", "--listen", "127.0.0.1:0", code=DIRECTORY)
    again = processes.run("restore", folder, "--to", tmp_path / "b", code=CORRUPT)
    assert "this copy's state is not the primary's" in again.stderr.decode()


def test_a_backup_whose_own_log_tells_of_another_state_is_not_brought_forward(
    processes: Processes, tmp_path: Path
) -> None:
    """G11: a mark in the log that came with a backup counts as one in a log that was shipped."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"0"))
    primary.terminate()
    with DataDirectory.open_existing(tmp_path / "a") as directory:
        append_false_mark(directory)
    lsn = make_backup(tmp_path / "a", tmp_path / "b").manifest.lsn
    with pytest.raises(CorruptionError, match="is not the primary's"):
        restore_backup(tmp_path / "b", tmp_path / "c", point=Point(lsn=Lsn(lsn)))


def test_chosen_realms_are_taken_from_what_was_restored_before(
    processes: Processes, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off when all was restored and only the choice was to be made, it goes on there, without the repository."""
    backup, _ = stored_with_log(processes, tmp_path, folder)
    repository = open_repository(str(folder))
    selection = Selection(realms=("/realm",))

    def restore() -> Manifest:
        target = tmp_path / "b"
        return restore_stored(repository, backup, target, with_log=True, selection=selection).manifest

    cut_off(monkeypatch, Records, "members", restore)
    (folder / backup.archive_name).unlink()
    assert restore().realms_chosen == ["/realm"]
    assert_sound(tmp_path / "b")


def append_false_mark(directory: DataDirectory) -> None:
    """Adds a freeze mark to a node's log, and a digest for it that no state has."""
    with Store.open(directory.store, cluster=directory.cluster) as store:
        time_us = store.current.checkpoint.time_us + 1_000_000_000
    with open_log(directory) as log:
        mark = log_pb2.DigestMark(freeze_lsn=log.end.lsn + 1, state_digest=bytes(32))
        for payload in (freeze_entry(time_us), digest_entry(time_us, mark)):
            lsn = Lsn(log.end.lsn + 1)
            record, digest = encode_record(log.end.digest, lsn, payload)
            log.write_batch(record, Position(lsn, digest), epoch=Epoch(1))
