"""gRPC in a simulated network: servers and channels as grpc.aio has them, with delays, cuts and partitions between.

Messages are serialized and parsed as on the wire. Those of one connection arrive in order, as TCP has it; between
connections there is no order. What a partition holds up arrives when it has gone, if anybody still waits for it; a
client whose peer says nothing for :data:`KEEPALIVE_S` takes the connection for lost, as gRPC's keepalive does.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from sim.loop import number_of
from sim.universe import Process, Universe

KEEPALIVE_S = 15.0
CONNECT_S = 20.0
WINDOW_BYTES = 1 << 20
LATENCY_S = (30e-6, 400e-6)

Frame = tuple[str, Any]


class Network:
    """All machines' connections.

    Attributes:
        latency_s: lowest and highest time that a message takes.
    """

    def __init__(self, universe: Universe) -> None:
        self.universe = universe
        self.latency_s = LATENCY_S
        self.servers: dict[str, Server] = {}
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

    def __init__(self, network: Network, client: Process, server: Server, *, is_local: bool) -> None:
        self.client, self.server = client, server
        self.is_local = is_local
        self._network = network
        self.calls: dict[int, ClientCall] = {}
        self.handled: dict[int, ServerCall] = {}
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
            self.handled[number] = ServerCall(self, number, content)
        elif number in self.handled:
            self.handled[number].receive(kind, content)


# -- the server's side ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Started:
    """A call's headers."""

    method: str
    invocation_metadata: tuple[tuple[str, Any], ...]


class Server:
    """As ``grpc.aio.server()`` gives one."""

    def __init__(self, network: Network, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> None:
        assert network.universe.current is not None
        self.network = network
        self.process = network.universe.current
        self.interceptors = interceptors
        self.handlers: list[grpc.GenericRpcHandler] = []
        self._addresses: list[str] = []
        self.calls: set[ServerCall] = set()

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Who is asked for the handler of a call."""
        self.handlers.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """What generated code adds beside the generic ones, which say the same."""

    def add_insecure_port(self, address: str) -> int:
        """Will listen there; the port."""
        self._addresses.append(_place(address))
        return int(address.rpartition(":")[2]) if not address.startswith("unix:") else 1

    async def start(self) -> None:
        """Listens."""
        for address in self._addresses:
            self.network.servers[address] = self
            if address.startswith("unix:"):
                _touch(address.removeprefix("unix:"))

    async def stop(self, grace: float | None) -> None:
        """Takes no more calls; those under way may finish."""
        for address in self._addresses:
            if self.network.servers.get(address) is self:
                del self.network.servers[address]
        if self.calls:
            await asyncio.wait([call.task for call in self.calls], timeout=grace or 0)
        for call in list(self.calls):
            call.cancel()
        for one in list(self.network.connections):
            if one.server is self:
                one.down.send(("lost", "Socket closed"))
        await asyncio.sleep(0)


def _touch(socket: str) -> None:
    Path(socket).touch()


def _place(address: str) -> str:
    """Where an address leads, whichever way it is written."""
    if not address.startswith("unix:"):
        return address
    folder, name = os.path.split(address.removeprefix("unix:"))
    return f"unix:{os.path.join(os.path.realpath(folder), name)}"


class ServerCall:
    """A call as its handler's context."""

    __hash__ = number_of  # type: ignore[assignment]

    def __init__(self, connection: Connection, number: int, started: _Started) -> None:
        self._connection = connection
        self._number = number
        self._started = started
        self._inbox: deque[Any] = deque()
        self._half_closed = False
        self._wake: asyncio.Event = asyncio.Event()
        self._ended = False
        self._serialize: Callable[[Any], bytes] = bytes
        self._parse: Callable[[bytes], Any] | None = None
        self._done: list[Callable[[Any], None]] = []
        self._flying = 0
        self._window = asyncio.Event()
        server = connection.server
        server.calls.add(self)
        self.task = server.process.loop.create_task(self._run(server))

    # -- what comes ------------------------------------------------------------------------------------------

    def receive(self, kind: str, content: Any) -> None:
        """A frame from the client."""
        if kind == "message":
            self._inbox.append(content)
        elif kind == "end":
            self._half_closed = True
        elif kind == "taken":
            self._flying -= content
            self._window.set()
        elif kind == "cancel":
            self.cancel()
        self._wake.set()

    def cancel(self) -> None:
        """The client has gone away, or the server stops."""
        self.task.cancel()

    async def _run(self, server: Server) -> None:
        try:
            handler = await self._handler(server)
            if handler is None:
                self._end(grpc.StatusCode.UNIMPLEMENTED, f"no {self._started.method}", ())
                return
            self._parse, self._serialize = handler.request_deserializer, handler.response_serializer
            await self._handle(handler)
        except grpc.aio.AbortError:
            pass
        except asyncio.CancelledError:
            self._end(grpc.StatusCode.CANCELLED, "CANCELLED", ())
        except Exception as error:
            server.network.universe.note_end(f"{server.process.name} {self._started.method}", error)
            self._end(grpc.StatusCode.UNKNOWN, f"Unexpected {error!r}", ())
        finally:
            server.calls.discard(self)
            self._connection.handled.pop(self._number, None)
            for callback in self._done:
                callback(self)

    async def _handler(self, server: Server) -> Any:
        async def found(details: Any) -> Any:
            return next(filter(None, (one.service(details) for one in server.handlers)), None)

        handler = found
        for interceptor in reversed(server.interceptors):
            inner = handler

            async def asked(details: Any, interceptor: Any = interceptor, inner: Any = inner) -> Any:
                return await interceptor.intercept_service(inner, details)

            handler = asked
        return await handler(self._started)

    async def _handle(self, handler: Any) -> None:
        behaviour = handler.stream_stream or handler.stream_unary
        assert behaviour is not None, "the door lets no unary requests through"
        if inspect.isasyncgenfunction(behaviour):
            async for message in behaviour(self._requests(), self):
                await self.write(message)
        else:
            answer = await behaviour(self._requests(), self)
            if handler.stream_unary is not None:
                await self.write(answer)
        self._end(grpc.StatusCode.OK, "", ())

    def _end(self, code: grpc.StatusCode, details: str, trailing: Sequence[tuple[str, Any]]) -> None:
        if not self._ended:
            self._ended = True
            self._connection.down.send(("status", (self._number, (code, details, tuple(trailing)))))

    # -- what a handler asks of its context ------------------------------------------------------------------

    async def read(self) -> Any:
        """The next message, or EOF."""
        while not self._inbox:
            if self._half_closed:
                return grpc.aio.EOF
            self._wake.clear()
            await self._wake.wait()
        raw = self._inbox.popleft()
        self._connection.down.send(("taken", (self._number, len(raw))))
        return raw if self._parse is None else self._parse(raw)

    async def _requests(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    async def write(self, message: Any) -> None:
        """Sends one; waits while too much is on its way."""
        raw = self._serialize(message)
        while self._flying > WINDOW_BYTES:
            self._window.clear()
            await self._window.wait()
        self._flying += len(raw)
        self._connection.down.send(("message", (self._number, raw)))

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[tuple[str, Any]] = ()
    ) -> None:
        """Ends the call."""
        self._end(code, details, trailing_metadata)
        raise grpc.aio.AbortError

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """When the call is over."""
        self._done.append(callback)

    def peer(self) -> str:
        """Who calls."""
        return "unix:" if self._connection.is_local else f"ipv4:127.0.0.1:{self._number % 60_000}"

    def invocation_metadata(self) -> tuple[tuple[str, Any], ...]:
        """What came with the call."""
        return self._started.invocation_metadata


# -- the client's side ---------------------------------------------------------------------------------------


class Channel:
    """As ``grpc.aio.insecure_channel()`` gives one."""

    def __init__(self, network: Network, target: str) -> None:
        assert network.universe.current is not None
        self._network = network
        self._process = network.universe.current
        self._target = _place(target)
        self._connection: Connection | None = None
        self._numbers = 0
        self._calls: list[ClientCall] = []
        self._is_closed = False

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Ends all calls."""
        self._is_closed = True
        for call in list(self._calls):
            call.cancel()
        if self._connection is not None:
            self._connection.up.send(("lost", "closed"))
            self._connection.lose_client("Channel closed!")

    def _multi(self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def begin(
            request: Any = None, timeout: float | None = None, metadata: Any = (), **_: Any
        ) -> ClientCall:
            if self._is_closed:
                raise grpc.aio.UsageError("Channel is closed.")
            self._numbers += 1
            call = ClientCall(
                self, self._numbers, request_serializer or bytes, response_deserializer or bytes, timeout
            )
            self._calls.append(call)
            call.begin(_Started(method, tuple(metadata or ())), request)
            return call

        return begin

    unary_unary = unary_stream = stream_unary = stream_stream = _multi

    def connected(self, then: Callable[[Connection | str], None]) -> None:
        """Calls ``then`` with a connection, or with why there is none."""
        if self._connection is not None and not self._connection.is_lost:
            then(self._connection)
            return
        network, universe = self._network, self._network.universe
        server = network.servers.get(self._target)
        machine = server.process.machine if server is not None else network_machine(self._target)
        if network.is_blocked(self._process.machine, machine) or network.is_blocked(
            machine, self._process.machine
        ):
            universe.at(CONNECT_S, lambda: then("failed to connect: timed out"), self._process)
        elif server is None:
            universe.at(network.delay_s(), lambda: then("Connection refused"), self._process)
        else:
            self._connection = Connection(
                network, self._process, server, is_local=self._target.startswith("unix:")
            )
            then(self._connection)

    def forget(self, call: ClientCall) -> None:
        """It is over."""
        with contextlib.suppress(ValueError):
            self._calls.remove(call)


_machines: dict[str, str] = {}


def network_machine(address: str) -> str:
    """The machine that has an address, whether anybody listens there or not."""
    return _machines.get(address, "")


def name_machine(address: str, machine: str) -> None:
    """From now on, ``machine`` has the address."""
    _machines[address] = machine


class ClientCall:
    """A call as its client sees it."""

    def __init__(
        self,
        channel: Channel,
        number: int,
        serialize: Callable[[Any], bytes],
        parse: Callable[[bytes], Any],
        timeout: float | None,
    ) -> None:
        self._channel = channel
        self._number = number
        self._serialize, self._parse = serialize, parse
        self._connection: Connection | None = None
        self._inbox: deque[bytes] = deque()
        self._unsent: deque[Frame] = deque()  # until there is a connection
        self._flying = 0
        self._status: tuple[grpc.StatusCode, str, tuple[tuple[str, Any], ...]] | None = None
        self._ended: tuple[grpc.StatusCode, str, tuple[tuple[str, Any], ...]] | None = None
        self._is_cancelled = False
        self._wake = asyncio.Event()
        self._callbacks: list[Callable[[Any], None]] = []
        loop = asyncio.get_running_loop()
        self._timer = None if timeout is None else loop.call_later(max(timeout, 0), self._time_out)

    def begin(self, started: _Started, request: Any) -> None:
        """Sends the headers, and the one request of a unary call."""
        self._send("call", started)
        if request is None:
            pass
        elif hasattr(request, "__aiter__"):
            self._feeder = asyncio.get_running_loop().create_task(self._feed(request))
        else:
            self._send("message", self._serialize(request))
            self._send("end", None)
        self._channel.connected(self._on_connection)

    async def _feed(self, requests: AsyncIterator[Any]) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async for one in requests:
                await self.write(one)
            await self.done_writing()

    def _on_connection(self, found: Connection | str) -> None:
        if self.done():
            return
        if isinstance(found, str):
            self.end(grpc.StatusCode.UNAVAILABLE, found, ())
            return
        self._connection = found
        self._number = next(found.numbers)
        found.calls[self._number] = self
        while self._unsent:
            kind, content = self._unsent.popleft()
            found.up.send((kind, (self._number, content)))

    def _send(self, kind: str, content: Any) -> None:
        if self._connection is None:
            self._unsent.append((kind, content))
        else:
            self._connection.up.send((kind, (self._number, content)))

    # -- what comes --------------------------------------------------------------------------------------------

    def receive(self, kind: str, content: Any) -> None:
        """A frame from the server."""
        if kind == "message":
            self._inbox.append(content)
        elif kind == "taken":
            self._flying -= content
        elif kind == "status":
            self.end(*content)
        self._wake.set()

    def end(self, code: grpc.StatusCode, details: str, trailing: Sequence[tuple[str, Any]]) -> None:
        """The call is over."""
        if self._ended is not None:
            return
        self._ended = (code, details, tuple(trailing))
        if self._timer is not None:
            self._timer.cancel()
        if self._connection is not None:
            self._connection.calls.pop(self._number, None)
        self._channel.forget(self)
        self._wake.set()
        for callback in self._callbacks:
            callback(self)

    def _time_out(self) -> None:
        self._send("cancel", None)
        self.end(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", ())

    # -- what grpc.aio offers --------------------------------------------------------------------------------

    def cancel(self) -> bool:
        """Ends it from here."""
        if self.done():
            return False
        self._is_cancelled = True
        self._send("cancel", None)
        self.end(grpc.StatusCode.CANCELLED, "Locally cancelled by application!", ())
        return True

    def cancelled(self) -> bool:
        """Whether it ended so."""
        return self._is_cancelled

    def done(self) -> bool:
        """Whether it is over."""
        return self._ended is not None

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """When it is over."""
        self._callbacks.append(callback)

    async def _until_ended(self) -> tuple[grpc.StatusCode, str, tuple[tuple[str, Any], ...]]:
        while self._ended is None:
            await self._woken()
        return self._ended

    async def code(self) -> grpc.StatusCode:
        """Of the status."""
        return (await self._until_ended())[0]

    async def details(self) -> str:
        """Of the status."""
        return (await self._until_ended())[1]

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        """That came with the status."""
        return grpc.aio.Metadata(*(await self._until_ended())[2])

    async def initial_metadata(self) -> grpc.aio.Metadata:
        """None is sent."""
        return grpc.aio.Metadata()

    def _raise_for_status(self) -> None:
        assert self._ended is not None
        code, details, trailing = self._ended
        if self._is_cancelled:
            raise asyncio.CancelledError
        if code is not grpc.StatusCode.OK:
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)

    async def _woken(self) -> None:
        self._wake.clear()
        try:
            await self._wake.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def read(self) -> Any:
        """The next message, or EOF."""
        while not self._inbox:
            if self._ended is not None:
                self._raise_for_status()
                return grpc.aio.EOF
            await self._woken()
        raw = self._inbox.popleft()
        self._send("taken", len(raw))
        return self._parse(raw)

    async def write(self, message: Any) -> None:
        """Sends one; waits while too much is on its way."""
        if self.done():
            self._raise_for_status()
            raise asyncio.InvalidStateError("RPC already finished.")
        raw = self._serialize(message)
        while self._flying > WINDOW_BYTES:
            if self.done():
                self._raise_for_status()
            await self._woken()
        self._flying += len(raw)
        self._send("message", raw)

    async def done_writing(self) -> None:
        """Nothing more comes from here."""
        self._send("end", None)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    def __await__(self) -> Any:
        return self._unary().__await__()

    async def _unary(self) -> Any:
        message = await self.read()
        if message is grpc.aio.EOF:
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), "no answer"
            )
        return message
