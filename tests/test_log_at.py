"""The log around a moment: how the moment before a mistake is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import Processes
from nodes import put

from understudy.backup.manifest import utc_text
from understudy.cli.log_entries import LogEntry, directory_records
from understudy.cli.log_moment import Moment, entries_around

USAGE = 2


def lines(processes: Processes, *arguments: str | Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in processes.run("log", *arguments, "--json").stdout.decode().splitlines()
    ]


@pytest.fixture
def data_dir(processes: Processes, tmp_path: Path) -> Path:
    """Of a server that runs, with five changes in two realms."""
    primary = processes.primary(tmp_path / "a")
    for number in range(5):
        put(primary.address, "/a" if number % 2 else "/b", (b"key", b"%d" % number))
    return tmp_path / "a"


def test_entries_around_a_moment_are_shown_with_their_origin(processes: Processes, data_dir: Path) -> None:
    """``log --at`` shows the entries of that moment as ``log`` has them, and who made them; --realm narrows it."""
    entries = [entry for entry in lines(processes, data_dir) if entry.get("realm") in ("/a", "/b")]
    mistake = entries[3]
    at = ("--at", _iso(mistake["time_us"]))
    assert lines(processes, data_dir, *at, "--around", "0") == [mistake]
    assert entries[-5:] == lines(processes, data_dir, *at)[-5:]
    of_a = lines(processes, data_dir, *at, "--realm", "/a")
    assert [entry["lsn"] for entry in of_a] == [entries[1]["lsn"], mistake["lsn"]]
    assert [entry["lsn"] for entry in lines(processes, data_dir, *at, "--to", str(mistake["lsn"]))][-1] == (
        mistake["lsn"]
    )
    shown = processes.run("log", data_dir, *at, "--around", "0").stdout.decode()
    assert f"{mistake['lsn']}  {at[1]}" in shown
    assert f"/a version {mistake['version']}: put key = 3  by {mistake['client']}" in shown


def test_a_moment_outside_of_the_log_is_said(processes: Processes, data_dir: Path) -> None:
    """Before its beginning and behind its end, and where nothing is near, `log --at` says what is next to it."""
    first, *_, last = lines(processes, data_dir)

    def said(at: str, *more: str) -> str:
        done = processes.run("log", data_dir, "--at", at, *more)
        assert done.stdout == b""
        return done.stderr.decode()

    assert f"begins after that moment, with LSN {first['lsn']} of" in said("2001-01-01T00:00:00Z")
    assert f"ends before that moment, with LSN {last['lsn']} of" in said("2100-01-01T00:00:00Z")
    between_us = last["time_us"] - 1
    near = said(_iso(between_us), "--around", "0")
    assert f"nothing within 0 s of it: LSN {last['lsn'] - 1} of" in near
    assert f", then LSN {last['lsn']} of" in near


@pytest.mark.parametrize("flags", [("--at", "yesterday"), ("--around", "5")])
def test_what_is_no_moment_is_refused(processes: Processes, data_dir: Path, flags: tuple[str, ...]) -> None:
    """A time that is none, and --around without --at, are mistakes."""
    processes.run("log", data_dir, *flags, code=USAGE)


def test_a_long_log_is_read_from_the_segment_of_the_moment(processes: Processes, tmp_path: Path) -> None:
    """Whichever segment the moment lies in, what is found is what reading all of the log finds."""
    primary = processes.primary(tmp_path / "a")
    for number in range(20):
        put(primary.address, "/realm", (b"key", bytes(8 << 20 if number % 2 else 1)))
    assert len(list((tmp_path / "a" / "log").glob("*.seg"))) > 1
    entries = [LogEntry.of(record) for record in directory_records(tmp_path / "a", None, None)]
    for entry in entries:
        moment = Moment(at_us=entry.time_us, around_s=0)
        found = entries_around(tmp_path / "a", moment, None, None, lambda words: pytest.fail(words))
        wanted = [one.record.lsn for one in entries if one.time_us == entry.time_us]
        assert [one.record.lsn for one in found] == wanted


def _iso(time_us: int) -> str:
    return utc_text(time_us / 1e6)
