"""Where the time of one replicated commit goes, from one point on its way to the next."""

from __future__ import annotations

import json
from bisect import bisect_left
from itertools import pairwise
from pathlib import Path

from jobs import TracedJob
from processes import BenchFailed, wait_for_replica
from results import Detail, Figure, RowResult, quantile
from stage import VALUE_BYTES, Bench

# What has happened, where it is noted, and what the time up to it is spent on.
_STAGES = (
    ("the primary has read and parsed it", "submitted", "gRPC and its threads, both loops"),
    ("checked, numbered, chained, signed, handed to the log's thread", "handed over", "Python"),
    ("the log's thread has it", "writes", "a change of threads"),
    ("durable on the primary", "durable", "pwrite, fdatasync"),
    ("the primary's loop hears of it", "hears", "a change of threads"),
    ("read from the log and on its way to the replica", "ships", "Python"),
    ("the replica has read and parsed it", "chunk came", "gRPC and its threads, both loops"),
    ("chain and entry checked, the log's thread has it", "replica writes", "Python, a change of threads"),
    ("durable on the replica", "replica durable", "pwrite, fdatasync"),
    ("the replica's loop hears of it", "replica hears", "a change of threads"),
    ("applied there, progress on its way", "replica applied", "Python"),
    ("the primary has read and parsed that", "replica told", "gRPC and its threads, both loops"),
    ("applied on the primary, the answer is made", "answers", "Python"),
)
_LAST = ("the client has its receipt", "gRPC and its threads, both loops")
_METHOD = """
One client with one writer; a primary at durability `replica`, a replica, values of 100 bytes. Both nodes note the
time at which each commit passes these points (`bench/traced.py` wraps the methods that stand there), and the client
when it asks and when it is answered; all share one clock. Noting costs some 10 µs a commit. Given are the median and
the 90th percentile of each step, and what it is mostly spent on. Medians of steps don't add up to that of the whole.
"""


def measure(bench: Bench) -> RowResult:
    """The row."""
    steps_s: list[list[float]] = [[] for _ in range(len(_STAGES) + 1)]
    whole_s: list[list[float]] = []
    for seed in range(bench.scale.rounds):
        bench.say(f"one commit after the other, traced, round {seed + 1}")
        passed = _traced(bench, seed)
        for step_s, times_s in zip(steps_s, zip(*map(_differences, passed), strict=True), strict=True):
            step_s.extend(times_s)
        whole_s.append([times_s[-1] - times_s[0] for times_s in passed])
    return RowResult(
        name="stages",
        title="Where one replicated commit's time goes",
        method=_METHOD,
        figures=[
            Figure(
                name="one commit, traced, p50",
                unit="ms",
                values=[quantile(one, 0.5) * 1e3 for one in whole_s],
            )
        ],
        details=[
            Detail(
                title="Steps of one commit, µs",
                columns=["what has happened", "p50", "p90", "mostly spent on"],
                rows=[
                    [what, quantile(step_s, 0.5) * 1e6, quantile(step_s, 0.9) * 1e6, spent_on]
                    for (what, spent_on), step_s in zip(
                        [*((what, spent_on) for what, _, spent_on in _STAGES), _LAST], steps_s, strict=True
                    )
                ],
            )
        ],
    )


def _traced(bench: Bench, seed: int) -> list[list[float]]:
    """When each commit passed each point, in order, the client's two included."""
    with bench.scratch() as folder:
        files = [folder / "primary.json", folder / "replica.json"]
        primary = bench.processes.primary(folder / "a", "--durability", "replica", traced=files[0])
        replica = bench.processes.replica(folder / "b", primary, traced=files[1])
        wait_for_replica(primary, replica)
        job = TracedJob(
            address=primary.address,
            keys=bench.scale.keys,
            value_bytes=VALUE_BYTES,
            warm_s=bench.scale.warm_s,
            window_s=bench.scale.window_s,
            seed=seed,
        )
        commits: list[tuple[float, float]] = bench.processes.run("writer.py", job)["commits"]
        replica.stop()
        primary.stop()
        return _passed(commits, files)


def _passed(commits: list[tuple[float, float]], files: list[Path]) -> list[list[float]]:
    noted: dict[str, list[float]] = {}
    for file in files:
        noted |= json.loads(file.read_text())
    found = []
    for asked_s, answered_s in commits:
        times_s = [asked_s]
        for _, name, _ in _STAGES:
            at = bisect_left(noted[name], times_s[-1])
            if at == len(noted[name]) or noted[name][at] > answered_s:
                break  # something else was under way, such as a mark: not to be told apart
            times_s.append(noted[name][at])
        else:
            found.append([*times_s, answered_s])
    if not found:
        raise BenchFailed("no commit could be told apart from what else was under way")
    return found


def _differences(times_s: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times_s)]
