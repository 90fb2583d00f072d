"""Puts many pairs into a realm: large transactions, several of them under way at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import click

from understudy.cli.output import Progress, counted
from understudy.cli.pairs import Pair
from understudy.cli.writing import check_primary
from understudy.client import AsyncServer, Put, Receipt
from understudy.client.direct import aconnect_as
from understudy.common import portal
from understudy.common.credentials import Credentials
from understudy.common.errors import BadImport, UnderstudyError

# Large enough that a transaction costs little beside its content, small enough that others get their turn.
BATCH_BYTES = 1 << 20
# Under way: enough to keep the server's disk and the network busy, and a bound on memory.
BATCHES_MAX = 16
BYTES_MAX = 32 << 20
COMMIT_S_MAX = 120.0  # a server that is waiting for space or for replicas says nothing for so long


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What came of it."""

    keys: int
    transactions: int
    lsn: int  # of the last transaction; 0 if there was none


def load(
    server: str, credentials: Credentials, realm: str, pairs: Iterable[Pair], *, batch_pairs: int
) -> Loaded:
    """Commits all pairs, in order. When it raises, everything before the pair named was committed.

    Raises:
        BadImport: a pair can't be read; all before it were committed.
        UnderstudyError: the server can't be reached or refused; from the line named on, pairs may be missing.
    """
    with connected(server, credentials) as connection, Progress("importing", unit="keys") as progress:
        check_primary(portal.call(connection.status()), server)
        window = _Window(connection, realm)
        try:
            for batch in batches(pairs, pairs_max=batch_pairs):
                portal.call(window.submit(batch))
                progress.update(window.keys)
        except BadImport:
            portal.call(window.finish())
            raise
        except KeyboardInterrupt:
            click.echo(
                f"understudy: interrupted with {counted(window.keys, 'key')} in; {window.how_to_go_on()}",
                err=True,
            )
            raise
        portal.call(window.finish())
    return Loaded(keys=window.keys, transactions=window.transactions, lsn=window.lsn)


@contextlib.contextmanager
def connected(server: str, credentials: Credentials) -> Iterator[AsyncServer]:
    """A connection on the portal's loop."""
    # The reading of pairs may wait for a pipe, so the connection lives on another thread's loop.
    manager = aconnect_as(credentials, server)
    connection = portal.call(manager.__aenter__())
    try:
        yield connection
    finally:
        portal.call(manager.__aexit__(None, None, None))


def batches(pairs: Iterable[Pair], *, pairs_max: int) -> Iterator[list[Pair]]:
    """The pairs in order, in transactions of about ``BATCH_BYTES``; what was collected before an error comes first."""
    batch: list[Pair] = []
    size = 0
    try:
        for pair in pairs:
            if batch and (len(batch) == pairs_max or size + pair.size > BATCH_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(pair)
            size += pair.size
    except BadImport:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


class _Window:
    """Transactions under way, in order. Used on the portal's loop, by one call at a time."""

    def __init__(self, connection: AsyncServer, realm: str) -> None:
        self._connection = connection
        self._realm = realm
        self._under_way: list[tuple[asyncio.Task[Receipt], list[Pair], int]] = []
        self._bytes = 0
        self._line = 0  # of the last pair committed
        self.keys = 0
        self.transactions = 0
        self.lsn = 0

    async def submit(self, batch: list[Pair]) -> None:
        """Sends a batch, once there is room for it."""
        size = sum(pair.size for pair in batch)
        while self._under_way and (len(self._under_way) >= BATCHES_MAX or self._bytes + size > BYTES_MAX):
            await self._wait_for_oldest()
        operations = [Put(pair.key, pair.value) for pair in batch]
        commit = self._connection.commit(self._realm, operations, timeout_s=COMMIT_S_MAX)
        # Tasks begin in the order in which they are made, and below the client's own limits none has to wait; so
        # of two batches with the same key, the later one is sent later.
        self._under_way.append((asyncio.create_task(commit), batch, size))
        self._bytes += size

    async def finish(self) -> None:
        """Returns when everything sent was committed."""
        while self._under_way:
            await self._wait_for_oldest()

    async def _wait_for_oldest(self) -> None:
        task, batch, size = self._under_way.pop(0)
        try:
            receipt = await task
        except UnderstudyError as error:
            await self._give_up()
            error.remedy = (
                f"{error.remedy}; then {self.how_to_go_on()}" if error.remedy else self.how_to_go_on()
            )
            raise
        self._bytes -= size
        self.keys += len(batch)
        self.transactions += 1
        self._line = batch[-1].line
        self.lsn = receipt.lsn

    async def _give_up(self) -> None:
        for task, _, _ in self._under_way:
            task.cancel()
        await asyncio.gather(*(task for task, _, _ in self._under_way), return_exceptions=True)
        self._under_way.clear()

    def how_to_go_on(self) -> str:
        """What to do after an error or an interruption."""
        return (
            f"go on with --from-line {self._line + 1}" if self._line else "import again, which does no harm"
        )
