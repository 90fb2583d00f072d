"""Direct clients that write, wait and read, and remember what they were told."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from sim.cluster import BrokenPromise, Cluster
from sim.universe import Process

from understudy.client import aconnect
from understudy.common.errors import OutcomeUnknown, PeerError, Unavailable, UnderstudyError, UnknownRealm
from understudy.common.operations import Add, Put
from understudy.common.types import Lsn, Position

REALM = "/accounts"
_TIMEOUT_S = 5.0


@dataclass
class Writer:
    """One client: it puts `name/number`, and adds one to `name`, in the same transaction.

    Attributes:
        acknowledged: numbers, with the LSN that was told.
        refused: numbers that the server surely did not apply.
        tried: how many there are.
    """

    cluster: Cluster
    name: str
    acknowledged: dict[int, Lsn] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    tried: int = 0
    reads: int = 0
    pause_s: float = 0.02
    size: int = 50
    process: Process | None = None
    stopped: bool = False
    lossy: bool = False  # acknowledged ones may be lost: reads say nothing

    def start(self) -> None:
        """A process of its own on a machine of its own."""
        self.process = self.cluster.lab.start(self.name, self.name, self._run)

    def key(self, number: int) -> bytes:
        """Of a transaction."""
        return f"{self.name}/{number:06}".encode()

    async def _run(self) -> None:
        rng = self.cluster.lab.universe.rng
        while not self.stopped:
            try:
                async with aconnect(self.cluster.addresses, timeout_s=_TIMEOUT_S) as server:
                    pending: set[asyncio.Task[None]] = set()
                    for _ in range(rng.randrange(20, 200)):
                        if self.stopped:
                            break
                        if len(pending) >= 8:
                            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                        writing = asyncio.create_task(self._write(server))
                        writing.add_done_callback(self._surface)
                        pending.add(writing)
                        if rng.random() < 0.15:
                            await self._read(server)
                        await asyncio.sleep(rng.expovariate(1 / self.pause_s))
                    if pending:
                        await asyncio.wait(pending)
            except UnderstudyError:
                await asyncio.sleep(rng.uniform(0.1, 1.0))

    def _surface(self, writing: asyncio.Task[None]) -> None:
        error = None if writing.cancelled() else writing.exception()
        if error is not None:
            self.cluster.lab.universe.trace("broken", self.name, f"BrokenPromise: {error!r}")

    async def _write(self, server: object) -> None:
        self.tried += 1
        number = self.tried
        operations = [Put(self.key(number), b"v" * self.size), Add(self.name.encode(), 1)]
        try:
            receipt = await server.commit(REALM, operations, timeout_s=_TIMEOUT_S)  # type: ignore[attr-defined]
        except OutcomeUnknown:
            return
        except (UnderstudyError, asyncio.CancelledError) as error:
            if isinstance(error, UnderstudyError):
                self.refused.add(number)
            return
        self.acknowledged[number] = receipt.lsn
        self.cluster.check_acknowledged(Position(receipt.lsn, receipt.digest))

    async def _read(self, server: object) -> None:
        known = list(self.acknowledged)[-1:]
        count = len(self.acknowledged)
        with contextlib.suppress(PeerError, Unavailable, UnknownRealm):
            keys = [self.name.encode(), *map(self.key, known)]
            total, *values = await server.get_many(REALM, keys, timeout_s=_TIMEOUT_S)  # type: ignore[attr-defined]
            self.reads += 1
            if self.lossy:
                return
            if None in values or int(total or 0) < count:
                raise BrokenPromise(
                    f"G1: {self.name} reads {total!r} and {values!r:.60}, with {count} acknowledged, last {known}"
                )


def check(writers: list[Writer], state: dict[bytes, bytes], *, lossless: bool) -> None:
    """What is there in the end is what was promised.

    Raises:
        BrokenPromise.
    """
    for one in writers:
        prefix = one.name.encode() + b"/"
        there = {int(key[len(prefix) :]) for key in state if key.startswith(prefix)}
        total = int(state.get(one.name.encode(), b"0"))
        if total != len(there):
            raise BrokenPromise(f"G2, G6: {one.name} has {len(there)} keys, and has counted {total}")
        lost = sorted(set(one.acknowledged) - there)
        if lossless and lost:
            raise BrokenPromise(f"G1: {one.name}: acknowledged and gone: {lost[:10]}")
        if refused := sorted(one.refused & there):
            raise BrokenPromise(f"{one.name}: refused, and there: {refused[:10]}")
        if unknown := sorted(there - set(range(1, one.tried + 1))):
            raise BrokenPromise(f"{one.name}: never written, and there: {unknown[:10]}")
