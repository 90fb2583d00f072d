"""Threads that run one at a time, when the universe says so, and give way only where they wait.

They are greenlets, so that the product's code runs in them as it is.
"""

from __future__ import annotations

import queue
from collections import deque
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
        self.locals: dict[str, Any] = {}
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
            self._universe.note_end(f"a thread of {self._process.name}", error)
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


class RLock:
    """As threading's: of a thread of the product, or of its event loop."""

    def __init__(self, universe: Universe) -> None:
        self._universe = universe
        self._owner: object = None
        self._depth = 0
        self._waiting: list[CoThread] = []

    def _me(self) -> object:
        process = self._universe.current
        return process.thread or process if process is not None else self

    def acquire(self) -> bool:
        """Waits until it is free."""
        me = self._me()
        while self._owner not in (None, me):
            process = self._universe.current
            assert process is not None, "a lock is held by a process, and wanted by nobody"
            waiting = running(process)
            self._waiting.append(waiting)
            waiting.park()
        self._owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        """Lets the next one have it."""
        self._depth -= 1
        if not self._depth:
            self._owner = None
            waiting, self._waiting = self._waiting, []
            for one in waiting:
                one.start()

    def __enter__(self) -> RLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def put_down(self) -> int:
        """Releases it altogether; how often it was held."""
        depth, self._depth = self._depth, 1
        self.release()
        return depth

    def take_up(self, depth: int) -> None:
        """The opposite."""
        self.acquire()
        self._depth = depth


class Condition:
    """As threading's, for those threads."""

    def __init__(self, universe: Universe, lock: RLock | None = None) -> None:
        self._universe = universe
        assert universe.current is not None
        self._process = universe.current
        self._lock = lock or RLock(universe)
        self._waiting: list[CoThread] = []

    def __enter__(self) -> Condition:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def notify_all(self) -> None:
        """Those that wait look again, some time soon."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.start(self._universe.rng.uniform(*self._process.wake_s))

    notify = notify_all

    def wait(self, timeout: float | None = None) -> bool:
        """Returns when it is notified, or the time is over."""
        waiting = running(self._process)
        self._waiting.append(waiting)
        if timeout is not None:
            self._universe.at(timeout, partial(self._time_is_over, waiting), self._process)
        depth = self._lock.put_down()
        waiting.park()
        self._lock.take_up(depth)
        return True

    def wait_for(self, condition: Callable[[], Any], timeout: float | None = None) -> Any:
        """Returns what ``condition`` gives, once it is true or the time is over."""
        end_s = None if timeout is None else self._universe.now_s + timeout
        while not (result := condition()):
            left_s = None if end_s is None else end_s - self._universe.now_s
            if left_s is not None and left_s <= 0:
                return result
            self.wait(left_s)
        return result

    def _time_is_over(self, waiting: CoThread) -> None:
        if waiting in self._waiting:
            self._waiting.remove(waiting)
            waiting.resume()


class SimpleQueue:
    """As queue's."""

    def __init__(self, universe: Universe) -> None:
        self._changed = Condition(universe)
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        """Never waits."""
        self._items.append(item)
        self._changed.notify_all()

    def get(self, timeout: float | None = None) -> Any:
        """The next one; waits for it.

        Raises:
            queue.Empty.
        """
        if not self._changed.wait_for(lambda: self._items, timeout):
            raise queue.Empty
        return self._items.popleft()

    def get_nowait(self) -> Any:
        """The next one.

        Raises:
            queue.Empty.
        """
        if not self._items:
            raise queue.Empty
        return self._items.popleft()

    def empty(self) -> bool:
        """Whether there is none."""
        return not self._items


class Future:
    """As concurrent.futures has it, for one that waits."""

    def __init__(self, universe: Universe) -> None:
        self._done = Condition(universe)
        self._end: tuple[Any, BaseException | None] | None = None

    def set_result(self, result: Any) -> None:
        """It has come."""
        self._end = result, None
        self._done.notify_all()

    def set_exception(self, error: BaseException) -> None:
        """It never will."""
        self._end = None, error
        self._done.notify_all()

    def result(self) -> Any:
        """Waits for it."""
        self._done.wait_for(lambda: self._end is not None)
        assert self._end is not None
        result, error = self._end
        if error is not None:
            raise error
        return result


class Local:
    """As threading's: attributes that each thread has for itself."""

    def __init__(self, universe: Callable[[], Universe]) -> None:
        object.__setattr__(self, "_universe", universe)

    def __getattr__(self, name: str) -> Any:
        process = self._universe().current
        try:
            return process.thread.locals[name]
        except (AttributeError, KeyError):
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        process = self._universe().current
        assert process is not None
        running(process).locals[name] = value


class Threading:
    """What a module that starts threads takes for :mod:`threading`."""

    def __init__(self, universe: Callable[[], Universe]) -> None:
        self._universe = universe

    def Condition(self, lock: RLock | None = None) -> Condition:
        """A condition of the process that runs."""
        return Condition(self._universe(), lock)

    def RLock(self) -> RLock:
        """A lock of the process that runs."""
        return RLock(self._universe())

    def Thread(self, *, target: Callable[[], None], name: str, daemon: bool) -> CoThread:
        """A thread of the process that runs."""
        universe = self._universe()
        assert universe.current is not None
        return CoThread(universe, universe.current, target)


def sleep(universe: Universe, seconds: float) -> None:
    """Lets time pass; for threads."""
    assert universe.current is not None
    waiting = running(universe.current)
    waiting.start(seconds)
    waiting.park()
