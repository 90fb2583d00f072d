"""A replica's first copy against copying the same file with cp."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import time
from pathlib import Path

from processes import Node, wait_until
from results import Figure, RowResult, at_least
from scale import MIB
from stage import Bench, copy_synced, data_file

RATIO = 0.6
_METHOD = """
From the replica's log event that its bootstrap begins to the one that it is done: pinning, fetching, checking each
range by its digest, fsync, reading back, installing and opening the copy. Then the same file with `cp`, fsync of the
copy and of its directory included. The two take turns, and so does who begins. No caches are dropped: the file that
is read is in memory for both. The primary takes no writes meanwhile.
"""


def measure(bench: Bench) -> RowResult:
    """The row."""
    with bench.scratch() as folder:
        directory = copy_synced(bench.store_of(bench.scale.store_bytes), folder / "primary")
        primary = bench.processes.primary(directory)
        source = data_file(directory)
        size = source.stat().st_size / MIB
        ours: list[float] = []
        theirs: list[float] = []
        for number in range(bench.scale.rounds):
            bench.say(f"bootstrap and cp of {size:,.0f} MiB, round {number + 1}")
            if number % 2:
                theirs.append(size / _copy_seconds(source, folder / "copy"))
            ours.append(size / _bootstrap_seconds(bench, primary, folder / "replica"))
            if not number % 2:
                theirs.append(size / _copy_seconds(source, folder / "copy"))
        primary.stop()
    return RowResult(
        name="bootstrap",
        title=f"Bootstrap of a store of {size:,.0f} MiB",
        method=_METHOD,
        figures=_figures(ours, theirs),
    )


def _figures(ours: list[float], theirs: list[float]) -> list[Figure]:
    copied = Figure(name="reference: cp and fsync", unit="MiB/s", values=theirs)
    return [
        Figure(name="bootstrap", unit="MiB/s", values=ours, reference=f"cp {copied.median:,.0f} MiB/s"),
        Figure(
            name="bootstrap, against cp",
            unit="",
            values=[one / other for one, other in zip(ours, theirs, strict=True)],
            target=at_least(RATIO),
        ),
        copied,
    ]


def _bootstrap_seconds(bench: Bench, primary: Node, directory: Path) -> float:
    replica = bench.processes.replica(directory, primary)
    wait_until(lambda: bool(replica.events("bootstrap_done")), what="the bootstrap ends", every_s=0.1)
    seconds = _logged_at(replica, "bootstrap_done") - _logged_at(replica, "bootstrap_begins")
    replica.stop()
    shutil.rmtree(directory)
    os.sync()
    return seconds


def _logged_at(node: Node, event: str) -> float:
    return datetime.datetime.fromisoformat(node.events(event)[0]["timestamp"]).timestamp()


def _copy_seconds(source: Path, target: Path) -> float:
    began_s = time.monotonic()
    subprocess.run(["cp", str(source), str(target)], check=True)
    for path in (target, target.parent):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    seconds = time.monotonic() - began_s
    target.unlink()
    os.sync()
    return seconds
