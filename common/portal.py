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

_THREAD = "understudy-portal"

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
            threading.Thread(target=_loop.run_forever, name=_THREAD, daemon=True).start()
        return _loop


def post(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs ``coroutine`` on the portal's loop some time soon."""
    asyncio.run_coroutine_threadsafe(coroutine, _started())


def call(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Runs ``coroutine`` on the portal's loop and waits; an interrupt here cancels it there.

    Raises:
        RuntimeError: called on that loop, which would wait for itself.
    """
    if threading.current_thread().name == _THREAD:
        coroutine.close()
        raise RuntimeError("a blocking call from the event loop that would have to answer it")
    future: concurrent.futures.Future[_T] = asyncio.run_coroutine_threadsafe(coroutine, _started())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
    finally:
        # Else it and its error hold each other, and the connection that failed is left until they are found.
        del future
