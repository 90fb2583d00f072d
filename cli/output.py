"""What people and programs get to see: tables, JSON, numbers, and progress where someone watches.

Everything but :func:`print_json` loads rich when it is first called, not before.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

# Work that is over sooner needs no bar.
_BAR_AFTER_S = 1.0
_BAR_EVERY_S = 0.1
_LINE_EVERY_S = 10.0


def print_json(facts: Any) -> None:
    """Prints facts as one line of JSON, in UTF-8 whatever the terminal's encoding."""
    # Half a surrogate pair comes from a file name that is not UTF-8; its escape is JSON's own.
    click.echo(json.dumps(facts, ensure_ascii=False).encode(errors="backslashreplace"))


def printable(data: bytes, *, length_max: int = 60) -> str:
    """Bytes on one line, for people: text where it can be printed, else as Python writes bytes; cut if long."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    shown = text if text.isprintable() and (text or not data) else repr(data)
    return shown if len(shown) <= length_max else shown[: length_max - 1] + "…"


def size_text(size: float) -> str:
    """A number of bytes in a unit that leaves few digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def seconds_text(seconds: float) -> str:
    """A duration, in milliseconds up to days."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // (24 * 60)} days"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()) -> None:
    """A table on standard output; the columns named in ``right`` are numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    _print_plain(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Names and what they are, one to a line, aligned."""
    shown = list(facts)
    width = max(len(name) for name, _ in shown)
    for name, value in shown:
        click.echo(f"{name:<{width}}  {value}")


def _print_plain(renderable: Any) -> None:
    from rich.console import Console

    # Without a terminal nothing tells how wide a line may be, and a folded table is of no use to `grep`.
    width = None if sys.stdout.isatty() else 10_000
    console = Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)
    console.print(renderable, crop=False, no_wrap=width is not None)


class Progress:
    """How far something is, on standard error: a bar after a second where a person watches, else a line now and then.

    Args:
        what: what is being done, as in ``importing``.
        unit: what is counted; ``bytes`` are shown in a unit that fits.
    """

    def __init__(self, what: str, *, unit: str) -> None:
        self._what = what
        self._unit = unit
        self._started_s = self._shown_s = time.monotonic()
        self.is_watched = sys.stderr.isatty()
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int | None = None) -> None:
        """``done`` of ``total``, which is None as long as nobody knows."""
        now_s = time.monotonic()
        if now_s - self._started_s < _BAR_AFTER_S:
            return
        if now_s - self._shown_s >= (_BAR_EVERY_S if self.is_watched else _LINE_EVERY_S):
            self._shown_s = now_s
            self._show(done, total)

    def _show(self, done: int, total: int | None) -> None:
        if self.is_watched:
            self._bar = self._bar or self._new_bar(total)
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        else:
            of = "" if total is None else f" of {self._count(total)}"
            click.echo(f"{self._what}: {self._count(done)}{of}", err=True)

    def _count(self, number: int) -> str:
        return size_text(number) if self._unit == "bytes" else f"{number:,} {self._unit}"

    def _new_bar(self, total: int | None) -> RichProgress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        count = DownloadColumn() if self._unit == "bytes" else MofNCompleteColumn()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            count,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
        bar.add_task(self._what, total=total)
        bar.start()
        return bar
