"""The stream of a sync: found, opened, read and written on the portal's loop, opened again when it ends.

Everything that happens is handed over to the directory's thread, one at a time, and waited for: what the thread has no
time for stays in gRPC's window, and so with the server.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from understudy.client.peers import Peers, SyncStream, kept, stream_end
from understudy.client.realm_state import ConnectionState
from understudy.client.sync_port import Send
from understudy.common.backoff import Backoff
from understudy.common.credentials import Credentials
from understudy.common.errors import PeerUnreachable, ProtocolError, UnderstudyError
from understudy.common.rpc import peer_errors
from understudy.common.tasks import spawn
from understudy.v1 import local_pb2, sync_pb2

BACKOFF_S = (0.1, 10.0)
_WELCOME_S_MAX = 5.0


class Link:
    """One stream that was opened, as the thread sees it. ``send`` and ``drop`` may be called from any thread."""

    def __init__(self, address: str, call: SyncStream) -> None:
        self.address = address
        self.problem: UnderstudyError | None = None  # why the thread has dropped it
        self.was_of_use = False  # the thread has brought a realm up to date with it
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[Send] = deque()
        self._work = asyncio.Event()

    def send(self, sends: Sequence[Send]) -> None:
        """Sends these behind what is waiting; the session limits how much that is."""
        self._unsent.extend(sends)
        self._loop.call_soon_threadsafe(self._work.set)

    def drop(self, problem: UnderstudyError) -> None:
        """Ends the stream."""
        self.problem = kept(problem)
        self._loop.call_soon_threadsafe(self._call.cancel)

    async def next(self) -> Send:
        """What is to be sent next."""
        while not self._unsent:
            self._work.clear()
            await self._work.wait()
        return self._unsent.popleft()


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """A server has taken us."""

    link: Link
    welcome: sync_pb2.SyncWelcome
    met: local_pb2.LocalDirectory  # cluster, epoch and proof


@dataclass(frozen=True, slots=True, kw_only=True)
class Came:
    """A message has come."""

    link: Link
    response: sync_pb2.SyncResponse


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A request has gone."""

    link: Link
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The stream has ended."""

    link: Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """An attempt to connect, or a connection, has failed."""

    error: UnderstudyError


Event = Connected | Came | Written | Lost | Failed


class SyncConnection:
    """Keeps a stream open to whichever of the addresses is the primary. Its methods run on the portal's loop.

    Args:
        addresses: in any order.
        met: the reign that this directory has met.
        hello: who we are, asked for at each connecting.
        hand_over: passes an event to the thread, which calls the function given with it when it has done with it.
        credentials: who we are to the server.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        met: local_pb2.LocalDirectory,
        hello: Callable[[], sync_pb2.SyncHello],
        hand_over: Callable[[Event, Callable[[], None]], None],
        credentials: Credentials,
    ) -> None:
        self.state = ConnectionState.CONNECTING
        self._peers = Peers(addresses, met, credentials)
        self._hello = hello
        self._give = hand_over
        self._loop = asyncio.get_running_loop()
        self._backoff = Backoff(first_s=BACKOFF_S[0], last_s=BACKOFF_S[1])
        self._hurry = asyncio.Event()
        self._task = spawn(self._run_forever(), self._on_crash)

    async def close(self) -> None:
        """Ends everything; what is handed over from here on need not be taken."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.state = ConnectionState.OFFLINE
        await self._peers.close()

    def hurry(self) -> None:
        """Somebody waits: tries again at once. May be called from any thread."""
        self._loop.call_soon_threadsafe(self._hurry.set)

    def _on_crash(self, error: UnderstudyError) -> None:
        self.state = ConnectionState.OFFLINE
        self._give(Failed(error=error), lambda: None)

    async def _hand_over(self, event: Event) -> None:
        taken = self._loop.create_future()

        def take() -> None:
            if not taken.done():
                taken.set_result(None)

        def done() -> None:
            self._loop.call_soon_threadsafe(take)

        self._give(event, done)
        await taken

    # -- connecting ----------------------------------------------------------------------------------------------

    async def _run_forever(self) -> None:
        while True:
            self.state = ConnectionState.CONNECTING
            await self._attempt()
            self.state = ConnectionState.OFFLINE
            self._hurry.clear()
            try:
                async with asyncio.timeout(self._backoff.next_s(random.random())):
                    await self._hurry.wait()
            except TimeoutError:
                pass

    async def _attempt(self) -> None:
        """Tries the addresses until one takes us, and stays with it while it does."""
        try:
            for index in await self._peers.in_order():
                if await self._converse(index):
                    return
        except UnderstudyError as error:
            await self._hand_over(Failed(error=error))

    async def _converse(self, index: int) -> bool:
        """Opens a stream to one address, and sends and receives until it ends; whether it was opened."""
        address = self._peers.addresses[index]
        call = self._peers.sync(address).Sync()
        link = Link(address, call)
        is_open = False
        try:
            with peer_errors(address):
                connected = await self._connect(link, call)
                is_open = True
                self._peers.current, self.state = index, ConnectionState.ONLINE
                await self._hand_over(connected)
                await self._exchange(link, call)
        except UnderstudyError as error:
            if is_open:
                await self._hand_over(Lost(link=link))
            await self._hand_over(Failed(error=link.problem or kept(error)))
        finally:
            call.cancel()
        if link.was_of_use:
            # Not when the stream opens: a server that takes us and fails each stream is left alone longer and longer.
            self._backoff.reset()
        return is_open

    async def _connect(self, link: Link, call: SyncStream) -> Connected:
        hello = self._hello()
        self._peers.introduce(hello)
        try:
            async with asyncio.timeout(_WELCOME_S_MAX):
                await call.write(sync_pb2.SyncRequest(hello=hello))
                answer = await call.read()
        except TimeoutError:
            raise PeerUnreachable(f"{link.address} did not answer within {_WELCOME_S_MAX:g} s") from None
        if not isinstance(answer, sync_pb2.SyncResponse):
            raise await stream_end(call)
        if answer.WhichOneof("message") != "welcome":
            raise ProtocolError(f"{link.address} did not answer the hello")
        self._peers.accept(link.address, answer.welcome)
        return Connected(link=link, welcome=answer.welcome, met=self._peers.met)

    # -- one connection ------------------------------------------------------------------------------------------

    async def _exchange(self, link: Link, call: SyncStream) -> None:
        sender = asyncio.create_task(self._send_forever(link, call))
        try:
            while isinstance(response := await call.read(), sync_pb2.SyncResponse):
                await self._hand_over(Came(link=link, response=response))
            raise await stream_end(call)
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _send_forever(self, link: Link, call: SyncStream) -> None:
        while True:
            send = await link.next()
            await call.write(send.request)
            self._give(Written(link=link, size=send.size), lambda: None)
