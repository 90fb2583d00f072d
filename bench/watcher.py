"""The process that watches how far a replica is: it reads, again and again, and notes which LSN it was shown.

A read that asks for no key is the cheapest question that a node answers with its applied LSN. Prints a row of (LSN,
before the question, after the answer) for each question, in seconds of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import json
import select
import sys
import time

import grpc
from jobs import WatchJob, argument, parse_job
from load import REALM

from understudy.v1 import data_pb2, data_pb2_grpc


def watch(job: WatchJob) -> dict[str, list[tuple[int, float, float]]]:
    """Asks until standard input ends, and once more."""
    seen: list[tuple[int, float, float]] = []
    request = data_pb2.GetRequest(realm=REALM)
    with grpc.insecure_channel(job.address) as channel:
        stub = data_pb2_grpc.DataStub(channel)
        goes_on = True
        while goes_on:
            goes_on = not select.select([sys.stdin], [], [], job.every_s)[0]
            asked_s = time.monotonic()
            lsn = stub.Get(request).lsn
            seen.append((lsn, asked_s, time.monotonic()))
    return {"seen": seen}


if __name__ == "__main__":
    print(json.dumps(watch(parse_job(WatchJob, argument()))))
