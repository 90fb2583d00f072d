"""The demo's story: two nodes, a load, a kill, a promotion, a rewind, and the proof at the end."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from understudy.cli.demo_ledger import Tally
from understudy.cli.demo_library import find_library
from understudy.cli.demo_processes import Node
from understudy.cli.demo_screen import Screen
from understudy.cli.demo_writers import Writers

# How long the promoted node waits for a replica before it acknowledges alone: whoever has just lost one node of two
# wants writes to go on now, and full durability as soon as the other is back.
DEGRADE_AFTER_S = 1.0
_POLL_S = 0.02
_VIEW_S = 0.25
_STATUS_S_MAX = 5.0
_WAIT_S_MAX = 60.0  # for anything that should take a second or two

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All that the demo's last table says."""

    files: int
    file_bytes: int
    realms: int
    files_differing: int
    tally: Tally
    under_way_at_failover: int
    answered_again: int
    without_primary_s: float
    promote_command_s: float
    promote_s: float
    rewind_s: float
    entries_exported: int
    bytes_fetched: int
    bytes_total: int
    problems: list[str]  # of the comparison of both nodes
    lsn: int

    @property
    def is_good(self) -> bool:
        """Whether everything that was promised was kept."""
        return self.tally.is_clean and not self.files_differing and not self.problems


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failover:
    without_primary_s: float
    promote_command_s: float
    promote_s: float
    under_way: int


class Story:
    """Everything that happens, in order."""

    def __init__(self, folder: Path, *, writers: int, seconds: float, screen: Screen) -> None:
        self._first = Node("first", folder)
        self._second = Node("second", folder)
        self._seconds = seconds
        self._writer_count = writers
        self._writers: Writers | None = None
        self._screen = screen
        self._library = find_library()

    async def run(self) -> Outcome:
        """Plays it.

        Raises:
            UnderstudyError: it could not be played to its end.
        """
        async with contextlib.AsyncExitStack() as stack:
            for node in (self._first, self._second):
                stack.push_async_callback(node.stop)
            await self._start_nodes()
            ...
