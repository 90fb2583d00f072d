"""One call of an operator's to a running server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from understudy.common.credentials import Credentials
    from understudy.v1 import admin_pb2_grpc

_T = TypeVar("_T")


def ask_server(
    server: str, credentials: Credentials, call: Callable[[admin_pb2_grpc.AdminAsyncStub], Awaitable[_T]]
) -> _T:
    """What the server answers to ``call``.

    Raises:
        UnderstudyError: it is not reachable, or refuses.
    """
    import asyncio

    from understudy.common.portal import new_event_loop

    async def ask() -> _T:
        from understudy.common.addresses import split_address
        from understudy.common.rpc import open_channel, peer_errors
        from understudy.v1 import admin_pb2_grpc

        split_address(server)
        async with open_channel(server, credentials) as channel:
            with peer_errors(server):
                return await call(admin_pb2_grpc.AdminStub(channel))

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(ask())
