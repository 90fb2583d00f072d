"""The data directory: whose it is, who has it open, and how a new copy takes the old one's place."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from understudy.common import directory as directory_module
from understudy.common.directory import DataDirectory, Role
from understudy.common.errors import (
    CorruptionError,
    DirectoryError,
    DirectoryInUse,
    DiskFull,
    NewerFormat,
    NotADataDirectory,
)
from understudy.common.types import ClusterId

CLUSTER = ClusterId(b"old cluster 0000")
NEW_CLUSTER = ClusterId(b"new cluster 0000")


def made(path: Path, role: Role = Role.PRIMARY) -> Path:
    """A data directory of that role."""
    with DataDirectory.open(path) as directory:
        directory.begin(role, CLUSTER)
    return path


# -- whose it is ---------------------------------------------------------------------------------------------


def test_an_absent_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    """A directory that is not there is made, with its parents, and nobody else may look into it."""
    path = tmp_path / "a" / "b"
    with DataDirectory.open(path) as directory:
        assert directory.is_new
        assert not directory.has_copy
        assert path.stat().st_mode & 0o077 == 0
        assert (path / "lock").stat().st_mode & 0o077 == 0
        with pytest.raises(NotADataDirectory):
            _ = directory.role


@pytest.mark.parametrize("role", [Role.PRIMARY, Role.REPLICA, Role.PROMOTING, Role.FENCED])
def test_role_cluster_and_node_are_remembered(tmp_path: Path, role: Role) -> None:
    """What a directory was made for is what it is when it is opened again, and its node has an id of its own."""
    made(tmp_path / "a", role)
    made(tmp_path / "b", role)
    with DataDirectory.open(tmp_path / "a") as one, DataDirectory.open_existing(tmp_path / "b") as other:
        assert (one.role, one.cluster, one.is_new, one.has_copy) == (role, CLUSTER, False, True)
        assert one.node != other.node
        one.set_role(Role.FENCED)
    with DataDirectory.open(tmp_path / "a") as again:
        assert (again.role, again.cluster, again.node) == (Role.FENCED, CLUSTER, one.node)


def test_a_replica_without_a_copy_has_no_cluster(tmp_path: Path) -> None:
    """A new replica belongs to nobody until it has its first copy."""
    with DataDirectory.open(tmp_path) as directory:
        directory.begin(Role.REPLICA, ClusterId(b""))
        assert (directory.cluster, directory.has_copy) == (b"", False)


@pytest.mark.parametrize("name", ["notes.txt", "data.mdb", ".hidden", "log"])
def test_g4_a_directory_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    """G4: a directory with something else in it is not taken, and nothing is added to it."""
    (tmp_path / name).write_text("precious")
    with pytest.raises(NotADataDirectory, match="not empty and not a data directory"):
        DataDirectory.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["lost+found", "lock", "node.json.new"])
def test_what_a_file_system_or_a_cut_off_start_leaves_is_no_obstacle(tmp_path: Path, name: str) -> None:
    """A fresh volume has its lost+found, and a first start that was cut off leaves a lock or half a file."""
    (tmp_path / name).touch()
    with DataDirectory.open(tmp_path) as directory:
        assert directory.is_new


def test_g9_a_directory_that_finds_no_space_is_no_misuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: no space to make the directory is told as that, not as a directory that can't be used."""

    def mkdir(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(DiskFull, match=r"no space left to create .*/new"):
        DataDirectory.open(tmp_path / "new")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    """A path that is a file, or leads through one, is refused as one of ours."""
    (tmp_path / "file").touch()
    with pytest.raises(NotADataDirectory, match="not a directory"):
        DataDirectory.open(tmp_path / "file")
    with pytest.raises(DirectoryError, match="can't use"):
        DataDirectory.open(tmp_path / "file" / "below")


def test_a_directory_that_should_hold_data_is_not_made(tmp_path: Path) -> None:
    """A command for existing data makes none where it was given a wrong path."""
    with pytest.raises(NotADataDirectory, match=r"no node\.json"):
        DataDirectory.open_existing(tmp_path / "typo")
    assert list(tmp_path.iterdir()) == []


def _rewrite(path: Path, **changes: object) -> None:
    file = path / "node.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **changes}))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """A directory that a later version wrote is not opened, and not locked either."""
    _rewrite(made(tmp_path), format=2)
    for _ in range(2):
        with pytest.raises(NewerFormat, match=r"format 2.*upgrade"):
            DataDirectory.open(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"role": "king"},
        {"role": None},
        {"node": "x"},
        {"node": 5},
        {"node": None},
        {"cluster": "x"},
        {"cluster": 5},
        {"format": "one"},
    ],
    ids=str,
)
def test_a_damaged_node_file_is_called_that(tmp_path: Path, changes: dict[str, object]) -> None:
    """Whatever node.json says that it can't, the answer is corruption with a remedy, never a traceback."""
    _rewrite(made(tmp_path), **changes)
    for _ in range(2):
        with pytest.raises(CorruptionError, match=r"node\.json can't be read.*make the copy anew"):
            DataDirectory.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe\x00"])
def test_a_node_file_that_is_not_one_is_called_that(tmp_path: Path, content: bytes) -> None:
    """An empty, cut or binary node.json is corruption, too."""
    (made(tmp_path) / "node.json").write_bytes(content)
    with pytest.raises(CorruptionError, match=r"node\.json can't be read"):
        DataDirectory.open(tmp_path)


def test_a_creation_that_was_cut_off_is_begun_anew(tmp_path: Path) -> None:
    """The first files of a primary that was never finished are removed: nobody was told that they are there."""
    made(tmp_path, Role.CREATING)
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "x.seg").touch()
    with DataDirectory.open(tmp_path) as directory:
        assert directory.role is Role.CREATING
        assert not directory.has_copy
        assert not directory.log.exists()


# -- who has it open -----------------------------------------------------------------------------------------

# Opens the directory, then has a child of its own that has the lock, too, as a checkpoint process has.
HOLDER = """
import subprocess, sys
from pathlib import Path
from understudy.common.directory import DataDirectory
directory = DataDirectory.open(Path(sys.argv[1]))
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=(directory.lock_fd,)) if sys.argv[2] else None
print("open", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def another_process(path: Path, *, child_stdin: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has ``path`` open; with ``child_stdin`` a child that reads that inherits the lock."""
    program = HOLDER.replace("stdin=subprocess.PIPE", f"stdin={child_stdin}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", program, path, "child" if child_stdin is not None else ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=() if child_stdin is None else (child_stdin,),
        env=environment,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def test_a_directory_that_another_process_has_open_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second server on one directory is refused without waiting, naming the first, and the first goes on."""
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    with another_process(tmp_path) as process:
        for _ in range(2):
            with pytest.raises(DirectoryInUse, match=f"in use by process {process.pid}"):
                DataDirectory.open(tmp_path)
    with DataDirectory.open(tmp_path):
        pass


def test_a_directory_is_opened_once_in_a_process(tmp_path: Path) -> None:
    """The same holds within one process, until it is closed."""
    with DataDirectory.open(tmp_path), pytest.raises(DirectoryInUse, match=str(os.getpid())):
        DataDirectory.open(tmp_path)
    DataDirectory.open(tmp_path).close()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_child_of_a_killed_owner_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reaped: bool
) -> None:
    """A checkpoint process that is still writing when its server was killed keeps the directory until it is
    done; the next server waits for that, whether or not somebody has taken note of the death.
    """
    read_end, write_end = os.pipe()
    waits: list[float] = []
    really_sleep = time.sleep

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            os.close(write_end)  # the child ends
        really_sleep(seconds)

    with another_process(tmp_path, child_stdin=read_end) as process:
        os.close(read_end)
        process.kill()
        if reaped:
            process.wait()
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        monkeypatch.setattr(time, "sleep", sleep)
        with DataDirectory.open(tmp_path) as directory:
            assert directory.is_new
        assert len(waits) >= 3


def test_a_child_that_never_ends_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: after a while the directory is called in use, rather than waiting for ever."""
    monkeypatch.setattr(directory_module, "LOCK_WAIT_S", 0.05)
    read_end, write_end = os.pipe()
    with another_process(tmp_path, child_stdin=read_end) as process:
        os.close(read_end)
        process.kill()
        process.wait()
        with pytest.raises(DirectoryInUse, match=str(process.pid)):
            DataDirectory.open(tmp_path)
        os.close(write_end)


# -- a new copy takes the old one's place ------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone; nothing catches this."""


class Crashing:
    """Ends the process before the nth change to the file system, or in the middle of removing a tree."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._left = -1
        self.reached = 0
        for module, name in ((os, "rename"), (os, "fsync"), (Path, "mkdir"), (Path, "unlink")):
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))
        self._rmtree = shutil.rmtree
        monkeypatch.setattr(shutil, "rmtree", self._remove)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._step()
            return function(*args, **kwargs)

        return call

    def _step(self) -> None:
        if self._left == 0:
            self._left = -1
            raise Crash
        self._left -= self._left > 0

    def _remove(self, path: Path, **kwargs: Any) -> None:
        self._step()
        if path.is_dir():
            for index, name in enumerate(sorted(os.listdir(path))):
                if index:
                    self._step()  # in the middle
                if (path / name).is_dir():
                    self._rmtree(path / name)
                else:
                    os.unlink(path / name)
        self._rmtree(path, **kwargs)

    @contextlib.contextmanager
    def after(self, steps: int) -> Iterator[None]:
        """Crashes after so many steps of what is done in the block, if it has so many."""
        self._left = steps
        self.crashed = False
        try:
            yield
        except Crash:
            self.crashed = True
        finally:
            self._left = -1


def fill(path: Path, what: str) -> None:
    """A store and a log, of two files each."""
    for part in ("store", "log"):
        (path / part).mkdir(parents=True)
        for name in ("one", "two"):
            (path / part / name).write_text(f"{what} {part} {name}")


def copy_in(path: Path) -> str | None:
    """Whose store and log are there, whole: "old", "new", or None where there is nothing."""
    found = {
        (part, name): (path / part / name).read_text().split()[0] if (path / part / name).exists() else None
        for part in ("store", "log")
        for name in ("one", "two")
    }
    [whose] = set(found.values())  # never a mixture
    return whose


def kept_copies(path: Path) -> list[str]:
    folder = path / "set-aside"
    found = [copy_in(one) for one in folder.iterdir()] if folder.exists() else []
    return [one for one in found if one is not None]


@pytest.fixture
def crashing(monkeypatch: pytest.MonkeyPatch) -> Crashing:
    """Crashes where it is told."""
    return Crashing(monkeypatch)


def _before_install(path: Path) -> None:
    made(path, Role.FENCED)
    fill(path, "old")
    fill(path / "incoming", "new")


def _check_installed(path: Path, *, keep_old: bool) -> None:
    with DataDirectory.open(path) as directory:
        assert (directory.role, directory.cluster) == (Role.REPLICA, NEW_CLUSTER)
        assert copy_in(path) == "new"
        assert kept_copies(path) == (["old"] if keep_old else [])
        assert not (directory.incoming / "store").exists()


@pytest.mark.parametrize("keep_old", [True, False])
def test_a_copy_takes_the_old_ones_place(tmp_path: Path, keep_old: bool) -> None:
    """G4: after an install the new copy is there, and the old one is set aside where that was asked for."""
    _before_install(tmp_path)
    with DataDirectory.open(tmp_path) as directory:
        kept = directory.install(NEW_CLUSTER, keep_old=keep_old)
        assert (kept is not None) == keep_old
        assert kept is None or copy_in(kept) == "old"
        assert not directory.incoming.exists()
    _check_installed(tmp_path, keep_old=keep_old)


@pytest.mark.parametrize("keep_old", [True, False])
def test_a_first_copy_has_nothing_to_set_aside(tmp_path: Path, keep_old: bool) -> None:
    """A new replica's first copy is installed in the same way."""
    with DataDirectory.open(tmp_path) as directory:
        directory.begin(Role.REPLICA, ClusterId(b""))
        fill(directory.incoming, "new")
        assert directory.install(NEW_CLUSTER, keep_old=keep_old) is None
    _check_installed(tmp_path, keep_old=False)


@pytest.mark.parametrize("keep_old", [True, False])
def test_g4_an_install_cut_off_at_any_step_leaves_the_old_copy_or_the_new_one(
    tmp_path: Path, crashing: Crashing, keep_old: bool
) -> None:
    """G4: cut off before any step, and once more before any step of making that good, the directory opens with
    the old copy as it was, or with the new one and the old set aside; and the install can be done again.
    """
    outcomes = set()
    first = 0
    while True:
        second = 0
        while True:
            path = tmp_path / f"{first}-{second}"
            _before_install(path)
            directory = DataDirectory.open(path)
            with crashing.after(first):
                directory.install(NEW_CLUSTER, keep_old=keep_old)
            directory.close()
            crashed = crashing.crashed
            with crashing.after(second):
                DataDirectory.open(path).close()
            if not crashing.crashed:
                outcomes.add(_check_after_crash(path, keep_old=keep_old))
                break
            second += 1
        if not crashed:
            break
        first += 1
    assert first > 8
    assert outcomes == {"as before", "installed"}


def _check_after_crash(path: Path, *, keep_old: bool) -> str:
    with DataDirectory.open(path) as directory:
        if directory.role is Role.REPLICA:
            outcome = "installed"
        else:
            outcome = "as before"
            assert (directory.role, directory.cluster) == (Role.FENCED, CLUSTER)
            assert (copy_in(path), copy_in(path / "incoming")) == ("old", "new")
            directory.install(NEW_CLUSTER, keep_old=keep_old)
    _check_installed(path, keep_old=keep_old)
    return outcome


def test_g4_a_folder_lost_with_the_power_does_not_stop_an_install(tmp_path: Path) -> None:
    """G4: should the note of where the old copy goes have outlived the folder itself, the old copy still goes
    there.
    """
    _before_install(tmp_path)
    (tmp_path / "incoming" / "old-copy-to").write_text("copy-x")
    _rewrite(tmp_path, role="installing", cluster=str(uuid.UUID(bytes=NEW_CLUSTER)))
    _check_installed(tmp_path, keep_old=True)
    assert copy_in(tmp_path / "set-aside" / "copy-x") == "old"


def test_g4_two_copies_set_aside_in_one_second_have_places_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4: the second copy to be set aside at a time does not take the first one's place."""
    monkeypatch.setattr(time, "strftime", lambda *_: "copy-now")
    _before_install(tmp_path)
    with DataDirectory.open(tmp_path) as directory:
        first = directory.install(NEW_CLUSTER, keep_old=True)
        fill(directory.incoming, "newer")
        second = directory.install(NEW_CLUSTER, keep_old=True)
    assert first is not None
    assert second is not None
    assert (copy_in(first), copy_in(second), copy_in(tmp_path)) == ("old", "new", "newer")
