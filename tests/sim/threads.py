"""Threads that run one at a time, when the universe says so, and give way only where they wait.

They are greenlets, so that the product's code runs in them as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from greenlet import greenlet

if TYPE_CHECKING:
    from sim.universe import Process, Universe


class CoThread:
    """A thread of a process. When that is killed, it stays where it waits for good."""

    def __init__(self, universe: Universe, process: Process, target: Callable[[], None]) -> None:
        self._universe = universe
        self._process = process
        self._target = target
        self._greenlet = greenlet(self._body)
        self.has_ended = False
        self._joiners: list[CoThread] = []
        self._back: greenlet | None = None

    def start(self, delay_s: float = 0.0) -> None:
        """It begins, or goes on, in so many seconds."""
        self._universe.at(delay_s, self.resume, self._process)

    def resume(self) -> None:
        """Runs it until it waits again. For the universe, as a step of its process."""
        before, self._process.thread = self._process.thread, self
        self._back = greenlet.getcurrent()
        self._greenlet.switch()
        self._process.thread = before

    def park(self) -> None:
        """Waits until :meth:`resume`. For the thread itself."""
        assert self._back is not None
        self._back.switch()

    def join(self) -> None:
        """Waits for its end; for other threads of its process."""
        while not self.has_ended:
            waiting = running(self._process)
            self._joiners.append(waiting)
            waiting.park()

    def _body(self) -> None:
        try:
            self._target()
        except BaseException as error:
            self._universe.trace("thread ended", self._process.name, repr(error))
        self.has_ended = True
        for one in self._joiners:
            one.start()
        assert self._back is not None
        self._back.switch()


def running(process: Process) -> CoThread:
    """The thread that runs.

    Raises:
        AssertionError: it is the event loop, which must not wait.
    """
    assert process.thread is not None, f"{process.name} waits on its event loop"
    return process.thread


class Condition:
    """As threading's, for those threads."""

    def __init__(self, universe: Universe) -> None:
        self._universe = universe
        assert universe.current is not None
        self._process = universe.current
        self._waiting: list[CoThread] = []

    def __enter__(self) -> Condition:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def notify(self) -> None:
        """Those that wait look again, some time soon."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.start(self._universe.rng.uniform(*self._process.wake_s))

    def wait_for(self, condition: Callable[[], Any], timeout: float | None = None) -> Any:
        """Returns what ``condition`` gives, once it is true or the time is over."""
        end_s = None if timeout is None else self._universe.now_s + timeout
        while not (result := condition()):
            left_s = None if end_s is None else end_s - self._universe.now_s
            if left_s is not None and left_s <= 0:
                return result
            waiting = running(self._process)
            self._waiting.append(waiting)
            if left_s is not None:
                self._universe.at(left_s, partial(self._time_is_over, waiting), self._process)
            waiting.park()
        return result

    def _time_is_over(self, waiting: CoThread) -> None:
        if waiting in self._waiting:
            self._waiting.remove(waiting)
            waiting.resume()


class Threading:
    """What a module that starts threads takes for :mod:`threading`."""

    def __init__(self, universe: Callable[[], Universe]) -> None:
        self._universe = universe

    def Condition(self) -> Condition:  # as in threading
        """A condition of the process that runs."""
        return Condition(self._universe())

    def Thread(self, *, target: Callable[[], None], name: str, daemon: bool) -> CoThread:
        """A thread of the process that runs."""
        universe = self._universe()
        assert universe.current is not None
        return CoThread(universe, universe.current, target)
