"""Background tasks that can't die unnoticed, and a signal to wait on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from understudy.common.errors import UnderstudyError
from understudy.common.events import log


def spawn(work: Coroutine[Any, Any, None], on_crash: Callable[[UnderstudyError], None]) -> asyncio.Task[None]:
    """Starts a task; an error that it does not handle itself is logged and handed to ``on_crash``.

    One of our own errors says all there is to say, and is handed over as it is. Anything else is a mistake in this
    program: it is logged with its traceback, and handed over as the base class.
    """

    def done(task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        if isinstance(error, UnderstudyError):
            log.error("task_failed", task=task.get_name(), error=str(error))
            on_crash(error)
        else:
            log.error("task_crashed", task=task.get_name(), exc_info=error)
            on_crash(UnderstudyError(f"internal error: {error!r}"))

    task = asyncio.create_task(work, name=getattr(work, "__qualname__", None))
    task.add_done_callback(done)
    return task


class Signal:
    """Wakes whoever waits for a condition when it may have become true. For one event loop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Lets everybody who waits look again."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Returns once ``condition`` holds."""
        while not condition():
            await self._event.wait()
