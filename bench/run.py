"""Measures Understudy on this machine: ``make bench``, or ``python bench/run.py --only commits --quick``.

Starts real primaries and replicas by their command line, on loopback, with their data on a real disk, and measures
them from client processes of its own. Nothing else should run meanwhile: the figures are those of a machine that
has nothing else to do. Prints a table. Ends with 1 if a row could not be measured, and with 0 where a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import attached
import backup_load
import backups
import bootstrap
import catchup
import commits
import download
import fanout
import lag
import local
import machine
import memory
import promotion
import realms
import replay
import report
import stages
import upload
from processes import HERE, BenchFailed, Processes
from results import RowResult
from rich.console import Console
from scale import FULL, GIB, QUICK, Scale
from stage import Bench

ROWS: dict[str, Callable[[Bench], RowResult]] = {
    "commits": commits.measure,
    "stages": stages.measure,
    "attached": attached.measure,
    "lag": lag.measure,
    "catchup": catchup.measure,
    "bootstrap": bootstrap.measure,
    "promote": promotion.measure,
    "memory": memory.measure,
    "local": local.measure,
    "upload": upload.measure,
    "download": download.measure,
    "fanout": fanout.measure,
    "realms": realms.measure,
    "backup": backups.measure,
    "backup_larger": backups.measure_larger,
    "backup_load": backup_load.measure,
    "replay": replay.measure,
}


def main() -> int:
    """Runs the rows that were asked for; returns the exit code."""
    options = _options()
    scale = _scale(options)
    signal.signal(signal.SIGTERM, _stop)
    console = Console(stderr=True)
    try:
        with _data_folder(options.dir, scale) as folder:
            facts = machine.facts(folder) | {"load_before": round(os.getloadavg()[0], 2)}
            before = machine.busy()
            rows, failed = _measure(options.only, scale, folder, console)
            facts["stolen_percent"] = machine.stolen_percent(before)
    except BenchFailed as error:
        console.print(f"bench: {error}", style="red", markup=False, highlight=False)
        return 1
    report.show(Console(), rows)
    if options.json:
        options.json.write_text(json.dumps(report.as_json(facts, scale.name, rows), indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(report.as_markdown(facts, scale.name, rows, _command(options)))
    return 1 if failed else 0


def _options() -> Any:
    parser = argparse.ArgumentParser(
        description="Measures Understudy on this machine.",
        epilog="example: run.py --quick --only commits lag",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, one round: only to see that it runs"
    )
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME",
                        help=f"these rows: {', '.join(ROWS)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="how often each row is measured, instead of 3 times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    parser.add_argument("--dir", type=Path, metavar="DIR",
                        help="where the data lie meanwhile; build/ of the checkout if not set")  # fmt: skip
    return parser.parse_args()


def _command(options: Any) -> str:
    """The command that makes the same tables again; where the data lay is nobody's business."""
    arguments = ["--quick"] * options.quick
    if options.rounds:
        arguments += ["--rounds", str(options.rounds)]
    if options.only != list(ROWS):
        arguments += ["--only", *options.only]
    return f"make bench ARGS='{' '.join([*arguments, '--markdown', str(options.markdown)])}'"


def _scale(options: Any) -> Scale:
    scale = QUICK if options.quick else FULL
    return dataclasses.replace(scale, rounds=options.rounds) if options.rounds else scale


def _stop(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)  # by way of everything that has to be ended and removed


@contextlib.contextmanager
def _data_folder(parent: Path | None, scale: Scale) -> Iterator[Path]:
    """A temporary folder on a real disk with enough space."""
    parent = parent or HERE.parent / "build"
    parent.mkdir(exist_ok=True)
    if machine.is_in_memory(parent):
        raise BenchFailed(f"{parent} is in memory, where fsync costs nothing: give --dir on a disk")
    if shutil.disk_usage(parent).free < scale.disk_bytes:
        raise BenchFailed(f"{scale.disk_bytes / GIB:.0f} GiB are needed in {parent}: give --dir, or --quick")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as folder:
        yield Path(folder)


def _measure(names: list[str], scale: Scale, folder: Path, console: Console) -> tuple[list[RowResult], int]:
    """Measures row by row; gives what came of them, and how many failed, which stops none of the others."""
    rows: list[RowResult] = []
    with _progress(console) as say, Processes(folder) as processes:
        bench = Bench(scale=scale, folder=folder, processes=processes, say=say)
        for name in names:
            began_s = time.monotonic()
            try:
                row = ROWS[name](bench)
            except BenchFailed as error:
                console.print(f"{name}: {error}", style="red", markup=False, highlight=False)
                continue
            rows.append(dataclasses.replace(row, seconds=time.monotonic() - began_s))
            say(f"{name} took {rows[-1].seconds:.0f} s")
    return rows, len(names) - len(rows)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Says what is being done: in one changing line where a person watches, else line by line."""
    if not console.is_terminal:
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    with console.status("") as status:
        yield status.update


if __name__ == "__main__":
    sys.exit(main())
