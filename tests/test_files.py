"""Publishing a file: under its name it is whole and durable, or not there, and nothing else is left."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from understudy.common.errors import DiskFull, PeerUnreachable, StorageFailed
from understudy.common.files import OsFile, publish, publishing

OLD = b"what was there"


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A file that is there; whatever a test publishes badly, it is as it was and alone afterwards."""
    path = tmp_path / "file"
    path.write_bytes(OLD)
    yield path
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == OLD


def fill_disk(file: IO[bytes]) -> None:
    """From here on the file finds no space, whatever is tried, as often as it is tried."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file.fileno())
    os.close(full)


def write_to_full_disk(path: Path, data: bytes, error: Exception | None = None) -> None:
    """Publishes ``data`` where there is no space, and then raises ``error``."""
    with publishing(path) as file:
        fill_disk(file)
        file.write(data)
        if error is not None:
            raise error


@pytest.mark.parametrize("length", [10, 1_000_000], ids=["buffered", "written at once"])
def test_g9_a_full_disk_is_told_as_that_wherever_it_shows(path: Path, length: int) -> None:
    """G9: what is written, and what a flush or the closing after it writes again, all fail as ``DiskFull``."""
    with pytest.raises(DiskFull, match=f"no space left to write {path}"):
        write_to_full_disk(path, bytes(length))


def test_the_first_error_is_the_one_that_is_told(path: Path) -> None:
    """Where a block fails by itself, a file that can't be closed properly does not take that error's place."""
    with pytest.raises(PeerUnreachable):
        write_to_full_disk(path, b"buffered", PeerUnreachable("gone"))


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize(
    "put", [lambda path: publish(path, b"new"), lambda path: put_all(path)], ids=["publish", "publishing"]
)
def test_a_step_that_fails_leaves_nothing_beside(
    path: Path, call: str, put: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync or a rename that fails is ``StorageFailed``, and what was written beside is gone."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageFailed, match=f"can't write {path}: Input/output error"):
        put(path)
    monkeypatch.undo()


def put_all(path: Path) -> None:
    """Publishes a few bytes."""
    with publishing(path) as file:
        file.write(b"new")


def test_two_that_publish_one_name_are_not_in_each_others_way(tmp_path: Path) -> None:
    """Each writes a file of its own, hidden until its block ends, and the last to end is the one that is found."""
    path = tmp_path / "file"
    with publishing(path, mode=0o644) as one:
        with publishing(path) as other:
            one.write(b"one")
            other.write(b"other")
            assert len(list(tmp_path.iterdir())) == 2
            assert all(child.name.startswith(".file-") for child in tmp_path.iterdir())
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"one"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


_WRITING = """
import sys
from pathlib import Path
from understudy.common.files import publishing
with publishing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_g9_what_a_killed_writer_left_is_removed_by_the_next_and_by_nobody_else(tmp_path: Path) -> None:
    """G9: nothing piles up beside a name; what a living process writes there, or others keep there, stays."""
    path, others = tmp_path / "file", [tmp_path / ".file-of-somebody", tmp_path / f".file2-{'0' * 16}"]
    for other in others:
        other.write_bytes(b"theirs")
    killed, living = (begin_writing(path) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 4
    killed.kill()
    killed.wait()
    publish_through_a_hidden_file(path, b"whole")
    assert path.read_bytes() == b"whole"
    (hidden,) = set(tmp_path.iterdir()) - {path, *others}
    assert hidden.read_bytes() == b"half"
    living.communicate(timeout=60)
    assert living.returncode == 0
    assert path.read_bytes() == b"half"
    assert set(tmp_path.iterdir()) == {path, *others}


@pytest.mark.parametrize("letter", ["n", "\N{GREEK SMALL LETTER NU}"])
@pytest.mark.parametrize("length", [236, 238, 240, 254])
def test_names_can_be_as_long_as_the_file_system_has_them(tmp_path: Path, length: int, letter: str) -> None:
    """G9: the hidden name beside a long one is no longer, and what a killed writer left is found by it."""
    path, other = (tmp_path / (letter * (length // len(letter.encode()))) for letter in (letter, "m"))
    for one in (path, other):
        killed = begin_writing(one)
        killed.kill()
        killed.wait()
    assert len(list(tmp_path.iterdir())) == 2
    publish_through_a_hidden_file(path, b"whole")
    assert len(list(tmp_path.iterdir())) == 2  # the other's leftover stays
    publish_through_a_hidden_file(other, b"whole")
    assert {child.name for child in tmp_path.iterdir()} == {path.name, other.name}


def begin_writing(path: Path) -> subprocess.Popen[bytes]:
    """A process that has written half of what it publishes, and goes on when its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITING, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    return process


def publish_through_a_hidden_file(path: Path, data: bytes) -> None:
    """All at once."""
    with publishing(path) as file:
        file.write(data)


def test_what_is_taken_for_a_leftover_before_it_is_locked_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making its hidden file and locking it, another writer may have looked for leftovers."""
    path, begun = tmp_path / "file", [True]
    lock = fcntl.flock

    def lock_late(fd: int, how: int) -> None:
        if begun:
            begun.clear()
            publish_through_a_hidden_file(path, b"other")
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    publish_through_a_hidden_file(path, b"ours")
    assert {child.name: child.read_bytes() for child in tmp_path.iterdir()} == {"file": b"ours"}


def test_what_is_closed_and_about_to_be_renamed_is_no_leftover_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What took hours to write is not removed by who comes in its last moment."""
    path, rename, first = tmp_path / "file", os.rename, [True]

    def rename_late(old: Path, new: Path) -> None:
        if first:
            first.clear()
            publish_through_a_hidden_file(path, b"other")
        rename(old, new)

    monkeypatch.setattr(os, "rename", rename_late)
    publish_through_a_hidden_file(path, b"ours")
    assert {child.name: child.read_bytes() for child in tmp_path.iterdir()} == {"file": b"ours"}


def test_without_locks_everything_is_published_and_nothing_taken_for_a_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that has none nobody can tell whose writer lives."""

    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    left = tmp_path / f".file-{'0' * 16}"
    left.write_bytes(b"half")
    monkeypatch.setattr(fcntl, "flock", refuse)
    publish_through_a_hidden_file(tmp_path / "file", b"whole")
    assert {child.name for child in tmp_path.iterdir()} == {"file", left.name}


def test_what_a_crash_left_beside_a_file_of_ours_is_overwritten(tmp_path: Path) -> None:
    """Half a file of a data directory's that was cut off does not stay beside it for ever."""
    (tmp_path / "file.new").write_bytes(bytes(1000))
    publish(tmp_path / "file", b"whole")
    assert {child.name: child.read_bytes() for child in tmp_path.iterdir()} == {"file": b"whole"}


def test_g1_what_the_system_writes_and_reads_in_part_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1: a write or read that the system ends early, as near a full disk or a signal, is made whole, not taken so."""
    pwrite, pread, content = os.pwrite, os.pread, bytes(range(256))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:100], offset))
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 70), offset))
    file = OsFile(tmp_path / "file", create=True)
    file.write_at(content, 10)
    assert file.read_at(len(content), 10) == content
    file.close()
    assert (tmp_path / "file").read_bytes() == bytes(10) + content
