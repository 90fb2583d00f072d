"""gRPC's client in a simulated network, as grpc.aio has it. Messages are serialized and parsed as on the wire."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from sim.network import WINDOW_BYTES, Connection, Frame, Network, Started, network_machine, place

CONNECT_S = 20.0


class Channel:
    """As ``grpc.aio.insecure_channel()`` gives one."""

    def __init__(self, network: Network, target: str) -> None:
        assert network.universe.current is not None
        self._network = network
        self._process = network.universe.current
        self._target = place(target)
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
            call.begin(Started(method, tuple(metadata or ())), request)
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

    def begin(self, started: Started, request: Any) -> None:
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
