"""The demo's story: two nodes, a load, a kill, a promotion, a rewind, and the proof at the end."""

from __future__ import annotations

import asyncio
import contextlib
import platform
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from understudy.cli.demo_ledger import Tally
from understudy.cli.demo_library import Importer, differing_files, find_library
from understudy.cli.demo_processes import Node, run_command
from understudy.cli.demo_screen import Screen
from understudy.cli.demo_watch import Watch
from understudy.cli.demo_writers import Writers
from understudy.cli.output import seconds_text, size_text
from understudy.client import aconnect
from understudy.common.errors import UnderstudyError

# How long the promoted node waits for a replica before it acknowledges alone. Whoever has just lost one node of two
# wants writes to go on now, and full durability as soon as the other node is back.
DEGRADE_AFTER_S = 1
_POLL_S = 0.02
_WAIT_S_MAX = 60.0  # for what should take a second or two


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """The real data."""

    files: int
    file_bytes: int
    realms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failover:
    """From the kill to the first transaction that the new primary made and acknowledged."""

    without_primary_s: float
    promote_s: float  # the command, from start to end
    under_way: int  # transactions that nobody had answered then


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewound:
    """What it took to make the old primary a replica."""

    seconds: float  # the command, from start to end
    entries_exported: int
    bytes_fetched: int
    bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was found in the end."""

    tally: Tally
    files_differing: int
    problems: list[str]  # from comparing the nodes
    lsn: int  # at which they were compared

    @property
    def is_good(self) -> bool:
        """Whether everything that was promised was kept."""
        return self.tally.is_clean and not self.files_differing and not self.problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All that came of it."""

    imported: Imported
    failover: Failover
    answered_again: int
    rewound: Rewound
    proof: Proof


class Story:
    """Everything that happens, in order."""

    def __init__(self, folder: Path, *, writers: int, seconds: float, screen: Screen) -> None:
        self._folder = folder
        self._first = Node("first", folder)
        self._second = Node("second", folder)
        self._library = find_library()
        self._writers = Writers(writers)
        self._seconds = seconds
        self._screen = screen

    async def play(self) -> Outcome:
        """From the start of two nodes to the proof; nothing runs any more when this returns or raises.

        Raises:
            UnderstudyError: it could not be played to its end.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._stop_nodes)
            await self._start_nodes()
            watch = Watch([self._first, self._second])
            stack.push_async_callback(watch.close)
            await stack.enter_async_context(watch.showing(self._screen, self._writers))
            stack.push_async_callback(self._writers.close)
            return await self._play(watch)

    async def _play(self, watch: Watch) -> Outcome:
        imported = await self._import()
        self._writers.start(f"{self._first.address},{self._second.address}")
        count = len(self._writers.ledgers)
        self._screen.tell(f"{count} writers begin; acknowledged means durable on both nodes")
        await self._pause(self._seconds / 2)
        failover = await self._fail_over()
        rewound = await self._bring_back(watch)
        await self._pause(self._seconds / 2)
        await self._writers.stop()
        self._screen.tell(f"the writers are done: {self._writers.acknowledged:,} transactions acknowledged")
        return Outcome(
            imported=imported,
            failover=failover,
            answered_again=self._writers.answered_again,
            rewound=rewound,
            proof=await self._prove(watch),
        )

    async def _stop_nodes(self) -> None:
        await asyncio.gather(self._first.stop(), self._second.stop())

    # -- scenes --------------------------------------------------------------------------------------------

    async def _start_nodes(self) -> None:
        self._screen.tell(f"two nodes start in {self._folder}")
        await self._first.start_primary("--durability", "replica")
        self._screen.tell(f"first is the primary, on {self._first.address}")
        await self._second.start_replica(self._first.address)
        self._screen.tell(f"second is its replica, on {self._second.address}")

    async def _import(self) -> Imported:
        async with aconnect(self._first.address) as server:
            importer = Importer(server, self._library)
            await importer.run()
        python = platform.python_version()
        self._screen.tell(
            f"imported Python {python}'s standard library: {importer.files:,} files, {size_text(importer.bytes)}"
        )
        return Imported(files=importer.files, file_bytes=importer.bytes, realms=len(self._library.realms))

    async def _fail_over(self) -> Failover:
        killed_s = time.monotonic()
        await self._first.kill()
        self._screen.tell(f"killed first (SIGKILL), after {self._writers.acknowledged:,} transactions")
        began_s = time.monotonic()
        promotion = await run_command("promote", str(self._second.directory))
        promote_s = time.monotonic() - began_s
        under_way = self._writers.under_way
        self._writers.begin_reign(promotion["lsn"])
        self._screen.tell(f"promoted second in {seconds_text(promote_s)}: epoch {promotion['epoch']} begins")
        await self._second.start_primary("--durability", "replica", "--degrade-after", str(DEGRADE_AFTER_S))
        self._screen.tell(
            f"second is the primary; with no replica for {DEGRADE_AFTER_S} s it acknowledges alone"
        )

        async def is_answered() -> bool:
            return self._writers.first_new_s is not None

        await self._until(is_answered, "transaction acknowledged by the new primary")
        assert self._writers.first_new_s is not None
        without_s = self._writers.first_new_s - killed_s
        self._screen.tell(f"the writers go on, after {seconds_text(without_s)} without a primary")
        return Failover(without_primary_s=without_s, promote_s=promote_s, under_way=under_way)

    async def _bring_back(self, watch: Watch) -> Rewound:
        began_s = time.monotonic()
        facts = await run_command(
            "rewind", str(self._first.directory), "--to", self._second.address, "--id", self._first.name
        )
        rewound = Rewound(
            seconds=time.monotonic() - began_s,
            entries_exported=facts["entries_exported"],
            bytes_fetched=facts["bytes_fetched"],
            bytes_total=facts["bytes_total"],
        )
        self._screen.tell(
            f"rewound first: {rewound.entries_exported:,} entries only it had are exported, "
            f"{size_text(rewound.bytes_fetched)} fetched"
        )
        await self._first.start_replica(self._second.address)

        async def is_safe_again() -> bool:
            status = await watch.status(self._second)
            return status is not None and status.durability == "replica"

        await self._until(is_safe_again, "return to durability replica")
        self._screen.tell("first is the replica now; acknowledged means durable on both again")
        return rewound

    async def _prove(self, watch: Watch) -> Proof:
        async def has_caught_up() -> bool:
            primary, replica = await watch.status(self._second), await watch.status(self._first)
            return primary is not None and replica is not None and primary.lsn == replica.committed_lsn

        await self._until(has_caught_up, "replica that has caught up")
        async with aconnect(self._second.address) as server:
            tally = await self._writers.tally(server)
            differing = await differing_files(server, self._library)
        self._screen.tell("looked for every transaction and every file")
        compared = await run_command(
            "verify", "--server", self._second.address, "--against", self._first.address
        )
        self._screen.tell("compared both nodes")
        return Proof(
            tally=tally, files_differing=differing, problems=compared["problems"], lsn=compared["lsn"]
        )

    # -- waiting -------------------------------------------------------------------------------------------

    def _check(self) -> None:
        for node in (self._first, self._second):
            node.check()
        self._writers.check()

    async def _pause(self, seconds: float) -> None:
        """Lets the writers write."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self._check()
            await asyncio.sleep(_POLL_S)

    async def _until(self, condition: Callable[[], Awaitable[bool]], what: str) -> None:
        end_s = time.monotonic() + _WAIT_S_MAX
        while not await condition():
            self._check()
            if time.monotonic() > end_s:
                raise UnderstudyError(
                    f"no {what} within {_WAIT_S_MAX:g} s", remedy=f"the logs are in {self._folder}"
                )
            await asyncio.sleep(_POLL_S)
