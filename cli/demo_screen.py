"""What the demo shows while it runs: the story line by line, and below it, where a person watches, how things stand."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

_SAMPLE_S = 0.5
_SAMPLES = 60  # half a minute
_LINE_EVERY_S = 2.0
_BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """How one node stands."""

    name: str
    role: str
    address: str
    position: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How things stand, a few times a second."""

    nodes: list[NodeView]
    lag: str  # of the replica
    acknowledged: int
    under_way: int


class Screen:
    """Prints on standard output, or on standard error where that is wanted for something else.

    As a context manager it owns the lower lines of a terminal. Without a terminal: plain lines, now and then one
    with the rate.
    """

    def __init__(self, *, on_stderr: bool) -> None:
        from rich.console import Console
        from rich.live import Live

        self._on_stderr = on_stderr
        self._console = Console(file=sys.stderr if on_stderr else sys.stdout, highlight=False, markup=False)
        # Redrawn when there is something new, not by a thread of its own.
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._rate = _Rate()
        self._started_s = self._shown_s = time.monotonic()

    @property
    def _is_watched(self) -> bool:
        return self._console.is_terminal

    def __enter__(self) -> Screen:
        if self._is_watched:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def tell(self, what: str) -> None:
        """One line of the story, with the time since the beginning."""
        line = f"{time.monotonic() - self._started_s:5.1f} s  {what}"
        if self._is_watched:
            self._console.print(line)
        else:
            click.echo(line, err=self._on_stderr)

    def show(self, view: View) -> None:
        """How things stand now."""
        now_s = time.monotonic()
        self._rate.add(view.acknowledged, now_s)
        if self._is_watched:
            self._live.update(self._picture(view), refresh=True)
        elif not view.under_way:
            self._shown_s = now_s  # nothing to tell before the writers begin, nor after they are done
        elif now_s - self._shown_s >= _LINE_EVERY_S:
            self._shown_s = now_s
            self.tell(f"  {self._rate.latest:,.0f} transactions/s, {view.lag}")

    def clear(self) -> None:
        """There is nothing to show any more, only to tell."""
        if self._is_watched:
            self._live.update("", refresh=True)

    def _picture(self, view: View) -> RenderableType:
        from rich.box import ROUNDED
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        nodes = Table.grid(padding=(0, 2))
        for node in view.nodes:
            style = {"primary": "bold green", "replica": "cyan"}.get(node.role, "red")
            nodes.add_row(
                node.name,
                Text(node.role, style=style),
                Text(node.address, style="dim"),
                node.position,
                node.note,
            )
        writers = Table.grid(padding=(0, 3))
        writers.add_row(
            Text(f"{self._rate.latest:7,.0f} transactions/s", style="bold"),
            f"{view.acknowledged:,} acknowledged",
            f"{view.under_way} under way",
        )
        graph = Text(self._rate.graph(), style="green")
        return Panel(Group(nodes, "", writers, graph), box=ROUNDED, width=min(self._console.width, 78))


class _Rate:
    """Acknowledged transactions a second, over the last half minute."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=_SAMPLES)
        self._count = 0
        self._at_s = time.monotonic()

    def add(self, count: int, now_s: float) -> None:
        """So many in all by now; a sample every ``_SAMPLE_S``."""
        if now_s - self._at_s >= _SAMPLE_S:
            self._samples.append((count - self._count) / (now_s - self._at_s))
            self._count, self._at_s = count, now_s

    @property
    def latest(self) -> float:
        """The last sample."""
        return self._samples[-1] if self._samples else 0.0

    def graph(self) -> str:
        """One block a sample; the highest is the highest shown."""
        most = max(self._samples, default=0.0) or 1.0
        last = len(_BLOCKS) - 1
        return "".join(_BLOCKS[round(sample / most * last)] for sample in self._samples)
