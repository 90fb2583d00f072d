"""Writes transactions to one realm: in order, many under way at a time, and with an eye on what others do meanwhile."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import click

from understudy.backup.restored_realms import operation_bytes
from understudy.cli.loader import COMMIT_S_MAX
from understudy.cli.output import Progress
from understudy.client import AsyncServer, Operation, Receipt
from understudy.common import portal
from understudy.common.errors import UnderstudyError

# Under way: enough that small ones don't wait for the network one by one, and, with the bytes, below the client's own
# limits: then they are sent in the order in which they are given.
_TRANSACTIONS_MAX = 256
_BYTES_MAX = 8 << 20
_AGAIN = "give the command again: it goes on with what differs"


@dataclass(slots=True)
class Written:
    """What was committed."""

    transactions: int = 0
    version: int = 0  # of the realm, after the last of them
    lsn: int = 0
    others: int = 0  # changes that others made to the realm in between


class RealmWriter:
    """One realm's.

    Args:
        connection: its loop is the portal's.
        version: the realm's, as it was looked at; 0 where there was none. Then nobody else may have made it.
        progress: told of the transactions committed.
    """

    def __init__(self, connection: AsyncServer, realm: str, version: int, progress: Progress) -> None:
        self.written = Written(version=version)
        self._connection = connection
        self._realm = realm
        self._is_new = version == 0
        self._progress = progress
        self._under_way: deque[tuple[asyncio.Task[Receipt], int]] = deque()
        self._bytes = 0

    def write(self, transactions: Iterable[list[Operation]]) -> Written:
        """Commits them all.

        Raises:
            UnderstudyError: refused, or no answer, or others are making the realm, too; some may have been committed.
        """
        try:
            for operations in transactions:
                portal.call(self._submit(operations))
                if self._is_new and not self.written.transactions:
                    portal.call(self._finish())  # nothing is added to a realm that others have made meanwhile
                self._progress.update(self.written.transactions)
            portal.call(self._finish())
        except KeyboardInterrupt:
            click.echo(f"understudy: interrupted; {_AGAIN}", err=True)
            raise
        except UnderstudyError as error:
            portal.call(self._give_up())
            error.remedy = f"{error.remedy}; then {_AGAIN}" if error.remedy else _AGAIN
            raise
        return self.written

    async def _submit(self, operations: list[Operation]) -> None:
        size = sum(operation_bytes(operation) for operation in operations)
        while self._under_way and (
            len(self._under_way) >= _TRANSACTIONS_MAX or self._bytes + size > _BYTES_MAX
        ):
            await self._wait_for_oldest()
        commit = self._connection.commit(self._realm, operations, timeout_s=COMMIT_S_MAX)
        self._under_way.append((asyncio.create_task(commit), size))
        self._bytes += size

    async def _finish(self) -> None:
        while self._under_way:
            await self._wait_for_oldest()

    async def _wait_for_oldest(self) -> None:
        task, size = self._under_way.popleft()
        receipt = await task
        self._bytes -= size
        self._note_others(receipt)
        self.written.transactions += 1
        self.written.version, self.written.lsn = receipt.version, receipt.lsn

    def _note_others(self, receipt: Receipt) -> None:
        """A version that is not the next one tells of changes in between, or that the realm was dropped."""
        expected = self.written.version + 1
        if receipt.version == expected:
            return
        if self._is_new:
            raise UnderstudyError(
                f"others write to {self._realm}, too, which was not there: LSN {receipt.lsn} made its version "
                f"{receipt.version}, not {expected}"
            )
        self.written.others += max(receipt.version - expected, 1)

    async def _give_up(self) -> None:
        for task, _ in self._under_way:
            task.cancel()
        await asyncio.gather(*(task for task, _ in self._under_way), return_exceptions=True)
        self._under_way.clear()
