"""What the client processes of Redis and etcd share: a window of time in which answers count."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from results import quantile


class Window:
    """Latencies of what was answered between two moments; or the first failure."""

    def __init__(self) -> None:
        self._latencies_s: list[float] = []
        self._is_open = False
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def note(self, seconds: float) -> None:
        """One was answered."""
        if self._is_open:
            self._latencies_s.append(seconds)

    def fail(self, error: Exception) -> None:
        """One was not, or wrongly: nothing measured counts."""
        if not self._failure.done():
            self._failure.set_exception(error)

    async def measure(self, warm_s: float, window_s: float) -> dict[str, float]:
        """Waits, opens, closes; gives what came of it.

        Raises:
            RuntimeError: something was not answered as it should be.
        """
        await self._pass(warm_s)
        self._is_open, began_s = True, time.monotonic()
        await self._pass(window_s)
        self._is_open, seconds = False, time.monotonic() - began_s
        return {
            "rate": len(self._latencies_s) / seconds,
            "p50_s": quantile(self._latencies_s, 0.5),
            "p99_s": quantile(self._latencies_s, 0.99),
        }

    async def wait_for(self, answered: asyncio.Event) -> None:
        """Returns when it is set.

        Raises:
            RuntimeError: something was not answered as it should be.
        """
        waiting = asyncio.ensure_future(answered.wait())
        either: list[asyncio.Future[Any]] = [waiting, self._failure]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._failure.done():
            waiting.cancel()
            self._failure.result()

    async def _pass(self, seconds: float) -> None:
        done, _ = await asyncio.wait([self._failure], timeout=seconds)
        if done:
            self._failure.result()
