"""Backups and restores of a large store, against the tools that one would use without them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tools
from accounts import MemorySampler
from jobs import CountedJob
from processes import Node, Process, understudy_command, wait_until
from results import Figure, RowResult, Target, at_least, below
from scale import MIB
from stage import STORE_BYTES_A_KEY, STORE_VALUE_BYTES, Bench, copy_synced, data_file

COPY_RATIO = 0.8
UPDATE_SHARE = 0.25
ARCHIVE_RATIO = 0.7
RESTORE_RATIO = 0.8
MEMORY_MIB = 300.0
_CHANGED_SHARE = 0.01
_PUTS_EACH = 100
_AGE = ("age", "age-keygen")
_WRITERS = 8
_METHOD = """
The source is a primary's directory; the primary runs and is idle. A time of ours is the wall time of the whole
command, the start of Python included, until its copy is durable; "without Python's start" is what the command itself
says. The references are followed by an fsync of each file and directory that they made; `mdb_copy` by itself syncs
nothing. Like ours it writes past the page cache; `cp -r` copies a backup's directory through it. The source is in the
page cache for all. What is compared takes turns, and so does who begins. Ours computes and writes down (a backup) or
compares (a restore) the XXH3-128 of each file besides, and copies the log behind the store, which `mdb_copy` does
not. `--update`: a hundredth of the keys, drawn at random, were given new values of the same size since the full copy
of the same round. The archive is compressed by zstd at level 3 and encrypted for one key of age's, where `age` is
installed; the pipe is `tar | zstd -3 | age`. The values are random bytes, which can't be compressed. Memory is the
highest RssAnon in any round, sampled 20 times a second.
"""


@dataclass(slots=True, kw_only=True)
class _Runs:
    """Seconds of each round by what was measured, and memory of our commands."""

    bench: Bench
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def note(self, name: str, seconds: float) -> None:
        """The next round's."""
        self.seconds.setdefault(name, []).append(seconds)

    def ours(self, name: str, *arguments: str | Path) -> Any:
        """Runs a command of ours, notes what it took, and returns what it printed."""
        command = understudy_command(*map(str, arguments), "--json")
        started = self.bench.processes.program(Process, name, command)
        with MemorySampler({name: started.pid}) as sampler:
            printed, seconds = _timed(started)
        self.memory[name] = max(self.memory.get(name, 0), sampler.peaks[name])
        self.note(name, seconds)
        return printed

    def ratios(self, name: str, reference: str) -> list[float]:
        """How many times as fast as the reference, round by round."""
        return [
            theirs / ours for ours, theirs in zip(self.seconds[name], self.seconds[reference], strict=True)
        ]


def _timed(process: Process) -> tuple[Any, float]:
    found: list[Any] = []
    seconds = tools.timed(lambda: found.append(process.result()))
    return found[0], seconds


def measure(bench: Bench) -> RowResult:
    """The row: whatever is made of a store, and restored."""

    def others(runs: _Runs, source: Path, folder: Path, number: int) -> None:
        _archives(runs, source, folder, number, _age_key(folder))
        _restores(runs, folder, number)

    return _measure(bench, "backup", bench.scale.store_bytes, others)


def measure_larger(bench: Bench) -> RowResult:
    """The row of a store so large that what every command takes to begin does not count for much."""
    return _measure(bench, "backup_larger", bench.scale.larger_store_bytes, lambda *_: None)


def _measure(
    bench: Bench, name: str, store_bytes: int, others: Callable[[_Runs, Path, Path, int], None]
) -> RowResult:
    """Full copies, what ``others`` makes of them, and updates."""
    with bench.scratch() as folder:
        source = copy_synced(bench.store_of(store_bytes), folder / "source")
        primary = bench.processes.primary(source)
        runs = _Runs(bench=bench)
        size = data_file(source).stat().st_size / MIB
        for number in range(bench.scale.rounds):
            bench.say(f"backups of {size:,.0f} MiB, round {number + 1}")
            _copies(runs, source, folder, number)
            others(runs, source, folder, number)
            bench.say(f"changing keys, round {number + 1}")
            _change_keys(bench, primary, store_bytes // STORE_BYTES_A_KEY, seed=number)
            runs.ours("update", "backup", "-f", source, "-t", folder / "backup", "--update")
            _remove(folder / "backup")
            primary.checkpoint()
        primary.stop()
    return RowResult(
        name=name, title=f"Backups of a store of {size:,.0f} MiB", method=_METHOD, figures=_figures(runs)
    )


# -- what takes turns --------------------------------------------------------------------------------------


def _copies(runs: _Runs, source: Path, folder: Path, number: int) -> None:
    """The backup stays, for what comes next."""

    def ours() -> None:
        printed = runs.ours("full copy", "backup", "-f", source, "-t", folder / "backup")
        runs.note("full copy, said", printed["seconds"])

    def theirs() -> None:
        _reference(runs, "mdb_copy", f"mdb_copy {source / 'store'} {folder / 'copy'}", folder / "copy")

    _take_turns(number, ours, *([] if tools.missing("mdb_copy") else [theirs]))


def _archives(runs: _Runs, source: Path, folder: Path, number: int, key: str) -> None:
    archive, target = folder / f"backup.tar.zst{'.age' if key else ''}", folder / "piped"
    # Its exit code 1 says that a file has changed meanwhile, such as a segment that the server makes ready.
    tar = f"{{ tar -C {source} -c log store/data.mdb; test $? -le 1; }}"
    pipe = f"{tar} | zstd -3 -q" + (f" | age -r {key}" if key else "")

    def ours() -> None:
        runs.ours("archive", "backup", "-f", source, "-t", archive, *(("--recipient", key) if key else ()))
        _remove(archive)

    def theirs() -> None:
        _reference(runs, "archive by a pipe", f"{pipe} > {target}/archive", target)

    _take_turns(number, ours, *([] if tools.missing("tar", "zstd") else [theirs]))


def _restores(runs: _Runs, folder: Path, number: int) -> None:
    backup, archive, target = folder / "backup", folder / "backup.tar.zst", folder / "restored"
    subprocess.run(understudy_command("backup", "-f", str(backup), "-t", str(archive)), check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip

    def of_directory() -> None:
        runs.ours("restore of a directory", "restore", backup, "--to", target)
        _remove(target)

    def of_archive() -> None:
        runs.ours("restore of an archive", "restore", archive, "--to", target)
        _remove(target)

    def theirs() -> None:
        _reference(runs, "cp", f"cp -r {backup} {target}", target, is_made=True)

    _take_turns(number, of_directory, of_archive, theirs)
    _remove(archive)


def _take_turns(number: int, *steps: Callable[[], None]) -> None:
    for step in steps if number % 2 == 0 else reversed(steps):
        step()


def _reference(runs: _Runs, name: str, command: str, target: Path, *, is_made: bool = False) -> None:
    """Notes what a shell's command takes that writes into a directory, which it makes itself if ``is_made``."""
    if not is_made:
        target.mkdir()
    runs.note(name, tools.shell_seconds(command, target))
    _remove(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    os.sync()


def _age_key(folder: Path) -> str:
    """A public key of age's; empty where that is not installed."""
    if tools.missing(*_AGE):
        return ""
    private = folder / "age-key"
    if not private.exists():
        subprocess.run(["age-keygen", "-o", private], check=True, stderr=subprocess.DEVNULL)
    shown = subprocess.run(["age-keygen", "-y", private], check=True, capture_output=True, text=True)
    return shown.stdout.strip()


def _change_keys(bench: Bench, primary: Node, keys: int, *, seed: int) -> None:
    job = CountedJob(
        address=primary.address,
        writers=_WRITERS,
        keys=keys,
        value_bytes=STORE_VALUE_BYTES,
        transactions=int(keys * _CHANGED_SHARE) // _PUTS_EACH,
        puts_each=_PUTS_EACH,
        seed=seed,
    )
    last_lsn = bench.processes.run("writer.py", job)["last_lsn"]
    wait_until(lambda: primary.status().committed_lsn >= last_lsn, what="all is durable", every_s=0.02)


# -- figures -----------------------------------------------------------------------------------------------


def _figures(runs: _Runs) -> list[Figure]:
    update = [one / full for one, full in zip(runs.seconds["update"], runs.seconds["full copy"], strict=True)]
    return [
        *_against(runs, "full copy", "mdb_copy", tools.missing("mdb_copy"), at_least(COPY_RATIO)),
        *_against(runs, "full copy, said", "mdb_copy", tools.missing("mdb_copy"), None),
        _seconds(runs, "update", "--update, 1 % of the keys changed"),
        Figure(name="--update, against the full copy", unit="", values=update, target=below(UPDATE_SHARE)),
        *_against(
            runs, "archive", "archive by a pipe", tools.missing("tar", "zstd"), at_least(ARCHIVE_RATIO)
        ),
        *_against(runs, "restore of a directory", "cp", "", at_least(RESTORE_RATIO)),
        *_against(runs, "restore of an archive", "cp", "", None),
        *(
            Figure(name=f"memory of {name}", unit="MiB", values=[peak / MIB], target=below(MEMORY_MIB))
            for name, peak in runs.memory.items()
        ),
    ]


_SHOWN: Mapping[str, str] = {
    "full copy, said": "full copy, without Python's start",
    "archive by a pipe": "a pipe of the shell",
    "cp": "`cp -r`",
    "restore of an archive": "restore of an archive that is not encrypted",
    "mdb_copy": "`mdb_copy`",
}


def _against(runs: _Runs, name: str, reference: str, missing: str, target: Target | None) -> list[Figure]:
    """Seconds, and how many times as fast as the reference; only what was measured."""
    if name not in runs.seconds:
        return []
    shown, theirs = _SHOWN.get(name, name), _SHOWN[reference]
    if missing:
        return [_seconds(runs, name, shown, f"{theirs} {missing}")]
    seconds = Figure(name=reference, unit="s", values=runs.seconds[reference]).median
    ratios = Figure(
        name=f"{shown}, against {theirs}", unit="", values=runs.ratios(name, reference), target=target
    )
    return [_seconds(runs, name, shown, f"{theirs} {seconds:.2f} s"), ratios]


def _seconds(runs: _Runs, name: str, shown: str, reference: str = "") -> Figure:
    return Figure(name=shown, unit="s", values=runs.seconds[name], reference=reference)
