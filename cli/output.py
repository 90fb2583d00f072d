"""What people and programs get to see: tables, JSON, numbers, and progress where someone watches.

Only :func:`print_table` and the bar of :class:`Progress` load rich, when they are first shown.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from understudy.v1 import sync_pb2

# Work that is over sooner needs no bar.
_BAR_AFTER_S = 1.0
_BAR_EVERY_S = 0.1
_LINE_EVERY_S = 10.0


def print_json(facts: Any) -> None:
    """Prints facts as one line of JSON, in UTF-8 whatever the terminal's encoding."""
    click.echo(json_bytes(facts))


def json_bytes(facts: Any) -> bytes:
    """Facts as one line of JSON in UTF-8, without its end; nothing in it can drive a terminal."""
    text = _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(facts, ensure_ascii=False))
    # Half a surrogate pair comes from a file name that is not UTF-8; its escape is JSON's own.
    return text.encode(errors="backslashreplace")


def printable(data: bytes, *, length_max: int | None = 60) -> str:
    r"""Bytes on one line, for people, so that no two look alike unless they were cut.

    Text that can be printed is shown as it is. Anything else stands in double quotes: ``\xff`` is a byte that is not
    part of UTF-8, ``\n`` and ``\u202e`` are characters that can't be seen. What is cut ends in ``…`` (behind the
    quotes, if there are any). Text that looks like either is quoted too.
    """
    text = data.decode(errors="surrogateescape")
    looks_quoted = text.startswith('"') and ("\\" in text or "…" in text)
    if text.isprintable() and not looks_quoted and not text.endswith("…"):
        return text if length_max is None or len(text) <= length_max else text[: length_max - 1] + "…"
    units = [_unit(character) for character in text]
    shown = f'"{"".join(units)}"'
    if length_max is None or len(shown) <= length_max:
        return shown
    return f'"{_within(units, length_max - 3)}"…'


def plain(text: str) -> str:
    """What someone else has worded, without characters that could drive a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _unit(c) for c in text)


def counted(number: int, one: str, many: str = "") -> str:
    """``1 entry``, ``2,000 entries``; ``many`` is ``one`` with an s if not given."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


# What json.dumps leaves as it is, though a terminal may act on it: DEL, the C1 controls, line ends and directions.
_UNSEEN = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_SHORT = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _unit(character: str) -> str:
    code = ord(character)
    if character in _SHORT:
        return _SHORT[character]
    if character.isprintable():
        return character
    if 0xDC80 <= code <= 0xDCFF:  # how surrogateescape hands on a byte
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _within(units: Sequence[str], length_max: int) -> str:
    """As many whole units as fit."""
    shown = ""
    for unit in units:
        if len(shown) + len(unit) > length_max:
            break
        shown += unit
    return shown


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


def moment(time_s: float) -> str | None:
    """Seconds since 1970 in UTC, to the second; None for 0, which is never."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s)) if time_s else None


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()) -> None:
    """A table on standard output; the columns named in ``right`` are numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(plain, row))
    _print_plain(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Names and what they are, one to a line, aligned."""
    shown = list(facts)
    width = max(len(name) for name, _ in shown)
    for name, value in shown:
        click.echo(f"{name:<{width}}  {plain(value)}")


def homecoming_facts(homecoming: sync_pb2.Homecoming) -> dict[str, object]:
    """What became of changes that came home, for JSON."""
    return {
        "appended": homecoming.appended,
        "renewed": homecoming.renewed,
        "known": homecoming.known,
        "refused": homecoming.refused,
        "problems": list(homecoming.problems),
    }


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
