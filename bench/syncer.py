"""A process with synced realms, as an application would have them, that measures.

Prints one JSON object; a line before it says that a part of the job is done. Times are of CLOCK_MONOTONIC, which all
processes of a machine share.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from accounts import cpu_seconds
from jobs import (
    DownloadJob,
    DriveJob,
    FollowJob,
    LocalJob,
    RealmsJob,
    UploadJob,
    argument,
    parse_job,
)
from load import REALM, random_pairs, realm

from understudy.client import Change, Put, Realm

SYNC_S_MAX = 300.0
_LOOKED_EVERY_S = 0.01


def local(job: LocalJob) -> dict[str, Any]:
    """Commits here; gives what each took."""
    pairs = random_pairs(seed=0, keys=job.keys, value_bytes=job.value_bytes)
    times_s = []
    with Realm.open(REALM, server=None, directory=job.directory, local_durability=job.durability) as opened:
        for key, value in itertools.islice(pairs, job.transactions):
            began_s = time.monotonic()
            opened.commit([Put(key, value)])
            times_s.append(time.monotonic() - began_s)
    return {"times_s": times_s}


def upload(job: UploadJob) -> dict[str, Any]:
    """Commits without a server, then uploads; gives the seconds from opening until all has come back."""
    pairs = random_pairs(seed=0, keys=job.keys, value_bytes=job.value_bytes)
    with Realm.open(REALM, server=None, directory=job.directory, local_durability="relaxed") as offline:
        for key, value in itertools.islice(pairs, job.transactions):
            offline.commit([Put(key, value)])
    began_s = time.monotonic()
    with _open(job.address, job.directory) as opened:
        opened.wait_for_upload(SYNC_S_MAX)
        return {"seconds": time.monotonic() - began_s}


def download(job: DownloadJob) -> dict[str, Any]:
    """Loads a realm; gives the seconds from opening until it is here, and its keys."""
    began_s = time.monotonic()
    with _open(job.address, job.directory) as opened:
        opened.wait_for_download(SYNC_S_MAX)
        return {"seconds": time.monotonic() - began_s, "keys": opened.count()}


# -- many clients of one realm -----------------------------------------------------------------------------


def follow(job: FollowJob) -> dict[str, Any]:
    """Notes when each transaction had come into the last of the directories; gives that, and how many it reached."""
    seen: list[tuple[int, float]] = []

    def note(change: Change) -> None:
        seen.append((change.number, time.monotonic()))

    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(_open(job.address, directory)) for directory in job.directories]
        for one in opened:
            one.wait_for_download(SYNC_S_MAX)
            one.on_change(note)
        _say("ready")
        sys.stdin.read()
        for one in opened:
            one.wait_for_download(SYNC_S_MAX)
    last_s: dict[int, tuple[float, int]] = {}
    for number, applied_s in seen:
        latest_s, count = last_s.get(number, (0.0, 0))
        last_s[number] = max(latest_s, applied_s), count + 1
    return {"applied": [(number, *found) for number, found in last_s.items()]}


def drive(job: DriveJob) -> dict[str, Any]:
    """Commits at a pace; gives of each transaction: number, when it was due, when commit began and ended."""
    pairs = random_pairs(seed=0, keys=job.keys, value_bytes=job.value_bytes)
    committed: list[tuple[int, float, float, float]] = []
    returned: list[tuple[int, float]] = []

    def note(change: Change) -> None:
        returned.append((change.number, time.monotonic()))

    with _open(job.address, job.directory) as opened:
        opened.wait_for_download(SYNC_S_MAX)
        opened.on_change(note)
        before = {name: cpu_seconds(pid) for name, pid in job.watched.items()}
        started_s = time.monotonic()
        for due_s in _due(job.rate, job.seconds):
            key, value = next(pairs)
            began_s = time.monotonic()
            number = opened.commit([Put(key, value)])
            committed.append((number, due_s, began_s, time.monotonic()))
        seconds = time.monotonic() - started_s
        cpu = {name: (cpu_seconds(pid) - before[name]) / seconds for name, pid in job.watched.items()}
        opened.wait_for_upload(SYNC_S_MAX)
    return {"committed": committed, "returned": returned, "cpu": cpu}


def _due(rate: int, seconds: float) -> Iterator[float]:
    """Gives each moment when a transaction is due, when it has come."""
    started_s = time.monotonic()
    for number in range(int(rate * seconds)):
        due_s = started_s + number / rate
        time.sleep(max(due_s - time.monotonic(), 0.0))
        yield due_s


# -- many realms -------------------------------------------------------------------------------------------


def realms(job: RealmsJob) -> dict[str, Any]:
    """Opens all; says when each was up to date at the latest. Then writes a little."""
    time.sleep(max(job.begin_s - time.monotonic(), 0.0))
    cpu_before_s = time.process_time()
    with contextlib.ExitStack() as stack:
        opened = []
        for index, directory in enumerate(job.directories):
            first = job.first_realm + index * job.realms_each
            for number in range(first, first + job.realms_each):
                opened.append(stack.enter_context(_open(job.address, directory, realm(number))))
        opened_s = time.monotonic()
        for one in opened:
            _wait_until_caught_up(one)
        caught_up_s, cpu_s = time.monotonic(), time.process_time() - cpu_before_s
        _say(json.dumps({"opened_s": opened_s, "caught_up_s": caught_up_s, "cpu_s": cpu_s}))
        pairs = random_pairs(seed=job.first_realm, keys=len(opened), value_bytes=job.value_bytes)
        for _ in _due(job.rate, job.seconds):
            key, value = next(pairs)
            opened[int(key)].commit([Put(key, value)])
        for one in opened:
            one.wait_for_upload(SYNC_S_MAX)
        sys.stdin.read()
    return {}


def _wait_until_caught_up(opened: Realm) -> None:
    """Without asking the server anything, as ``wait_for_download`` would."""
    deadline_s = time.monotonic() + SYNC_S_MAX
    while not 0 < (state := opened.state).server_version <= state.version:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{opened.path} has not caught up: {state}")
        time.sleep(_LOOKED_EVERY_S)


# -- what they share ---------------------------------------------------------------------------------------


def _open(address: str, directory: str, path: str = REALM) -> Realm:
    return Realm.open(path, server=address, directory=directory, local_durability="relaxed")


def _say(line: str) -> None:
    print(line, flush=True)


_MODES: dict[str, tuple[type[Any], Callable[[Any], dict[str, Any]]]] = {
    "local": (LocalJob, local),
    "upload": (UploadJob, upload),
    "download": (DownloadJob, download),
    "follow": (FollowJob, follow),
    "drive": (DriveJob, drive),
    "realms": (RealmsJob, realms),
}


def main() -> None:
    """Does the job in the argument."""
    kind, work = _MODES[json.loads(argument())["mode"]]
    print(json.dumps(work(parse_job(kind, argument()))))


if __name__ == "__main__":
    main()
