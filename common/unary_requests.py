"""The one message of a call that is no stream, read by us: gRPC would read it before anybody asked who the caller is.

With gRPC's own unary handlers, strangers could have a server read messages of :data:`MESSAGE_BYTES_MAX` each, as many
at a time as they like. A message that nobody reads stays with its sender: HTTP/2's flow control sees to that.
"""

from __future__ import annotations

import asyncio
from typing import Any
from weakref import WeakValueDictionary

import grpc.aio

from understudy.common.access import Kind, Principal, peer_host
from understudy.common.errors import Overloaded, ProtocolError
from understudy.common.rpc import FIRST_MESSAGE_S_MAX, first_message

Context = grpc.aio.ServicerContext[Any, Any]

# Requests of strangers, such as a login's, that are read at the same time; each may take MESSAGE_BYTES_MAX.
READING_MAX = 8
READING_OF_HOST_MAX = 2


class UnaryRequests:
    """Reads requests: those of strangers few at a time (G9)."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(READING_MAX)
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def read(self, principal: Principal, context: Context) -> Any:
        """The request of a call.

        Raises:
            ProtocolError: the caller sends none.
            Overloaded: too many strangers are sending theirs.
        """
        if principal.kind is Kind.ANONYMOUS:
            request = await self._in_turn(context)
        else:
            request = await context.read()
        if request is grpc.aio.EOF:
            raise ProtocolError("the call carried no request")
        return request

    async def _in_turn(self, context: Context) -> Any:
        host = peer_host(context.peer())
        of_host = self._hosts.setdefault(host, asyncio.Semaphore(READING_OF_HOST_MAX))
        try:
            async with asyncio.timeout(FIRST_MESSAGE_S_MAX) as waiting, of_host, self._all:
                waiting.reschedule(None)
                return await first_message(context)
        except TimeoutError:
            raise Overloaded(
                "too many calls without a token are being read", remedy="try again later"
            ) from None
