"""How fast a replica catches up that was away for a million small entries."""

from __future__ import annotations

import datetime
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from jobs import CountedJob, RawJob
from processes import BenchFailed, Node, wait_until
from results import Figure, RowResult, at_least
from stage import VALUE_BYTES, Bench, Pair, copy_synced, freeze_marks

RATE = 100_000
RATIO = 0.5
_WRITERS = 512
_SEED = 1
_POLL_S = 0.01
_METHOD = """
A million transactions of one put (100-byte values, random keys of a million that the store has already) are written
while the replica is stopped. From the replica's log event that the primary lets it stream to the first read (asked
every 10 ms) that shows the last entry: received, checked, durable, applied. Each round begins with the same copy of
the replica's directory. The reference writes the same pairs in the batches that the replica's checkpoints had,
coalesced and sorted beforehand, with `putmulti` and one synced transaction each, into a bare LMDB environment that is
preloaded alike; the two take turns. When the last entry shows, up to two memtables are not in the replica's store yet
(they are in its log); the rate up to the last checkpoint is given as well.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    applied_rate: float
    checkpointed_rate: float
    raw_rate: float


def measure(bench: Bench) -> RowResult:
    """The row."""
    with bench.scratch() as folder:
        pair = bench.preloaded_pair(folder)
        # What the replica of the second round lacks, the one of the first has acknowledged.
        primary = bench.processes.primary(pair.primary, "--log-floor", "4GiB")
        first_lsn = primary.status().lsn
        _write_backlog(bench, primary)
        raw = _raw_environment(bench, folder)
        rounds: list[_Round] = []
        batches: list[int] = []
        for number in range(bench.scale.rounds):
            bench.say(f"catching up, round {number + 1}")
            away = copy_synced(pair.replica, folder / f"replica-{number}")
            seconds = _catch_up(bench, primary, away)
            batches = _batches(Pair(primary=pair.primary, replica=away), first_lsn, bench)
            shutil.rmtree(away)
            bench.say(f"raw LMDB, round {number + 1}")
            rounds.append(_rates(bench, seconds, _write_raw(bench, raw, folder, batches)))
        primary.stop()
    return RowResult(
        name="catchup",
        title=f"Catch-up of a replica {bench.scale.catchup_entries:,} small entries behind",
        method=_METHOD,
        figures=_figures(rounds, batches),
    )


def _write_backlog(bench: Bench, primary: Node) -> None:
    bench.say(f"writing {bench.scale.catchup_entries:,} entries without a replica")
    job = CountedJob(
        address=primary.address,
        writers=_WRITERS,
        keys=bench.scale.keys,
        value_bytes=VALUE_BYTES,
        transactions=bench.scale.catchup_entries,
        puts_each=1,
        seed=_SEED,
    )
    bench.processes.run("writer.py", job)


def _catch_up(bench: Bench, primary: Node, directory: Path) -> tuple[float, float]:
    """Seconds from the start of streaming until all is visible, and until the last checkpoint is in the store."""
    lsn = primary.status().lsn
    checkpoint_lsn = primary.status().checkpoint_lsn
    replica = bench.processes.replica(directory, primary)
    wait_until(lambda: replica.visible_lsn() >= lsn, what="the replica catches up", every_s=_POLL_S)
    visible_s = time.time()
    wait_until(
        lambda: replica.status().checkpoint_lsn >= checkpoint_lsn,
        what="the replica's checkpoints catch up",
        every_s=_POLL_S,
    )
    checkpointed_s = time.time()
    began_s = _streaming_since(replica)
    replica.stop()
    return visible_s - began_s, checkpointed_s - began_s


def _streaming_since(replica: Node) -> float:
    """When the primary let it stream, by the wall clock, from its log."""
    answers = replica.events("following")
    if not answers or len(replica.events("bootstrap_begins")):
        raise BenchFailed("the replica was to catch up by streaming, and did not")
    return datetime.datetime.fromisoformat(answers[0]["timestamp"]).timestamp()


def _batches(pair: Pair, first_lsn: int, bench: Bench) -> list[int]:
    """How many entries each of the replica's checkpoints held; what was left after the last is one more."""
    ends = [lsn for lsn in freeze_marks(pair.replica) if lsn > first_lsn]
    sizes = [end - start for start, end in zip([first_lsn, *ends], ends, strict=False)]
    rest = bench.scale.catchup_entries - sum(sizes)
    return [*sizes, rest] if rest > 0 else sizes


# -- the reference -----------------------------------------------------------------------------------------


def _raw_job(bench: Bench, folder: Path, batches: list[int]) -> RawJob:
    return RawJob(
        folder=str(folder),
        keys=bench.scale.keys,
        value_bytes=VALUE_BYTES,
        seed=_SEED,
        batches=batches,
    )


def _raw_environment(bench: Bench, folder: Path) -> Path:
    path = folder / "raw"
    bench.processes.run("raw_lmdb.py", _raw_job(bench, path, []))
    return path


def _write_raw(bench: Bench, preloaded: Path, folder: Path, batches: list[int]) -> float:
    """Seconds that LMDB alone takes."""
    path = copy_synced(preloaded, folder / "raw-round")
    found = bench.processes.run("raw_lmdb.py", _raw_job(bench, path, batches))
    shutil.rmtree(path)
    os.sync()
    return float(sum(found["seconds"]))


def _rates(bench: Bench, seconds: tuple[float, float], raw_s: float) -> _Round:
    entries = bench.scale.catchup_entries
    visible_s, checkpointed_s = seconds
    return _Round(
        applied_rate=entries / visible_s,
        checkpointed_rate=entries / checkpointed_s,
        raw_rate=entries / raw_s,
    )


def _figures(rounds: list[_Round], batches: list[int]) -> list[Figure]:
    raw = Figure(
        name=f"reference: raw LMDB putmulti, batches of {max(batches):,}",
        unit="entries/s",
        values=[one.raw_rate for one in rounds],
    )
    return [
        Figure(
            name="until applied",
            unit="entries/s",
            values=[one.applied_rate for one in rounds],
            target=at_least(RATE),
            reference=f"raw LMDB {raw.median:,.0f}/s",
        ),
        Figure(
            name="until applied, against raw LMDB",
            unit="",
            values=[one.applied_rate / one.raw_rate for one in rounds],
            target=at_least(RATIO),
        ),
        Figure(
            name="until in the store",
            unit="entries/s",
            values=[one.checkpointed_rate for one in rounds],
        ),
        raw,
    ]
