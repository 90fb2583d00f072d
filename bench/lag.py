"""How far behind an attached replica is under a steady load."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from jobs import PacedJob, WatchJob
from processes import Node, wait_for_replica
from results import Figure, RowResult, below, quantile
from stage import VALUE_BYTES, Bench, Pair, freeze_marks

RATE = 5_000
LAG_S = 0.02
_ASKED_EVERY_S = 0.002
_METHOD = """
5,000 commits a second at `--durability local`, begun when they are due, whatever became of those before. The lag of
a commit: from the moment that the client has its acknowledgement to the first answer of the replica to a read that
shows its LSN. Another process asks for that every 2 ms and notes when the answer was there, so a lag is overstated by
up to one interval between answers (given below), never understated by it. What the acknowledgement took from primary
to client would be missing; the lag from when the commit was due has it in full.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    lags_s: list[float]  # from the acknowledgement
    ages_s: list[float]  # from when it was due
    intervals_s: list[float]  # between the replica's answers
    rate: float


def measure(bench: Bench) -> RowResult:
    """The row."""
    with bench.scratch() as folder:
        pair = bench.preloaded_pair(folder)
        primary = bench.processes.primary(pair.primary)
        replica = bench.processes.replica(pair.replica, primary)
        wait_for_replica(primary, replica)
        first_lsn = primary.status().lsn
        rounds = [_round(bench, primary, replica, seed) for seed in range(bench.scale.rounds)]
        replica.stop()
        primary.stop()
        checkpoints = _checkpoints(pair, first_lsn)
    return RowResult(
        name="lag",
        title="Lag of an attached replica, 5,000 commits/s offered",
        method=_METHOD + f"Checkpoints at the replica meanwhile: {checkpoints}.",
        figures=_figures(rounds),
    )


def _checkpoints(pair: Pair, first_lsn: int) -> int:
    return sum(lsn > first_lsn for lsn in freeze_marks(pair.replica))


def _round(bench: Bench, primary: Node, replica: Node, seed: int) -> _Round:
    bench.say(f"{RATE:,} commits/s for {bench.scale.lag_s:g} s, round {seed + 1}")
    watcher = bench.processes.helper("watcher.py", WatchJob(address=replica.address, every_s=_ASKED_EVERY_S))
    job = PacedJob(
        address=primary.address,
        rate=RATE,
        seconds=bench.scale.lag_s,
        keys=bench.scale.keys,
        value_bytes=VALUE_BYTES,
        seed=seed,
    )
    written = bench.processes.run("writer.py", job)
    wait_for_replica(primary, replica)
    return _joined(written, watcher.result()["seen"])


def _joined(written: dict[str, Any], seen: list[tuple[int, float, float]]) -> _Round:
    """Both sides' rows joined by LSN; a commit that was visible before its acknowledgement came has a lag of 0."""
    lsns = [lsn for lsn, _, _ in seen]
    lags_s, ages_s = [], []
    for lsn, due_s, answered_s in written["answered"]:
        _, _, visible_s = seen[bisect_left(lsns, lsn)]
        lags_s.append(max(visible_s - answered_s, 0.0))
        ages_s.append(visible_s - due_s)
    return _Round(
        lags_s=lags_s,
        ages_s=ages_s,
        intervals_s=[later[2] - earlier[2] for earlier, later in itertools.pairwise(seen)],
        rate=len(lags_s) / written["seconds"],
    )


def _figures(rounds: list[_Round]) -> list[Figure]:
    def milliseconds(share: float, values: list[list[float]]) -> list[float]:
        return [quantile(one, share) * 1e3 for one in values]

    lags = [one.lags_s for one in rounds]
    ages = [one.ages_s for one in rounds]
    intervals = milliseconds(0.5, [one.intervals_s for one in rounds])
    resolution = f"resolution {sorted(intervals)[len(intervals) // 2]:.1f} ms"
    return [
        Figure(name="lag p50", unit="ms", values=milliseconds(0.5, lags), reference=resolution),
        Figure(
            name="lag p99",
            unit="ms",
            values=milliseconds(0.99, lags),
            target=below(LAG_S * 1e3),
            reference=resolution,
        ),
        Figure(name="lag, highest", unit="ms", values=milliseconds(1.0, lags)),
        Figure(name="from due to visible at the replica, p50", unit="ms", values=milliseconds(0.5, ages)),
        Figure(name="from due to visible at the replica, p99", unit="ms", values=milliseconds(0.99, ages)),
        Figure(
            name="between two answers of the replica, p99",
            unit="ms",
            values=milliseconds(0.99, [one.intervals_s for one in rounds]),
        ),
        Figure(name="achieved", unit="commits/s", values=[one.rate for one in rounds]),
    ]
