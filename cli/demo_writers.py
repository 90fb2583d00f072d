"""The demo's writers: each a client of its own, with several transactions under way, that stops for nothing."""

from __future__ import annotations

import asyncio
import time

from understudy.cli.demo_ledger import Ledger, Tally, operations
from understudy.client import AsyncServer, Receipt, aconnect

UNDER_WAY = 8  # transactions of one writer
ANSWER_S_MAX = 60.0  # for the last transactions, once no more are begun


class Writers:
    """All writers, and what they have come to. Their clients find the primary, again and again."""

    def __init__(self, count: int) -> None:
        self.acknowledged = 0
        self.ledgers = [Ledger(writer=number) for number in range(1, count + 1)]
        # Of the promoted node: its first own entry, and what was acknowledged since.
        self.first_new_s: float | None = None  # monotonic time of the first transaction that it made itself
        self.answered_again = 0  # transactions that it held already, and answered with their first receipts
        self._reign_lsn: int | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    def start(self, addresses: str) -> None:
        """Begins to write, to whichever of ``"a:7850,b:7850"`` is the primary."""
        self._tasks = [asyncio.create_task(self._write(ledger, addresses)) for ledger in self.ledgers]

    @property
    def under_way(self) -> int:
        """Transactions sent and not answered."""
        return sum(ledger.sent for ledger in self.ledgers) - self.acknowledged

    def begin_reign(self, lsn: int) -> None:
        """The old primary is gone; what is newer than ``lsn`` comes from its successor."""
        self._reign_lsn = lsn

    def check(self) -> None:
        """Raises the error that a writer ended with, if one did."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def stop(self) -> None:
        """Begins no more transactions, and returns when all are answered, or will not be.

        Raises:
            UnderstudyError: a server refused one.
        """
        self._stopping = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=ANSWER_S_MAX)
        self.check()
        await self.close()

    async def close(self) -> None:
        """Ends what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def tally(self, server: AsyncServer) -> Tally:
        """Compares every writer's ledger with what ``server`` holds."""
        tally = Tally()
        for ledger in self.ledgers:
            tally += ledger.check([pair async for pair in server.scan(_realm(ledger))])
        return tally

    # -- one writer ----------------------------------------------------------------------------------------

    async def _write(self, ledger: Ledger, addresses: str) -> None:
        async with aconnect(addresses) as server:
            under_way = [asyncio.create_task(self._write_on(server, ledger)) for _ in range(UNDER_WAY)]
            try:
                await asyncio.gather(*under_way)
            finally:
                for task in under_way:
                    task.cancel()

    async def _write_on(self, server: AsyncServer, ledger: Ledger) -> None:
        while not self._stopping:
            number = ledger.next_number()
            # Without a deadline: how long there is no primary is not the writer's business.
            receipt = await server.commit(_realm(ledger), operations(ledger.writer, number), timeout_s=None)
            self._note(ledger, number, receipt)

    def _note(self, ledger: Ledger, number: int, receipt: Receipt) -> None:
        ledger.acknowledged.add(number)
        self.acknowledged += 1
        if self._reign_lsn is None:
            return
        if receipt.lsn < self._reign_lsn:
            self.answered_again += 1
        elif self.first_new_s is None:
            self.first_new_s = time.monotonic()


def _realm(ledger: Ledger) -> str:
    return f"/writers/{ledger.writer}"
