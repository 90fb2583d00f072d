"""Backups of records, manifests and shipped logs: killed anywhere, a bit changed anywhere, made of damaged sources."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pyrage
import pytest
from backup_helpers import RealmContent, contents, looks_whole
from harness import Processes
from killing import KILLED, Nursery
from nodes import DIRECTORY, assert_sound, checkpoint, copy_node, put

from understudy.backup.archive import write_archive
from understudy.backup.archiver import Archiver
from understudy.backup.catalog import read_catalog
from understudy.backup.choice import choose_backup
from understudy.backup.encryption import Encryption, Unlocking
from understudy.backup.make import make_backup
from understudy.backup.manifest import Manifest
from understudy.backup.policy import parse_policy
from understudy.backup.repository import open_repository
from understudy.backup.restore import restore_backup, restore_stored
from understudy.backup.run import run_policy
from understudy.backup.selection import Selection
from understudy.common.directory import IN_PROGRESS_FILE
from understudy.common.errors import UnderstudyError

KEY = pyrage.x25519.Identity.generate()
ENCRYPTION = Encryption("", (str(KEY.to_public()),))
UNLOCKING = Unlocking("", (KEY,))
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
        write_archive(origin.path, backup, selection=selection, encryption=encryption)

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
