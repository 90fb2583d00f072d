"""How long a change is on its way from one client of a realm to all others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import DriveJob, FillJob, FollowJob
from processes import BenchFailed, Node, Process
from results import Detail, Figure, RowResult, below, quantile
from stage import VALUE_BYTES, Bench

RATE = 50
REACHED_S = 0.25
PROCESSES = 4
_KEYS = 10_000
_METHOD = """
Clients of one realm of 10,000 keys, each a directory and a connection of its own: one of them, in a process of its
own, commits a put of a 100-byte value 50 times a second, begun when it is due; the others are spread over four
processes. From the moment that `commit` is called to the last client's `on_change`, the writer's own included, when
the change can be read there. The primary is at `--durability local`, without a replica; the directories are relaxed,
since a hundred devices would have a hundred disks. They share one machine's two processors with the primary, which is
the hard case: see how much of them each uses.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    reached_s: list[float]  # from the call of commit to the last client
    returned_s: list[float]  # to the writer itself
    commits_s: list[float]  # what the call took
    late_s: list[float]  # from when it was due to the call
    cpu: dict[str, float]  # processors used, by process


def measure(bench: Bench) -> RowResult:
    """The row."""
    clients = bench.scale.followers
    with bench.scratch() as folder:
        primary = bench.processes.primary(folder / "primary")
        fill = FillJob(address=primary.address, keys=_KEYS, value_bytes=VALUE_BYTES, puts_each=1_000)
        bench.processes.run("writer.py", fill)
        rounds = [
            _round(bench, primary, folder / f"clients-{number}") for number in range(bench.scale.rounds)
        ]
        primary.stop()
    return RowResult(
        name="fanout",
        title=f"A change's way to {clients} clients of one realm, {RATE} transactions/s",
        method=_METHOD,
        figures=_figures(rounds),
        details=[_processors(rounds)],
    )


def _round(bench: Bench, primary: Node, folder: Path) -> _Round:
    followers = [
        bench.processes.helper("syncer.py", FollowJob(address=primary.address, directories=directories))
        for directories in spread(folder, bench.scale.followers - 1)
    ]
    bench.say(f"connecting {bench.scale.followers} clients")
    for one in followers:
        if one.first_line().strip() != "ready":
            raise one.failure("did not connect")
    bench.say(f"{RATE} transactions/s for {bench.scale.followed_s:g} s")
    driven = bench.processes.run("syncer.py", _drive_job(bench, primary, followers, folder / "writer"))
    found = [one.result()["applied"] for one in followers]
    return _joined(driven, found, bench.scale.followers - 1)


def _drive_job(bench: Bench, primary: Node, followers: list[Process], directory: Path) -> DriveJob:
    watched = {f"clients {number + 1}": one.pid for number, one in enumerate(followers)}
    return DriveJob(
        address=primary.address,
        directory=str(directory),
        rate=RATE,
        seconds=bench.scale.followed_s,
        keys=_KEYS,
        value_bytes=VALUE_BYTES,
        watched={"primary": primary.pid, **watched},
    )


def spread(folder: Path, clients: int) -> list[list[str]]:
    """Directories of so many clients, shared out among the processes."""
    directories = [str(folder / f"client-{number:03d}") for number in range(clients)]
    return [directories[first::PROCESSES] for first in range(PROCESSES)]


def _joined(driven: dict[str, Any], found: list[list[tuple[int, float, int]]], followers: int) -> _Round:
    """All sides' rows joined by the writer's number of each transaction."""
    returned_s = dict(driven["returned"])
    last_s: dict[int, float] = dict(returned_s)
    reached = dict.fromkeys(last_s, 0)
    for applied in found:
        for number, applied_s, count in applied:
            last_s[number] = max(last_s[number], applied_s)
            reached[number] += count
    if any(count != followers for count in reached.values()):
        raise BenchFailed("not every client has had every change once")
    committed = driven["committed"]
    return _Round(
        reached_s=[last_s[number] - began_s for number, _, began_s, _ in committed],
        returned_s=[returned_s[number] - began_s for number, _, began_s, _ in committed],
        commits_s=[ended_s - began_s for _, _, began_s, ended_s in committed],
        late_s=[began_s - due_s for _, due_s, began_s, _ in committed],
        cpu=driven["cpu"],
    )


def _figures(rounds: list[_Round]) -> list[Figure]:
    def milliseconds(share: float, values: list[list[float]]) -> list[float]:
        return [quantile(one, share) * 1e3 for one in values]

    reached = [one.reached_s for one in rounds]
    commits = [one.commits_s for one in rounds]
    return [
        Figure(name="to the last client, p50", unit="ms", values=milliseconds(0.5, reached)),
        Figure(
            name="to the last client, p99",
            unit="ms",
            values=milliseconds(0.99, reached),
            target=below(REACHED_S * 1e3),
        ),
        Figure(name="to the last client, highest", unit="ms", values=milliseconds(1.0, reached)),
        Figure(
            name="back to the writer, p50",
            unit="ms",
            values=milliseconds(0.5, [one.returned_s for one in rounds]),
        ),
        Figure(name="`commit` meanwhile, p50", unit="ms", values=milliseconds(0.5, commits)),
        Figure(name="`commit` meanwhile, p99", unit="ms", values=milliseconds(0.99, commits)),
        Figure(
            name="begun after it was due, p99",
            unit="ms",
            values=milliseconds(0.99, [one.late_s for one in rounds]),
        ),
    ]


def _processors(rounds: list[_Round]) -> Detail:
    """Of the last round."""
    cpu = rounds[-1].cpu
    return Detail(
        title="Processor time used in a second, s, by process",
        columns=[*cpu, "sum"],
        rows=[[*cpu.values(), sum(cpu.values())]],
    )
