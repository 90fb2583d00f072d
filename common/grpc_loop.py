"""What gRPC says by mistake to an event loop that shares a process with others.

grpc.aio has one poller for all loops: whichever wakes first takes its events, and passes on those that belong to
another. Where that one was closed before the last event of a call that it had cancelled, or where a loop comes too
late and finds nothing, an exception comes out of gRPC's own callback, which the loop would report as an error.
Nothing is lost by either.
"""

from __future__ import annotations

import asyncio
from typing import Any

_POLLER = "PollerCompletionQueue._handle_events"


def ignore_stray_events(loop: asyncio.AbstractEventLoop) -> None:
    """Has ``loop`` say nothing of them; does nothing where somebody handles its exceptions already."""
    if loop.get_exception_handler() is None:
        loop.set_exception_handler(_report)


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not _is_stray(context):
        loop.default_exception_handler(context)


def _is_stray(context: dict[str, Any]) -> bool:
    error = context.get("exception")
    is_closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    return (is_closed or isinstance(error, BlockingIOError)) and _POLLER in str(context.get("handle"))
