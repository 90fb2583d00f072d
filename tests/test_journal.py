"""The journal: whole lines with their times, files of bounded size, and a disk that is full."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
from running_together import run_together

from understudy.backup import journal as journal_module
from understudy.backup.journal import Journal
from understudy.common.errors import DiskFull, StorageFailed

NOON_S = 1795262400.0
STAMP = "2026-11-21T12:00:00Z "


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def at_noon(path: Path, bytes_max: int = 10_000_000, files: int = 5) -> Journal:
    """A journal whose clock stands still."""
    return Journal(path, bytes_max=bytes_max, files=files, clock=lambda: NOON_S)


def lines_of(path: Path) -> list[str]:
    """All that was written and is still there, the newest last."""
    full = sorted(path.parent.glob("journal.[0-9]*"), key=lambda one: int(one.suffix[1:]), reverse=True)
    return "".join(one.read_text() for one in [*full, path]).splitlines()


def test_a_line_is_appended_with_its_time(path: Path) -> None:
    """Lines of one journal follow those of another on the same file; times are UTC."""
    at_noon(path).write("backup 7 began")
    at_noon(path).write("backup 7 is done")
    assert path.read_text() == f"{STAMP}backup 7 began\n{STAMP}backup 7 is done\n"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("two\nlines\r\n", r"two\nlines\r\n"),
        ("\x1b[2J\x00\x7f\x9b", r"\x1b[2J\x00\x7f\x9b"),
        ("a\u2028b\u202ec\x85", r"a\u2028b\u202ec\x85"),
        ("\udcff", r"\udcff"),
        ("Ärger mit 猫", "Ärger mit 猫"),
        ("", ""),
    ],
)
def test_a_line_is_one_line_whatever_is_in_it(path: Path, line: str, shown: str) -> None:
    """Control characters, ends of lines and halves of characters are escaped, letters are not."""
    at_noon(path).write(line)
    assert path.read_bytes() == f"{STAMP}{shown}\n".encode()
    assert lines_of(path) == [STAMP + shown]


def test_g9_an_endless_line_is_cut(path: Path) -> None:
    """G9: one line can't push all others out of the journal."""
    at_noon(path).write("x" * 10_000_000)
    assert path.stat().st_size < 20_000


def test_g9_full_files_move_on_and_the_oldest_goes(path: Path) -> None:
    """G9: no file is longer than it may be, by no byte; there are only so many, and between them no line is missing."""
    journal = at_noon(path, bytes_max=86, files=2)
    for number in range(20):
        journal.write(f"line {number:02}")
    assert sorted(each.name for each in path.parent.iterdir()) == [
        "journal",
        "journal.1",
        "journal.2",
        "journal.lock",
    ]
    files = [path.with_name(name) for name in ("journal.2", "journal.1", "journal")]
    assert all(each.stat().st_size <= 86 for each in files)
    lines = "".join(each.read_text() for each in files).splitlines()
    assert lines == [f"{STAMP}line {number:02}" for number in range(20 - len(lines), 20)]
    assert len(lines) == 6


def test_a_file_without_its_neighbours_moves_on_as_well(path: Path) -> None:
    """Files that somebody has removed leave gaps that do no harm."""
    journal = at_noon(path, bytes_max=50, files=3)
    path.with_name("journal.2").write_text("old\n")
    journal.write("a" * 30)
    journal.write("b" * 30)
    assert path.with_name("journal.3").read_text() == "old\n"
    assert lines_of(path) == ["old", STAMP + "a" * 30, STAMP + "b" * 30]


def test_a_line_that_a_crash_cut_off_ends_there(path: Path) -> None:
    """The next line does not go on where the last one broke off."""
    path.write_text("2026-11-21T11:59:59Z half a li")
    at_noon(path).write("whole")
    assert lines_of(path) == ["2026-11-21T11:59:59Z half a li", STAMP + "whole"]


WRITER = """
import sys
from pathlib import Path
from understudy.backup.journal import Journal
journal = Journal(Path(sys.argv[1]), bytes_max=100, files=100)
print("ready", flush=True)
sys.stdin.read()
for number in range(60):
    journal.write(f"{sys.argv[2]} {number}")
"""


def test_processes_that_write_at_the_same_time_lose_nothing(path: Path) -> None:
    """Every line of each is there, once, whole, in its order, through many rotations."""
    assert run_together(*([sys.executable, "-c", WRITER, path, name] for name in "abc")) == [0, 0, 0]
    lines = [line.split()[1:] for line in lines_of(path)]
    for name in "abc":
        assert [line for line in lines if line[0] == name] == [[name, str(number)] for number in range(60)]
    assert len(lines) == 180
    assert path.with_name("journal.50").exists()


# -- a disk that is full or fails --------------------------------------------------------------------------


def test_g9_a_full_disk_is_told_as_that(path: Path) -> None:
    """G9: who writes hears of it, and decides."""
    path.symlink_to("/dev/full")
    with pytest.raises(DiskFull):
        at_noon(path).write("does not fit")


def test_g9_a_line_that_did_not_fit_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: when there is space again, the journal goes on as if that line had not been tried."""
    journal = at_noon(path)
    journal.write("before")
    write, calls = os.write, []

    def no_space_for_the_rest(fd: int, data: memoryview) -> int:
        calls.append(fd)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "no space left")
        return write(fd, data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "write", no_space_for_the_rest)
        with pytest.raises(DiskFull):
            journal.write("half of it fits")
    journal.write("after")
    assert lines_of(path) == [STAMP + "before", STAMP + "after"]


def test_a_directory_that_is_missing_is_told_as_ours(tmp_path: Path) -> None:
    """No error of the operating system comes through."""
    with pytest.raises(StorageFailed, match="missing"):
        at_noon(tmp_path / "missing" / "journal").write("lost")


def test_a_line_that_is_not_durable_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bringing it to disk fails, that is told, and the line is taken back."""
    journal = at_noon(path)
    journal.write("before")

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "fsync", broken)
        with pytest.raises(StorageFailed):
            journal.write("lost")
    assert lines_of(path) == [STAMP + "before"]
