"""Clients that read from one node, whatever its role is, and what they may see there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from sim.cluster import BrokenPromise, Cluster, Node
from sim.devices import Device
from sim.universe import Process
from sim.writers import REALM, Writer

from understudy.client import AsyncServer, aconnect
from understudy.common.errors import UnderstudyError, UnknownRealm
from understudy.common.types import Durability

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class View:
    """What a node has shown, and of which copy and by which process.

    Attributes:
        version: of the realm. Each of its transactions counts one thing, so they add up to it.
        shown: all keys that stay for good.
    """

    copy: int | None
    process: Process | None
    version: int
    shown: frozenset[bytes]
    pairs: dict[bytes, bytes]


@dataclass
class Views:
    """The latest of each node, which later ones must follow from.

    A copy only grows, whatever becomes of its node's process: what it shows is durable there. Who rewinds a node,
    or puts an earlier copy back, gives it another; a replica that fetches another for itself never goes back.
    """

    cluster: Cluster
    writers: Sequence[Writer]
    devices: Sequence[Device]
    count: int = 0
    _latest: dict[str, View] = field(default_factory=dict)

    def begin(self, node: Node) -> _Reading:
        """Before a reading, which may then see what is there already, and more."""
        least = self._latest.get(node.name)
        acknowledged = {}
        if self.cluster.durability is Durability.APPLIED:  # visible on every node, then
            acknowledged = {writer.name: frozenset(writer.acknowledged) for writer in self.writers}
        return _Reading(node, node.copy, node.process, least, acknowledged)

    def note(self, reading: _Reading, pairs: dict[bytes, bytes]) -> View:
        """After it.

        Raises:
            BrokenPromise: no such state can be.
        """
        self.count += 1
        shown = {one.name: one.shown(pairs) for one in self.writers}
        for device in self.devices:
            device.shown(pairs)
        if self.cluster.is_lossless:
            self._check_prefix(reading, shown)
        view = self._view(reading, pairs)
        if not self.cluster.is_tampered_with:
            _check_follows(reading, view)
        latest = self._latest.get(reading.node.name)
        if latest is None or latest.copy != view.copy or latest.version <= view.version:
            self._latest[reading.node.name] = view
        return view

    def _view(self, reading: _Reading, pairs: dict[bytes, bytes]) -> View:
        node = reading.node
        names = [one.name for one in (*self.writers, *self.devices)]
        return View(
            copy=node.copy if node.copy == reading.copy else None,
            process=node.process if node.process is reading.process else None,
            version=sum(int(pairs.get(name.encode(), b"0")) for name in names),
            shown=frozenset(key for key in pairs if b"/" in key and b"." not in key),
            pairs=pairs,
        )

    def _check_prefix(self, reading: _Reading, shown: dict[str, set[int]]) -> None:
        """Of what was acknowledged, which no history lacks, all is there up to the last that is."""
        known = {one.name: one.acknowledged for one in self.writers}
        there = [lsn for name, of in known.items() for number, lsn in of.items() if number in shown[name]]
        last = max(there, default=0)
        for name, of in known.items():
            missing = [number for number, lsn in of.items() if lsn < last and number not in shown[name]]
            if missing:
                raise BrokenPromise(
                    f"G2: {reading.node} shows LSN {last}, and lacks {missing[:10]} of {name}"
                )
            if missing := sorted(reading.acknowledged.get(name, frozenset()) - shown[name]):
                raise BrokenPromise(f"G1: {reading.node} does not show {missing[:10]} of {name}, as applied")


@dataclass(frozen=True, slots=True)
class _Reading:
    """One that is under way.

    Attributes:
        acknowledged: what must be visible.
    """

    node: Node
    copy: int | None
    process: Process | None
    least: View | None
    acknowledged: dict[str, frozenset[int]]


def _check_follows(reading: _Reading, view: View) -> None:
    least = reading.least
    if least is None:
        return
    is_same_copy = view.copy is not None and view.copy == least.copy
    is_same_process = view.process is not None and view.process is least.process
    if not (is_same_copy or is_same_process):
        return
    if gone := sorted(least.shown - view.shown):
        raise BrokenPromise(
            f"G2: {reading.node} has shown version {least.version}, now {view.version} without {gone[:10]}"
        )
    if least.version == view.version and least.pairs != view.pairs:
        raise BrokenPromise(f"G2: {reading.node} shows version {view.version} in two ways")


@dataclass
class Reader:
    """One client: it stays with a node for a while, and then with another."""

    cluster: Cluster
    name: str
    views: Views
    pause_s: float = 1.0
    stopped: bool = False

    def start(self) -> None:
        """A process of its own on a machine of its own."""
        self.cluster.lab.start(self.name, self.name, self._run)

    async def _run(self) -> None:
        rng = self.cluster.lab.universe.rng
        while not self.stopped:
            node = rng.choice(self.cluster.nodes)
            try:
                async with aconnect(node.address, timeout_s=_TIMEOUT_S) as server:
                    for _ in range(rng.randrange(2, 20)):
                        await self._read(server, node)
                        await asyncio.sleep(rng.expovariate(1 / self.pause_s))
            except UnderstudyError:
                await asyncio.sleep(rng.uniform(0.1, 1.0))

    async def _read(self, server: AsyncServer, node: Node) -> None:
        """Everything, in pages of one state."""
        reading = self.views.begin(node)
        try:
            pairs = {key: value async for key, value in server.scan(REALM, timeout_s=_TIMEOUT_S)}
        except UnknownRealm:
            pairs = {}
        self.views.note(reading, pairs)
