"""Sources that become something else while they are backed up: promoted, rewound, bootstrapped anew, pruned."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from backup_helpers import RealmContent, contents
from harness import Process, Processes, wait_until
from nodes import RESET_NEEDED, Load, Pair, assert_sound, checkpoint, copy_node, put, wait_until_caught_up

from understudy.backup import archive as archive_module
from understudy.backup import make as make_module
from understudy.backup import source as source_module
from understudy.backup.archive import write_archive
from understudy.backup.log_files import LogFiles
from understudy.backup.make import make_backup
from understudy.backup.manifest import read_manifest
from understudy.backup.restore import restore_backup
from understudy.backup.selection import Selection
from understudy.backup.source import Source, open_source
from understudy.common.directory import IN_PROGRESS_FILE, DataDirectory
from understudy.common.errors import UnderstudyError
from understudy.common.records import Record

ALL_BY_NAME = Selection(realms=("/realm", "/large", "/other"))


class Copies(NamedTuple):
    """Of one cluster, as an old primary's directory and what may take its place."""

    old: Path  # with entries of its own behind the fork
    new: Path  # of the promoted replica, which has gone further
    later: Path  # of the old primary's history, with a store that is further and a log that begins there


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    """Stopped nodes."""
    folder = tmp_path_factory.mktemp("copies")
    processes = Processes(tmp_path_factory.mktemp("processes"))
    try:
        pair = Pair(processes, folder)
        put(pair.primary.address, "/realm", *((b"%03d" % number, b"both" * 50) for number in range(100)))
        checkpoint(pair.primary.address)
        put(pair.primary.address, "/realm", (b"behind", b"the store"))
        wait_until_caught_up(pair.primary.address, pair.replica.address)
        pair.replica.kill()
        for number in range(5):
            put(pair.primary.address, "/realm", (b"%03d" % number, b"old"), (b"own", b"%d" % number))
        pair.primary.terminate()
        old = copy_node(pair.a, folder / "old")
        primary = processes.primary(pair.a)
        put(primary.address, "/other", *((b"%03d" % number, b"later" * 50) for number in range(100)))
        checkpoint(primary.address)
        put(primary.address, "/other", (b"last", b"one"))
        primary.terminate()
        later = folder / "later"
        make_backup(pair.a, later)
        processes.run("promote", pair.b)
        primary = processes.primary(pair.b)
        for number in range(20):
            put(primary.address, "/realm", (b"%03d" % number, b"new"), (b"new", b"%d" % number))
        primary.terminate()
        return Copies(old, pair.b, later)
    finally:
        processes.close()


# -- in steps --------------------------------------------------------------------------------------------------


def install(directory: Path, copy: Path) -> None:
    """As a rewind or a bootstrap ends: another copy takes the place of the one that is there."""
    with DataDirectory.open(directory) as opened:
        opened.incoming.mkdir()
        for part in ("store", "log"):
            shutil.copytree(copy / part, opened.incoming / part)
        opened.install(opened.cluster, keep_old=False)


def once(action: Callable[[], None]) -> Callable[..., None]:
    """Does it at the first call only."""
    left = [action]

    def call(*_: object) -> None:
        while left:
            left.pop()()

    return call


def arrange(patched: pytest.MonkeyPatch, moment: str, event: Callable[..., None]) -> None:
    """Lets something happen once the store is open, once the log behind it was read, or behind all that."""
    pin, durable_records = source_module._pin, LogFiles.durable_records

    def pin_first(*arguments: Any) -> Any:
        pinned = pin(*arguments)
        event()
        return pinned

    def read_first(*arguments: Any) -> Iterator[Record]:
        yield from durable_records(*arguments)
        event()

    @contextlib.contextmanager
    def open_first(path: Path) -> Iterator[Source]:
        with open_source(path) as opened:
            event()
            yield opened

    if moment == "source opened":
        for module in (make_module, archive_module):
            patched.setattr(module, "open_source", open_first)
    elif moment == "store opened":
        patched.setattr(source_module, "_pin", pin_first)
    elif moment == "log read":
        patched.setattr(LogFiles, "durable_records", read_first)


def back_up(way: str, source: Path, folder: Path, progress: Callable[..., None]) -> Path:
    """Backs up; returns a data directory that holds the backup."""
    if way == "directory":
        make_backup(source, folder / "b", progress=progress)
    elif way == "records":
        make_backup(source, folder / "b", selection=ALL_BY_NAME, progress=progress)
    else:
        write_archive(source, folder / "b.tar.zst", progress=progress)
        restore_backup(folder / "b.tar.zst", folder / "b")
    return folder / "b"


@pytest.mark.parametrize("way", ["directory", "records", "archive"])
@pytest.mark.parametrize("moment", ["store opened", "log read", "source opened", "copying"])
@pytest.mark.parametrize("successor", ["new", "later"])
def test_a_source_that_is_replaced_is_backed_up_as_one_of_the_two(
    tmp_path: Path, copies: Copies, monkeypatch: pytest.MonkeyPatch, way: str, moment: str, successor: str
) -> None:
    """G2, G3: rewound or bootstrapped anew at any moment, the backup is of one copy, whole, and never of both."""
    source = copy_node(copies.old, tmp_path / "source")
    event = once(lambda: install(source, getattr(copies, successor)))
    with monkeypatch.context() as patched:
        arrange(patched, moment, event)
        backup = back_up(way, source, tmp_path, event if moment == "copying" else lambda *_: None)
    assert_sound(backup)
    pinned = moment in ("source opened", "copying")
    assert contents(backup) == contents(copies.old if pinned else source)
    assert_sound(source)


@pytest.mark.parametrize("way", ["directory", "records", "archive"])
def test_a_log_that_is_pruned_while_it_is_backed_up_is_copied_all_the_same(
    tmp_path: Path, copies: Copies, way: str
) -> None:
    """G9: a slow backup keeps what it needs, and the server needs not wait for it with removing its segments."""
    source = copy_node(copies.old, tmp_path / "source")

    def prune() -> None:
        shutil.rmtree(source / "log")
        shutil.copytree(copies.later / "log", source / "log")

    backup = back_up(way, source, tmp_path, once(prune))
    assert_sound(backup)
    assert contents(backup) == contents(copies.old)


# -- with processes --------------------------------------------------------------------------------------------


class Halted(NamedTuple):
    """A backup that stands still in the middle, however long the rest of a test takes."""

    command: Process
    target: Path

    def go_on(self) -> None:
        """Lets it come to its end, which is a good one."""
        self.command.send(signal.SIGCONT)
        assert self.command.wait() == 0, self.command.describe()


def begin_and_halt(processes: Processes, source: Path, target: Path) -> Halted:
    """Starts one, and halts it once it is copying."""
    command = processes.start("backup", "-f", source, "-t", target, "--rate", "500kB/s")
    wait_until((target / IN_PROGRESS_FILE).exists, what=command.describe)
    command.send(signal.SIGSTOP)
    assert command.is_running
    return Halted(command, target)


def fill(address: str) -> None:
    """Some MB, for which a backup takes some seconds."""
    put(address, "/large", *((b"%d" % number, b"%04d" % number * 250) for number in range(1500)))
    checkpoint(address)


def assert_holds(backup: Path, before: dict[str, RealmContent]) -> None:
    """A finished backup is sound, and as the source was."""
    assert_sound(backup)
    found = contents(backup)
    for realm, content in before.items():
        assert found[realm] == content, realm


def test_a_replica_that_is_promoted_while_it_is_backed_up(processes: Processes, tmp_path: Path) -> None:
    """G1, G3: the backup is of the moment before, and an update goes on in the new epoch."""
    pair = Pair(processes, tmp_path)
    fill(pair.primary.address)
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    halted = begin_and_halt(processes, pair.b, tmp_path / "c")
    primary = pair.fail_over()
    with Load(primary.address) as load:
        load.wait_for(100)
        checkpoint(primary.address)
        load.stop()
    halted.go_on()
    assert_sound(halted.target)
    manifest = read_manifest(halted.target)
    assert (manifest.epoch, manifest.realms) == (1, 1)
    processes.run("backup", "-f", pair.b, "-t", halted.target, "--update")
    assert read_manifest(halted.target).epoch == 2
    assert primary.terminate() == 0
    assert_holds(halted.target, {"/load": contents(pair.b)["/load"], "/large": contents(pair.b)["/large"]})


def test_an_old_primary_that_is_rewound_while_it_is_backed_up(processes: Processes, tmp_path: Path) -> None:
    """G3, G4: the backup holds what only the old primary had; an update from what it has become is refused."""
    pair = Pair(processes, tmp_path)
    fill(pair.primary.address)
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    pair.replica.kill()
    put(pair.primary.address, "/realm", (b"only", b"here"))
    pair.primary.kill()
    processes.run("promote", pair.b)
    primary = processes.primary(pair.b)
    put(primary.address, "/realm", (b"new", b"1"))
    before = contents(pair.a)
    halted = begin_and_halt(processes, pair.a, tmp_path / "c")
    processes.run("rewind", pair.a, "--to", primary.address)
    halted.go_on()
    assert_holds(halted.target, before)
    again = processes.run("backup", "-f", pair.a, "-t", halted.target, "--update", code=RESET_NEEDED)
    assert b"keep this backup" in again.stderr
    assert_holds(halted.target, before)
    processes.run("backup", "-f", pair.a, "-t", tmp_path / "d")
    assert_holds(tmp_path / "d", contents(pair.a))


def test_a_replica_that_is_bootstrapped_anew_while_it_is_backed_up(
    processes: Processes, tmp_path: Path
) -> None:
    """G2: the backup is of the copy that was; an update goes on with the one that has taken its place."""
    pair = Pair(processes, tmp_path)
    fill(pair.primary.address)
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    assert pair.replica.terminate() == 0
    before = contents(pair.b)
    halted = begin_and_halt(processes, pair.b, tmp_path / "c")
    shutil.rmtree(pair.b)
    replica = processes.replica(pair.b, pair.primary.address, "--id", "b")
    put(pair.primary.address, "/realm", (b"meanwhile", b"1"))
    wait_until_caught_up(pair.primary.address, replica.address)
    halted.go_on()
    assert_holds(halted.target, before)
    processes.run("backup", "-f", pair.b, "-t", halted.target, "--update")
    assert replica.terminate() == 0
    assert_holds(halted.target, contents(pair.b))


def test_a_source_that_is_no_copy_for_a_moment_is_refused(tmp_path: Path, copies: Copies) -> None:
    """G8: what a crash has left in the middle of a replacement is not backed up, and nothing is made."""
    source = copy_node(copies.old, tmp_path / "source")
    text = (source / "node.json").read_text()
    (source / "node.json").write_text(text.replace('"primary"', '"installing"'))
    with pytest.raises(UnderstudyError, match="no whole copy"):
        make_backup(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()
