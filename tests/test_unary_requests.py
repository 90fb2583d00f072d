"""Requests of calls that are no streams: who is read, and how many at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from understudy.common import unary_requests
from understudy.common.access import ANONYMOUS, LOCAL
from understudy.common.errors import Overloaded, ProtocolError
from understudy.common.unary_requests import READING_MAX, READING_OF_HOST_MAX, UnaryRequests


class Caller:
    """A call as its server sees it: whether it is being read, and a message that comes when it is told to."""

    def __init__(self, host: str) -> None:
        self._host = host
        self.is_read = False
        self.message: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def peer(self) -> str:
        return f"ipv4:{self._host}:4000"

    async def read(self) -> Any:
        self.is_read = True
        return await self.message


def _play(story: Callable[[UnaryRequests, asyncio.TaskGroup], Awaitable[None]]) -> None:
    async def played() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            async with asyncio.timeout(30), asyncio.TaskGroup() as group:
                await story(UnaryRequests(), group)

    asyncio.run(played())


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_g9_a_host_s_strangers_are_read_in_turn() -> None:
    """G9: of one host's strangers few are read at a time; the next has its turn when one has sent its request."""

    async def story(requests: UnaryRequests, group: asyncio.TaskGroup) -> None:
        callers = [Caller("192.0.2.1") for _ in range(READING_OF_HOST_MAX + 1)]
        reads = [group.create_task(requests.read(ANONYMOUS, one)) for one in callers]  # type: ignore[arg-type]
        await _settle()
        assert [one.is_read for one in callers] == [True] * READING_OF_HOST_MAX + [False]
        other = Caller("192.0.2.2")
        reads.append(group.create_task(requests.read(ANONYMOUS, other)))  # type: ignore[arg-type]
        await _settle()
        assert other.is_read
        callers[0].message.set_result(b"login")
        assert await reads[0] == b"login"
        await _settle()
        assert callers[-1].is_read
        for one in reads[1:]:
            one.cancel()

    _play(story)


def test_g9_all_strangers_together_are_read_in_turn() -> None:
    """G9: however many hosts call, no more requests of strangers are read at once than there is memory for."""

    async def story(requests: UnaryRequests, group: asyncio.TaskGroup) -> None:
        callers = [Caller(f"192.0.2.{number}") for number in range(READING_MAX + 5)]
        reads = [group.create_task(requests.read(ANONYMOUS, one)) for one in callers]  # type: ignore[arg-type]
        await _settle()
        assert sum(one.is_read for one in callers) == READING_MAX
        known = Caller("192.0.2.99")
        reads.append(group.create_task(requests.read(LOCAL, known)))  # type: ignore[arg-type]
        await _settle()
        assert known.is_read
        for one in reads:
            one.cancel()

    _play(story)


def test_g9_who_waits_in_vain_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: a stranger whose turn does not come is told that there are too many."""
    monkeypatch.setattr(unary_requests, "FIRST_MESSAGE_S_MAX", 0.01)

    async def story(requests: UnaryRequests, group: asyncio.TaskGroup) -> None:
        silent = [Caller("192.0.2.1") for _ in range(READING_OF_HOST_MAX)]
        reads = [group.create_task(requests.read(ANONYMOUS, one)) for one in silent]  # type: ignore[arg-type]
        await _settle()
        with pytest.raises(Overloaded):
            await requests.read(ANONYMOUS, Caller("192.0.2.1"))  # type: ignore[arg-type]
        for one in reads:
            one.cancel()

    _play(story)


def test_a_call_without_a_request_is_refused() -> None:
    """A caller that ends its call before it has asked for anything is told so."""

    async def story(requests: UnaryRequests, _: asyncio.TaskGroup) -> None:
        caller = Caller("192.0.2.1")
        caller.message.set_result(grpc.aio.EOF)
        with pytest.raises(ProtocolError):
            await requests.read(LOCAL, caller)  # type: ignore[arg-type]

    _play(story)
