"""How fast a restore to a point in time applies the log that was shipped after the backup."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from accounts import MemorySampler
from jobs import CountedJob
from processes import Node, Process, understudy_command
from results import Figure, RowResult, at_least, below
from scale import MIB
from stage import VALUE_BYTES, Bench
from tools import timed

from understudy.backup.archiver import Archiver
from understudy.backup.repository import open_repository
from understudy.common.directory import NodeFile
from understudy.common.types import ClusterId

RATE = 100_000
MEMORY_MIB = 300.0
_POLICY = "bench"
_WRITERS = 512
_METHOD = """
A backup of a preloaded store (100-byte values) in a repository, which is a folder, and the log of so many
transactions of one put (random keys) that came after it, shipped by whole segments, not encrypted. `understudy
restore REPOSITORY --to DIR --lsn LAST` restores the backup, fetches the log, checks its chain, appends it durably,
and brings store and state to the last entry; `understudy restore REPOSITORY ID --to DIR` restores the same backup
without the log. The two take turns; the entries divided by the difference of their wall times is the rate.
"""


def measure(bench: Bench) -> RowResult:
    """The row."""
    with bench.scratch() as folder:
        repository, backup_id = folder / "repository", _stored(bench, folder)
        last_lsn, entries = _ship_entries(bench, folder)
        alone: list[float] = []
        whole: list[float] = []
        peak = 0
        for number in range(bench.scale.rounds):
            bench.say(f"restoring {entries:,} entries, round {number + 1}")
            alone.append(_restore(bench, folder, repository, backup_id)[0])
            seconds, memory = _restore(bench, folder, repository, "--lsn", str(last_lsn))
            whole.append(seconds)
            peak = max(peak, memory)
    rates = [entries / (one - other) for one, other in zip(whole, alone, strict=True)]
    return RowResult(
        name="replay",
        title=f"Restore to a point {entries:,} small entries behind a backup",
        method=_METHOD,
        figures=[
            Figure(name="replayed", unit="entries/s", values=rates, target=at_least(RATE)),
            Figure(name="restore with the log", unit="s", values=whole),
            Figure(name="restore of the backup alone", unit="s", values=alone),
            Figure(name="memory of the restore", unit="MiB", values=[peak / MIB], target=below(MEMORY_MIB)),
        ],
    )


def _stored(bench: Bench, folder: Path) -> str:
    """Backs a preloaded primary up; returns the backup's id."""
    pair = bench.preloaded_pair(folder)
    repository, config = folder / "repository", folder / "policies.toml"
    config.write_text(f'[[backup]]\nname = "{_POLICY}"\nrepositories = ["{repository}"]\n')
    repository.mkdir()
    arguments = ("backup", "run", _POLICY, "--config", str(config), "--data-dir", str(pair.primary), "--json")
    bench.processes.program(Process, "backup", understudy_command(*arguments)).result()
    listed, _ = bench.processes.command("backups", "list", str(repository), "--json")
    return str(listed["backups"][0]["id"])


def _ship_entries(bench: Bench, folder: Path) -> tuple[int, int]:
    """Writes entries and ships the log; returns the last LSN, and how many entries that were."""
    directory = folder / "primary"
    primary = bench.processes.primary(directory, "--log-floor", "4GiB")
    first_lsn = primary.status().lsn
    bench.say(f"writing {bench.scale.replayed_entries:,} entries")
    last_lsn = _write(bench, primary)
    primary.stop()
    cluster = ClusterId(uuid.UUID(NodeFile.read(directory / "node.json").cluster).bytes)
    Archiver(directory / "log", cluster, open_repository(str(folder / "repository")), encryption=None).ship()
    return last_lsn, last_lsn - first_lsn


def _write(bench: Bench, primary: Node) -> int:
    job = CountedJob(
        address=primary.address,
        writers=_WRITERS,
        keys=bench.scale.keys,
        value_bytes=VALUE_BYTES,
        transactions=bench.scale.replayed_entries,
        puts_each=1,
        seed=1,
    )
    return int(bench.processes.run("writer.py", job)["last_lsn"])


def _restore(bench: Bench, folder: Path, repository: Path, *arguments: str) -> tuple[float, int]:
    """Seconds, and the highest RssAnon in bytes."""
    target = folder / "restored"
    command = understudy_command("restore", str(repository), *arguments, "--to", str(target), "--json")
    process = bench.processes.program(Process, "restore", command)
    with MemorySampler({"restore": process.pid}) as sampler:
        seconds = timed(process.result)
    shutil.rmtree(target)
    os.sync()
    return seconds, sampler.peaks["restore"]
