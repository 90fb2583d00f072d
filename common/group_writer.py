"""The thread that writes the change-log: what was submitted while one ``fdatasync`` ran goes with the next.

It takes records that are whole, in order, and follow what was submitted before; it makes no decisions about
them. What it reports, it reports on its own thread; the callbacks should only hand over.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from understudy.common.changelog import ChangeLog
from understudy.common.errors import CorruptionError, DiskFull, StorageFailed
from understudy.common.types import Epoch, Position

BATCH_BYTES_MAX = 8 << 20  # one sync must not hold up those behind it for long
_RETRY_MIN_S = 0.01
_RETRY_MAX_S = 1.0


@dataclass(frozen=True, slots=True)
class _Batch:
    data: bytes
    last: Position
    epoch: Epoch


class GroupWriter:
    """Writes what is submitted, in order, as few large batches.

    Args:
        log: nobody else writes to it.
        on_durable: gets the position and the log offset up to which everything is durable.
        on_disk_full: gets True when the disk is found full, False once writing goes on. Meanwhile the batch
            is kept and tried again.
        on_failed: gets the error after which nothing more is written.
        on_sync: gets the seconds that writing a batch took, and its bytes.
    """

    def __init__(
        self,
        log: ChangeLog,
        *,
        on_durable: Callable[[Position, int], None],
        on_disk_full: Callable[[bool], None],
        on_failed: Callable[[StorageFailed | CorruptionError], None],
        on_sync: Callable[[float, int], None] | None = None,
    ) -> None:
        self._log = log
        self._on_durable = on_durable
        self._on_disk_full = on_disk_full
        self._on_failed = on_failed
        self._on_sync = on_sync
        self._changed = threading.Condition()
        self._queue: deque[_Batch] = deque()
        self._pending_bytes = 0
        self._closing = False
        self._failed: StorageFailed | CorruptionError | None = None
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    @property
    def pending_bytes(self) -> int:
        """Submitted and not yet durable. The queue has no limit of its own: who submits must hold back."""
        return self._pending_bytes

    def submit(self, data: bytes, last: Position, epoch: Epoch) -> None:
        """Queues whole records; never waits.

        Args:
            data: they follow directly behind those submitted before.
            last: position of the last of them.
            epoch: of all of them.

        Raises:
            StorageFailed, CorruptionError: writing has failed; nothing will be written any more.
            RuntimeError: closed.
        """
        with self._changed:
            if self._failed is not None:
                raise self._failed
            if self._closing:
                raise RuntimeError("the log's writer is closed")
            self._queue.append(_Batch(data, last, epoch))
            self._pending_bytes += len(data)
            self._changed.notify()

    def close(self) -> None:
        """Finishes what was submitted and ends the thread. On a full or failed disk it gives up instead."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (batch := self._take()) is not None:
                self._write(batch)
        except (StorageFailed, CorruptionError) as error:
            self._fail(error)
        except DiskFull:
            pass  # closed meanwhile
        except Exception as error:
            # A mistake in this program. It must not end as a writer that is silently gone.
            self._fail(StorageFailed(f"the log's writer stopped: {error!r}"))
            raise

    def _take(self) -> _Batch | None:
        """What is queued, as one batch up to the limit; waits for some. None when closed and done."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            if not self._queue:
                return None
            first = last = self._queue.popleft()
            pieces, size = [first.data], len(first.data)
            while self._queue and self._joins(self._queue[0], first, size):
                last = self._queue.popleft()
                pieces.append(last.data)
                size += len(last.data)
        return _Batch(b"".join(pieces), last.last, first.epoch)

    @staticmethod
    def _joins(candidate: _Batch, first: _Batch, size: int) -> bool:
        # One epoch a batch, because a segment that begins within it notes the epoch in its header.
        return candidate.epoch == first.epoch and size + len(candidate.data) <= BATCH_BYTES_MAX

    def _write(self, batch: _Batch) -> None:
        """Writes all of the batch, waiting for space as often as needed.

        Raises:
            DiskFull: closed while waiting.
            StorageFailed, CorruptionError.
        """
        data, wait_s, full = batch.data, _RETRY_MIN_S, False
        while True:
            start, started_s = self._log.end_offset, time.perf_counter()
            try:
                self._log.write_batch(data, batch.last, epoch=batch.epoch)
            except DiskFull:
                data = data[self._written(start) :]
                if not full:
                    full = True
                    self._on_disk_full(True)
                with self._changed:
                    if self._changed.wait_for(lambda: self._closing, wait_s):
                        raise
                wait_s = min(2 * wait_s, _RETRY_MAX_S)
            else:
                if self._on_sync is not None:
                    self._on_sync(time.perf_counter() - started_s, len(data))
                self._written(start)
                break
        if full:
            self._on_disk_full(False)

    def _written(self, start: int) -> int:
        """Reports what became durable since ``start``; how many bytes that was."""
        written = self._log.end_offset - start
        if written:
            with self._changed:
                self._pending_bytes -= written
            self._on_durable(self._log.end, self._log.end_offset)
        return written

    def _fail(self, error: StorageFailed | CorruptionError) -> None:
        with self._changed:
            self._failed = error
            self._queue.clear()
        self._on_failed(error)
