"""How much memory of their own the processes take while much more than that goes through them."""

from __future__ import annotations

from accounts import MemorySampler
from jobs import CountedJob
from processes import Node, wait_for_replica
from results import Detail, Figure, RowResult, below
from scale import MIB
from stage import STORE_BYTES_A_KEY, Bench, copy_synced, data_file

LIMIT_MIB = 300.0
_LARGE_VALUE_BYTES = 4096
_LARGE_PUTS_EACH = 16
_LARGE_WRITERS = 64
_SMALL_VALUE_BYTES = 100
_SMALL_WRITERS = 256
# Of store, for one 4-KiB value: it does not fit into a page of that size together with LMDB's header.
_PAGES_BYTES = 8192
_METHOD = """
The highest RssAnon (memory that no file backs) of primary, replica and the checkpoint process of each, sampled 20
times a second; a node's data file is mapped, so its pages in the cache do not count. At `--durability local` with the
replica attached. First 4-KiB values: transactions of 16 puts by 64 writers, each key put about twice, into an empty
store. Then 100-byte values: transactions of one put by 256 writers, random keys of a large store whose pages hold
four rows each, so that every checkpoint changes nearly as many pages as it has rows. One round of each.
"""


def measure(bench: Bench) -> RowResult:
    """The row."""
    large = _large_values(bench)
    small, store_mib = _small_values(bench)
    titles = {
        f"{bench.scale.memory_bytes / MIB:,.0f} MiB of 4-KiB values": large,
        f"{bench.scale.memory_commits:,} commits of 100 bytes over {store_mib:,.0f} MiB": small,
    }
    return RowResult(
        name="memory",
        title="Anonymous memory",
        method=_METHOD,
        figures=[
            Figure(name=f"{name}, {title}", unit="MiB", values=[peak / MIB], target=below(LIMIT_MIB))
            for title, sampler in titles.items()
            for name, peak in sampler.peaks.items()
        ],
        details=[
            Detail(
                title="Highest sum over all four processes at one moment, MiB",
                columns=["load", "sum"],
                rows=[[title, sampler.peak_of_sum / MIB] for title, sampler in titles.items()],
            )
        ],
    )


def _large_values(bench: Bench) -> MemorySampler:
    puts = bench.scale.memory_bytes // _LARGE_VALUE_BYTES
    with bench.scratch() as folder:
        primary = bench.processes.primary(folder / "primary")
        job = CountedJob(
            address=primary.address,
            writers=_LARGE_WRITERS,
            keys=bench.scale.memory_bytes // _PAGES_BYTES,
            value_bytes=_LARGE_VALUE_BYTES,
            transactions=puts // _LARGE_PUTS_EACH,
            puts_each=_LARGE_PUTS_EACH,
            seed=1,
        )
        replica = bench.processes.replica(folder / "replica", primary)
        wait_for_replica(primary, replica)
        bench.say(f"{bench.scale.memory_bytes / MIB:,.0f} MiB of 4-KiB values")
        return _sampled(bench, primary, replica, job)


def _small_values(bench: Bench) -> tuple[MemorySampler, float]:
    with bench.scratch() as folder:
        directory = copy_synced(bench.store_of(bench.scale.store_bytes), folder / "primary")
        store_mib = data_file(directory).stat().st_size / MIB
        primary = bench.processes.primary(directory)
        replica = bench.processes.replica(folder / "replica", primary)
        wait_for_replica(primary, replica)
        job = CountedJob(
            address=primary.address,
            writers=_SMALL_WRITERS,
            keys=bench.scale.store_bytes // STORE_BYTES_A_KEY,
            value_bytes=_SMALL_VALUE_BYTES,
            transactions=bench.scale.memory_commits,
            puts_each=1,
            seed=2,
        )
        bench.say(f"{bench.scale.memory_commits:,} commits over a large store")
        return _sampled(bench, primary, replica, job), store_mib


def _sampled(bench: Bench, primary: Node, replica: Node, job: CountedJob) -> MemorySampler:
    with MemorySampler(primary.pids() | replica.pids()) as sampler:
        bench.processes.run("writer.py", job)
        wait_for_replica(primary, replica)
    replica.stop()
    primary.stop()
    return sampler
