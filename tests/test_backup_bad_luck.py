"""Backups of records, manifests and shipped logs: killed anywhere, a bit changed anywhere, made of damaged sources."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pyrage
import pytest
from backup_helpers import RealmContent, contents, looks_whole
from harness import Processes
from killing import KILLED, Nursery
from nodes import DIRECTORY, assert_sound, checkpoint, copy_node, put

from understudy.backup import archive as archive_module
from understudy.backup import archiver as archiver_module
from understudy.backup.archive import write_archive
from understudy.backup.archive_options import ArchiveOptions
from understudy.backup.archiver import Archiver
from understudy.backup.catalog import read_catalog
from understudy.backup.choice import choose_backup
from understudy.backup.drill import drill_newest
from understudy.backup.drill_server import ReadReport
from understudy.backup.encryption import Encryption, Unlocking
from understudy.backup.make import make_backup
from understudy.backup.manifest import Manifest, read_manifest
from understudy.backup.policy import parse_policy
from understudy.backup.repository import Repository, StoredObject, open_repository
from understudy.backup.repository_lock import LOCK, locked
from understudy.backup.restore import restore_backup, restore_stored
from understudy.backup.retention import Retention
from understudy.backup.run import run_policy
from understudy.backup.selection import Selection
from understudy.backup.source import open_source
from understudy.backup.store_backup import publish_stored, store_archive
from understudy.backup.upkeep import ORPHAN_S, delete_backup, prune
from understudy.common.directory import IN_PROGRESS_FILE
from understudy.common.errors import CorruptionError, ExitCode, NotStored, RepositoryError, UnderstudyError

KEY = pyrage.x25519.Identity.generate()
ENCRYPTION = Encryption("", (str(KEY.to_public()),))
UNLOCKING = Unlocking(identities=(KEY,))
SAMPLES = 40
CHOSEN = Selection(realms=("/one", "/two/*"))
PORTABLE = Selection(portable=True)


@dataclass(frozen=True)
class Origin:
    """A stopped server's directory, and what it holds."""

    path: Path
    contents: dict[str, RealmContent]

    def chosen(self, selection: Selection) -> dict[str, RealmContent]:
        """What of it a selection takes."""
        return {realm: content for realm, content in self.contents.items() if selection.takes(realm)}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Origin:
    """Four realms, half of them in its store and half in its log only."""
    folder = tmp_path_factory.mktemp("origin")
    processes = Processes(tmp_path_factory.mktemp("processes"))
    try:
        primary = processes.primary(folder / "server")
        for part in (1, 2):
            for realm in ("/one", "/two/x", "/two/y", "/three"):
                put(
                    primary.address,
                    realm,
                    *((b"%d %06d" % (part, number), os.urandom(20)) for number in range(150)),
                )
            if part == 1:
                checkpoint(primary.address)
        primary.terminate()
    finally:
        processes.close()
    return Origin(folder / "server", contents(folder / "server"))


# -- killed ----------------------------------------------------------------------------------------------------

Words = tuple[str | Path, ...]


def _chosen(origin: Origin, _: Path) -> Words:
    return ("backup", "-f", origin.path, "--realm", "/one", "--realm", "/two/*", "-t")


def _portable(origin: Origin, _: Path) -> Words:
    return ("backup", "-f", origin.path, "--portable", "-t")


def _restored(origin: Origin, folder: Path) -> Words:
    write_archive(origin.path, folder / "whole.tar.zst")
    return ("restore", folder / "whole.tar.zst", "--realm", "/one", "--realm", "/two/*", "--to")


def _restored_records(origin: Origin, folder: Path) -> Words:
    make_backup(origin.path, folder / "records", selection=PORTABLE)
    return ("restore", folder / "records", "--to")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("prepare", "selection"),
    [(_chosen, CHOSEN), (_portable, PORTABLE), (_restored, CHOSEN), (_restored_records, PORTABLE)],
)
def test_what_makes_or_takes_records_can_be_killed_at_any_step(
    processes: Processes,
    nursery: Nursery,
    tmp_path: Path,
    origin: Origin,
    prepare: Callable[[Origin, Path], Words],
    selection: Selection,
) -> None:
    """G8: whichever step a kill comes before, nobody takes what is left for whole; the same command again makes it."""
    command = prepare(origin, tmp_path)
    for step in itertools.count(1):
        target = tmp_path / f"b{step}"
        ended = processes.start(*command, target, launch=nursery.dying_at(step)).wait()
        assert ended in (0, KILLED)
        if not looks_whole(target):
            if (target / IN_PROGRESS_FILE).exists():
                refused = processes.start("verify", target, launch=nursery.dying_at(0))
                assert refused.wait() == DIRECTORY
            assert processes.start(*command, target, launch=nursery.dying_at(0)).wait() == 0
        found = target
        if "--portable" in command:
            found = tmp_path / "restored"
            restore_backup(target, found)
        assert_sound(found)
        assert contents(found) == origin.chosen(selection)
        assert not (found / "incoming").exists()
        shutil.rmtree(found)
        shutil.rmtree(target, ignore_errors=True)
        if ended == 0:
            break
    assert step > 10


# -- a flipped bit ---------------------------------------------------------------------------------------------


def flips(folder: Path, chance: Random) -> Iterator[str]:
    """Flips a bit, and another one when that was looked at, in large files as often as in small ones."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNREAD)
    for path in [*files, *chance.choices(files, k=max(SAMPLES - len(files), 0))]:
        good = path.read_bytes()
        if not good:
            continue
        bad, at, bit = bytearray(good), chance.randrange(len(good)), chance.randrange(8)
        bad[at] ^= 1 << bit
        path.write_bytes(bad)
        yield f"{path.relative_to(folder)}, byte {at}, bit {bit}"
        path.write_bytes(good)


# Held while somebody works there; who tells others apart; and names that a restore gives anew.
UNREAD = ("lock", ".lock-guard", "lock.json", "lock.mdb", "node.json", "understudy.json")


def assert_no_bit_counts(
    folder: Path,
    restore: Callable[[Path], Manifest],
    expected: dict[str, RealmContent],
    chance: Random,
    scratch: Path,
) -> None:
    """Wherever a bit is changed, what is restored is what it should be, or refused and marked."""
    good = restore(scratch / "good")
    assert contents(scratch / "good") == expected
    refused = 0
    for where in flips(folder, chance):
        target = scratch / "bad"
        shutil.rmtree(target, ignore_errors=True)
        try:
            found = restore(target)
        except UnderstudyError:
            refused += 1
            assert not looks_whole(target), where
        else:
            assert replace(found, made=good.made) == good, where
            assert contents(target) == expected, where
    assert refused > SAMPLES // 8


@pytest.mark.parametrize("selection", [Selection(), PORTABLE], ids=["pages", "records"])
@pytest.mark.parametrize("kind", ["directory", "archive", "encrypted archive"])
def test_a_flipped_bit_anywhere_in_a_backup_is_never_restored(
    tmp_path: Path, origin: Origin, seed: int, selection: Selection, kind: str
) -> None:
    """G8, G11: in its files, in its manifest, in what compresses and encrypts them."""
    folder = tmp_path / "backup"
    backup = folder
    if kind == "directory":
        make_backup(origin.path, folder, selection=selection)
    else:
        folder.mkdir()
        backup = folder / ("a.tar.zst" if kind == "archive" else "a.tar.zst.age")
        encryption = None if kind == "archive" else ENCRYPTION
        write_archive(origin.path, backup, ArchiveOptions(selection=selection, encryption=encryption))

    def restore(to: Path) -> Manifest:
        return restore_backup(backup, to, unlocking=UNLOCKING).manifest

    assert_no_bit_counts(folder, restore, origin.contents, Random(seed), tmp_path)


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_a_flipped_bit_anywhere_in_a_repository_is_never_restored(
    tmp_path: Path, processes: Processes, origin: Origin, seed: int, encrypted: bool
) -> None:
    """G8, G11: in archives, manifests, notes of checks and the shipped log: refused, or another backup leads there."""
    data_dir, folder = copy_node(origin.path, tmp_path / "a"), tmp_path / "repository"
    folder.mkdir()
    table: dict[str, object] = {"name": "n", "repositories": [str(folder)], "retries": 0}
    if encrypted:
        table["recipients"] = list(ENCRYPTION.recipients)
    policy = parse_policy(table, "u.toml")
    primary = processes.primary(data_dir)
    for number in range(2):
        put(primary.address, "/one", (b"before run", b"%d" % number))
        assert run_policy(policy, data_dir).all_errors == []
    put(primary.address, "/one", (b"behind", b"all backups"))
    repository = open_repository(str(folder))
    cluster = read_catalog(repository).backups[0].manifest.cluster_id
    Archiver(data_dir / "log", cluster, repository, encryption=policy.encryption()).ship()
    primary.terminate()

    def restore(to: Path) -> Manifest:
        catalog = read_catalog(repository)
        backup = choose_backup(catalog, None, str(folder))
        return restore_stored(
            repository, backup, to, with_log=True, catalog=catalog, unlocking=UNLOCKING
        ).manifest

    def restore_alike(to: Path) -> Manifest:
        # Which backup it begins with is no matter: these differ by it.
        return replace(restore(to), checkpoint_lsn=0, state_digest="", files=[])

    assert_no_bit_counts(folder, restore_alike, contents(data_dir), Random(seed), tmp_path)


def test_no_bit_of_a_manifest_counts(origin: Origin, tmp_path: Path) -> None:
    """G11: whichever bit of it is changed, a manifest is refused, or says what it said."""
    good = make_backup(origin.path, tmp_path / "a").manifest
    data = good.encode()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        with contextlib.suppress(UnderstudyError):
            assert Manifest.decode(bytes(changed), "name") == good, at


# -- a damaged source ------------------------------------------------------------------------------------------

PAGE_BYTES = 4096


def test_no_damage_of_a_source_is_taken_into_records(
    tmp_path: Path, nursery: Nursery, processes: Processes, origin: Origin, seed: int
) -> None:
    """G8, G11: wherever its pages are damaged, even where LMDB gives up, what was not named as lost is as it was."""
    chance, source = Random(seed), copy_node(origin.path, tmp_path / "a")
    store = source / "store" / "data.mdb"
    good = store.read_bytes()
    for number in range(40):
        bad = bytearray(good)
        # In the head of a page, or in its table of rows, where LMDB looks more often than anywhere else.
        at = chance.randrange(len(good) // PAGE_BYTES) * PAGE_BYTES + chance.randrange(64)
        bad[at] ^= 1 << chance.randrange(8)
        store.write_bytes(bad)
        target = tmp_path / f"b{number}"
        command = ("backup", "-f", source, "--exclude", "/none", "-t", target)
        ended = processes.start(*command, launch=nursery.dying_at(0)).wait()
        if not looks_whole(target):
            assert ended not in (0, ExitCode.USAGE), at
            continue
        assert ended in (0, ExitCode.FAILED)
        assert_sound(target)
        lost = {one.realm for one in read_manifest(target).failed}
        assert (ended == 0) == (not lost), at
        if "" not in lost:
            assert contents(target) == {
                realm: content for realm, content in origin.contents.items() if realm not in lost
            }, at


# -- what lies in a repository ---------------------------------------------------------------------------------


class _Lies(NamedTuple):
    key: str
    value: Any


@pytest.mark.parametrize(
    "lie",
    [
        _Lies("lsn", 5),
        _Lies("digest", "00" * 32),
        _Lies("realms", 7),
        _Lies("checkpoint_lsn", 1),
        _Lies("state_digest", "00" * 16),
    ],
    ids=lambda lie: lie.key,
)
def test_a_drill_does_not_believe_a_manifest(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch, lie: _Lies
) -> None:
    """G11: one that fits its archive, and says of it what is not so, is found by restoring."""
    folder = tmp_path / "repository"
    folder.mkdir()
    table = {"name": "n", "repositories": [str(folder)], "retries": 0, "archive_log": False}
    policy = parse_policy(table, "u.toml")
    with monkeypatch.context() as patched:
        truth = archive_module.describe
        patched.setattr(
            archive_module, "describe", lambda *of, **how: replace(truth(*of, **how), **{lie.key: lie.value})
        )
        assert run_policy(policy, copy_node(origin.path, tmp_path / "a")).all_errors == []

    def read_nothing(_: Path) -> ReadReport:
        raise AssertionError("a server was started on it")

    drill = drill_newest(policy, str(folder), tmp_path, read_all=read_nothing)
    assert drill.finding == "damaged"
    assert ("its manifest says" in drill.problem) or ("its backup.json says" in drill.problem)


def lose(repository: Repository) -> None:
    """Somebody else takes the lock over."""
    stored = repository.read(LOCK)
    assert repository.swap(LOCK, stored.replace(b'"owner": "', b'"owner": "not '), stored)


def test_who_has_lost_the_lock_publishes_and_removes_nothing(tmp_path: Path, origin: Origin) -> None:
    """G4, G8: a run that hung for too long finds out before it changes what others rely on."""
    folder, data_dir = tmp_path / "repository", copy_node(origin.path, tmp_path / "a")
    folder.mkdir()
    table = {"name": "n", "repositories": [str(folder)], "retries": 0}
    repository = open_repository(str(folder))
    policy = parse_policy(table, "u.toml")
    made = [run_policy(policy, data_dir).backups[0].id for _ in range(3)]
    with open_source(data_dir) as source:
        stored = store_archive(source, repository, policy="n", run=4, options=ArchiveOptions())
    with locked(repository, "test") as lock:
        lose(repository)
        with pytest.raises(RepositoryError, match="lost to another run"):
            publish_stored(repository, lock, stored)
    (folder / LOCK).unlink()
    with locked(repository, "test") as lock:
        lose(repository)
        with pytest.raises(RepositoryError, match="lost to another run"):
            prune(repository, lock, Retention(last=1))
    assert [backup.id for backup in read_catalog(repository).backups] == made


def test_an_archive_that_was_taken_for_a_leftover_is_no_backup(tmp_path: Path, origin: Origin) -> None:
    """G8: what was removed between its upload and its manifest is not published."""
    folder, data_dir = tmp_path / "repository", copy_node(origin.path, tmp_path / "a")
    folder.mkdir()
    repository = open_repository(str(folder))
    with open_source(data_dir) as source:
        stored = store_archive(source, repository, policy="n", run=1, options=ArchiveOptions())
    with locked(repository, "test") as lock:
        os.utime(folder / stored.archive_name, (0, time.time() - 2 * ORPHAN_S))
        prune(repository, lock, Retention())
        with pytest.raises(RepositoryError, match="removed before it could be published"):
            publish_stored(repository, lock, stored)
    assert read_catalog(repository).backups == []


def test_log_that_could_not_be_stored_is_shipped_by_the_next_attempt(
    tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1: nothing counts as shipped before the repository has it."""
    folder = tmp_path / "repository"
    folder.mkdir()
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"1"))
    table = {"name": "n", "repositories": [str(folder)], "retries": 0}
    backup = run_policy(parse_policy(table, "u.toml"), tmp_path / "a").backups[0]
    repository = open_repository(str(folder))
    archiver = Archiver(tmp_path / "a" / "log", backup.manifest.cluster_id, repository, encryption=None)
    archiver.ship()
    receipt = put(primary.address, "/realm", (b"key", b"2"))
    with monkeypatch.context() as patched:
        patched.setattr(archiver_module, "ship", fail)
        with pytest.raises(RepositoryError, match="away"):
            archiver.ship()
    assert archiver.ship() >= receipt.lsn
    restore_stored(repository, backup, tmp_path / "b", with_log=True)
    assert contents(tmp_path / "b")["/realm"][2] == [(b"key", b"2")]


def fail(*_: object, **__: object) -> None:
    raise RepositoryError("the repository is away")


# -- listings that are old -------------------------------------------------------------------------------------


class OldListings:
    """A repository whose listings are those of an earlier moment, as some storages give them for a while."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._listed = list(repository.list())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._repository, name)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """What was there."""
        return iter([one for one in self._listed if one.name.startswith(prefix)])


def test_old_listings_take_nothing_that_is_needed(tmp_path: Path, origin: Origin) -> None:
    """G8: neither what has been made since they were true goes, nor the last backup in favour of one that is gone."""
    folder, data_dir = tmp_path / "repository", copy_node(origin.path, tmp_path / "a")
    folder.mkdir()
    repository = open_repository(str(folder))
    table = {"name": "n", "repositories": [str(folder)], "retries": 0}
    policy = parse_policy(table, "u.toml")
    made = [run_policy(policy, data_dir).backups[0] for _ in range(2)]
    before_the_third: Any = OldListings(repository)
    made.append(run_policy(policy, data_dir).backups[0])
    with locked(repository, "test") as lock:
        prune(before_the_third, lock, Retention(last=1))
    assert [one.id for one in read_catalog(repository).backups] == [made[1].id, made[2].id]
    old: Any = OldListings(repository)
    delete_backup(repository, made[2])
    with locked(repository, "test") as lock, pytest.raises((CorruptionError, NotStored)):
        prune(old, lock, Retention(last=1))
    assert [one.id for one in read_catalog(repository).backups] == [made[1].id]
    restore_stored(repository, made[1], tmp_path / "b", with_log=False)
    assert contents(tmp_path / "b") == origin.contents
