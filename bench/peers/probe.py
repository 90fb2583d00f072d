"""The process that measures a replica's lag, alike for all systems: it writes markers and watches for them.

A marker is written to the primary every 10 ms; the replica is asked every 2 ms which one it shows. Says so in a line
when it has begun, ends with standard input, and prints markers as (number, due, acknowledged) and answers as (number,
answered), in seconds of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from jobs import argument, parse_job

from peers.clients import connect_to
from peers.system import Endpoint

WRITTEN_EVERY_S = 0.01
ASKED_EVERY_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeJob:
    """What to probe. ``first``: the number of the first marker."""

    system: str
    primary: str
    replica: str
    key: int
    first: int


def probe(job: ProbeJob) -> dict[str, Any]:
    """Probes until standard input ends, and until the last marker was seen."""
    stopped = threading.Event()
    written: list[tuple[int, float, float]] = []
    writing = threading.Thread(target=_write, args=(job, written, stopped))
    seen: list[tuple[int, float]] = []
    replica = connect_to(Endpoint(system=job.system, address=job.replica))
    replica.get(job.key)
    writing.start()
    print("probing", flush=True)
    threading.Thread(target=_wait_for_end, args=(stopped,), daemon=True).start()
    while not stopped.is_set() or writing.is_alive() or not seen or seen[-1][0] < written[-1][0]:
        number = replica.get(job.key)
        seen.append((number, time.monotonic()))
        time.sleep(ASKED_EVERY_S)
    replica.close()
    return {"written": written, "seen": seen}


def _wait_for_end(stopped: threading.Event) -> None:
    sys.stdin.read()
    stopped.set()


def _write(job: ProbeJob, written: list[tuple[int, float, float]], stopped: threading.Event) -> None:
    primary = connect_to(Endpoint(system=job.system, address=job.primary))
    primary.put(job.key, job.first - 1)  # connects
    started_s = time.monotonic()
    number = 0
    while not stopped.is_set() or not written:
        due_s = started_s + number * WRITTEN_EVERY_S
        time.sleep(max(due_s - time.monotonic(), 0.0))
        primary.put(job.key, job.first + number)
        written.append((job.first + number, due_s, time.monotonic()))
        number += 1
    primary.close()


if __name__ == "__main__":
    print(json.dumps(probe(parse_job(ProbeJob, argument()))))
