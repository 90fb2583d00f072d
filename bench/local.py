"""What a local transaction of a synced realm takes."""

from __future__ import annotations

from jobs import LocalDurability, LocalJob
from references import RECORD_BYTES, sync_seconds
from results import Figure, RowResult, below, quantile
from stage import VALUE_BYTES, Bench

RELAXED_S = 60e-6
# What "close to one fdatasync" may be: the transaction's own work, and no second one.
DURABLE_RATIO = 1.5
_KEYS = 10_000
_METHOD = """
`Realm.commit` of one put of a 100-byte value at a random key of 10,000, one after the other, in a realm that was
opened without a server; its queue gets longer with each. Durable: the transaction survives a power loss; relaxed: the
end of the process. Reference: one fdatasync behind a write into a file that has its blocks already, in the same
folder. LMDB makes a transaction durable by two syncs, one of its pages and one of the page that points to them. Each
round begins with new directories.
"""


def measure(bench: Bench) -> RowResult:
    """The row."""
    syncs_s = []
    times_s: dict[LocalDurability, list[list[float]]] = {"relaxed": [], "durable": []}
    with bench.scratch() as folder:
        for number in range(bench.scale.rounds):
            bench.say(f"local transactions, round {number + 1}")
            syncs_s.append(sync_seconds(folder))
            for durability, found in times_s.items():
                job = _job(bench, str(folder / f"{durability}-{number}"), durability)
                found.append(bench.processes.run("syncer.py", job)["times_s"])
    return RowResult(
        name="local",
        title="Local transactions of a synced realm, 100-byte values",
        method=_METHOD,
        figures=_figures(times_s["relaxed"], times_s["durable"], syncs_s),
    )


def _job(bench: Bench, directory: str, durability: LocalDurability) -> LocalJob:
    commits = bench.scale.local_commits
    return LocalJob(
        directory=directory,
        durability=durability,
        transactions=commits if durability == "relaxed" else commits // 10,
        keys=_KEYS,
        value_bytes=VALUE_BYTES,
    )


def _figures(
    relaxed_s: list[list[float]], durable_s: list[list[float]], syncs_s: list[float]
) -> list[Figure]:
    def microseconds(share: float, rounds: list[list[float]]) -> list[float]:
        return [quantile(one, share) * 1e6 for one in rounds]

    durable = microseconds(0.5, durable_s)
    sync = Figure(
        name=f"reference: fdatasync of {RECORD_BYTES} bytes, p50",
        unit="µs",
        values=[one * 1e6 for one in syncs_s],
    )
    return [
        Figure(
            name="relaxed, p50", unit="µs", values=microseconds(0.5, relaxed_s), target=below(RELAXED_S * 1e6)
        ),
        Figure(name="relaxed, p99", unit="µs", values=microseconds(0.99, relaxed_s)),
        Figure(name="durable, p50", unit="µs", values=durable, reference=f"fdatasync {sync.median:.0f} µs"),
        Figure(name="durable, p99", unit="µs", values=microseconds(0.99, durable_s)),
        Figure(
            name="durable, p50, against one fdatasync",
            unit="",
            values=[one / other for one, other in zip(durable, sync.values, strict=True)],
            target=below(DURABLE_RATIO),
        ),
        sync,
    ]
