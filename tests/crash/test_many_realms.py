"""Backups of very many small realms take little memory: 20,000 of them, and a million in `make crash`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from backup_helpers import contents
from harness import Process, Processes, wait_until
from nodes import assert_sound

from crash.tally import Tally
from understudy.backup.manifest import read_manifest
from understudy.client import Put, aconnect
from understudy.common import portal

MIB = 1 << 20
MEMORY_BYTES_MAX = 300 * MIB  # of a process, without what it has mapped
_COMMAND_S_MAX = 1800.0
_MANY_FOR_A_DRILL = 100_000  # it reads each by itself, which takes most of an hour for a million
_AT_ONCE = 2_000


async def make_realms(address: str, count: int) -> None:
    """So many realms with a pair each."""
    async with aconnect(address) as server:
        for first in range(0, count, _AT_ONCE):
            await asyncio.gather(
                *(
                    server.commit(f"/realm/{number}", [Put(b"key", b"%d" % number)])
                    for number in range(first, min(first + _AT_ONCE, count))
                )
            )


def with_children(pid: int) -> list[int]:
    """A process and all that have come from it."""
    found = [pid]
    for one in found:
        try:
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except OSError:
            continue  # it has ended
    return found


def anonymous_bytes(pid: int) -> int:
    """Memory of a process's own."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def peak_of(command: Process) -> int:
    """The most memory that one of a command's processes had, in bytes, once it has ended well."""
    peak = 0

    def ended() -> bool:
        nonlocal peak
        peak = max(peak, *map(anonymous_bytes, with_children(command.pid)))
        return not command.is_running

    wait_until(ended, deadline_s=_COMMAND_S_MAX, what=command.describe)
    assert command.wait() == 0, command.describe()
    return peak


@pytest.fixture
def count(is_thorough: bool) -> int:
    """How many realms."""
    return 1_000_000 if is_thorough else 20_000


def test_very_many_realms_take_little_memory(
    processes: Processes, tmp_path: Path, count: int, tally: Tally
) -> None:
    """G9: backed up and restored in each way, verified, proven, they take less than 300 MiB, and all are there."""
    primary = processes.primary(tmp_path / "a")
    portal.call(make_realms(primary.address, count))
    assert primary.terminate() == 0
    source, archive, portable = tmp_path / "a", tmp_path / "a.tar.zst", tmp_path / "p.tar.zst"
    repository, config = tmp_path / "repository", tmp_path / "u.toml"
    repository.mkdir()
    config.write_text(
        f'[[backup]]\nname = "n"\nretries = 0\nrepositories = [{json.dumps(str(repository))}]\n'
    )
    policy = ("n", "--config", config)
    commands: dict[str, tuple[str | Path, ...]] = {
        "a directory": ("backup", "-f", source, "-t", tmp_path / "directory"),
        "an archive": ("backup", "-f", source, "-t", archive),
        "a portable one": ("backup", "-f", source, "-t", portable, "--portable"),
        "all but one": ("backup", "-f", source, "-t", tmp_path / "chosen", "--exclude", "/realm/7"),
        "an archive restored": ("restore", archive, "--to", tmp_path / "from-archive"),
        "a portable one restored": ("restore", portable, "--to", tmp_path / "from-portable"),
        "one realm restored": ("restore", archive, "--to", tmp_path / "one", "--realm", "/realm/7"),
        "the source verified": ("verify", source),
        "a run": ("backup", "run", *policy, "--data-dir", source),
    }
    if count < _MANY_FOR_A_DRILL:
        commands["a drill"] = ("backup", "drill", *policy, "--scratch", tmp_path)
    for name, words in commands.items():
        peak = peak_of(processes.start(*words))
        tally.add(f"MiB for {name}", peak // MIB)
        assert peak < MEMORY_BYTES_MAX, name
    for name, realms in (("directory", count), ("from-archive", count), ("from-portable", count)):
        assert read_manifest(tmp_path / name).realms == realms
    assert read_manifest(tmp_path / "chosen").realms == count - 1
    assert_sound(tmp_path / "one")
    assert contents(tmp_path / "one")["/realm/7"][2] == [(b"key", b"7")]
    assert_sound(tmp_path / "from-portable")
