"""What a backup costs a server that goes on: commits while its directory, or its replica's, is being backed up."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs import TimedJob
from processes import Node, Process, Processes, understudy_command, wait_for_replica
from results import Figure, RowResult, at_least
from scale import MIB
from stage import STORE_BYTES_A_KEY, STORE_VALUE_BYTES, Bench, copy_synced, data_file

RATIOS = {"replica": 0.85, "primary": 0.7}
_WRITERS = 64
_METHOD = """
64 writers as in the row of commits (primary at `--durability replica`, a replica, values of the preloaded size at
random keys of a large store), with no backup, and while full backups are made one after the other for the whole
window: each is one `understudy backup -f DIRECTORY -t NEW` of the running replica's directory, or of the running
primary's, on the same disk, removed when it is done. All processes share the machine, so that the processor time of a
backup counts as its cost even where it is made of the replica: on two machines only the disk of the replica would be
shared. A backup without `--rate` pauses while its source is written to. The three take turns, and so does who begins.
What was acknowledged within the window counts.
"""


def measure(bench: Bench) -> RowResult:
    """The row."""
    sources: tuple[str, ...] = ("", *RATIOS)
    rates: dict[str, list[float]] = {source: [] for source in sources}
    counts: dict[str, list[float]] = {source: [] for source in RATIOS}
    with bench.scratch() as folder:
        directory = copy_synced(bench.store_of(bench.scale.store_bytes), folder / "primary")
        primary = bench.processes.primary(directory, "--durability", "replica")
        replica = bench.processes.replica(folder / "replica", primary)
        wait_for_replica(primary, replica)
        size = data_file(directory).stat().st_size / MIB
        for number in range(bench.scale.rounds):
            for source in sources if number % 2 == 0 else reversed(sources):
                bench.say(f"commits while {source or 'nothing'} is backed up, round {number + 1}")
                rate, count = _rate(bench, primary, folder, source, seed=number)
                rates[source].append(rate)
                if source:
                    counts[source].append(count)
        replica.stop()
        primary.stop()
    return RowResult(
        name="backup_load",
        title=f"{_WRITERS} writers while a store of {size:,.0f} MiB is backed up",
        method=_METHOD,
        figures=_figures(rates, counts),
    )


def _rate(bench: Bench, primary: Node, folder: Path, source: str, *, seed: int) -> tuple[float, int]:
    """Commits a second, and how many backups were finished meanwhile."""
    job = TimedJob(
        address=primary.address,
        writers=_WRITERS,
        keys=bench.scale.store_bytes // STORE_BYTES_A_KEY,
        value_bytes=STORE_VALUE_BYTES,
        warm_s=bench.scale.warm_s,
        window_s=bench.scale.window_s,
        seed=seed,
    )
    if not source:
        return float(bench.processes.run("writer.py", job)["rate"]), 0
    with _backing_up(bench.processes, folder / source, folder / "backup") as done:
        rate = float(bench.processes.run("writer.py", job)["rate"])
    return rate, len(done)


@contextmanager
def _backing_up(processes: Processes, source: Path, target: Path) -> Iterator[list[float]]:
    """Makes one backup after the other until the block ends; gives the seconds that each took."""
    done: list[float] = []
    ended = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            while not ended.is_set():
                command = understudy_command("backup", "-f", str(source), "-t", str(target), "--json")
                done.append(processes.program(Process, "backup", command).result()["seconds"])
                shutil.rmtree(target)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="backups")
    thread.start()
    try:
        yield done
    finally:
        ended.set()
        thread.join()
        os.sync()
    if failed:
        raise failed[0]


def _figures(rates: dict[str, list[float]], counts: dict[str, list[float]]) -> list[Figure]:
    figures = [Figure(name="no backup", unit="commits/s", values=rates[""])]
    for source, ratio in RATIOS.items():
        during = rates[source]
        figures += [
            Figure(name=f"while the {source} is backed up", unit="commits/s", values=during),
            Figure(
                name=f"while the {source} is backed up, against without",
                unit="",
                values=[one / other for one, other in zip(during, rates[""], strict=True)],
                target=at_least(ratio),
            ),
            Figure(name=f"backups of the {source} finished meanwhile", unit="", values=counts[source]),
        ]
    return figures
