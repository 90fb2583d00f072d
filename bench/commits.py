"""Replicated commits a second, by number of concurrent writers, and where the processors' time goes."""

from __future__ import annotations

from typing import Any

import references
from jobs import TimedJob
from processes import Node, wait_for_replica
from references import Physics
from results import Detail, Figure, RowResult, at_least
from stage import VALUE_BYTES, Bench

TARGETS = {1: 500, 16: 5_500, 64: 12_000, 256: 20_000}
_METHOD = """
One client process with one `aconnect` and so many tasks, each of which commits a put of a 100-byte value at a
random key and waits for the acknowledgement; primary (`--durability replica`), replica, their checkpoint processes
and the client share the machine. The store is preloaded with all keys, so every put replaces a value. What was
acknowledged within the window counts, checkpoints that fell into it included. Reference: by latency alone, two
fdatasyncs and two gRPC round trips one after the other, so many at a time.
"""


def timed_job(bench: Bench, primary: Node, writers: int, *, seed: int, watched: dict[str, int]) -> TimedJob:
    """What the client of one closed-loop measurement does."""
    return TimedJob(
        address=primary.address,
        writers=writers,
        keys=bench.scale.keys,
        value_bytes=VALUE_BYTES,
        warm_s=bench.scale.warm_s,
        window_s=bench.scale.window_s,
        seed=seed,
        watched=watched,
    )


def measure(bench: Bench) -> RowResult:
    """The row."""
    physics: list[Physics] = []
    runs: dict[int, list[dict[str, Any]]] = {writers: [] for writers in TARGETS}
    with bench.scratch() as folder:
        pair = bench.preloaded_pair(folder)
        primary = bench.processes.primary(pair.primary, "--durability", "replica")
        replica = bench.processes.replica(pair.replica, primary)
        wait_for_replica(primary, replica)
        watched = primary.pids() | replica.pids()
        for seed in range(bench.scale.rounds):
            bench.say(f"references, round {seed + 1}")
            physics.append(references.measure(bench.processes, folder))
            for writers, found in runs.items():
                bench.say(f"{writers} writers at once, round {seed + 1}")
                job = timed_job(bench, primary, writers, seed=seed, watched=watched)
                found.append(bench.processes.run("writer.py", job))
        replica.stop()
        primary.stop()
    return RowResult(
        name="commits",
        title="Replicated commits, 100-byte values",
        method=_METHOD,
        figures=[*_rates(runs, physics), *_physics_figures(physics)],
        details=[_latencies(runs), _processor_time(runs)],
    )


def _rates(runs: dict[int, list[dict[str, Any]]], physics: list[Physics]) -> list[Figure]:
    return [
        Figure(
            name=f"{writers} writer{'s' if writers > 1 else ''}",
            unit="commits/s",
            values=[run["rate"] for run in found],
            target=at_least(TARGETS[writers]),
            reference=f"{writers / _median(physics).replicated_commit_s:,.0f}/s by latency",
        )
        for writers, found in runs.items()
    ]


def _median(physics: list[Physics]) -> Physics:
    return sorted(physics, key=lambda one: one.replicated_commit_s)[len(physics) // 2]


def _physics_figures(physics: list[Physics]) -> list[Figure]:
    return [
        Figure(
            name=f"reference: fdatasync of {references.RECORD_BYTES} bytes, p50",
            unit="ms",
            values=[one.sync_s * 1e3 for one in physics],
        ),
        Figure(
            name="reference: loopback round trip over TCP, p50",
            unit="ms",
            values=[one.loopback_s * 1e3 for one in physics],
        ),
        Figure(
            name="reference: gRPC round trip, p50", unit="ms", values=[one.echo_s * 1e3 for one in physics]
        ),
        Figure(
            name="reference: gRPC messages, 64 in flight",
            unit="messages/s",
            values=[one.echo_rate for one in physics],
        ),
    ]


def _latencies(runs: dict[int, list[dict[str, Any]]]) -> Detail:
    return Detail(
        title="Latency of a replicated commit, ms (median round)",
        columns=["writers", "p50", "p99"],
        rows=[
            [writers, middle(found, "p50_s") * 1e3, middle(found, "p99_s") * 1e3]
            for writers, found in runs.items()
        ],
    )


def _processor_time(runs: dict[int, list[dict[str, Any]]]) -> Detail:
    """Of the round in the middle by rate, so that the columns belong together."""
    rows: list[list[str | float]] = []
    names: list[str] = []
    for writers, found in runs.items():
        each = sorted(found, key=lambda run: float(run["rate"]))[len(found) // 2]["cpu_s_each"]
        names = list(each)
        rows.append([writers, *(each[name] * 1e6 for name in names), sum(each.values()) * 1e6])
    return Detail(
        title="Processor time of one commit, µs, by process (two processors give 2,000,000 a second)",
        columns=["writers", *names, "sum"],
        rows=rows,
    )


def middle(runs: list[dict[str, Any]], name: str) -> float:
    """The median of one number over the rounds."""
    return sorted(float(run[name]) for run in runs)[len(runs) // 2]
