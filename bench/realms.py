"""What a server needs for many realms and many clients."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path

from accounts import MemorySampler, anonymous_bytes, cpu_seconds
from fanout import spread
from jobs import FillRealmsJob, RealmsJob
from processes import Node
from results import Detail, Figure, RowResult, below
from scale import MIB
from stage import VALUE_BYTES, Bench

START_S = 5.0
LIMIT_MIB = 400.0
_KEYS_EACH = 10
_RATE = 10  # transactions a second, of each process
_BEGIN_AFTER_S = 2.0  # for all processes to be there
_METHOD = """
10,000 realms of ten keys (100-byte values). The server's start: from the start of its process until it serves, all
realms being in its store. Clients' start: 200 clients, each a directory and a connection of its own with 50 realms
that no other has, spread over four processes, all of which begin at the same moment. First with new directories: from
that moment until every realm of every client is here, so all 10,000 are opened, connected and loaded. Then once
more with the same directories, which need nothing. The primary is at `--durability local`, without a replica; the
directories are relaxed. Primary and clients share the machine's two processors, so what the clients do is most of
it: see the processor time of each. Memory is the highest RssAnon of the primary, and of its checkpoint process,
during the first start and 30 s of 40 transactions/s behind it, each of one client at random.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    opened_s: float  # since it was begun, until the last realm was opened
    caught_up_s: float
    primary_cpu_s: float
    clients_cpu_s: float
    settled_bytes: int  # anonymous memory of the primary, behind the traffic


def measure(bench: Bench) -> RowResult:
    """The row."""
    scale = bench.scale
    with bench.scratch() as folder:
        primary = _preloaded(bench, folder / "primary")
        with MemorySampler(primary.pids()) as sampler:
            first = _start(bench, primary, folder / "clients", traffic_s=scale.realms_s)
        again = _start(bench, primary, folder / "clients", traffic_s=0.0)
        ready_s = primary.ready_s
        primary.stop()
    return RowResult(
        name="realms",
        title=f"{scale.realms:,} realms on one server, {scale.realms_clients} clients",
        method=_METHOD,
        figures=[
            Figure(name="start of the server", unit="s", values=[ready_s], target=below(START_S)),
            *_starts(first, again),
            *_memory(sampler, first),
        ],
        details=[_parts(first, again)],
    )


def _preloaded(bench: Bench, directory: Path) -> Node:
    """A primary that was started with all realms in its store."""
    bench.say(f"preloading {bench.scale.realms:,} realms")
    primary = bench.processes.primary(directory)
    job = FillRealmsJob(
        address=primary.address, realms=bench.scale.realms, keys_each=_KEYS_EACH, value_bytes=VALUE_BYTES
    )
    bench.processes.run("writer.py", job)
    primary.checkpoint()
    primary.stop()
    return bench.processes.primary(directory)


def _start(bench: Bench, primary: Node, folder: Path, *, traffic_s: float) -> _Start:
    bench.say(f"{bench.scale.realms_clients} clients with {bench.scale.realms:,} realms")
    begin_s = time.monotonic() + _BEGIN_AFTER_S
    jobs = _jobs(bench, primary, folder, begin_s, traffic_s)
    cpu_before_s = cpu_seconds(primary.pid)
    clients = [bench.processes.helper("syncer.py", job) for job in jobs]
    lines = [one.first_line() for one in clients]
    if not all(lines):
        raise next(one for one, line in zip(clients, lines, strict=True) if not line).failure(
            "did not catch up"
        )
    primary_cpu_s = cpu_seconds(primary.pid) - cpu_before_s
    found = [json.loads(line) for line in lines]
    for one in clients:
        one.result()
    return _Start(
        opened_s=max(one["opened_s"] for one in found) - begin_s,
        caught_up_s=max(one["caught_up_s"] for one in found) - begin_s,
        primary_cpu_s=primary_cpu_s,
        clients_cpu_s=sum(one["cpu_s"] for one in found),
        settled_bytes=anonymous_bytes(primary.pid),
    )


def _jobs(bench: Bench, primary: Node, folder: Path, begin_s: float, traffic_s: float) -> list[RealmsJob]:
    scale = bench.scale
    shares = spread(folder, scale.realms_clients)
    realms_each = scale.realms // scale.realms_clients
    begins = itertools.accumulate((len(share) * realms_each for share in shares), initial=0)
    return [
        RealmsJob(
            address=primary.address,
            directories=share,
            first_realm=first_realm,
            realms_each=realms_each,
            begin_s=begin_s,
            rate=_RATE,
            seconds=traffic_s,
            value_bytes=VALUE_BYTES,
        )
        for share, first_realm in zip(shares, begins, strict=False)
    ]


def _starts(first: _Start, again: _Start) -> list[Figure]:
    return [
        Figure(
            name="start of the clients, everything loaded",
            unit="s",
            values=[first.caught_up_s],
            target=below(START_S),
        ),
        Figure(
            name="start of the clients, nothing to load",
            unit="s",
            values=[again.caught_up_s],
            target=below(START_S),
        ),
    ]


def _memory(sampler: MemorySampler, first: _Start) -> list[Figure]:
    return [
        *(
            Figure(name=f"memory of {name}", unit="MiB", values=[peak / MIB], target=below(LIMIT_MIB))
            for name, peak in sampler.peaks.items()
        ),
        Figure(name="memory of primary behind the traffic", unit="MiB", values=[first.settled_bytes / MIB]),
    ]


def _parts(first: _Start, again: _Start) -> Detail:
    def row(name: str, start: _Start) -> list[str | float]:
        return [name, start.opened_s, start.caught_up_s, start.primary_cpu_s, start.clients_cpu_s]

    return Detail(
        title="Start of the clients, s, and processor time that it took, s",
        columns=["directories", "all opened", "all up to date", "of the primary", "of the clients"],
        rows=[row("new", first), row("as before", again)],
    )
