"""The client process for Redis: RESP over sockets, one connection a writer, since WAIT holds its connection up.

redis-benchmark can't do this work: it sends one command at a time, and a write is replicated only with the WAIT behind
it. Here both go out in one piece. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from jobs import CountedJob, FillJob, PacedJob, TimedJob, argument, parse_job
from load import ordered_pairs, random_pairs

from peers.closed_loop import Window
from understudy.common.portal import new_event_loop

_OK = b"+OK\r\n"
_WAIT = b"*3\r\n$4\r\nWAIT\r\n$1\r\n1\r\n$1\r\n0\r\n"
_BATCH = 1_000
_BATCH_CONNECTIONS = 4
_TICK_S = 0.001
Pairs = Iterator[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisTimedJob(TimedJob):
    """``wait``: each SET is followed by a WAIT for one replica."""

    wait: bool


def _set(key: bytes, value: bytes) -> bytes:
    return b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(key), key, len(value), value)


class _Writer(asyncio.Protocol):
    """Sends, waits for the answer, sends the next."""

    def __init__(self, pairs: Pairs, window: Window, *, wait: bool) -> None:
        self._pairs = pairs
        self._window = window
        self._behind = _WAIT if wait else b""
        self._expected = _OK + b":1\r\n" if wait else _OK
        self._answer = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._began_s = time.monotonic()
        self._transport.write(_set(*next(self._pairs)) + self._behind)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if len(self._answer) < len(self._expected) and self._expected.startswith(self._answer):
            return
        if self._answer != self._expected:
            self._window.fail(RuntimeError(f"Redis answered {self._answer!r}"))
            return
        self._window.note(time.monotonic() - self._began_s)
        self._answer = b""
        self._send()


async def timed(job: RedisTimedJob) -> dict[str, Any]:
    """Writes for a while; gives rate and latencies."""
    window = Window()
    pairs = random_pairs(seed=job.seed, keys=job.keys, value_bytes=job.value_bytes)
    host, _, port = job.address.partition(":")
    loop = asyncio.get_running_loop()
    for _ in range(job.writers):
        await loop.create_connection(lambda: _Writer(pairs, window, wait=job.wait), host, int(port))
    return await window.measure(job.warm_s, job.window_s)


async def fill(job: FillJob) -> dict[str, Any]:
    """Preloads."""
    await _write_all(job.address, ordered_pairs(seed=0, keys=job.keys, value_bytes=job.value_bytes))
    return {}


async def counted(job: CountedJob) -> dict[str, Any]:
    """Writes so many."""
    pairs = random_pairs(seed=job.seed, keys=job.keys, value_bytes=job.value_bytes)
    await _write_all(job.address, islice(pairs, job.transactions))
    return {}


async def _write_all(address: str, pairs: Pairs) -> None:
    """In batches, over several connections."""

    async def go_on() -> None:
        reader, writer = await _connect(address)
        while batch := [_set(*pair) for pair in islice(pairs, _BATCH)]:
            writer.write(b"".join(batch))
            await _expect(reader, len(batch))
        writer.close()

    await asyncio.gather(*(go_on() for _ in range(_BATCH_CONNECTIONS)))


async def paced(job: PacedJob) -> dict[str, Any]:
    """Writes at a pace over one connection; gives how many and the seconds that it took."""
    pairs = random_pairs(seed=job.seed, keys=job.keys, value_bytes=job.value_bytes)
    reader, writer = await _connect(job.address)
    total, begun = int(job.rate * job.seconds), 0
    answers = asyncio.create_task(_expect(reader, total))
    started_s = time.monotonic()
    while begun < total:
        due = min(int((time.monotonic() - started_s) * job.rate) + 1, total)
        writer.write(b"".join(_set(*pair) for pair in islice(pairs, due - begun)))
        begun = due
        await asyncio.sleep(_TICK_S)
    await answers
    return {"answered": total, "seconds": time.monotonic() - started_s}


async def _connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return reader, writer


async def _expect(reader: asyncio.StreamReader, count: int) -> None:
    """Reads so many answers, all of which must be OK."""
    for _ in range(count):
        if (answer := await reader.readexactly(len(_OK))) != _OK:
            raise RuntimeError(f"Redis answered {answer!r}")


_MODES: dict[str, tuple[type[Any], Callable[[Any], Coroutine[Any, Any, dict[str, Any]]]]] = {
    "timed": (RedisTimedJob, timed),
    "fill": (FillJob, fill),
    "counted": (CountedJob, counted),
    "paced": (PacedJob, paced),
}


def main() -> None:
    """Does the job in the argument."""
    kind, work = _MODES[json.loads(argument())["mode"]]
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        print(json.dumps(runner.run(work(parse_job(kind, argument())))))


if __name__ == "__main__":
    main()
