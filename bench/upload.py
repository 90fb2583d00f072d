"""How fast a client uploads what was changed while it had no server."""

from __future__ import annotations

from jobs import UploadJob
from results import Figure, RowResult, at_least
from stage import VALUE_BYTES, Bench

RATE = 8_000
_KEYS = 10_000
_METHOD = """
10,000 transactions of one put (100-byte values, random keys of 10,000) are committed in a new directory without a
server. From `Realm.open` with the server until `wait_for_upload` returns: connected, sent, committed by the primary
(`--durability local`, no replica), come back in the server's order, and gone from the queue. The directory is relaxed:
the server's disk counts, the client's does not, but for one sync before each message that is sent.
"""


def measure(bench: Bench) -> RowResult:
    """The row."""
    changes, seconds = bench.scale.uploaded_changes, []
    with bench.scratch() as folder:
        primary = bench.processes.primary(folder / "primary")
        for number in range(bench.scale.rounds):
            bench.say(f"uploading {changes:,} changes, round {number + 1}")
            job = UploadJob(
                address=primary.address,
                directory=str(folder / f"client-{number}"),
                transactions=changes,
                keys=_KEYS,
                value_bytes=VALUE_BYTES,
            )
            seconds.append(float(bench.processes.run("syncer.py", job)["seconds"]))
        primary.stop()
    return RowResult(
        name="upload",
        title=f"Upload of {changes:,} queued changes",
        method=_METHOD,
        figures=[
            Figure(
                name="uploaded",
                unit="changes/s",
                values=[changes / one for one in seconds],
                target=at_least(RATE),
            ),
            Figure(name="from opening until uploaded", unit="s", values=seconds),
        ],
    )
