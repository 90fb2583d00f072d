"""gRPC's server in a simulated network, as grpc.aio has it. Messages are serialized and parsed as on the wire."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from sim.loop import number_of
from sim.network import WINDOW_BYTES, Connection, Network, Started, place


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
        self._addresses.append(place(address))
        return int(address.rpartition(":")[2]) if not address.startswith("unix:") else 1

    async def start(self) -> None:
        """Listens."""
        for address in self._addresses:
            self.network.servers[address] = self
            if address.startswith("unix:"):
                _touch(address.removeprefix("unix:"))

    def begin(self, connection: Connection, number: int, started: Started) -> ServerCall:
        """A call has come over a connection."""
        return ServerCall(self, connection, number, started)

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


class ServerCall:
    """A call as its handler's context."""

    __hash__ = number_of  # type: ignore[assignment]

    def __init__(self, server: Server, connection: Connection, number: int, started: Started) -> None:
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
