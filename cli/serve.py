"""The shell that both processes run in: event loop, logs, signals, and word to whoever waits for readiness."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from types import FrameType
from typing import Protocol, TypeVar

from understudy.common.errors import UnderstudyError
from understudy.common.logs import configure_logs
from understudy.common.memory import keep_freed_memory
from understudy.common.portal import new_event_loop

# The thread that writes the log asks for the interpreter again after each fdatasync, and every commit waits for
# it. With the default of 5 ms it would often wait ten times as long as the disk took.
SWITCH_INTERVAL_S = 0.0005

# A memtable is some 100,000 tuples and no cycle. With the default thresholds, looking through all of them again and
# again stopped everything for up to 50 ms.
GC_THRESHOLDS = (50_000, 50, 1_000)


class Serving(Protocol):
    """A server as :func:`serve` needs it."""

    @property
    def address(self) -> str:
        """Where it listens, with the real port."""


_S = TypeVar("_S", bound=Serving)


def serve(
    role: str,
    serving: Callable[[], AbstractAsyncContextManager[_S]],
    ended: Callable[[_S], Awaitable[UnderstudyError | None]],
    *,
    log_format: str,
) -> bool:
    """Serves until a signal comes or the server ends by itself.

    SIGTERM and SIGINT end it cleanly, a second one at once.

    Args:
        role: what it says it is, once it serves, in its one line on standard output.
        ended: gives what is done when the server has to end: with an error, or None if all is well.
        log_format: ``console`` or ``json``.

    Returns:
        Whether the server ended by itself, and not by a signal.

    Raises:
        UnderstudyError: it could not start, or had to end.
    """
    configure_logs(log_format)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(*GC_THRESHOLDS)
    gc.freeze()
    keep_freed_memory()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_serve(role, serving, ended))


async def _serve(
    role: str,
    serving: Callable[[], AbstractAsyncContextManager[_S]],
    ended: Callable[[_S], Awaitable[UnderstudyError | None]],
) -> bool:
    task = asyncio.current_task()
    assert task is not None
    stop = asyncio.Event()
    serves = False

    def request_stop() -> None:
        stop.set()
        if not serves:
            task.cancel()

    with _stopping_signals(request_stop):
        try:
            async with serving() as server:
                serves = True
                print(f"{role} ready on {server.address}", flush=True)
                notify("READY=1")
                error = await _first(stop, ended(server))
                notify("STOPPING=1")
        except asyncio.CancelledError:
            if stop.is_set():
                return False  # asked to stop before it served
            raise
    if error is not None:
        raise error
    return not stop.is_set()


async def _first(stop: asyncio.Event, ended: Awaitable[UnderstudyError | None]) -> UnderstudyError | None:
    """Waits for either; the error, if there is one."""
    stopped, failed = asyncio.create_task(stop.wait()), asyncio.ensure_future(ended)
    await asyncio.wait((stopped, failed), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    return failed.result() if failed.done() else None


@contextlib.contextmanager
def _stopping_signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """Calls ``request_stop`` on the loop at the first SIGTERM or SIGINT; a second one ends the process at once.

    Python's own handlers, because the loop's would not be called while it is busy, and a person who sends a
    second signal does not want to wait for that.
    """
    loop = asyncio.get_running_loop()
    count = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            os._exit(128 + number)
        loop.call_soon_threadsafe(request_stop)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def notify(state: str) -> None:
    """Tells the service manager, where there is one (``sd_notify``'s protocol: one datagram to $NOTIFY_SOCKET)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        sender.sendall(state.encode())
