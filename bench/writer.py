"""The client process of the bench: writes through one ``aconnect`` as an application would, and measures.

Prints one JSON object. Times are of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from itertools import islice
from typing import Any

from accounts import cpu_seconds
from jobs import CountedJob, FillJob, FillRealmsJob, PacedJob, TimedJob, TracedJob, argument, parse_job
from load import REALM, ordered_pairs, random_pairs, realm
from results import quantile

from understudy.client import AsyncServer, Put, aconnect
from understudy.common.portal import new_event_loop

FILLS_UNDER_WAY = 8
REALMS_UNDER_WAY = 64
ANSWER_S_MAX = 300.0
_TICK_S = 0.001


async def _commit(server: AsyncServer, pairs: Iterator[tuple[bytes, bytes]], count: int) -> int:
    """Commits the next pairs as one transaction; returns its LSN, or 0 if there were no more pairs."""
    puts = [Put(key, value) for key, value in islice(pairs, count)]
    return (await server.commit(REALM, puts, timeout_s=ANSWER_S_MAX)).lsn if puts else 0


async def fill(job: FillJob) -> dict[str, Any]:
    """Preloads; gives the seconds that it took."""
    pairs = ordered_pairs(seed=0, keys=job.keys, value_bytes=job.value_bytes)

    async def go_on(server: AsyncServer) -> None:
        while await _commit(server, pairs, job.puts_each):
            pass

    started_s = time.monotonic()
    async with aconnect(job.address) as server:
        await asyncio.gather(*(go_on(server) for _ in range(FILLS_UNDER_WAY)))
    return {"seconds": time.monotonic() - started_s}


async def fill_realms(job: FillRealmsJob) -> dict[str, Any]:
    """Preloads many realms alike; gives the seconds that it took."""
    pairs = ordered_pairs(seed=0, keys=job.keys_each, value_bytes=job.value_bytes)
    puts = [Put(key, value) for key, value in pairs]
    numbers = iter(range(job.realms))

    async def go_on(server: AsyncServer) -> None:
        for number in numbers:
            await server.commit(realm(number), puts, timeout_s=ANSWER_S_MAX)

    started_s = time.monotonic()
    async with aconnect(job.address) as server:
        await asyncio.gather(*(go_on(server) for _ in range(REALMS_UNDER_WAY)))
    return {"seconds": time.monotonic() - started_s}


async def counted(job: CountedJob) -> dict[str, Any]:
    """Writes so many transactions; gives seconds and the last LSN."""
    pairs = random_pairs(seed=job.seed, keys=job.keys, value_bytes=job.value_bytes)
    left = job.transactions
    last_lsn = 0

    async def go_on(server: AsyncServer) -> None:
        nonlocal left, last_lsn
        while left:
            left -= 1
            last_lsn = max(last_lsn, await _commit(server, pairs, job.puts_each))

    async with aconnect(job.address) as server:
        started_s = time.monotonic()
        await asyncio.gather(*(go_on(server) for _ in range(job.writers)))
        return {"seconds": time.monotonic() - started_s, "last_lsn": last_lsn}


class _Window:
    """Latencies of what was answered between two moments."""

    def __init__(self) -> None:
        self.is_open = False
        self.latencies_s: list[float] = []

    async def measure(self, job: TimedJob) -> dict[str, Any]:
        """Waits for ``warm_s``, opens for ``window_s``, and gives what came of it."""
        watched = {"client": os.getpid(), **job.watched}
        await asyncio.sleep(job.warm_s)
        before = {name: cpu_seconds(pid) for name, pid in watched.items()}
        began_s = time.monotonic()
        self.is_open = True
        await asyncio.sleep(job.window_s)
        self.is_open = False
        seconds = time.monotonic() - began_s
        count = len(self.latencies_s)
        return {
            "rate": count / seconds,
            "p50_s": quantile(self.latencies_s, 0.5),
            "p99_s": quantile(self.latencies_s, 0.99),
            "cpu_s_each": {name: (cpu_seconds(pid) - before[name]) / count for name, pid in watched.items()},
        }


async def timed(job: TimedJob) -> dict[str, Any]:
    """Writes for a while; gives rate, latencies, and processor seconds of one commit in each process."""
    pairs = random_pairs(seed=job.seed, keys=job.keys, value_bytes=job.value_bytes)
    window = _Window()
    clock = time.monotonic

    async def go_on(server: AsyncServer) -> None:
        while True:
            key, value = next(pairs)
            began_s = clock()
            await server.commit(REALM, [Put(key, value)], timeout_s=ANSWER_S_MAX)
            if window.is_open:
                window.latencies_s.append(clock() - began_s)

    async with aconnect(job.address) as server:
        writers = [asyncio.create_task(go_on(server)) for _ in range(job.writers)]
        try:
            return await window.measure(job)
        finally:
            for writer in writers:
                writer.cancel()
            await asyncio.gather(*writers, return_exceptions=True)


async def traced(job: TracedJob) -> dict[str, Any]:
    """One commit after the other; gives when each was asked for and answered."""
    pairs = random_pairs(seed=job.seed, keys=job.keys, value_bytes=job.value_bytes)
    commits: list[tuple[float, float]] = []
    async with aconnect(job.address) as server:
        counts_from_s = time.monotonic() + job.warm_s
        while (asked_s := time.monotonic()) < counts_from_s + job.window_s:
            await _commit(server, pairs, 1)
            if asked_s >= counts_from_s:
                commits.append((asked_s, time.monotonic()))
    return {"commits": commits}


async def paced(job: PacedJob) -> dict[str, Any]:
    """Writes at a pace; gives of each transaction: LSN, when it was due, when its answer was here."""
    pairs = random_pairs(seed=job.seed, keys=job.keys, value_bytes=job.value_bytes)
    answered: list[tuple[int, float, float]] = []
    under_way: set[asyncio.Task[None]] = set()

    async def one(server: AsyncServer, due_s: float) -> None:
        lsn = await _commit(server, pairs, 1)
        answered.append((lsn, due_s, time.monotonic()))

    async with aconnect(job.address) as server:
        await _commit(server, pairs, 1)  # connects
        begun, total, started_s = 0, int(job.rate * job.seconds), time.monotonic()
        while begun < total:
            due = min(int((time.monotonic() - started_s) * job.rate) + 1, total)
            for number in range(begun, due):
                task = asyncio.create_task(one(server, started_s + number / job.rate))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            begun = due
            await asyncio.sleep(_TICK_S)
        await asyncio.gather(*under_way)
    return {"answered": answered, "seconds": time.monotonic() - started_s}


_MODES: dict[str, tuple[type[Any], Callable[[Any], Coroutine[Any, Any, dict[str, Any]]]]] = {
    "fill": (FillJob, fill),
    "fill_realms": (FillRealmsJob, fill_realms),
    "counted": (CountedJob, counted),
    "timed": (TimedJob, timed),
    "paced": (PacedJob, paced),
    "traced": (TracedJob, traced),
}


def main() -> None:
    """Does the job in the argument."""
    kind, work = _MODES[json.loads(argument())["mode"]]
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        print(json.dumps(runner.run(work(parse_job(kind, argument())))))


if __name__ == "__main__":
    main()
