"""The rows of the comparison, each written once for all systems."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from json import dumps
from statistics import median
from typing import Any, TypeVar

from processes import Process
from results import quantile
from scale import MIB
from stage import STORE_BYTES_A_KEY, STORE_VALUE_BYTES, VALUE_BYTES, Bench

from peers import copies
from peers.comparison import Comparison, Measured
from peers.methods import METHODS
from peers.ours import Understudy
from peers.probe import ProbeJob
from peers.system import DataSet, Durability, Pair, System, Timed, next_mark

WRITERS = (1, 16, 64, 256)
ATTACHED_WRITERS = (16, 64)
RATES = (2_000, 5_000)
BOOTSTRAP_RATE = 500
_BOOTSTRAP_S_MAX = 900.0
_FAILOVER_WRITES = 50_000
_RETRIED_EVERY_S = 0.001
_MARKERS = 1_000_000  # a block of marker numbers for one probe
# Ours against theirs, at least: by peer and number of writers; and for a replica's way to where the primary is.
_REACH = {("PostgreSQL", 64): 2.0, ("Redis", 64): 2.5, ("PostgreSQL", 16): 1.0, ("PostgreSQL", 1): 0.4}
_REACH_OF_RECOVERY = {"PostgreSQL": 1.0}

_T = TypeVar("_T")
Kinds = Sequence[type[System]]


def commits(bench: Bench, kinds: Kinds) -> Comparison:
    """Replicated commits a second and their latency."""
    runs: dict[tuple[int, type[System], Durability], list[Timed]] = defaultdict(list)
    with _made(bench, kinds, _small(bench)) as systems:
        variants = [
            (system, level) for system in systems for level in system.durabilities if level != "local"
        ]
        for number, (system, level) in _turns(bench, variants):
            system.start(level)
            for writers in WRITERS:
                bench.say(f"{_said(type(system), level)}: {writers} writers, round {number + 1}")
                runs[writers, type(system), level].append(system.timed(writers, number))
            system.stop()
    return Comparison(
        name="commits",
        title="Replicated commits, 100-byte values",
        method=METHODS["commits"],
        unit="commits/s",
        less_is_better=False,
        measured=[_commits(*key, found) for key, found in sorted(runs.items(), key=lambda item: item[0][0])],
        beside=("p50, ms", "p99, ms"),
    )


def _commits(writers: int, kind: type[System], level: Durability, found: list[Timed]) -> Measured:
    ours = kind is Understudy
    middle = sorted(found, key=lambda one: one.rate)[len(found) // 2]
    return Measured(
        work=_writers(writers),
        system=_said(kind, level),
        values=[one.rate for one in found],
        against="" if ours else _said(Understudy, level),
        reach=_REACH.get((kind.name, writers)) if level == "replica" else None,
        beside=(middle.p50_s * 1e3, middle.p99_s * 1e3),
    )


def attached(bench: Bench, kinds: Kinds) -> Comparison:
    """What a replica costs a primary that does not wait for it."""
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    with _made(bench, _of_pairs(kinds), _small(bench)) as systems:
        for number, system in _turns(bench, _pairs(systems)):
            system.start("local")
            for is_attached in (True, False):
                if not is_attached:
                    system.stop_replica()
                for writers in ATTACHED_WRITERS:
                    work = f"{_writers(writers)}, {'with' if is_attached else 'without'} a replica"
                    bench.say(f"{system.name}: {work}, round {number + 1}")
                    rates[work, system.name].append(system.timed(writers, number).rate)
            system.stop_primary()
    return Comparison(
        name="attached",
        title="The cost of being replicated",
        method=METHODS["attached"],
        unit="commits/s",
        less_is_better=False,
        measured=_all(rates),
    )


def lag(bench: Bench, kinds: Kinds) -> Comparison:
    """How far behind a replica is under a steady load."""
    lags: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    achieved: dict[tuple[str, str], list[float]] = defaultdict(list)
    with _made(bench, _of_pairs(kinds), _small(bench)) as systems:
        for number, system in _turns(bench, _pairs(systems)):
            system.start("local")
            for rate in RATES:
                bench.say(f"{system.name}: {rate:,} commits/s, round {number + 1}")
                found, done = _lags(bench, system, rate, number)
                lags[_offered(rate), system.name].append(found)
                achieved[_offered(rate), system.name].append(done)
            system.stop()
    measured = [
        Measured(
            work=f"{work}: {name}",
            system=system,
            values=[quantile(one, share) * 1e3 for one in found],
            against="" if system == Understudy.name else Understudy.name,
            beside=(median(achieved[work, system]), median(map(len, found))),
        )
        for rate in RATES
        for name, share in (("p50", 0.5), ("p99", 0.99), ("highest", 1.0))
        for (work, system), found in lags.items()
        if work == _offered(rate)
    ]
    return Comparison(
        name="lag",
        title="Lag of an attached replica",
        method=METHODS["lag"],
        unit="ms",
        less_is_better=True,
        measured=measured,
        beside=("achieved, commits/s", "markers"),
    )


def _offered(rate: int) -> str:
    return f"{rate:,} commits/s offered"


def _lags(bench: Bench, system: Pair, rate: int, seed: int) -> tuple[list[float], float]:
    """Seconds from a marker's acknowledgement to the first answer of the replica that shows it; and the load's rate."""
    job = ProbeJob(
        system=system.name,
        primary=system.endpoint(replica=False).address,
        replica=system.endpoint(replica=True).address,
        key=system.data.keys,
        first=next_mark() * _MARKERS,
    )
    command = [sys.executable, "-P", "-m", "peers.probe", dumps(asdict(job))]
    probe = bench.processes.program(Process, "probe", command)
    probe.first_line()
    achieved = system.paced(rate, bench.scale.lag_s, seed).finish()
    under_load_s = time.monotonic() - bench.scale.lag_s
    found: dict[str, Any] = probe.result()
    seen = [number for number, _ in found["seen"]]
    return [
        max(found["seen"][bisect_left(seen, number)][1] - acknowledged_s, 0.0)
        for number, due_s, acknowledged_s in found["written"]
        if due_s >= under_load_s
    ], achieved


def catchup(bench: Bench, kinds: Kinds) -> Comparison:
    """How fast a replica catches up that was away."""
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    missed = bench.scale.catchup_entries
    with _made(bench, _of_pairs(kinds), _small(bench)) as systems:
        for number, system in _turns(bench, _pairs(systems)):
            system.start("local")
            system.cut_replica_off()
            bench.say(f"{system.name}: {missed:,} updates without a replica, round {number + 1}")
            system.counted(missed, number)
            mark = next_mark()
            system.mark(mark)
            bench.say(f"{system.name}: catching up, round {number + 1}")
            began_s = time.monotonic()
            system.let_replica_rejoin()
            system.wait_for_mark(mark)
            rates["until the last is visible", system.name].append(missed / (time.monotonic() - began_s))
            system.stop()
    return Comparison(
        name="catchup",
        title=f"Catching up {missed:,} missed updates",
        method=METHODS["catchup"],
        unit="updates/s",
        less_is_better=False,
        measured=_all(rates, _REACH_OF_RECOVERY),
    )


def bootstrap(bench: Bench, kinds: Kinds) -> Comparison:
    """How long a new replica takes while commits go on."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    work = f"{BOOTSTRAP_RATE} commits/s meanwhile"
    with _made(bench, _of_pairs(kinds), _large(bench.scale.store_bytes)) as systems:
        for number, system in _turns(bench, _pairs(systems)):
            system.remove_replica()
            system.start_primary("local")
            load = system.paced(BOOTSTRAP_RATE, _BOOTSTRAP_S_MAX, number)
            bench.say(f"{system.name}: a new replica, round {number + 1}")
            seconds[work, system.name].append(_bootstrap_seconds(system))
            system.stop_replica()
            if isinstance(system, Understudy):
                for program in copies.installed():
                    bench.say(f"{program}, round {number + 1}")
                    taken_s = copies.seconds(program, system.store, system.folder / "copy")
                    seconds[work, f"{program} of our store"].append(taken_s)
            load.process.kill()
            system.stop_primary()
    return Comparison(
        name="bootstrap",
        title=f"A new replica of a data set of {bench.scale.store_bytes / MIB:,.0f} MiB",
        method=METHODS["bootstrap"],
        unit="s",
        less_is_better=True,
        measured=_all(seconds, _REACH_OF_RECOVERY),
    )


def _bootstrap_seconds(system: Pair) -> float:
    mark = next_mark()
    system.mark(mark)
    began_s = time.monotonic()
    system.new_replica()
    system.wait_for_mark(mark)
    return time.monotonic() - began_s


def failover(bench: Bench, kinds: Kinds) -> Comparison:
    """From the kill of the primary to the first write that the promoted replica acknowledges."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for size in (bench.scale.small_store_bytes, bench.scale.store_bytes):
        work = f"{size / MIB:,.0f} MiB"
        with _made(bench, _of_pairs(kinds), _large(size)) as systems:
            for number, system in _turns(bench, _pairs(systems)):
                bench.say(f"{system.name}: failover at {work}, round {number + 1}")
                system.start("local")
                system.counted(_FAILOVER_WRITES, number)
                system.wait_for_replica()
                seconds[work, system.name].append(_failover_seconds(system))
                _replace_the_killed(system)
    return Comparison(
        name="failover",
        title="Failover",
        method=METHODS["failover"],
        unit="s",
        less_is_better=True,
        measured=_all(seconds, _REACH_OF_RECOVERY),
    )


def _failover_seconds(system: Pair) -> float:
    mark = next_mark()
    began_s = time.monotonic()
    system.kill_primary()
    system.promote()
    client = system.client(replica=False)
    while not client.put(system.data.keys, mark):
        time.sleep(_RETRIED_EVERY_S)
    seconds = time.monotonic() - began_s
    client.close()
    return seconds


def _replace_the_killed(system: Pair) -> None:
    system.remove_replica()
    system.new_replica()
    system.wait_for_replica()
    system.stop()


# -- what they share ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _made(bench: Bench, kinds: Kinds, data: DataSet) -> Iterator[list[System]]:
    """The systems, preloaded and stopped; removed at the end."""
    with bench.scratch() as folder:
        folder.chmod(0o755)  # a system may run as another user
        systems = [kind(bench, folder / kind.name.lower(), data) for kind in kinds]
        for system in systems:
            system.make()
        os.sync()
        yield systems


def _turns(bench: Bench, those: Sequence[_T]) -> Iterator[tuple[int, _T]]:
    """Round by round, each once; another begins each time."""
    for number in range(bench.scale.rounds):
        for index in range(len(those)):
            yield number, those[(number + index) % len(those)]


def _pairs(systems: Sequence[System]) -> list[Pair]:
    return [system for system in systems if isinstance(system, Pair)]


def _of_pairs(kinds: Kinds) -> Kinds:
    return [kind for kind in kinds if issubclass(kind, Pair)]


def _small(bench: Bench) -> DataSet:
    return DataSet(keys=bench.scale.keys, value_bytes=VALUE_BYTES)


def _large(size: int) -> DataSet:
    return DataSet(keys=size // STORE_BYTES_A_KEY, value_bytes=STORE_VALUE_BYTES)


def _all(
    found: Mapping[tuple[str, str], list[float]], reach: Mapping[str, float] | None = None
) -> list[Measured]:
    """By work, in the order in which it was done first; ``reach`` by system."""
    works = list(dict.fromkeys(work for work, _ in found))
    return [
        Measured(
            work=work,
            system=system,
            values=values,
            against="" if system == Understudy.name else Understudy.name,
            reach=(reach or {}).get(system),
        )
        for (work, system), values in sorted(found.items(), key=lambda item: works.index(item[0][0]))
    ]


def _writers(number: int) -> str:
    return f"{number} writer{'s' if number > 1 else ''}"


def _said(kind: type[System], level: Durability) -> str:
    return f"{kind.name}, {kind.durabilities[level]}"


ROWS: dict[str, Callable[[Bench, Kinds], Comparison]] = {
    "commits": commits,
    "attached": attached,
    "lag": lag,
    "catchup": catchup,
    "bootstrap": bootstrap,
    "failover": failover,
}
