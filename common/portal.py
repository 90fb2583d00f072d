"""One event loop in a thread of its own, for the blocking faces of what is asynchronous inside.

There is one for the whole process: gRPC's asyncio layer serves one loop well and several badly.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where the platform has it, else asyncio's."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _started() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None or _loop.is_closed():
            _loop = new_event_loop()
            threading.Thread(target=_loop.run_forever, name="understudy-portal", daemon=True).start()
        return _loop


def call(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Runs ``coroutine`` on the portal's loop and waits; an interrupt here cancels it there."""
    future: concurrent.futures.Future[_T] = asyncio.run_coroutine_threadsafe(coroutine, _started())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
