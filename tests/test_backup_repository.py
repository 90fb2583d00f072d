"""Policies run once, and what their repositories give back: newest backups, moments between them, nothing half done."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from harness import Processes, complaint
from killing import KILLED, Nursery
from nodes import (
    Load,
    Pair,
    assert_sound,
    checkpoint,
    offline_status,
    pairs,
    put,
    status,
    wait_until_caught_up,
)
from repositories import age_log, archiver_of, done, policy_to, ship
from s3_server import FaultyFront, S3Server, credentials

from understudy.backup.catalog import read_catalog
from understudy.backup.drill import drill_newest
from understudy.backup.drill_server import read_all
from understudy.backup.encryption import Unlocking
from understudy.backup.manifest import read_manifest
from understudy.backup.repository import StoredObject, open_repository
from understudy.backup.repository_lock import locked
from understudy.backup.restore import restore_stored
from understudy.backup.retention import Retention
from understudy.backup.run import run_policy
from understudy.backup.stretch import list_stretches
from understudy.backup.upkeep import prune
from understudy.common.errors import CorruptionError
from understudy.common.segment import SECTOR_BYTES, SegmentHeader
from understudy.common.types import Digest

FAILED, USAGE, CORRUPT = 1, 2, 4


def write_config(path: Path, *folders: Path, more: str = "") -> Path:
    repositories = json.dumps([str(folder) for folder in folders])
    path.write_text(f'[[backup]]\nname = "nightly"\nrepositories = {repositories}\nretries = 0\n{more}')
    return path


# -- runs ------------------------------------------------------------------------------------------------------


def test_a_run_makes_a_backup_in_each_repository_and_writes_it_down(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G8: `backup run` on a running server; list, history, journal and restored data agree."""
    other = tmp_path / "other"
    other.mkdir()
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"value"))
    config = write_config(tmp_path / "u.toml", folder, other)
    run = ("backup", "run", "nightly", "--config", config, "--data-dir", tmp_path / "a")
    told = json.loads(processes.run(*run, "--json").stdout)
    assert (told["number"], told["result"], told["realms"]) == (1, "done", 1)
    assert "run 2 of nightly: done" in processes.run(*run).stdout.decode()
    for url in (folder, other):
        listed = json.loads(processes.run("backups", "list", url, "--json").stdout)["backups"]
        assert [backup["run"] for backup in listed] == [1, 2]
        assert [backup["state"] for backup in listed] == ["unchecked"] * 2
        assert listed[0]["id"].encode() in processes.run("backups", "list", url).stdout
    books = tmp_path / "a" / "backups"
    entries = json.loads((books / "history.json").read_text())["entries"]
    assert [(entry["number"], entry["result"]) for entry in entries] == [(1, "done"), (2, "done")]
    assert len((books / "journal").read_text().splitlines()) == 2
    processes.run("restore", other, "--to", tmp_path / "b")
    assert_sound(tmp_path / "b")
    assert pairs(processes.primary(tmp_path / "b").address, "/realm") == {b"key": b"value"}


def test_numbers_go_on_though_the_history_was_lost(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """A lost history.json does not let a number be given twice."""
    processes.primary(tmp_path / "a")
    for expected in (1, 2):
        assert run_policy(policy_to(folder), tmp_path / "a").number == expected
    (tmp_path / "a" / "backups" / "history.json").unlink()
    assert run_policy(policy_to(folder), tmp_path / "a").number == 3


def test_a_repository_that_fails_does_not_hold_up_the_others(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """A run that reached some repositories only is partial, and says so by its exit code and to the operator's hook."""
    processes.primary(tmp_path / "a")
    hook = [sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"]
    more = f"on_failure = {json.dumps([*hook, str(tmp_path / 'told')])}\n"
    config = write_config(tmp_path / "u.toml", tmp_path / "not mounted", folder, more=more)
    run = ("backup", "run", "nightly", "--config", config, "--data-dir", tmp_path / "a")
    told = processes.run(*run, code=FAILED)
    assert "run 1 of nightly: partial" in told.stdout.decode()
    assert "not mounted" in told.stderr.decode()
    report = json.loads((tmp_path / "told").read_text())
    assert (report["result"], len(report["errors"])) == ("partial", 1)
    assert len(read_catalog(open_repository(str(folder))).backups) == 1


def test_a_failed_repository_is_tried_again(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """Retries come after a wait, and what then goes well is no failure."""
    processes.primary(tmp_path / "a")
    away = folder.rename(tmp_path / "away")
    waits = []

    def mount(seconds: float) -> None:
        waits.append(seconds)
        away.rename(folder)

    done(run_policy(policy_to(folder, retries=2, retry_wait_s=60.0), tmp_path / "a", sleep=mount))
    assert waits == [60.0]


def test_a_hook_before_that_fails_is_no_backup(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """What has to be done before was not done: nothing is backed up."""
    processes.primary(tmp_path / "a")
    report = run_policy(policy_to(folder, before=("/bin/false",)), tmp_path / "a")
    assert report.result == "failed"
    assert "/bin/false" in report.all_errors[0]
    assert list(folder.iterdir()) == []


def test_encryption_that_can_not_be_is_no_backup(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """G10: a policy whose passphrase is gone makes no backup, rather than one in plaintext."""
    processes.primary(tmp_path / "a")
    report = run_policy(policy_to(folder, passphrase_file=tmp_path / "gone"), tmp_path / "a")
    assert report.result == "failed"
    assert list(folder.iterdir()) == []


def test_a_repository_takes_one_cluster_only(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """G4: a second server's backups are refused where another's are kept."""
    for name in ("a", "b"):
        processes.primary(tmp_path / name)
    done(run_policy(policy_to(folder), tmp_path / "a"))
    report = run_policy(policy_to(folder), tmp_path / "b")
    assert "of their own" in report.all_errors[0]
    assert len(read_catalog(open_repository(str(folder))).backups) == 1


def test_an_older_backup_keeps_its_passphrase(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """Changing the passphrase concerns backups to come; each opens with the one that it was made with."""
    primary = processes.primary(tmp_path / "a")
    made = []
    for word in ("first", "second"):
        (tmp_path / "secret").touch(mode=0o600)
        (tmp_path / "secret").write_text(word)
        put(primary.address, "/realm", (b"key", word.encode()))
        made.append(done(run_policy(policy_to(folder, passphrase_file=tmp_path / "secret"), tmp_path / "a")))
    for word, backup in zip(("first", "second"), made, strict=True):
        target = tmp_path / f"restored-{word}"
        restore_stored(
            open_repository(str(folder)), backup, target, with_log=False, unlocking=Unlocking((word,))
        )
        assert pairs(processes.primary(target).address, "/realm") == {b"key": word.encode()}


# -- to any moment ---------------------------------------------------------------------------------------------


def test_any_moment_between_backups_can_be_restored(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G1, G2: with the log behind a backup, each LSN and each moment after it comes back exactly as it was."""
    primary = processes.primary(tmp_path / "a")
    lsns = [put(primary.address, "/realm", (b"count", b"0")).lsn]
    done(run_policy(policy_to(folder), tmp_path / "a"))
    times = []
    for number in range(1, 6):
        lsns.append(put(primary.address, "/realm", (b"count", b"%d" % number)).lsn)
        times.append(datetime.datetime.now(datetime.UTC).isoformat())
        if number == 3:
            ship(tmp_path / "a", open_repository(str(folder)))
    ship(tmp_path / "a", open_repository(str(folder)))
    for number, flags in (
        (2, ("--lsn", str(lsns[2]))),
        (4, ("--at", times[3])),
        (5, ()),
    ):
        target = tmp_path / f"b{number}"
        processes.run("restore", folder, "--to", target, *flags)
        assert_sound(target)
        server = processes.primary(target)
        assert pairs(server.address, "/realm") == {b"count": b"%d" % number}
        assert status(server.address).epoch == 2


def test_moments_before_the_newest_backup_can_be_restored_without_a_server_that_ships(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G1: runs by cron alone ship the log from one backup to the next; what lies between comes back."""
    primary = processes.primary(tmp_path / "a")
    lsns = []
    for number in range(3):
        lsns.append(put(primary.address, "/realm", (b"key", b"%d" % number)).lsn)
        lsns.append(put(primary.address, "/realm", (b"key", b"%d and a half" % number)).lsn)
        done(run_policy(policy_to(folder), tmp_path / "a"))
    for number in (2, 4):
        target = tmp_path / f"b{number}"
        processes.run("restore", folder, "--to", target, "--lsn", str(lsns[number]))
        assert pairs(processes.primary(target).address, "/realm") == {b"key": b"%d" % (number // 2)}


def test_a_gap_in_the_log_is_no_end(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """G8: where a later backup shows that there was more, a restore to between does not stop early and say nothing."""
    primary = processes.primary(tmp_path / "a")
    first = done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a"))
    put(primary.address, "/realm", (b"key", b"1"))
    moment = datetime.datetime.now(datetime.UTC).isoformat()
    put(primary.address, "/realm", (b"key", b"2"))
    done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a"))
    refused = processes.run("restore", folder, "--to", tmp_path / "b", "--at", moment, code=CORRUPT)
    assert f"--lsn {first.manifest.lsn}" in refused.stderr.decode()
    processes.run("restore", folder, first.id, "--to", tmp_path / "c")
    assert_sound(tmp_path / "c")


def test_the_log_of_whole_segments_takes_the_place_of_its_parts(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G9: what was shipped piece by piece is replaced once its segment is complete; the way from the backup stays."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"small", b"first"))
    done(run_policy(policy_to(folder), tmp_path / "a"))
    repository = open_repository(str(folder))
    value = bytes(8 << 20)
    for number in range(9):
        put(primary.address, "/realm", (b"%d" % number, value))
        shipped = ship(tmp_path / "a", repository)
    stretches = list_stretches(repository)
    assert len(stretches) < 5
    assert any(stretch.first == 1 for stretch in stretches)
    processes.run("restore", folder, "--to", tmp_path / "b")
    assert offline_status(tmp_path / "b").lsn == shipped
    assert_sound(tmp_path / "b")


def test_the_log_goes_on_behind_a_failover(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """G3: where the old primary and the promoted one have both shipped, a restore follows the one that reigns."""
    pair = Pair(processes, tmp_path)
    put(pair.primary.address, "/realm", (b"both", b"1"))
    repository = open_repository(str(folder))
    done(run_policy(policy_to(folder), pair.a))
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    pair.replica.kill()
    put(pair.primary.address, "/realm", (b"only", b"the old one"))
    ship(pair.a, repository)
    pair.primary.kill()
    processes.run("promote", pair.b)
    primary = processes.primary(pair.b)
    put(primary.address, "/realm", (b"new", b"1"))
    ship(pair.b, repository)
    processes.run("restore", folder, "--to", tmp_path / "c")
    assert_sound(tmp_path / "c")
    manifest = read_manifest(tmp_path / "c")
    assert manifest.epoch == 2
    assert pairs(processes.primary(tmp_path / "c").address, "/realm") == {b"both": b"1", b"new": b"1"}


def forked(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """A repository in which an old primary and the one that was promoted have both shipped, and the old one more."""
    pair = Pair(processes, tmp_path)
    put(pair.primary.address, "/realm", (b"both", b"0"))
    repository = open_repository(str(folder))
    done(run_policy(policy_to(folder, archive_log=False), pair.a))
    put(pair.primary.address, "/realm", (b"both", b"1"))
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    pair.replica.kill()
    for number in range(9):
        put(pair.primary.address, "/realm", (b"only", b"the old one %d" % number))
    ship(pair.a, repository)
    pair.primary.kill()
    processes.run("promote", pair.b)
    put(processes.primary(pair.b).address, "/realm", (b"new", b"1"))
    ship(pair.b, repository)


def test_an_old_primarys_stretch_is_left_where_its_successor_has_begun(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G3: the longest stretch behind the backup is of a history that was given up; --epoch gets at that one, too."""
    forked(processes, tmp_path, folder)
    processes.run("restore", folder, "--to", tmp_path / "new")
    assert_sound(tmp_path / "new")
    assert read_manifest(tmp_path / "new").epoch == 2
    assert pairs(processes.primary(tmp_path / "new").address, "/realm") == {b"both": b"1", b"new": b"1"}
    processes.run("restore", folder, "--to", tmp_path / "old", "--epoch", "1")
    server = processes.primary(tmp_path / "old")
    assert pairs(server.address, "/realm") == {b"both": b"1", b"only": b"the old one 8"}
    assert status(server.address).epoch == 3


def test_a_backup_of_a_history_that_was_given_up_is_told_as_such(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G3: made behind the fork, it is passed over; named, the error says how to get the successor's history."""
    forked(processes, tmp_path, folder)
    (outcome,) = run_policy(policy_to(folder, archive_log=False), tmp_path / "a").outcomes
    assert "another node has taken over" in outcome.errors[0]
    given_up = outcome.backup
    assert given_up is not None
    refused = processes.run(
        "restore", folder, given_up.id, "--to", tmp_path / "a1", "--epoch", "2", code=CORRUPT
    )
    assert "an earlier backup, with --epoch 2" in refused.stderr.decode()
    processes.run("restore", folder, "--to", tmp_path / "restored")
    server = processes.primary(tmp_path / "restored")
    assert pairs(server.address, "/realm") == {b"both": b"1", b"new": b"1"}
    nowhere = processes.run("restore", folder, "--to", tmp_path / "a2", "--epoch", "7", code=USAGE)
    assert "nothing in" in nowhere.stderr.decode()


def test_a_history_that_may_have_been_given_up_is_not_restored_unasked(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G3, G8: where the way to the highest epoch is missing, an earlier one is followed only with --epoch."""
    forked(processes, tmp_path, folder)
    repository = open_repository(str(folder))
    stretches = list_stretches(repository)
    old = max((one for one in stretches if one.epoch == 1), key=lambda one: one.last)
    newest = max(stretches, key=lambda one: one.rank)
    for stretch in stretches:
        if stretch not in (old, newest):
            repository.delete(stretch.name)
    spoilt = replace(newest, before="0" * len(newest.before))
    with repository.download(newest.name) as file, repository.upload(spoilt.name) as out:
        out.write(file.read())
    repository.delete(newest.name)
    refused = processes.run("restore", folder, "--to", tmp_path / "restored", code=CORRUPT)
    assert "--epoch 1" in refused.stderr.decode()
    processes.run("restore", folder, "--to", tmp_path / "restored", "--epoch", "1")
    assert offline_status(tmp_path / "restored").lsn == old.last


def test_a_stretch_that_is_not_what_its_name_says_is_damaged(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G3, G9: where a name leads on from the backup, and the content begins elsewhere, a restore ends with an error."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"1"))
    done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a"))
    put(primary.address, "/realm", (b"key", b"2"))
    repository = open_repository(str(folder))
    ship(tmp_path / "a", repository)
    (stretch,) = list_stretches(repository)
    with repository.download(stretch.name) as file:
        data = zstandard.ZstdDecompressor().decompressobj().decompress(file.read())
    header = SegmentHeader.decode(data[:SECTOR_BYTES], Path(stretch.name))
    spoilt = replace(header, previous=Digest(bytes(32))).encode()
    repository.delete(stretch.name)
    with repository.upload(stretch.name) as out:
        out.write(zstandard.compress(spoilt + data[len(spoilt) :]))
    refused = processes.run("restore", folder, "--to", tmp_path / "b", code=CORRUPT)
    assert "is of another log" in refused.stderr.decode()


def test_a_log_that_grows_slowly_is_few_objects(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """G9: small stretches are put together as more come, and a restore finds its way through what remains."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"first"))
    done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a"))
    repository = open_repository(str(folder))
    archiver = archiver_of(tmp_path / "a", repository)
    for number in range(40):
        put(primary.address, "/realm", (b"key", b"%d" % number))
        archiver.ship()
    assert len(list_stretches(repository)) <= 7
    processes.run("restore", folder, "--to", tmp_path / "b")
    assert_sound(tmp_path / "b")
    assert pairs(processes.primary(tmp_path / "b").address, "/realm") == {b"key": b"39"}


def test_a_stretch_that_is_replaced_while_a_restore_is_on_its_way_is_looked_for_again(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G8: what was listed and is gone when it is read has been replaced by a longer one."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"first"))
    backup = done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a"))
    repository = open_repository(str(folder))
    archiver = archiver_of(tmp_path / "a", repository)
    put(primary.address, "/realm", (b"key", b"second"))
    archiver.ship()
    before = list(repository.list("log/"))
    put(primary.address, "/realm", (b"key", b"third"))
    archiver.ship()
    assert not {stored.name for stored in before} & {stretch.name for stretch in list_stretches(repository)}
    answers = iter([before])

    def listing(prefix: str = "") -> Iterator[StoredObject]:
        return iter(next(answers, None) or list(open_repository(str(folder)).list(prefix)))

    repository.list = listing  # type: ignore[method-assign]
    restore_stored(repository, backup, tmp_path / "b", with_log=True)
    assert_sound(tmp_path / "b")
    assert pairs(processes.primary(tmp_path / "b").address, "/realm") == {b"key": b"third"}


def test_a_restore_to_before_a_promotion_begins_an_epoch_that_never_was(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G3, G7: nobody who has seen the reign that was given up can take it for the restored server's successor."""
    pair = Pair(processes, tmp_path)
    lsn = put(pair.primary.address, "/realm", (b"key", b"good")).lsn
    done(run_policy(policy_to(folder), pair.a))
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    primary = pair.fail_over()
    put(primary.address, "/realm", (b"key", b"bad"))
    done(run_policy(policy_to(folder), pair.b))
    for number, epoch in enumerate((3, 4)):
        target = tmp_path / f"restored{number}"
        processes.run("restore", folder, "--to", target, "--lsn", str(lsn))
        server = processes.primary(target)
        assert pairs(server.address, "/realm") == {b"key": b"good"}
        assert status(server.address).epoch == epoch
        done(run_policy(policy_to(folder), target))
    processes.run("restore", folder, "--to", tmp_path / "newest")
    assert read_manifest(tmp_path / "newest").epoch == 4


def test_a_backup_under_load_and_its_log_lose_nothing_that_was_shipped(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G1, G6: what was acknowledged before the log was shipped is restored, and each transaction once."""
    primary = processes.primary(tmp_path / "a")
    with Load(primary.address) as load:
        load.wait_for(200)
        done(run_policy(policy_to(folder), tmp_path / "a"))
        checkpoint(primary.address)
        load.wait_for(200)
        before = dict(load.acknowledged)
        ship(tmp_path / "a", open_repository(str(folder)))
        load.stop()
    processes.run("restore", folder, "--to", tmp_path / "b")
    assert_sound(tmp_path / "b")
    server = processes.primary(tmp_path / "b")
    assert before.keys() <= pairs(server.address, "/load").keys()
    load.acknowledged = before
    load.check(server.address)


def test_a_damaged_stretch_ends_the_restore_with_its_name(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G11: a flipped bit in the shipped log is found; up to the entry before it, all can be restored."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"1"))
    backup = done(run_policy(policy_to(folder), tmp_path / "a"))
    put(primary.address, "/realm", (b"key", b"2"))
    ship(tmp_path / "a", open_repository(str(folder)))
    (stretch,) = (
        path for path in (folder / "log").iterdir() if f"{backup.manifest.lsn + 1:020d}-" in path.name
    )
    data = bytearray(stretch.read_bytes())
    data[len(data) // 2] ^= 1
    stretch.write_bytes(data)
    done_badly = processes.run("restore", folder, "--to", tmp_path / "b", code=CORRUPT)
    assert stretch.name in done_badly.stderr.decode()
    shutil.rmtree(tmp_path / "b")
    processes.run("restore", folder, "--to", tmp_path / "b", "--lsn", str(backup.manifest.lsn))
    assert_sound(tmp_path / "b")


def test_what_no_backup_reaches_is_refused(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """A moment before the first backup, or an LSN behind the shipped log, is an error that says what there is."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"1"))
    done(run_policy(policy_to(folder), tmp_path / "a"))
    for flags, says in (
        (("--at", "2001-01-01T00:00:00Z"), "no backup in"),
        (("--lsn", "1000"), "reaches up to LSN"),
    ):
        refused = processes.run("restore", folder, "--to", tmp_path / "b", *flags, code=USAGE)
        assert says in refused.stderr.decode()
    assert "from 2" in processes.run("restore", folder, "--to", tmp_path / "c", "--dry-run").stderr.decode()
    assert not (tmp_path / "c").exists()


# -- object storage --------------------------------------------------------------------------------------------


def test_backups_in_an_object_storage_come_back_through_its_faults(
    processes: Processes, tmp_path: Path
) -> None:
    """G8, G11: on a real S3 server behind a front that throttles and cuts connections, runs and restores are whole."""
    with S3Server() as server, FaultyFront(server.address) as front:
        processes.environment |= credentials(front.address)
        primary = processes.primary(tmp_path / "a")
        put(primary.address, "/realm", *((b"%d" % number, os.urandom(50_000)) for number in range(60)))
        config = tmp_path / "u.toml"
        config.write_text('[[backup]]\nname = "nightly"\nrepositories = ["s3://backups/here"]\nretries = 0\n')
        front.refused = 3
        front.cut_uploads = 1
        run = ("backup", "run", "nightly", "--config", config, "--data-dir", tmp_path / "a")
        assert json.loads(processes.run(*run, "--json", deadline_s=300).stdout)["result"] == "done"
        put(primary.address, "/realm", (b"later", b"1"))
        processes.run(*run, deadline_s=300)
        listed = json.loads(processes.run("backups", "list", "s3://backups/here", "--json").stdout)["backups"]
        assert [backup["run"] for backup in listed] == [1, 2]
        front.cut_downloads = 2
        expected = pairs(primary.address, "/realm")
        restore = ("restore", "s3://backups/here", "--to", tmp_path / "b", "--lsn", str(listed[0]["lsn"] + 1))
        processes.run(*restore, deadline_s=300)
        assert_sound(tmp_path / "b")
        assert pairs(processes.primary(tmp_path / "b").address, "/realm") == expected


# -- upkeep ----------------------------------------------------------------------------------------------------


def test_checks_are_remembered_and_a_damaged_backup_is_passed_over(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G11: `backups verify` names a damaged archive and the intact one nearest to it; restore takes the other."""
    primary = processes.primary(tmp_path / "a")
    made = []
    for number in range(2):
        put(primary.address, "/realm", (b"key", b"%d" % number))
        made.append(done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a")))
    archive = folder / made[1].archive_name
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    said = processes.run("backups", "verify", folder, "--all", code=CORRUPT).stdout.decode()
    assert f"{made[0].id}: intact" in said
    assert f"the nearest that is not known to be damaged is {made[0].id}" in said
    states = [backup.state for backup in read_catalog(open_repository(str(folder))).backups]
    assert states == ["intact", "damaged"]
    refused = processes.run("restore", folder, "--to", tmp_path / "b", code=CORRUPT).stderr.decode()
    assert f"restore up to --lsn {made[0].manifest.lsn}" in refused
    processes.run("restore", folder, "--to", tmp_path / "b", "--lsn", str(made[0].manifest.lsn))
    assert pairs(processes.primary(tmp_path / "b").address, "/realm") == {b"key": b"0"}


def test_a_backup_is_shown_for_people_and_for_programs(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """`backups show` says what a backup holds and what checks found; with --json also each file."""
    put(processes.primary(tmp_path / "a").address, "/realm", (b"key", b"1"))
    backup = done(run_policy(policy_to(folder), tmp_path / "a"))
    processes.run("backups", "verify", folder, backup.id)
    shown = processes.run("backups", "show", folder, backup.id).stdout.decode()
    assert f"LSN {backup.manifest.lsn} of {backup.manifest.time}, epoch 1" in shown
    assert "1 realm, " in shown
    assert "intact" in shown
    facts = json.loads(processes.run("backups", "show", folder, backup.id, "--json").stdout)
    assert facts["files"] == [{"path": file.path, "bytes": file.bytes} for file in backup.manifest.files]
    assert [check["finding"] for check in facts["checks"]] == ["intact"]


def test_a_copied_backup_restores(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """`backups copy` takes a backup to another repository, once however often it is asked to."""
    other = tmp_path / "other"
    other.mkdir()
    put(processes.primary(tmp_path / "a").address, "/realm", (b"key", b"1"))
    backup = done(run_policy(policy_to(folder), tmp_path / "a"))
    for _ in range(2):
        processes.run("backups", "copy", folder, backup.id, "--to", other)
    assert read_catalog(open_repository(str(other))).backups == [backup]
    processes.run("restore", other, "--to", tmp_path / "b")
    assert_sound(tmp_path / "b")


def test_a_copy_is_not_published_on_another_archive(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G8: an archive that lies there already becomes a backup only if it is the one."""
    other = tmp_path / "other"
    (other / "there").mkdir(parents=True)
    processes.primary(tmp_path / "a")
    backup = done(run_policy(policy_to(folder), tmp_path / "a"))
    (other / backup.folder).mkdir(parents=True)
    (other / backup.archive_name).write_bytes(b"something else")
    (other / "there").rmdir()
    told = complaint(processes.run("backups", "copy", folder, backup.id, "--to", other, code=CORRUPT))
    assert backup.archive_name in told
    assert read_catalog(open_repository(str(other))).backups == []


def test_the_last_backup_is_not_deleted_without_force(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G4: the only backup that can be restored goes only on purpose."""
    processes.primary(tmp_path / "a")
    first, second = (done(run_policy(policy_to(folder), tmp_path / "a")) for _ in range(2))
    processes.run("backups", "delete", folder, first.id)
    assert "--force" in complaint(processes.run("backups", "delete", folder, second.id, code=USAGE))
    processes.run("backups", "delete", folder, second.id, "--force")
    assert read_catalog(open_repository(str(folder))).backups == []


def test_retention_removes_old_backups_and_the_log_before_them(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G9: a policy keeps as many as it says, and all moments from the oldest kept on can still be restored."""
    primary = processes.primary(tmp_path / "a")
    for number in range(4):
        put(primary.address, "/realm", (b"key", b"%d" % number))
        age_log(folder)
        done(run_policy(policy_to(folder, retention=Retention(last=2)), tmp_path / "a"))
    repository = open_repository(str(folder))
    backups = read_catalog(repository).backups
    assert [backup.run for backup in backups] == [3, 4]
    assert all(stretch.last > backups[0].manifest.lsn for stretch in list_stretches(repository))
    processes.run("restore", folder, "--to", tmp_path / "b", "--lsn", str(backups[0].manifest.lsn + 1))
    assert_sound(tmp_path / "b")


def test_each_policy_prunes_its_own_backups(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """G8: what one policy keeps few of, another that shares the repository keeps as it says."""
    processes.primary(tmp_path / "a")
    weekly = replace(policy_to(folder), name="weekly")
    kept = done(run_policy(weekly, tmp_path / "a"))
    for _ in range(2):
        last = done(run_policy(policy_to(folder, retention=Retention(last=1)), tmp_path / "a"))
    assert [backup.id for backup in read_catalog(open_repository(str(folder))).backups] == [kept.id, last.id]


def test_a_node_that_does_not_know_of_its_successor_takes_no_ones_place(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G3, G8: its backups are partial, no retention keeps them for the successor's, and drills take the successor's."""
    pair = Pair(processes, tmp_path)
    put(pair.primary.address, "/realm", (b"both", b"1"))
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    pair.replica.kill()
    put(pair.primary.address, "/realm", (b"only", b"the old one"), (b"and", b"more"))
    pair.primary.kill()
    processes.run("promote", pair.b)
    policy = policy_to(folder, retention=Retention(last=1))
    new = done(run_policy(policy, pair.b))
    for _ in range(2):
        report = run_policy(policy, pair.a)
        assert report.result == "partial"
        assert "another node has taken over" in report.all_errors[0]
    listed = [backup.id for backup in read_catalog(open_repository(str(folder))).backups]
    assert new.id in listed
    drill = drill_newest(policy, str(folder), tmp_path, read_all=read_all)
    assert (drill.is_proven, drill.backup) == (True, new)
    newer = done(run_policy(policy, pair.b))
    assert [backup.id for backup in read_catalog(open_repository(str(folder))).backups] == [newer.id]


def test_a_fenced_primary_is_not_backed_up_by_a_policy(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G8: the run fails and says why; by hand a copy can still be made of what the node has."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"1"))
    processes.run("fence", "--server", primary.address)
    report = run_policy(policy_to(folder), tmp_path / "a")
    assert report.result == "failed"
    assert "fenced" in report.all_errors[0]
    assert read_catalog(open_repository(str(folder))).backups == []
    processes.run("backup", "-f", tmp_path / "a", "-t", tmp_path / "b")
    assert_sound(tmp_path / "b")


def test_nothing_is_pruned_where_what_stays_is_not_there(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G8: if the newest backup has lost its archive, the older ones are not removed in its favour."""
    processes.primary(tmp_path / "a")
    made = [done(run_policy(policy_to(folder), tmp_path / "a")) for _ in range(3)]
    (folder / made[-1].archive_name).unlink()
    repository = open_repository(str(folder))
    with locked(repository, "test") as lock, pytest.raises(CorruptionError, match="nothing was removed"):
        prune(repository, lock, Retention(last=1))
    assert len(read_catalog(repository).backups) == 3


def test_a_run_killed_at_any_step_leaves_whole_backups_only(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G8: whatever step a kill comes before, each listed backup is whole, and the newest is restored with its log."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"1"))
    retention = "retention = { last = 1 }\n"
    config = write_config(tmp_path / "u.toml", folder, more=retention)
    done(run_policy(policy_to(folder), tmp_path / "a"))
    repository = open_repository(str(folder))
    with Nursery(processes.environment) as nursery:
        for step in itertools.count(1):
            process = processes.start(
                "backup", "run", "nightly", "--config", config, "--data-dir", tmp_path / "a",
                launch=nursery.dying_at(step),
            )  # fmt: skip
            ended = process.wait()
            assert ended in (0, KILLED), process.describe()
            backups = read_catalog(repository).backups
            assert backups
            for backup in backups:
                assert (folder / backup.archive_name).stat().st_size == backup.size
            target = tmp_path / f"b{step}"
            restore_stored(repository, backups[-1], target, with_log=True)
            assert_sound(target)
            (folder / "lock.json").unlink(missing_ok=True)  # instead of waiting until it is taken over
            shutil.rmtree(target)
            if ended == 0:
                break
    assert step > 15


def test_a_manifest_that_can_not_be_read_hides_no_other_backup(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G11: it is reported, and the backups beside it are listed and restored."""
    processes.primary(tmp_path / "a")
    first = done(run_policy(policy_to(folder), tmp_path / "a"))
    second = done(run_policy(policy_to(folder), tmp_path / "a"))
    (folder / f"{second.folder}manifest.json").write_text("{")
    listed = processes.run("backups", "list", folder)
    assert first.id.encode() in listed.stdout
    assert second.id.encode() in listed.stderr
    processes.run("restore", folder, "--to", tmp_path / "b")
    assert_sound(tmp_path / "b")
