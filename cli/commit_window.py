"""Many transactions to one realm, several of them under way at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from understudy.client import AsyncServer, Operation, Receipt
from understudy.common.errors import UnderstudyError
from understudy.common.operations import operation_bytes

# Under way: enough that small ones don't wait for the network one by one and large ones keep the server's disk busy; a
# bound on memory; and below the client's own limits, so that none has to wait there.
_TRANSACTIONS_MAX = 256
_BYTES_MAX = 8 << 20
_COMMIT_S_MAX = 120.0  # a server that is waiting for space or for replicas says nothing for so long

OnReceipt = Callable[[Receipt], None]


class CommitWindow:
    """Transactions under way, sent and answered in order. Used on the connection's loop, by one call at a time.

    When a call raises an UnderstudyError, it has given up what was under way: some of it may have been committed.
    """

    def __init__(self, connection: AsyncServer, realm: str) -> None:
        self._connection = connection
        self._realm = realm
        self._under_way: deque[tuple[asyncio.Task[Receipt], int, OnReceipt]] = deque()
        self._bytes = 0

    async def submit(self, operations: Sequence[Operation], on_receipt: OnReceipt) -> None:
        """Sends a transaction, once there is room for it; ``on_receipt`` is called when it was committed.

        Raises:
            UnderstudyError: an earlier one was refused or not answered, or its ``on_receipt`` has raised that.
        """
        size = sum(map(operation_bytes, operations))
        while self._under_way and (
            len(self._under_way) >= _TRANSACTIONS_MAX or self._bytes + size > _BYTES_MAX
        ):
            await self._wait_for_oldest()
        commit = self._connection.commit(self._realm, operations, timeout_s=_COMMIT_S_MAX)
        # Tasks begin in the order in which they are made, and none has to wait; so of two transactions with the same
        # key, the later one is sent later.
        self._under_way.append((asyncio.create_task(commit), size, on_receipt))
        self._bytes += size

    async def finish(self) -> None:
        """Returns when everything sent was committed.

        Raises:
            UnderstudyError: as of :meth:`submit`.
        """
        while self._under_way:
            await self._wait_for_oldest()

    async def give_up(self) -> None:
        """Waits for nothing more."""
        for task, _, _ in self._under_way:
            task.cancel()
        await asyncio.gather(*(task for task, _, _ in self._under_way), return_exceptions=True)
        self._under_way.clear()
        self._bytes = 0

    async def _wait_for_oldest(self) -> None:
        task, size, on_receipt = self._under_way.popleft()
        try:
            on_receipt(await task)
        except UnderstudyError:
            await self.give_up()
            raise
        self._bytes -= size


@contextlib.contextmanager
def telling_how_to_go_on(how: Callable[[], str]) -> Iterator[None]:
    """Adds to an error's remedy what to do after that."""
    try:
        yield
    except UnderstudyError as error:
        error.remedy = f"{error.remedy}; then {how()}" if error.remedy else how()
        raise
