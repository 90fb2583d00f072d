"""Nodes on machines of their own, and the operator who starts, promotes, rewinds and restores them."""

from __future__ import annotations

import asyncio
import functools
import itertools
import shutil
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from sim.lab import Lab
from sim.network import name_machine
from sim.universe import Process

from understudy.common.directory import NODE_FILE, DataDirectory, NodeFile, Role
from understudy.common.engine import Engine
from understudy.common.errors import StorageFailed, UnderstudyError
from understudy.common.locator import span_of
from understudy.common.settings import PrimarySettings, ReplicaSettings
from understudy.common.types import START, Durability, Lsn, Position
from understudy.primary.server import serving_primary, succeeding
from understudy.replica.promote import promote_directory
from understudy.replica.rewind import rewind
from understudy.replica.server import serving_replica

FIRST_PORT = 7001


class BrokenPromise(AssertionError):
    """The product has not done what it promises."""


class Node:
    """A machine with a data directory.

    Attributes:
        process: that serves from it, or did last.
        server: it, while it serves.
        busy: a tool of the operator's is at work on the directory.
        why: what the last process ended with.
    """

    def __init__(self, cluster: Cluster, index: int) -> None:
        self.cluster = cluster
        self.name = f"n{index}"
        self.path = cluster.lab.machine(self.name) / "data"
        self.address = f"127.0.0.1:{FIRST_PORT + index}"
        name_machine(self.address, self.name)
        self.process: Process | None = None
        self.server: Any = None
        self.busy: Process | None = None
        self.why: Exception | None = None
        self.starts = 0

    def __str__(self) -> str:
        return self.name

    @property
    def disk(self) -> Any:
        """The machine's."""
        return self.cluster.lab.disks[self.name]

    @property
    def is_up(self) -> bool:
        """Whether its process lives."""
        return self.process is not None and self.process.is_alive

    @property
    def is_busy(self) -> bool:
        """Whether a tool is at work."""
        return self.busy is not None and self.busy.is_alive

    @property
    def role(self) -> Role | None:
        """As its file says; None where there is none."""
        path = self.path / NODE_FILE
        return NodeFile.read(path).role if path.exists() else None

    @property
    def copy(self) -> int | None:
        """Tells its copies apart: which folder its store is in; None where there is none."""
        store = self.path / "store"
        return store.stat().st_ino if store.exists() else None

    @property
    def engine(self) -> Engine | None:
        """Of the process that serves; None where none does, or has no copy yet."""
        if not self.is_up or self.server is None:
            return None
        try:
            engine: Engine = self.server.node.engine
        except UnderstudyError:
            return None
        return engine

    @property
    def healing_since(self) -> Lsn | None:
        """The LSN that began its reign, while it takes in nothing but what comes home."""
        engine = self.engine
        window = getattr(self.server.node, "heal_window", None) if engine is not None else None
        if engine is None or window is None or not window.is_open(self.cluster.lab.universe.now_s):
            return None
        return Lsn(engine.state.epochs[-1].info.first_lsn)

    def holds(self, position: Position) -> bool | None:
        """Whether the node's log has the entry; None where that can't be told.

        Raises:
            BrokenPromise: it has, but a power loss could take it.
        """
        engine = self.engine
        if engine is None or engine.failed is not None or position.lsn < engine.log.first_lsn:
            return None
        try:
            if engine.durable.lsn < position.lsn or engine.log.position_at(position.lsn) != position:
                return False
            start, stop = (engine.log.offset_behind(Lsn(lsn)) for lsn in (position.lsn - 1, position.lsn))
        except StorageFailed:  # the log has failed, and its owner has not heard of it yet
            return None
        if start is None or stop is None:
            return None
        segment, _ = engine.log._segment_at(start)
        if not self.disk.is_durable(segment.path, segment.byte_of(start), segment.byte_of(stop)):
            raise BrokenPromise(f"G1: entry {position.lsn} is not durable on {self}")
        return True

    # -- the operator's commands -------------------------------------------------------------------------------

    def start(self, *, as_replica: bool = False) -> None:
        """`understudy primary` or `understudy replica`, as the directory is."""
        if self.is_up or self.is_busy:
            return
        role = self.role
        serve = self._replica if as_replica or role in (Role.REPLICA, Role.INSTALLING) else self._primary
        self.starts += 1
        self.cluster.lab.universe.trace("start", self, role, "")
        self.process = self.cluster.lab.start(f"{self.name}.{self.starts}", self.name, serve)
        self.process.wake_s = self.disk.sync_s

    async def _primary(self) -> None:
        await self._serve(serving_primary(self._primary_settings), lambda server: server.node.failed)

    @property
    def _primary_settings(self) -> PrimarySettings:
        return PrimarySettings(
            data_dir=self.path,
            listen=self.address,
            durability=self.cluster.durability,
            sync_replicas=self.cluster.sync_replicas,
            log_floor_bytes=self.cluster.log_floor_bytes,
            heal_window_s=self.cluster.heal_window_s,
        )

    async def _replica(self) -> None:
        others = ",".join(node.address for node in self.cluster.nodes if node is not self)
        settings = ReplicaSettings(
            data_dir=self.path,
            listen=self.address,
            primary=others,
            id=self.name,
            log_floor_bytes=self.cluster.log_floor_bytes,
        )
        succession = functools.partial(succeeding, self._primary_settings)
        await self._serve(serving_replica(settings, succession), lambda server: server.node.ended)

    async def _serve(self, serving: Any, ended: Callable[[Any], asyncio.Future[Any]]) -> None:
        self.why = None
        try:
            async with serving as server:
                self.server = server
                error = await ended(server)
            if error is not None:
                raise error
        except UnderstudyError as error:
            self.why = error
            raise

    def promote(self, *, serve: bool = False) -> None:
        """`understudy promote`, whether it runs or not; then it is started as a primary, unless its process serves."""

        async def promoting() -> None:
            promotion = await promote_directory(self.path, serve=serve)
            self.cluster.lab.universe.trace(
                "promoted", self, f"epoch {promotion.epoch}", f"lsn {promotion.lsn}", f"serve {serve}"
            )
            self.cluster.promotions += 1

        self._run_tool("promote", promoting())

    def rewind(self, to: Node) -> None:
        """`understudy rewind`."""

        async def rewinding() -> None:
            done = await rewind(self.path, to=to.address, replica_id=self.name)
            self.cluster.lab.universe.trace(
                "rewound", self, done.decision, f"{done.entries_exported} exported"
            )

        self._run_tool("rewind", rewinding())

    def _run_tool(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        lab = self.cluster.lab
        self.why = None
        lab.universe.trace(what, self)

        async def done() -> None:
            try:
                await work
            except (UnderstudyError, BrokenPromise) as error:
                self.why = error
                raise
            self.busy = None

        self.busy = lab.start(f"{self.name}.{what}", self.name, done)

    # -- what befalls it ----------------------------------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL to all that runs there."""
        for process in (self.process, self.busy):
            if process is not None:
                process.kill()

    def lose_power(self) -> None:
        """The machine is off; its disk keeps what it kept."""
        self.cluster.lab.universe.trace("power lost", self)
        for process in (self.process, self.busy):
            if process is not None:
                process.kill(silently=True)
        self.disk.lose_power()

    def copy_to(self, where: Path) -> None:
        """A copy of the stopped node's directory."""
        shutil.rmtree(where, ignore_errors=True)
        shutil.copytree(self.path, where, ignore=shutil.ignore_patterns("control.sock", "lock"))

    def restore(self, copy: Path) -> None:
        """Puts an earlier copy in the directory's place."""
        shutil.rmtree(self.path)
        shutil.copytree(copy, self.path)
        self.disk.forget()

    def wipe(self) -> None:
        """Empties the directory of the stopped node."""
        shutil.rmtree(self.path)
        self.disk.forget()
        self.why = None

    # -- what an examiner finds ---------------------------------------------------------------------------------

    def examine(self) -> tuple[int, Position]:
        """Epoch and head of the stopped node, as its files say.

        Raises:
            UnderstudyError: they can't be opened.
            BrokenPromise: they tell of epochs that can't be.
        """
        found: list[tuple[int, Position]] = []

        async def look() -> None:
            with DataDirectory.open_existing(self.path) as directory:
                if not directory.has_copy:
                    found.append((0, START))
                    return
                engine = Engine.open(directory)
                check_epochs(self, engine)
                found.append((engine.epoch, engine.durable))
                await engine.close()

        self._run_tool("examine", look())
        universe = self.cluster.lab.universe
        universe.run(lambda: not self.is_busy, for_s=60)
        if not found:
            raise self.why or UnderstudyError("it has found nothing")
        return found[0]


def epochs_of(engine: Engine) -> list[tuple[int, Position]]:
    """Each epoch that a node knows of, with the position that it has forked from."""
    spans = [span_of(row.info) for row in engine.state.epochs]
    return [(span.epoch, span.fork) for span in spans]


def check_epochs(node: Node, engine: Engine) -> None:
    """They follow one upon the other, each where the history was by then.

    Raises:
        BrokenPromise.
    """
    epochs = epochs_of(engine)
    for (before, fork_before), (epoch, fork) in itertools.pairwise(epochs):
        if epoch <= before or fork.lsn <= fork_before.lsn:
            raise BrokenPromise(
                f"G7: {node}: epoch {epoch} at {fork.lsn} follows {before} at {fork_before.lsn}"
            )
    for epoch, fork in epochs:
        if engine.log.first_lsn <= fork.lsn and engine.log.position_at(fork.lsn) != fork:
            raise BrokenPromise(f"G3, G7: {node}: epoch {epoch} did not begin at {fork.lsn}")


class Cluster:
    """Nodes that may all become primary.

    Attributes:
        durability: of all acknowledgements.
        heal_window_s: of all primaries.
        promotions: how many there were.
        is_tampered_with: old copies were restored, or disks have decayed: what was promised may be gone.
    """

    def __init__(self, lab: Lab, nodes: int, durability: Durability, log_floor_bytes: int) -> None:
        self.lab = lab
        self.durability = durability
        self.sync_replicas = nodes - 1
        self.log_floor_bytes = log_floor_bytes
        self.heal_window_s = 0.0
        self._acknowledged: Position | None = None  # the last of all
        self._copies: dict[str, int | None] = {}  # that each node had then
        self.promotions = 0
        self.is_tampered_with = False
        self.nodes: list[Node] = []
        for index in range(nodes):
            self.nodes.append(Node(self, index))

    def check_acknowledged(self, position: Position) -> None:
        """An entry that was acknowledged is where its durability says, at this very moment.

        Raises:
            BrokenPromise.
        """
        if self.is_tampered_with:
            return
        self._check_waited(position)
        self._check_held(position, self.nodes)
        if self._acknowledged is None or self._acknowledged.lsn < position.lsn:
            self._acknowledged = position
            self._copies = {node.name: node.copy for node in self.nodes}

    def look(self) -> None:
        """What was acknowledged is still there, wherever it can be looked for.

        A node that was rewound or bootstrapped since has another copy, which may have to catch up.

        Raises:
            BrokenPromise.
        """
        if self.is_lossless and self._acknowledged is not None:
            same = [node for node in self.nodes if node.copy == self._copies[node.name]]
            self._check_held(self._acknowledged, same)

    def _check_waited(self, position: Position) -> None:
        """No primary has taken it in while it was waiting for what comes home."""
        for node in self.nodes:
            begun = node.healing_since
            if begun is not None and position.lsn > begun and node.holds(position):
                raise BrokenPromise(f"entry {position.lsn} is acknowledged, and {node} waits since {begun}")

    def _check_held(self, position: Position, where: Sequence[Node]) -> None:
        found = [node.holds(position) if node in where else None for node in self.nodes]
        needed = 1 if self.durability is Durability.LOCAL else len(self.nodes)
        if len(found) - found.count(False) < needed:
            raise BrokenPromise(
                f"G1: entry {position.lsn} is acknowledged, and not on {needed} nodes: {found}"
            )
        if self.durability is Durability.APPLIED:
            late = [node for node in where if node.engine and node.engine.state.applied.lsn < position.lsn]
            if late:
                raise BrokenPromise(f"G1: entry {position.lsn} is acknowledged, and not applied on {late[0]}")

    @property
    def is_lossless(self) -> bool:
        """Whether what was acknowledged may never be missing, whoever reigns."""
        return self.durability is not Durability.LOCAL and not self.is_tampered_with

    @property
    def addresses(self) -> str:
        """All of them, for a client."""
        return ",".join(node.address for node in self.nodes)

    def primaries(self) -> list[Node]:
        """Nodes that serve as primaries, fenced or not."""
        return [node for node in self.nodes if node.is_up and node.role is Role.PRIMARY]
