"""Pauses a primary's writing, so that the file system or the hypervisor can take a snapshot of its directory.

While it is frozen, what comes in is taken in as far as there is room, and waits: nothing goes to the log, and no
checkpoint runs. It ends by itself: whoever asked for it may be gone.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from understudy.common.errors import Unavailable, UsageError
from understudy.common.events import log
from understudy.common.types import Position

if TYPE_CHECKING:
    from understudy.primary.node import PrimaryNode

# Clients wait meanwhile, and a snapshot takes seconds.
FREEZE_S_MAX = 300.0


@dataclass(frozen=True, slots=True)
class Frozen:
    """What a freeze has come to."""

    position: Position  # where the log ends
    was_frozen: bool  # before already: this one has put off the end


class Freezer:
    """Of one primary; everything runs on its loop."""

    def __init__(self, node: PrimaryNode, clock: Callable[[], float] = time.monotonic) -> None:
        self._node = node
        self._clock = clock
        self._until_s = -math.inf
        self._end: asyncio.TimerHandle | None = None
        self._holds_checkpoints = False
        self.ran_out_s = 0.0  # when the last freeze ended by itself, since 1970; 0 if it did not
        self._entering = asyncio.Lock()

    @property
    def is_on(self) -> bool:
        """Whether nothing may be written to the log now."""
        return self._end is not None

    @property
    def seconds_left(self) -> float:
        """Until it ends by itself; 0 if nothing is frozen."""
        return max(self._until_s - self._clock(), 0.0) if self.is_on else 0.0

    async def freeze(self, seconds: float) -> Frozen:
        """Lets nothing more into the log; returns where that ends once all of it is durable, committed and at rest.

        Frozen already, it stays so at least for so long. Cancelled before it is done, it is not frozen.

        Args:
            seconds: counted from now.

        Raises:
            UsageError: more than :data:`FREEZE_S_MAX`, or not above 0.
            Unavailable: what was taken in before is not committed within that time; it is not frozen.
        """
        if not 0 < seconds <= FREEZE_S_MAX:
            raise UsageError(
                f"a freeze of {seconds:g} s", remedy=f"give more than 0 and at most {FREEZE_S_MAX:g}"
            )
        async with self._entering:
            was_frozen = self.is_on
            if not was_frozen:
                self.ran_out_s = 0.0
                self._node.flush()
            self._end_in(max(seconds, self.seconds_left))
            if not was_frozen:
                await self._settle(seconds)
        position = self._node.engine.durable
        log.info("frozen", lsn=position.lsn, seconds=round(self.seconds_left, 1), was_frozen=was_frozen)
        return Frozen(position, was_frozen)

    def _end_in(self, seconds: float) -> None:
        if self._end is not None:
            self._end.cancel()
        self._until_s = self._clock() + seconds
        self._end = asyncio.get_running_loop().call_later(seconds, self._run_out)

    async def _settle(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._node.wait_until_committed(self._node.committer.position)
                # Only now: what is to be committed may have to wait for checkpoints.
                await self._node.engine.checkpointing.acquire()
                self._holds_checkpoints = True
        except TimeoutError:
            self.thaw()
            raise Unavailable(
                f"not frozen: what was taken in before was not committed within {seconds:g} s",
                remedy="`understudy status` says what it waits for",
            ) from None
        except BaseException:
            self.thaw()
            raise
        if not self.is_on or self._node.over.done():
            self.thaw()
            raise Unavailable("not frozen: it was ended meanwhile")

    def _run_out(self) -> None:
        if self._holds_checkpoints:  # else it never came about, which whoever asked for it is told
            self.ran_out_s = time.time()
        self.thaw()

    def thaw(self) -> None:
        """Goes on; fine if nothing is frozen."""
        # Both, whether or not it is complete: it can be ended while it begins.
        if self._holds_checkpoints:
            self._holds_checkpoints = False
            self._node.engine.checkpointing.release()
        if self._end is not None:
            self._end.cancel()
            self._end = None
            log.info("thawed", lsn=self._node.engine.durable.lsn)
            self._node.flush_soon()
