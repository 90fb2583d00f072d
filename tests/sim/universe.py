"""A simulated universe: one clock, one source of chance, and processes that run a step at a time.

Nothing in it is concurrent: at any moment one callback of one event loop, or one thread, runs, until it waits. Which
is next is decided by the time that each wants to run at, and among equals by the seed. So a seed is a history.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from asyncio import events
from collections.abc import Callable
from random import Random
from typing import NoReturn

from greenlet import greenlet
from sim.loop import SimLoop
from sim.threads import CoThread

from understudy.common.errors import UnderstudyError

START_US = 1_800_000_000_000_000  # when every universe begins, microseconds since 1970


class Process:
    """A process: an event loop, its threads, and what the operating system takes back when it ends.

    Attributes:
        machine: where it runs; processes of one machine share its disk.
        is_alive: until it was killed or has ended.
    """

    def __init__(self, universe: Universe, name: str, machine: str) -> None:
        self.universe = universe
        self.name = name
        self.machine = machine
        self.is_alive = True
        self.wake_s = (
            10e-6,
            100e-6,
        )  # until a thread goes on that was notified: the log's, on a slow disk, late
        self.loop = SimLoop(universe, self)
        self.thread: CoThread | None = None  # that runs, if it is not the loop
        self.at_end: list[Callable[[], None]] = []  # what the operating system does: closes files
        self.tell_peers: Callable[[], None] = lambda: None  # that their connections have ended

    def kill(self, *, silently: bool = False) -> None:
        """Ends it between two instructions: nothing of it runs any more, not even a `finally`.

        A process that kills itself is never heard of again: this does not return.

        Args:
            silently: nobody is left to tell its peers.
        """
        if not self.is_alive:
            return
        self.is_alive = False
        self.universe.trace("killed", self.name)
        self.universe.graveyard += [self, *asyncio.all_tasks(self.loop)]
        if not silently:
            self.tell_peers()
        for step in self.at_end:
            step()
        if self.universe.current is self:
            self.universe.abandon()


class Universe:
    """See the module.

    Attributes:
        now_s: seconds since it began.
        rng: everything that is left to chance.
        current: the process that runs.
        crashes: processes that a kill or a power loss has ended.
        problems: promises that were broken, and mistakes of the product; the first one ends the story.
    """

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.now_s = 0.0
        self.current: Process | None = None
        self.steps = 0
        self.crashes = 0
        self.problems: list[str] = []
        self.lines: list[str] = []  # of the trace
        self.graveyard: list[object] = []  # kept: what is left of them must not run when it is collected
        self._events: list[tuple[float, float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._main = greenlet.getcurrent()
        self._aside: greenlet | None = None

    def note_end(self, where: str, error: BaseException) -> None:
        """Something has ended with an error. Ours are answers; anything else is a mistake, or a broken promise."""
        self.trace("ended", where, repr(error)[:300])
        if not isinstance(error, UnderstudyError) or error.message.startswith("internal error"):
            self.problems.append(f"{where}: {error!r}")

    # -- what happens ----------------------------------------------------------------------------------------

    def at(self, delay_s: float, event: Callable[[], None], process: Process | None = None) -> None:
        """``event`` happens in so many seconds; as a step of ``process``, if that lives by then."""
        when = self.now_s + max(delay_s, 0.0)
        step = event if process is None else lambda: self.run_in(process, event)
        heapq.heappush(self._events, (when, self.rng.random(), next(self._numbers), step))

    def run_in(self, process: Process, step: Callable[[], None]) -> None:
        """Runs ``step`` as a part of ``process``, which may be killed by it."""
        if not process.is_alive:
            return
        self.current = process
        step()
        self.current = None

    def run(self, until: Callable[[], bool], *, for_s: float) -> bool:
        """Lets time pass until ``until`` holds; False if it does not within so many seconds."""
        end_s = self.now_s + for_s
        while not until():
            if not self._events or self._events[0][0] > end_s:
                self.now_s = end_s
                return until()
            when, _, _, event = heapq.heappop(self._events)
            self.now_s = max(self.now_s, when)
            self.steps += 1
            self._perform(event)
        return True

    def _perform(self, event: Callable[[], None]) -> None:
        """Runs an event aside, so that a process that is killed in the midst of it can be left where it stands."""
        self._main = greenlet.getcurrent()
        if self._aside is None:
            self._aside = greenlet(self._perform_forever)
        self._aside.switch(event)

    def _perform_forever(self, event: Callable[[], None]) -> None:
        while True:
            event()
            event = self._main.switch()

    def abandon(self) -> NoReturn:
        """Goes on without what runs."""
        self.graveyard += [self._aside, greenlet.getcurrent()]
        self._aside = self.current = None
        events._set_running_loop(None)
        self._main.switch()
        raise AssertionError("nobody comes back to a process that was killed")

    # -- what is told ------------------------------------------------------------------------------------------

    def trace(self, event: str, *details: object) -> None:
        """Notes what happens, for people."""
        self.lines.append(f"{self.now_s:10.6f} {event:<18} {' '.join(map(str, details))}")
