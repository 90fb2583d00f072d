"""A server whose answers are no messages: whoever asks hears so, and soon."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import pytest
from harness import DEADLINE_S
from nodes import until_said

from understudy.client import Put, aconnect
from understudy.common import portal
from understudy.common.credentials import ANONYMOUS, Credentials
from understudy.common.errors import OutcomeUnknown, ProtocolError
from understudy.common.rpc import open_channel, peer_errors
from understudy.v1 import admin_pb2, admin_pb2_grpc, data_pb2, data_pb2_grpc, sync_pb2, sync_pb2_grpc

NO_MESSAGE = b"\xff"
BOUND = data_pb2.CommitResponse(bound=data_pb2.Bound(cluster=bytes(16), epoch=1)).SerializeToString()

Answers = tuple[bytes, ...]


class _Bytes(grpc.GenericRpcHandler):
    """Answers each request of a stream with the next of some bytes, and leaves it open then; `Status` with others."""

    def __init__(self, answers: Answers, status: bytes) -> None:
        self._answers, self._status = answers, status
        self._silence = asyncio.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def answer(requests: AsyncIterator[bytes], context: Any) -> None:
            is_status = handler_call_details.method.endswith("/Status")
            for one in (self._status,) if is_status else self._answers:
                await anext(requests)
                await context.write(one)
            if not is_status:
                await self._silence.wait()

        return grpc.stream_stream_rpc_method_handler(answer)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def _answering(*answers: bytes, status: bytes = NO_MESSAGE) -> AsyncIterator[str]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Bytes(answers, status),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def _unary(channel: grpc.aio.Channel) -> None:
    await admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest())


async def _pages(channel: grpc.aio.Channel) -> None:
    async for _ in data_pb2_grpc.DataStub(channel).Scan(data_pb2.ScanRequest()):
        pass


async def _commits(channel: grpc.aio.Channel) -> None:
    call = data_pb2_grpc.DataStub(channel).Commit()
    await call.write(data_pb2.CommitRequest())
    await call.read()


async def _syncs(channel: grpc.aio.Channel) -> None:
    call = sync_pb2_grpc.SyncStub(channel).Sync()
    await call.write(sync_pb2.SyncRequest())
    await call.read()


@pytest.mark.parametrize("credentials", [ANONYMOUS, Credentials(token="a.b-c")], ids=["nobody", "a token"])
@pytest.mark.parametrize("ask", [_unary, _pages, _commits, _syncs])
def test_an_answer_that_is_no_message_is_an_error(
    ask: Callable[[grpc.aio.Channel], Any], credentials: Credentials
) -> None:
    """Of every kind of call, with the address: not nothing, and not a wait for the end of the stream."""

    async def story() -> None:
        async with _answering(NO_MESSAGE) as address, open_channel(address, credentials) as channel:
            refused = pytest.raises(ProtocolError, match=rf"{address} sent what can't be decoded")
            with refused, peer_errors(address):
                await asyncio.wait_for(ask(channel), DEADLINE_S)

    portal.call(story())


def test_a_transaction_is_not_waited_for_on_a_stream_that_has_turned_to_garbage() -> None:
    """Its outcome is unknown, the reason is said, and the stream is given up: the next one is asked again."""

    async def story() -> None:
        async with _answering(BOUND, NO_MESSAGE, status=b"") as address, aconnect(address) as client:
            with pytest.raises(OutcomeUnknown) as unknown:
                await client.commit("/realm", [Put(b"key", b"value")], timeout_s=0.1)
            await until_said(client, unknown.value.number, "sent what can't be decoded")

    portal.call(asyncio.wait_for(story(), DEADLINE_S))
