"""A replica's copy: its engine, and the way of each record from durable to applied, whoever brings them.

Everything runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from understudy.common.directory import DataDirectory
from understudy.common.engine import Engine
from understudy.common.errors import Unavailable, UnderstudyError
from understudy.common.metrics import EngineMetrics
from understudy.common.records import Record
from understudy.common.settings import LOG_CEILING_BYTES
from understudy.common.tasks import Signal, spawn
from understudy.common.types import ClusterId, Epoch, Lsn, Position
from understudy.v1 import store_pb2

_APPLY_SLICE = 500  # records applied before others get a turn
_TELL_S = 0.01  # while there is more to apply, the listener is told at most so often


class CopyListener(Protocol):
    """Who brings the records, and is told what becomes of them."""

    def on_durable(self, position: Position, offset: int, *, applies_at_once: bool) -> None:
        """Everything up to ``position`` is durable; the listener hands over what is to be applied."""

    def on_applied(self, record: Record) -> None:
        """One record was applied."""

    def on_applied_some(self) -> None:
        """Some records were applied: all there were, or those of some time."""


class Copy:
    """The copy in a replica's directory; none before the first bootstrap."""

    def __init__(
        self,
        directory: DataDirectory,
        metrics: EngineMetrics,
        *,
        log_floor_bytes: int,
        on_end: Callable[[UnderstudyError], None],
    ) -> None:
        self.directory = directory
        self.listener: CopyListener | None = None
        self.submitted: Position | None = None  # the last record handed to the log
        self._metrics = metrics
        self._log_floor_bytes = log_floor_bytes
        self._on_end = on_end
        self._engine: Engine | None = None
        self._to_apply: deque[Record] = deque()
        self._wake_applier = asyncio.Event()
        self._progressed = Signal()
        self._told_s = 0.0
        self._applier: asyncio.Task[None] | None = None
        self._is_ours = True
        self._replacing: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Opens what copy there is, and recovers it.

        Raises:
            CorruptionError, NewerFormat, StorageFailed, DiskFull.
        """
        if self.directory.has_copy:
            self._engine = Engine.open(self.directory, metrics=self._metrics)

    def start(self) -> None:
        """Begins to take records."""
        self._start_engine()
        self._applier = spawn(self._apply_forever(), self._on_end)

    def _start_engine(self) -> None:
        if self._engine is not None:
            self._engine.start(self)
            self.submitted = self._engine.durable

    async def close(self) -> None:
        """Writes what was received, and closes."""
        await self._stop_applying()
        if self._replacing is not None:
            await asyncio.gather(self._replacing, return_exceptions=True)
        if self._engine is not None and self._is_ours:
            await self._engine.close()

    async def hand_over(self) -> Engine:
        """Gives the engine, at work, to somebody who closes it; everything received must be applied.

        Raises:
            Unavailable: there is no copy yet.
        """
        engine = self.engine
        await self._stop_applying()
        self._is_ours = False
        return engine

    async def _stop_applying(self) -> None:
        if self._applier is not None:
            self._applier.cancel()
            await asyncio.gather(self._applier, return_exceptions=True)

    async def replace(self, cluster: ClusterId) -> None:
        """Puts the complete copy from ``incoming/`` in this one's place.

        Raises:
            UnderstudyError: it can't be put there, or can't be opened; the next start finishes what was begun.
        """
        # Once begun it goes on, whoever stops waiting: its thread can't be stopped, and needs the directory's lock.
        self._replacing = asyncio.create_task(self._replace(cluster))
        await asyncio.shield(self._replacing)

    async def _replace(self, cluster: ClusterId) -> None:
        old, self._engine = self._engine, None
        self._to_apply.clear()
        if old is not None:
            await old.close()
        await asyncio.to_thread(self.directory.install, cluster, keep_old=False)
        self._engine = await asyncio.to_thread(Engine.open, self.directory, metrics=self._metrics)
        self._start_engine()

    @property
    def opened(self) -> Engine | None:
        """The engine, if there is a copy."""
        return self._engine

    @property
    def engine(self) -> Engine:
        """The engine of the copy.

        Raises:
            Unavailable: there is no copy yet.
        """
        if self._engine is None:
            raise Unavailable(
                "this replica has no copy yet", remedy="`understudy status` says what it waits for"
            )
        return self._engine

    # -- records -------------------------------------------------------------------------------------------

    def submit(self, data: bytes, last: Position, epoch: Epoch) -> None:
        """Hands whole records of one epoch, which follow behind :attr:`submitted`, to the log.

        Raises:
            StorageFailed: storage has failed before.
        """
        self.submitted = last
        self.engine.submit(data, last, epoch)

    def apply(self, records: Iterable[Record]) -> None:
        """Applies records, soon. They must be durable."""
        self._to_apply.extend(records)
        self._wake_applier.set()

    async def _apply_forever(self) -> None:
        while True:
            if not self._to_apply:
                self._wake_applier.clear()
                await self._wake_applier.wait()
            engine = self.engine
            try:
                await engine.wait_for_room()
                self._apply_slice(engine)
            except UnderstudyError as error:
                engine.fail(error)
                return
            self._progressed.notify()
            await asyncio.sleep(0)

    def _apply_slice(self, engine: Engine) -> None:
        listener = self.listener
        for _ in range(min(_APPLY_SLICE, len(self._to_apply))):
            record = self._to_apply.popleft()
            engine.apply(record)
            if listener is not None:
                listener.on_applied(record)
            if engine.is_behind:
                break
        now_s = time.monotonic()
        pauses = not self._to_apply or engine.is_behind
        if listener is not None and (pauses or now_s - self._told_s >= _TELL_S):
            self._told_s = now_s
            listener.on_applied_some()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Returns once ``condition`` holds; it is looked at whenever something was applied.

        Raises:
            UnderstudyError: the copy has failed.
        """
        engine = self.engine
        await self._progressed.wait_for(lambda: engine.failed is not None or condition())
        if engine.failed is not None:
            raise engine.failed

    async def drain(self) -> None:
        """Returns once everything received is durable and applied.

        Raises:
            UnderstudyError: the copy has failed.
        """
        engine = self._engine
        if engine is not None:
            await self.wait_until(
                lambda: engine.durable == self.submitted and engine.state.applied == engine.durable
            )

    # -- what the engine tells -----------------------------------------------------------------------------

    def on_durable(self, position: Position, offset: int) -> None:
        """Tells the listener and applies; without one (the connection was lost meanwhile) only applies."""
        engine = self._engine
        if self.listener is not None:
            applies_at_once = not self._to_apply and not self.engine.is_behind
            self.listener.on_durable(position, offset, applies_at_once=applies_at_once)
        elif engine is not None:
            known = self._to_apply[-1].lsn if self._to_apply else engine.state.applied.lsn
            self.apply(engine.log.records(known, position.lsn))

    def on_checkpoint(self, result: store_pb2.CheckpointResult) -> None:
        """Nothing to do: the digest is compared by the engine."""

    def on_disk_full(self, full: bool) -> None:
        """Shown in the status; the primary sees our progress stand still."""

    def on_failure(self, error: UnderstudyError) -> None:
        """Ends the process."""
        self._on_end(error)
        self._progressed.notify()

    def retain_from(self) -> Lsn:
        """What the archive needs, and the newest ``log_floor_bytes``: others can follow us then after a promotion."""
        return min(
            self.engine.first_lsn_within(self._log_floor_bytes), self.engine.archived_from(LOG_CEILING_BYTES)
        )
