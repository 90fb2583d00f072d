"""Measures Understudy and its peers side by side: ``make bench-peers``.

Starts each system that is installed on loopback, with its data on a real disk, and gives all of them the same work in
turn. Nothing else should run meanwhile. Prints tables. A run of all rows on all peers at full scale writes
docs/peers.md and docs/peers.svg; any other only where --markdown says. Ends with 1 if a row could not be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import disk_usage
from typing import Any, NoReturn

import machine
from processes import HERE, BenchFailed, Processes
from scale import FULL, GIB, QUICK, Scale
from stage import Bench

from peers import copies, plot, tables
from peers.comparison import Comparison
from peers.etcd import Etcd
from peers.ours import Understudy
from peers.postgresql import Postgresql
from peers.redis import Redis
from peers.rows import ROWS
from peers.system import System
from understudy.common.errors import UnderstudyError

_PEERS: dict[str, type[System]] = {"postgresql": Postgresql, "redis": Redis, "etcd": Etcd}
_DOCUMENT = HERE.parent / "docs" / "peers.md"
_DISK_BYTES = {FULL.name: 40 * GIB, QUICK.name: 12 * GIB}  # of which PostgreSQL's log may take 16


def main() -> int:
    """Runs the rows that were asked for; returns the exit code."""
    options = _options()
    scale = _scale(options)
    signal.signal(signal.SIGTERM, _stop)
    wanted = [_PEERS[name] for name in options.peers]
    kinds: list[type[System]] = [Understudy, *(kind for kind in wanted if not kind.missing())]
    missing = _missing(wanted)
    for line in missing:
        print(line, file=sys.stderr)
    try:
        with _data_folder(options.dir, scale) as folder:
            facts = machine.facts(folder) | {"load_before": round(os.getloadavg()[0], 2)}
            before = machine.busy()
            rows, failed = _measure(options.only, scale, folder, kinds)
            facts["stolen_percent"] = machine.stolen_percent(before)
    except BenchFailed as error:
        print(f"bench-peers: {error}", file=sys.stderr)
        return 1
    print(tables.printed(rows, kinds))
    is_whole = not failed and not options.is_part
    if target := options.markdown or (_DOCUMENT if is_whole else None):
        picture = target.with_suffix(".svg")
        picture.write_text(plot.svg(rows))
        target.write_text(
            tables.document(
                machine=facts,
                scale=_said(scale),
                rows=rows,
                kinds=kinds,
                missing=missing,
                plot=picture.name,
                command=_command(options),
            )
        )
    return 1 if failed else 0


def _options() -> Any:
    parser = argparse.ArgumentParser(
        prog="make bench-peers",
        description="Measures Understudy and its peers side by side.",
        epilog='example: make bench-peers ARGS="--rounds 1 --only commits --peers postgresql"',
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, one round: only to see that it runs"
    )
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW",
                        help=f"these rows: {', '.join(ROWS)}")  # fmt: skip
    parser.add_argument("--peers", nargs="+", choices=list(_PEERS), default=list(_PEERS), metavar="PEER",
                        help=f"against these: {', '.join(_PEERS)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="how often each row is measured, instead of 3 times")
    parser.add_argument("--seconds", type=float, help="of each measurement, instead of 5; of lag, 30")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write tables there, the plot beside")
    parser.add_argument("--dir", type=Path, metavar="DIR",
                        help="where the data lie meanwhile; build/ of the checkout if not set")  # fmt: skip
    options = parser.parse_args()
    options.is_part = (
        options.quick
        or options.seconds is not None
        or set(options.only) != set(ROWS)
        or set(options.peers) != set(_PEERS)
    )
    return options


def _command(options: Any) -> str:
    """The command that makes the same tables again; where the data lay is nobody's business."""
    arguments = ["--quick"] * options.quick
    for name in ("rounds", "seconds"):
        if (value := getattr(options, name)) is not None:
            arguments += [f"--{name}", f"{value:g}"]
    for name, every in (("only", list(ROWS)), ("peers", list(_PEERS))):
        if (chosen := getattr(options, name)) != every:
            arguments += [f"--{name}", *chosen]
    if options.markdown:
        arguments += ["--markdown", str(options.markdown)]
    return f"make bench-peers ARGS='{' '.join(arguments)}'" if arguments else "make bench-peers"


def _scale(options: Any) -> Scale:
    scale = QUICK if options.quick else FULL
    if options.rounds:
        scale = dataclasses.replace(scale, rounds=options.rounds)
    if options.seconds:
        scale = dataclasses.replace(scale, window_s=options.seconds, lag_s=options.seconds)
    return scale


def _said(scale: Scale) -> str:
    return f"{scale.name}, {scale.rounds} round{'s' if scale.rounds > 1 else ''} of {scale.window_s:g} s"


def _missing(wanted: list[type[System]]) -> list[str]:
    lines = [(kind.name, kind.missing()) for kind in wanted] + [("mdb_copy", copies.missing())]
    return [
        f"{name} is not installed and was not measured: `apt-get install {' '.join(packages)}` on Debian."
        for name, packages in lines
        if packages
    ]


def _stop(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)  # by way of everything that has to be ended and removed


@contextlib.contextmanager
def _data_folder(parent: Path | None, scale: Scale) -> Iterator[Path]:
    """A temporary folder on a real disk with enough space, which other users may enter."""
    parent = parent or HERE.parent / "build"
    parent.mkdir(exist_ok=True)
    if machine.is_in_memory(parent):
        raise BenchFailed(f"{parent} is in memory, where fsync costs nothing: give --dir on a disk")
    if disk_usage(parent).free < _DISK_BYTES[scale.name]:
        raise BenchFailed(f"{_DISK_BYTES[scale.name] / GIB:.0f} GiB are needed in {parent}: give --dir")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as folder:
        path = Path(folder).resolve()
        path.chmod(0o755)
        yield path


def _measure(
    names: list[str], scale: Scale, folder: Path, kinds: list[type[System]]
) -> tuple[list[Comparison], int]:
    """Measures row by row; gives what came of them, and how many failed, which stops none of the others."""
    rows: list[Comparison] = []
    with Processes(folder) as processes:
        bench = Bench(scale=scale, folder=folder, processes=processes, say=_say)
        for name in names:
            try:
                rows.append(ROWS[name](bench, kinds))
            except (BenchFailed, UnderstudyError, OSError) as error:
                print(f"{name}: {error}", file=sys.stderr)
    return rows, len(names) - len(rows)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
