"""How long a promotion takes with a full memtable, and whether the store's size matters."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from jobs import CountedJob
from processes import BenchFailed, wait_for_replica, wait_until
from results import Figure, RowResult, below
from scale import MIB
from stage import STORE_BYTES_A_KEY, Bench, copy_synced, data_file

from understudy.common.memtable import MEMTABLE_OPERATIONS

SECONDS = 1.0
RATIO = 2.0
_FILL = 0.94  # of the operations at which a freeze mark is set
_VALUE_BYTES = 20  # so small that the memtable is full by operations before it is by bytes
_WRITERS = 256
_SEED = 7
_METHOD = """
A replica whose memtable is nearly full (94 % of the operations at which a freeze mark is set) loses its primary by
SIGKILL and is promoted, once as a process that runs and once as a directory. "Command" is the wall time of
`understudy promote`, the interpreter's start and the end of the replica's process included; "said" is what
`promote --json` gives as seconds. Then `understudy primary` is started on it: up to its line that it serves. As
nothing but log and role change meanwhile (the store's file is checked for that), each round begins by putting these
two back.
"""
_RESTORED = ("node.json", "log")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Promoted:
    said_s: float
    command_s: float
    start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One size of store."""

    store_bytes: int
    running: list[_Promoted]
    stopped: list[_Promoted]

    def of(self, *, running: bool) -> list[_Promoted]:
        """Those of running or of stopped replicas."""
        return self.running if running else self.stopped


def measure(bench: Bench) -> RowResult:
    """The row."""
    large = _case(bench, bench.scale.store_bytes)
    small = _case(bench, bench.scale.small_store_bytes)
    return RowResult(
        name="promote",
        title="Promotion with a full memtable, "
        f"store of {large.store_bytes / MIB:,.0f} MiB against {small.store_bytes / MIB:,.0f} MiB",
        method=_METHOD,
        figures=[
            *_figures(large, small, running=True),
            *_figures(large, small, running=False),
            *_start_figures(large, small),
        ],
    )


def _case(bench: Bench, size: int) -> _Case:
    with bench.scratch() as folder:
        directory = _replica_with_full_memtable(bench, size, folder)
        saved = folder / "saved"
        saved.mkdir()
        _copy_parts(directory, saved)
        case = _Case(store_bytes=data_file(directory).stat().st_size, running=[], stopped=[])
        for number in range(bench.scale.rounds):
            for running in (True, False):
                kind = "running" if running else "stopped"
                bench.say(f"promoting a {kind} replica of {size / MIB:,.0f} MiB, round {number + 1}")
                case.of(running=running).append(_promote(bench, directory, running=running))
                _copy_parts(saved, directory)
        return case


def _replica_with_full_memtable(bench: Bench, size: int, folder: Path) -> Path:
    primary = bench.processes.primary(copy_synced(bench.store_of(size), folder / "primary"))
    directory = folder / "replica"
    replica = bench.processes.replica(directory, primary)
    wait_for_replica(primary, replica)
    bench.say("filling the memtable")
    checkpoint_lsn = primary.checkpoint()
    job = CountedJob(
        address=primary.address,
        writers=_WRITERS,
        keys=size // STORE_BYTES_A_KEY,
        value_bytes=_VALUE_BYTES,
        transactions=int(_FILL * MEMTABLE_OPERATIONS),
        puts_each=1,
        seed=_SEED,
    )
    bench.processes.run("writer.py", job)
    wait_for_replica(primary, replica)
    wait_until(
        lambda: replica.status().checkpoint_lsn >= checkpoint_lsn,
        what="the replica's checkpoint",
        every_s=0.02,
    )
    if {primary.status().checkpoint_lsn, replica.status().checkpoint_lsn} != {checkpoint_lsn}:
        raise BenchFailed("a freeze mark was set before the memtable was full")
    primary.kill()
    replica.stop()
    return directory


def _copy_parts(source: Path, target: Path) -> None:
    """What a promotion changes; the slots' file, which it removes, a replica does not have."""
    shutil.copy2(source / _RESTORED[0], target / _RESTORED[0])
    shutil.rmtree(target / _RESTORED[1], ignore_errors=True)
    copy_synced(source / _RESTORED[1], target / _RESTORED[1])


def _promote(bench: Bench, directory: Path, *, running: bool) -> _Promoted:
    before = data_file(directory).stat()
    nobody = "127.0.0.1:1"  # the primary is gone
    replica = bench.processes.replica(directory, nobody) if running else None
    said, command_s = bench.processes.command("promote", str(directory), "--json")
    if replica is not None:
        replica.wait()
    primary = bench.processes.primary(directory)
    primary.kill()
    after = data_file(directory).stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise BenchFailed("a promotion or the start after it has changed the store")
    return _Promoted(said_s=said["seconds"], command_s=command_s, start_s=primary.ready_s)


def _figures(large: _Case, small: _Case, *, running: bool) -> list[Figure]:
    kind = "running" if running else "stopped"
    figures = []
    for name, case in (("large", large), ("small", small)):
        found = case.of(running=running)
        figures += [
            Figure(
                name=f"{kind} replica, {name} store, command",
                unit="s",
                values=[one.command_s for one in found],
                target=below(SECONDS),
            ),
            Figure(
                name=f"{kind} replica, {name} store, said",
                unit="s",
                values=[one.said_s for one in found],
                target=below(SECONDS),
            ),
        ]
    ratio = Figure(
        name=f"{kind} replica, large against small, command",
        unit="",
        values=[
            one.command_s / other.command_s
            for one, other in zip(large.of(running=running), small.of(running=running), strict=True)
        ],
        target=below(RATIO),
    )
    return [*figures, ratio]


def _start_figures(large: _Case, small: _Case) -> list[Figure]:
    return [
        Figure(
            name=f"`understudy primary` after it, {name} store, until ready",
            unit="s",
            values=[one.start_s for one in (*case.running, *case.stopped)],
        )
        for name, case in (("large", large), ("small", small))
    ]
