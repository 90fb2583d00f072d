"""An event loop in simulated time: asyncio's own, with the universe in the place of the selector."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from asyncio import events
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, TypeVar

from sim.threads import CoThread

if TYPE_CHECKING:
    from sim.universe import Process, Universe

_T = TypeVar("_T")

CALLBACK_S = 20e-6  # that a turn of the loop takes
THREAD_S = (20e-6, 2e-3)  # until a thread of the pool has begun


_numbers = itertools.count()


def number_of(one: Any) -> int:
    """A hash that does not tell where an object lies in memory: so sets are walked in the same order each time."""
    number: int | None = getattr(one, "_number", None)
    if number is None:
        number = one._number = next(_numbers)
    return number


class _Task(asyncio.Task[Any]):
    __hash__ = number_of  # type: ignore[assignment]


class _Future(asyncio.Future[Any]):
    __hash__ = number_of  # type: ignore[assignment]


class SimLoop(asyncio.BaseEventLoop):
    """Of one process."""

    def __init__(self, universe: Universe, process: Process) -> None:
        super().__init__()
        self.set_task_factory(lambda loop, work, **options: _Task(work, loop=loop, **options))
        self._universe = universe
        self._process = process
        self._wakes_at_s = float("inf")

    # -- what asyncio asks of a loop -----------------------------------------------------------------------------

    def time(self) -> float:
        """The universe's."""
        return self._universe.now_s

    def _process_events(self, event_list: object) -> None:
        """There are none but ours."""

    def _write_to_self(self) -> None:
        self._wake()

    def create_future(self) -> asyncio.Future[Any]:
        """As asyncio's."""
        return _Future(loop=self)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """A callback has raised; of tasks that nobody waits for, nobody knows when they are collected."""
        if context["message"].startswith("Exception in callback"):
            self._universe.note_end(f"a callback of {self._process.name}", context["exception"])

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        """As asyncio's."""
        handle = super().call_soon(callback, *args, context=context)
        self._wake()
        return handle

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        """As asyncio's."""
        timer = super().call_at(when, callback, *args, context=context)
        self._wake()
        return timer

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., _T], *args: Any
    ) -> asyncio.Future[_T]:
        """Runs ``func`` in a thread that is scheduled by the universe."""
        future: asyncio.Future[_T] = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except Exception as error:
                self.call_soon_threadsafe(_end, future, None, error)
            else:
                self.call_soon_threadsafe(_end, future, result, None)

        CoThread(self._universe, self._process, work).start(self._universe.rng.uniform(*THREAD_S))
        return future

    # -- turns -----------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Sees to it that there is a turn when something is to do."""
        ready = self._ready  # type: ignore[attr-defined]
        scheduled = self._scheduled  # type: ignore[attr-defined]
        if ready:
            wanted_s = self._universe.now_s + CALLBACK_S
        elif scheduled:
            wanted_s = scheduled[0].when()
        else:
            return
        if wanted_s < self._wakes_at_s:
            self._wakes_at_s = wanted_s
            self._universe.at(wanted_s - self._universe.now_s, lambda: self._turn(wanted_s), self._process)

    def _turn(self, wanted_s: float) -> None:
        if wanted_s != self._wakes_at_s:
            return  # an earlier one came in between, and has asked for the next
        self._wakes_at_s = float("inf")
        scheduled, ready = self._scheduled, self._ready  # type: ignore[attr-defined]
        while scheduled and scheduled[0].when() <= self.time():
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            if not timer.cancelled():
                ready.append(timer)
        events._set_running_loop(self)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()
        events._set_running_loop(None)
        self._wake()


def _end(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
