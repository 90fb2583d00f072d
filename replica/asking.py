"""Asking a primary what it makes of our history: the first message of a Follow, and its answer."""

from __future__ import annotations

import asyncio

import grpc.aio

from understudy.common.errors import PeerUnreachable, ProtocolError
from understudy.common.follow_table import Decision
from understudy.common.types import ID_BYTES
from understudy.v1 import replication_pb2

Call = grpc.aio.StreamStreamCall[replication_pb2.FollowRequest, replication_pb2.FollowResponse]

ANSWER_S_MAX = 30.0  # the primary may have to read its log to answer


async def ask(call: Call, address: str, hello: replication_pb2.Hello) -> replication_pb2.Answer:
    """What the primary at ``address`` answers.

    Raises:
        PeerUnreachable: nothing, or not in time.
        ProtocolError: nothing that this version knows.
    """
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            await call.write(replication_pb2.FollowRequest(hello=hello))
            response = await call.read()
    except TimeoutError:
        raise PeerUnreachable(f"{address} did not answer within {ANSWER_S_MAX:.0f} s") from None
    if not isinstance(response, replication_pb2.FollowResponse):
        raise PeerUnreachable(f"{address} closed the connection")
    answer = response.answer
    if answer.decision not in Decision.values()[1:] or len(answer.cluster) not in (0, ID_BYTES):
        raise ProtocolError(f"{address} gave an answer that this version does not know")
    return answer
