"""What an attached replica costs a primary that does not wait for it."""

from __future__ import annotations

import commits
from processes import Node, wait_for_replica
from results import Figure, RowResult, at_least
from stage import Bench, Pair

WRITERS = (64, 256)
RATIO = 0.85
_METHOD = """
As the commits above, at `--durability local`, with a replica attached and without one. All of them share the
machine's processors, so what the replica itself needs for receiving, writing and applying counts as its cost: this is
the hard case, as on two machines only the shipping would. The two take turns, and so does who begins; a
replica that comes back catches up before anything is measured.
"""


def measure(bench: Bench) -> RowResult:
    """The row."""
    rates: dict[tuple[int, bool], list[float]] = {
        (writers, attached): [] for writers in WRITERS for attached in (True, False)
    }
    with bench.scratch() as folder:
        pair = bench.preloaded_pair(folder)
        primary = bench.processes.primary(pair.primary)
        for number in range(bench.scale.rounds):
            order = (True, False) if number % 2 == 0 else (False, True)
            for attached in order:
                bench.say(f"{'with' if attached else 'without'} a replica, round {number + 1}")
                for writers, rate in _rates(bench, primary, pair, attached=attached, seed=number).items():
                    rates[writers, attached].append(rate)
        primary.stop()
    return RowResult(
        name="attached",
        title="Commits at local with a replica attached, against without",
        method=_METHOD,
        figures=[figure for writers in WRITERS for figure in _figures(rates, writers)],
    )


def _rates(bench: Bench, primary: Node, pair: Pair, *, attached: bool, seed: int) -> dict[int, float]:
    if not attached:
        return {writers: _rate(bench, primary, writers, seed) for writers in WRITERS}
    replica = bench.processes.replica(pair.replica, primary)
    wait_for_replica(primary, replica)
    try:
        return {writers: _rate(bench, primary, writers, seed) for writers in WRITERS}
    finally:
        replica.stop()


def _rate(bench: Bench, primary: Node, writers: int, seed: int) -> float:
    job = commits.timed_job(bench, primary, writers, seed=seed, watched={})
    return float(bench.processes.run("writer.py", job)["rate"])


def _figures(rates: dict[tuple[int, bool], list[float]], writers: int) -> list[Figure]:
    attached = Figure(
        name=f"{writers} writers, replica attached", unit="commits/s", values=rates[writers, True]
    )
    alone = Figure(name=f"{writers} writers, no replica", unit="commits/s", values=rates[writers, False])
    ratio = Figure(
        name=f"{writers} writers, ratio",
        unit="",
        values=[one / other for one, other in zip(attached.values, alone.values, strict=True)],
        target=at_least(RATIO),
    )
    return [attached, alone, ratio]
