"""Direct clients that write, delete, wait and read, and remember what they were told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from sim.cluster import BrokenPromise, Cluster

from understudy.client import AsyncServer, aconnect
from understudy.common.errors import OutcomeUnknown, PeerError, Unavailable, UnderstudyError, UnknownRealm
from understudy.common.operations import Add, Delete, DeleteRange, Operation, Put
from understudy.common.types import Lsn, Position

REALM = "/accounts"
_TIMEOUT_S = 5.0
_DELETED_MAX = 30  # leaves, by one range
_READ_MAX = 5  # deleted leaves, at a time


@dataclass(frozen=True, slots=True)
class Deletion:
    """Whose leaves a transaction deletes.

    Attributes:
        range: numbers of transactions before it.
        surely: those of them that were acknowledged before it was sent; the others may come after it.
    """

    range: range
    surely: frozenset[int]


@dataclass
class Writer:
    """One client: it puts `name/number` and a leaf, and adds one to `name`, in the same transaction.

    The first stays for good, so in any state one sees which transactions it has; some delete leaves of earlier ones.

    Attributes:
        acknowledged: numbers, with the LSN that was told.
        refused: numbers that the server surely did not apply.
        deletions: of the transactions that delete.
        tried: how many there are.
    """

    cluster: Cluster
    name: str
    acknowledged: dict[int, Lsn] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    deletions: dict[int, Deletion] = field(default_factory=dict)
    tried: int = 0
    pause_s: float = 0.02
    size: int = 50
    stopped: bool = False

    def start(self) -> None:
        """A process of its own on a machine of its own."""
        self.cluster.lab.start(self.name, self.name, self._run)

    def key(self, number: int) -> bytes:
        """Of a transaction."""
        return f"{self.name}/{number:06}".encode()

    def leaf(self, number: int) -> bytes:
        """Another key of it, which a later one may delete."""
        return f"{self.name}.leaf/{number:06}".encode()

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
            self.cluster.lab.universe.problems.append(f"{self.name}: {error!r}")

    async def _write(self, server: AsyncServer) -> None:
        self.tried += 1
        number = self.tried
        try:
            receipt = await server.commit(REALM, self._operations(number), timeout_s=_TIMEOUT_S)
        except OutcomeUnknown:
            return
        except (UnderstudyError, asyncio.CancelledError) as error:
            if isinstance(error, UnderstudyError):
                self.refused.add(number)
            return
        self.acknowledged[number] = receipt.lsn
        self.cluster.check_acknowledged(Position(receipt.lsn, receipt.digest))

    def _operations(self, number: int) -> list[Operation]:
        put: list[Operation] = [
            Put(self.key(number), b"v"),
            Put(self.leaf(number), b"v" * self.size),
            Add(self.name.encode(), 1),
        ]
        chance = self.cluster.lab.universe.rng.random()
        return put if chance > 0.3 or number == 1 else [*put, self._delete(number, one=chance < 0.2)]

    def _delete(self, number: int, *, one: bool) -> Operation:
        rng = self.cluster.lab.universe.rng
        first = rng.randrange(1, number)
        stop = first + 1 if one else rng.randrange(first, min(number, first + _DELETED_MAX)) + 1
        deleted = range(first, stop)
        self.deletions[number] = Deletion(deleted, self.acknowledged.keys() & frozenset(deleted))
        return Delete(self.leaf(first)) if one else DeleteRange(self.leaf(first), self.leaf(stop))

    async def _read(self, server: AsyncServer) -> None:
        known = list(self.acknowledged)[-1:]
        count = len(self.acknowledged)
        deleted = [leaf for one in known if one in self.deletions for leaf in self.deletions[one].surely]
        with contextlib.suppress(PeerError, Unavailable, UnknownRealm):
            keys = [self.name.encode(), *map(self.key, known), *map(self.leaf, sorted(deleted)[:_READ_MAX])]
            total, *values = await server.get_many(REALM, keys, timeout_s=_TIMEOUT_S)
            if not self.cluster.is_lossless:
                return
            if None in values[: len(known)] or int(total or 0) < count:
                raise BrokenPromise(
                    f"G1: {self.name} reads {total!r} and {values!r:.60}, with {count} acknowledged, last {known}"
                )
            if any(values[len(known) :]):
                raise BrokenPromise(f"G1: {self.name} reads what {known} has deleted: {keys} {values!r:.60}")

    # -- what a state shows ----------------------------------------------------------------------------------

    def shown(self, state: dict[bytes, bytes]) -> set[int]:
        """The transactions that a state has; any of a node at any time.

        Raises:
            BrokenPromise: it has one in part, or one that never was.
        """
        there = numbers(state, f"{self.name}/")
        total = int(state.get(self.name.encode(), b"0"))
        if total != len(there):
            raise BrokenPromise(f"G2, G6: {self.name} has {len(there)} keys, and has counted {total}")
        if refused := sorted(self.refused & there):
            raise BrokenPromise(f"{self.name}: refused, and there: {refused[:10]}")
        if unknown := sorted(there - set(range(1, self.tried + 1))):
            raise BrokenPromise(f"{self.name}: never written, and there: {unknown[:10]}")
        self._check_leaves(there, numbers(state, f"{self.name}.leaf/"))
        return there

    def _check_leaves(self, there: set[int], leaves: set[int]) -> None:
        deletions = [one for number, one in self.deletions.items() if number in there]
        may_be_gone = _all(one.range for one in deletions)
        if part := sorted((leaves - there) | (there - may_be_gone - leaves)):
            raise BrokenPromise(f"G2: {self.name}: there in part: {part[:10]}")
        # Where transactions get lost, one may come home behind the one that has deleted its leaf.
        if self.cluster.is_lossless and (left := sorted(leaves & _all(one.surely for one in deletions))):
            raise BrokenPromise(f"G1, G2: {self.name}: deleted and there: {left[:10]}")


def _all(parts: Iterable[Iterable[int]]) -> set[int]:
    return set().union(*parts)


def numbers(state: dict[bytes, bytes], prefix: str) -> set[int]:
    """Those that a state has keys of behind ``prefix``."""
    start = prefix.encode()
    return {int(key[len(start) :]) for key in state if key.startswith(start)}


def check(writers: list[Writer], state: dict[bytes, bytes]) -> None:
    """What is there in the end is what was promised.

    Raises:
        BrokenPromise.
    """
    for one in writers:
        there = one.shown(state)
        lost = sorted(set(one.acknowledged) - there)
        if one.cluster.is_lossless and lost:
            raise BrokenPromise(f"G1: {one.name}: acknowledged and gone: {lost[:10]}")
