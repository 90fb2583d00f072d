"""How fast a new client gets the whole of a realm."""

from __future__ import annotations

from jobs import DownloadJob, FillJob
from processes import BenchFailed
from results import Figure, RowResult, at_least
from stage import VALUE_BYTES, Bench

RATE = 80_000
_PUTS_EACH = 1_000
_METHOD = """
A realm of 100,000 keys with 100-byte values, all of it in the primary's store. From `Realm.open` with a new directory
until `wait_for_download` returns: connected, read, sent, checked, written, and taken for the copy. The directory is
relaxed: the disk does not count.
"""


def measure(bench: Bench) -> RowResult:
    """The row."""
    keys, seconds = bench.scale.downloaded_keys, []
    with bench.scratch() as folder:
        primary = bench.processes.primary(folder / "primary")
        fill = FillJob(address=primary.address, keys=keys, value_bytes=VALUE_BYTES, puts_each=_PUTS_EACH)
        bench.processes.run("writer.py", fill)
        primary.checkpoint()
        for number in range(bench.scale.rounds):
            bench.say(f"downloading {keys:,} keys, round {number + 1}")
            job = DownloadJob(address=primary.address, directory=str(folder / f"client-{number}"))
            found = bench.processes.run("syncer.py", job)
            if found["keys"] != keys:
                raise BenchFailed(f"{found['keys']:,} keys have come of {keys:,}")
            seconds.append(float(found["seconds"]))
        primary.stop()
    return RowResult(
        name="download",
        title=f"First download of a realm of {keys:,} keys",
        method=_METHOD,
        figures=[
            Figure(
                name="downloaded",
                unit="keys/s",
                values=[keys / one for one in seconds],
                target=at_least(RATE),
            ),
            Figure(name="from opening until downloaded", unit="s", values=seconds),
        ],
    )
