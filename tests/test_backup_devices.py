"""Backups to and from disks that are full, read-only, unplugged or slow, while their server goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from backup_helpers import RealmContent, contents, files_of, give_space, looks_whole, remount, take_space
from crash.machines import PowerLoss, power_losses
from harness import Process, Processes, wait_until
from killing import Nursery
from nodes import Load, assert_sound, checkpoint, put, status, warnings
from s3_server import FaultyFront, S3Server, credentials
from store_helpers import small_disk

from understudy.backup.archive import write_archive
from understudy.backup.catalog import read_catalog
from understudy.backup.make import make_backup
from understudy.backup.policy import parse_policy
from understudy.backup.repository import open_repository
from understudy.backup.restore import restore_backup, restore_stored
from understudy.backup.run import run_policy
from understudy.backup.selection import EVERYTHING, Selection
from understudy.common.errors import ExitCode
from understudy.common.files import sync_directory

KIB, MIB = 1 << 10, 1 << 20
PORTABLE = Selection(portable=True)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What there is to back up and to restore, on a disk that has room."""

    folder: Path
    server: Path  # a stopped server's directory
    contents: dict[str, RealmContent]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Origin:
    """Some 2 MiB that can't be compressed, half of them in the log only; and a backup of each kind."""
    folder = tmp_path_factory.mktemp("origin")
    processes = Processes(tmp_path_factory.mktemp("processes"))
    try:
        primary = processes.primary(folder / "server")
        for part in (1, 2):
            for realm in ("/one", "/two"):
                values = ((b"%d of %d" % (number, part), os.urandom(8_000)) for number in range(60))
                put(primary.address, realm, *values)
            if part == 1:
                checkpoint(primary.address)
        primary.terminate()
    finally:
        processes.close()
    server = folder / "server"
    make_backup(server, folder / "directory")
    make_backup(server, folder / "portable", selection=PORTABLE)
    write_archive(server, folder / "archive.tar.zst")
    (folder / "repository").mkdir()
    table = {"name": "nightly", "repositories": [str(folder / "repository")], "retries": 0}
    assert run_policy(parse_policy(table, "u.toml"), server).all_errors == []
    return Origin(folder=folder, server=server, contents=contents(server))


# -- ways to make a copy ---------------------------------------------------------------------------------------

Words = tuple[str | Path, ...]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A command that makes a copy on a disk.

    Attributes:
        command: given what there is to copy, and the disk.
        target: what it makes there.
        again: what to add to have it go on where it was cut off.
        restore: makes a directory of it, where it is none: given the target, and where to.
        flags: more words of the command.
    """

    command: Callable[[Origin, Path], Words]
    target: str
    again: Words = ()
    restore: Callable[[Path, Path], object] | None = None
    flags: Words = ()

    def words(self, origin: Origin, disk: Path) -> Words:
        """The command."""
        return (*self.command(origin, disk), *self.flags)


def _backup(target: str) -> Callable[[Origin, Path], Words]:
    return lambda origin, disk: ("backup", "-f", origin.server, "-t", disk / target)


def _run(origin: Origin, disk: Path) -> Words:
    (disk / "repository").mkdir(exist_ok=True)
    sync_directory(disk)
    config = origin.folder / "full.toml"
    config.write_text(
        f'[[backup]]\nname = "nightly"\nretries = 0\nrepositories = [{json.dumps(str(disk / "repository"))}]\n'
    )
    return ("backup", "run", "nightly", "--config", config, "--data-dir", origin.server)


def _restore(name: str) -> Callable[[Origin, Path], Words]:
    return lambda origin, disk: ("restore", origin.folder / name, "--to", disk / "copy")


def _restore_newest(folder: Path, to: Path) -> None:
    repository = open_repository(str(folder))
    restore_stored(repository, read_catalog(repository).backups[-1], to, with_log=True)


ALL_BY_NAME: Words = ("--realm", "/one", "--realm", "/two")
WAYS = {
    "a directory": Way(command=_backup("copy"), target="copy", again=("--update",)),
    "chosen realms": Way(command=_backup("copy"), target="copy", flags=ALL_BY_NAME),
    "a portable one": Way(
        command=_backup("copy"), target="copy", flags=("--portable",), restore=restore_backup
    ),
    "an archive": Way(command=_backup("a.tar.zst"), target="a.tar.zst", restore=restore_backup),
    "a repository": Way(command=_run, target="repository", restore=_restore_newest),
    "restored from a directory": Way(command=_restore("directory"), target="copy"),
    "restored from an archive": Way(command=_restore("archive.tar.zst"), target="copy"),
    "restored from records": Way(command=_restore("portable"), target="copy"),
    "restored from a repository": Way(command=_restore("repository"), target="copy"),
    "chosen realms restored": Way(command=_restore("archive.tar.zst"), target="copy", flags=ALL_BY_NAME),
}


def assert_whole(way: Way, target: Path, origin: Origin, scratch: Path) -> None:
    """It holds all that its origin did."""
    directory = target
    if way.restore is not None:
        shutil.rmtree(scratch, ignore_errors=True)
        way.restore(target, scratch)
        directory = scratch
    assert_sound(directory)
    assert contents(directory) == origin.contents


# -- full ------------------------------------------------------------------------------------------------------

LEFT = tuple(kib * KIB for kib in (0, 64, 300, 1000, 2000, 3000, 4500, 7000, 10_000, 15_000, 25_000, 40_000))


@pytest.mark.parametrize("name", WAYS)
def test_a_full_disk_is_named_and_the_copy_is_made_once_there_is_space(
    tmp_path: Path, processes: Processes, nursery: Nursery, origin: Origin, name: str
) -> None:
    """G8, G9: wherever space runs out, the command says so and where, nothing looks whole, and the next one ends it."""
    way, before, failed = WAYS[name], files_of(origin.folder), 0
    for number, leaving in enumerate(LEFT):
        with small_disk(tmp_path / f"disk{number}", size="48m") as disk:
            words, target = way.words(origin, disk), disk / way.target
            take_space(disk, leaving=leaving)
            command = processes.start(*words, launch=nursery.dying_at(0))
            if command.wait() == 0:
                assert_whole(way, target, origin, tmp_path / "scratch")
                break
            failed += 1
            said = command.stdout + command.stderr
            assert command.wait() == ExitCode.FAILED, said
            assert "no space left" in said
            assert "free some space, then try again" in said
            assert str(disk) in said
            assert "Traceback" not in said
            assert not looks_whole(target)
            give_space(disk)
            assert [path for path in disk.iterdir() if path.name not in (target.name, "repository")] == []
            again = processes.start(*words, *way.again, launch=nursery.dying_at(0))
            assert again.wait() == 0, again.describe()
            assert_whole(way, target, origin, tmp_path / "scratch")
    assert failed > 3
    after = files_of(origin.folder)
    for changed in ("full.toml", "server/backups/journal", "server/backups/history.json"):  # the runs' own
        for files in (before, after):
            files.pop(changed, None)
    assert after == before


# -- read-only -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_a_read_only_disk_is_named(
    tmp_path: Path, processes: Processes, nursery: Nursery, origin: Origin, name: str
) -> None:
    """G8: nothing can be made there, and the command says why and where; once it can be written to, it is made."""
    way = WAYS[name]
    with small_disk(tmp_path / "disk", size="48m") as disk:
        words, target = way.words(origin, disk), disk / way.target
        assert remount(disk, "ro")
        command = processes.start(*words, launch=nursery.dying_at(0))
        assert command.wait() in (ExitCode.FAILED, ExitCode.DIRECTORY), command.describe()
        said = command.stdout + command.stderr
        assert "ead-only" in said
        assert str(disk) in said
        assert "Traceback" not in said
        assert remount(disk, "rw")
        assert not looks_whole(target)
        again = processes.start(*words, launch=nursery.dying_at(0))
        assert again.wait() == 0, again.describe()
        assert_whole(way, target, origin, tmp_path / "scratch")


def test_everything_can_be_read_from_a_disk_that_is_read_only(tmp_path: Path, origin: Origin) -> None:
    """A snapshot of a server's disk, mounted to be read, can be backed up; and backups kept on such a disk restore."""
    with small_disk(tmp_path / "disk", size="48m") as disk:
        shutil.copytree(origin.folder, disk / "origin", ignore=shutil.ignore_patterns("*.sock"))
        assert remount(disk, "ro")
        sources = disk / "origin"
        for number, selection in enumerate((EVERYTHING, Selection(realms=("/one", "/two")))):
            make_backup(sources / "server", tmp_path / f"a{number}", selection=selection)
        for name in ("directory", "portable", "archive.tar.zst"):
            restore_backup(sources / name, tmp_path / name)
        _restore_newest(sources / "repository", tmp_path / "repository")
        remount(disk, "rw")
    for name in ("a0", "a1", "directory", "portable", "archive.tar.zst", "repository"):
        assert_sound(tmp_path / name)
        assert contents(tmp_path / name) == origin.contents


# -- unplugged -------------------------------------------------------------------------------------------------


def forget(target: Path) -> None:
    """Removes a copy, durably; a repository only loses all that is in it."""
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    if target.name == "repository":
        target.mkdir()
    os.sync()


def stops(command: Process) -> bool:
    """Waits until it is stopped; whether it is, or has ended."""

    def is_stopped() -> bool:
        return "\nState:\tT" in Path(f"/proc/{command.pid}/status").read_text()

    wait_until(lambda: not command.is_running or is_stopped(), what=command.describe)
    return command.is_running


@pytest.mark.parametrize("name", WAYS)
def test_a_disk_that_goes_away_in_the_middle_is_named_and_the_copy_is_made_when_it_is_back(
    tmp_path: Path, processes: Processes, nursery: Nursery, origin: Origin, name: str, seed: int
) -> None:
    """G8: what was not durable is lost with the disk; what is left is not taken for whole, and the next one ends it."""
    way = WAYS[name]
    chance = Random(seed)
    with power_losses(tmp_path / "disks", chance, 1) as (machine,):
        disk = machine.directory.parent
        words, target = way.words(origin, disk), disk / way.target
        for step in sorted(chance.sample(range(1, 25), 4)):
            command = processes.start(*words, launch=nursery.stopping_at(step))
            if stops(command):
                machine.unplug()
                command.send(signal.SIGCONT)
                ended = command.wait()
                said = command.stdout + command.stderr
                assert ended == 0 or str(disk) in said
                assert ended in (0, ExitCode.FAILED, ExitCode.DIRECTORY), said
                assert "Traceback" not in said
                machine.plug_in()
                (target / "lock.json").unlink(missing_ok=True)  # instead of waiting until it is taken over
                assert looks_whole(target) or ended != 0
            if not looks_whole(target):
                again = processes.start(*words, *way.again, launch=nursery.dying_at(0))
                assert again.wait() == 0, again.describe()
            assert_whole(way, target, origin, tmp_path / "scratch")
            forget(target)


# -- while a server goes on ------------------------------------------------------------------------------------

NO_SPACE, READ_ONLY, GONE = "no space left", "Read-only file system", "Input/output error"


def trouble(kind: str, machine: PowerLoss, disk: Path) -> None:
    """Makes a disk fail."""
    if kind == GONE:
        machine.unplug()
    elif kind == NO_SPACE:
        take_space(disk, leaving=0)
    else:
        wait_until(lambda: remount(disk, "ro"))  # not while somebody writes there


def mend(kind: str, machine: PowerLoss, disk: Path) -> None:
    """Undoes :func:`trouble`."""
    if kind == GONE:
        machine.plug_in()
    elif kind == NO_SPACE:
        give_space(disk)
    else:
        remount(disk, "rw")


@pytest.mark.parametrize("kind", [NO_SPACE, READ_ONLY, GONE])
def test_no_server_waits_for_the_disk_of_its_repository(
    tmp_path: Path, processes: Processes, seed: int, kind: str
) -> None:
    """G9: commits go on while nothing can be stored, status says why, and once it can, all is shipped and restores."""
    with power_losses(tmp_path / "disks", Random(seed), 1) as (machine,):
        disk = machine.directory.parent
        (disk / "repository").mkdir()
        sync_directory(disk)
        config = tmp_path / "u.toml"
        url = json.dumps(str(disk / "repository"))
        config.write_text(f'[[backup]]\nname = "nightly"\nretries = 0\nrepositories = [{url}]\n')
        primary = processes.primary(tmp_path / "a", "--config", config)
        put(primary.address, "/realm", (b"first", b"1"))
        run = ("backup", "run", "nightly", "--config", config, "--data-dir", tmp_path / "a")
        processes.run(*run)
        with Load(primary.address) as load:
            load.wait_for(20)
            trouble(kind, machine, disk)
            wait_until(lambda: kind in warnings(primary.address), what=lambda: warnings(primary.address))
            load.wait_for(50)
            assert kind in processes.run(*run, code=ExitCode.FAILED).stderr.decode()
            load.wait_for(50)
            load.stop()
        assert load.errors == []
        mend(kind, machine, disk)
        head = status(primary.address).durable_lsn
        wait_until(lambda: status(primary.address).backups[0].repositories[0].shipped_lsn >= head)
        processes.run("restore", disk / "repository", "--to", tmp_path / "b")
        assert primary.terminate() == 0
        assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_no_server_waits_for_a_reader_that_has_fallen_asleep(tmp_path: Path, processes: Processes) -> None:
    """G9: an archive into a pipe that nobody empties pins a moment, and the server commits and checkpoints on."""
    primary = processes.primary(tmp_path / "a")
    values = ((b"%d" % number, os.urandom(50_000)) for number in range(60))
    put(primary.address, "/large", *values)
    checkpoint(primary.address)
    arguments = ["backup", "-f", str(tmp_path / "a"), "-t", "-"]
    with subprocess.Popen(
        [sys.executable, "-m", "understudy.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=processes.environment,
    ) as command:
        assert command.stdout is not None
        head = command.stdout.read(1)
        pinned = status(primary.address).durable_lsn
        with Load(primary.address) as load:
            for _ in range(3):
                load.wait_for(50)
                checkpoint(primary.address)
            assert command.poll() is None
            load.stop()
        rest, said = command.communicate()
    assert (command.returncode, load.errors) == (0, []), said
    assert status(primary.address).checkpoint_lsn > pinned
    (tmp_path / "piped.tar.zst").write_bytes(head + rest)
    assert restore_backup(tmp_path / "piped.tar.zst", tmp_path / "b").manifest.lsn <= pinned
    assert_sound(tmp_path / "b")
    assert "/load" not in contents(tmp_path / "b")


def test_no_server_waits_for_an_object_storage_that_dawdles(tmp_path: Path, processes: Processes) -> None:
    """G9: while requests of a run hang, the server commits and checkpoints on; then the run ends well."""
    with S3Server() as storage, FaultyFront(storage.address) as front:
        processes.environment |= credentials(front.address)
        primary = processes.primary(tmp_path / "a")
        put(primary.address, "/large", *((b"%d" % number, os.urandom(50_000)) for number in range(60)))
        config = tmp_path / "u.toml"
        config.write_text('[[backup]]\nname = "n"\nretries = 0\nrepositories = ["s3://backups/dawdling"]\n')
        run = processes.start("backup", "run", "n", "--config", config, "--data-dir", tmp_path / "a")
        for number in range(1, 4):
            # Further than the lock and the identity, and each time a little.
            wait_until(lambda at=10 * number: front.requests >= at or not run.is_running)  # type: ignore[misc]
            front.may_pass.clear()
            with Load(primary.address) as load:
                load.wait_for(50)
                checkpoint(primary.address)
                load.stop()
            assert load.errors == []
            front.may_pass.set()
        assert run.wait() == 0, run.describe()
        processes.run("restore", "s3://backups/dawdling", "--to", tmp_path / "b")
        assert_sound(tmp_path / "b")
        assert contents(tmp_path / "b")["/large"] == contents(tmp_path / "a")["/large"]
