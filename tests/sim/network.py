"""Connections between machines, with delays, cuts and partitions: what carries gRPC's calls in a simulated network.

Frames of one connection arrive in order, as TCP has it; between connections there is no order. What a partition holds
up arrives when it has gone, if anybody still waits for it; a client whose peer says nothing for :data:`KEEPALIVE_S`
takes the connection for lost, as gRPC's keepalive does.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from sim.universe import Process, Universe

KEEPALIVE_S = 15.0
LATENCY_S = (30e-6, 400e-6)
WINDOW_BYTES = 1 << 20  # of one call and direction, on their way

Frame = tuple[str, Any]


@dataclass(frozen=True, slots=True)
class Started:
    """A call's headers."""

    method: str
    invocation_metadata: tuple[tuple[str, Any], ...]


class CallAtServer(Protocol):
    """A call's end at the server."""

    def receive(self, kind: str, content: Any) -> None:
        """A frame from the client."""

    def cancel(self) -> None:
        """The client has gone away."""


class CallAtClient(Protocol):
    """A call's end at the client."""

    def receive(self, kind: str, content: Any) -> None:
        """A frame from the server."""

    def end(self, code: grpc.StatusCode, details: str, trailing: Sequence[tuple[str, Any]]) -> None:
        """The call is over."""


class Listener(Protocol):
    """Who takes the calls at an address."""

    process: Process

    def begin(self, connection: Connection, number: int, started: Started) -> CallAtServer:
        """A call has come."""


class Network:
    """All machines' connections.

    Attributes:
        latency_s: lowest and highest time that a message takes.
    """

    def __init__(self, universe: Universe) -> None:
        self.universe = universe
        self.latency_s = LATENCY_S
        self.servers: dict[str, Listener] = {}
        self.blocked: Counter[tuple[str, str]] = Counter()  # from, to; by how many partitions
        self.connections: list[Connection] = []

    def is_blocked(self, source: str, target: str) -> bool:
        """Whether nothing gets from one machine to another."""
        return source != target and self.blocked[source, target] > 0

    def block(self, ways: Sequence[tuple[str, str]]) -> None:
        """Nothing gets from the one to the other of each any more."""
        self.blocked.update(ways)

    def unblock(self, ways: Sequence[tuple[str, str]]) -> None:
        """One partition is over; what only it has held up arrives."""
        self.blocked.subtract(ways)
        for one in list(self.connections):
            one.unblock()

    def heal(self) -> None:
        """All machines reach each other again, and what was held up arrives."""
        self.unblock(list(self.blocked.elements()))

    def delay_s(self) -> float:
        """Of one message."""
        return self.universe.rng.uniform(*self.latency_s)

    def cut(self, one: Connection) -> None:
        """Breaks a connection, as a reset does."""
        self.universe.trace("cut", one)
        one.down.send(("lost", "Connection reset by peer"))
        one.up.send(("lost", "Connection reset by peer"))

    def lose(self, process: Process) -> None:
        """A process has ended; the kernel tells its peers."""
        for address in [address for address, server in self.servers.items() if server.process is process]:
            del self.servers[address]
        for one in list(self.connections):
            if one.client is process:
                one.up.send(("lost", "peer has gone"))
            if one.server.process is process:
                one.down.send(("lost", "Socket closed"))


class _Way:
    """One direction of a connection: what was sent arrives in order, or waits."""

    def __init__(
        self, network: Network, source: Process, target: Process, arrive: Callable[[Frame], None]
    ) -> None:
        self._network = network
        self._source, self._target = source, target
        self._arrive = arrive
        self._free_s = 0.0
        self._frames: deque[Frame] = deque()  # sent, and not there yet
        self._coming = (
            0  # how many of them have a time at which they arrive, unless a partition is in the way
        )
        self.is_dead = False

    @property
    def is_blocked(self) -> bool:
        return self._network.is_blocked(self._source.machine, self._target.machine)

    def send(self, frame: Frame) -> None:
        if not self.is_dead:
            self._frames.append(frame)
            self._schedule()

    def _schedule(self) -> None:
        universe = self._network.universe
        self._free_s = max(self._free_s + 1e-7, universe.now_s + self._network.delay_s())
        self._coming += 1
        universe.at(self._free_s - universe.now_s, self._come, self._target)

    def _come(self) -> None:
        self._coming -= 1
        if not self.is_dead and not self.is_blocked:
            self._arrive(self._frames.popleft())

    def unblock(self) -> None:
        for _ in range(len(self._frames) - self._coming):
            self._schedule()


class Connection:
    """A client's to a server, with the calls on it; ``is_local``: over the server's Unix socket."""

    def __init__(self, network: Network, client: Process, server: Listener, *, is_local: bool) -> None:
        self.client, self.server = client, server
        self.is_local = is_local
        self._network = network
        self.calls: dict[int, CallAtClient] = {}
        self.handled: dict[int, CallAtServer] = {}
        self.up = _Way(network, client, server.process, self._at_server)
        self.down = _Way(network, server.process, client, self._at_client)
        self.is_lost = False  # as the client sees it
        self.numbers = itertools.count(1)
        network.connections.append(self)
        self._look()

    def __str__(self) -> str:
        return f"{self.client.name}->{self.server.process.name}"

    def unblock(self) -> None:
        """A partition has gone."""
        self.up.unblock()
        self.down.unblock()

    def _look(self) -> None:
        self._network.universe.at(KEEPALIVE_S, self._keep_alive, self.client)

    def _keep_alive(self) -> None:
        if self.is_lost:
            return
        if self.calls and (self.up.is_blocked or self.down.is_blocked or not self.server.process.is_alive):
            self.lose_client("keepalive watchdog timeout")
            self.up.send(("lost", "peer has gone"))
            return
        self._look()

    def lose_client(self, why: str) -> None:
        """The client's end is gone; its calls fail."""
        if self.is_lost:
            return
        self.is_lost = True
        self.down.is_dead = True
        for call in list(self.calls.values()):
            call.end(grpc.StatusCode.UNAVAILABLE, why, ())
        self._forget()

    def _forget(self) -> None:
        if self.is_lost and self.up.is_dead:
            with contextlib.suppress(ValueError):
                self._network.connections.remove(self)

    def _at_client(self, frame: Frame) -> None:
        kind, content = frame
        if kind == "lost":
            self.lose_client(content)
            return
        number, content = content
        call = self.calls.get(number)
        if call is not None:
            call.receive(kind, content)

    def _at_server(self, frame: Frame) -> None:
        kind, content = frame
        if kind == "lost":
            self.up.is_dead = True
            for handled in list(self.handled.values()):
                handled.cancel()
            self._forget()
            return
        number, content = content
        if kind == "call":
            self.handled[number] = self.server.begin(self, number, content)
        elif number in self.handled:
            self.handled[number].receive(kind, content)


def place(address: str) -> str:
    """Where an address leads, whichever way it is written."""
    if not address.startswith("unix:"):
        return address
    folder, name = os.path.split(address.removeprefix("unix:"))
    return f"unix:{os.path.join(os.path.realpath(folder), name)}"


_machines: dict[str, str] = {}


def network_machine(address: str) -> str:
    """The machine that has an address, whether anybody listens there or not."""
    return _machines.get(address, "")


def name_machine(address: str, machine: str) -> None:
    """From now on, ``machine`` has the address."""
    _machines[address] = machine
