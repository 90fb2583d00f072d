"""Reads over gRPC: the same on a primary and on a replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from understudy.common.errors import NotPermitted, NotPrimary, Overloaded, TransactionTooLarge
from understudy.common.rpc import answering_errors
from understudy.common.state import State
from understudy.common.types import check_key, check_realm_path, is_system_realm
from understudy.v1 import data_pb2, data_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

PAGE_BYTES = 256 << 10  # small enough that making one page never holds up commits for long
PAGE_PAIRS = 2_000
SCAN_S_MAX = 600.0  # a scan pins its snapshot, and what is pinned makes the store grow
SCANS_MAX = 64
KEYS_PER_GET_MAX = 10_000
ANSWER_BYTES_MAX = 16 << 20


class ReadService(data_pb2_grpc.DataServicer):
    """``Get``, ``Scan``, ``Count`` and ``Realms`` over the applied state; writes are refused."""

    def __init__(self, state: Callable[[], State]) -> None:
        """``state`` gives the present state, or raises where there is none to read from."""
        self._state = state
        self._scans = 0

    async def Get(self, request: data_pb2.GetRequest, context: Context) -> data_pb2.GetResponse:
        """Values of some keys, all at one LSN."""
        async with answering_errors(context):
            return self._get(request)
        raise AssertionError("aborted")

    def _get(self, request: data_pb2.GetRequest) -> data_pb2.GetResponse:
        path = _readable(request.realm)
        if len(request.keys) > KEYS_PER_GET_MAX:
            raise TransactionTooLarge(
                f"a read of {len(request.keys)} keys", remedy=f"ask for at most {KEYS_PER_GET_MAX} at once"
            )
        state = self._state()
        response = data_pb2.GetResponse(lsn=state.applied.lsn)
        size = 0
        for key in request.keys:
            check_key(key)
            value = state.get(path, key)
            response.present.append(value is not None)
            response.values.append(value or b"")
            size += len(value or b"")
            if size > ANSWER_BYTES_MAX:
                raise TransactionTooLarge(
                    "the values asked for are too large for one answer", remedy="ask for fewer"
                )
        if not request.keys and state.realm(path) is None:
            state.count(path)  # raises UnknownRealm
        return response

    async def Scan(self, request: data_pb2.ScanRequest, context: Context) -> AsyncIterator[data_pb2.ScanPage]:
        """Pages of one consistent state."""
        async with answering_errors(context):
            async for page in self._scan(request):
                yield page

    async def _scan(self, request: data_pb2.ScanRequest) -> AsyncIterator[data_pb2.ScanPage]:
        path = _readable(request.realm)
        state = self._state()
        if self._scans >= SCANS_MAX:
            raise Overloaded(f"{SCANS_MAX} scans are under way already", remedy="try again later")
        head = state.realm(path)
        deadline = time.monotonic() + SCAN_S_MAX
        left = request.limit or None
        self._scans += 1
        try:
            with state.scan(path, request.start, request.end, reverse=request.reverse) as scan:
                lsn, version = state.applied.lsn, head.version if head else 0
                at_end = False
                while not at_end and left != 0:
                    pairs_max = PAGE_PAIRS if left is None else min(PAGE_PAIRS, left)
                    keys, values, at_end = scan.page(bytes_max=PAGE_BYTES, pairs_max=pairs_max)
                    left = None if left is None else left - len(keys)
                    yield data_pb2.ScanPage(keys=keys, values=values, lsn=lsn, version=version)
                    if time.monotonic() > deadline:
                        raise Overloaded(
                            f"the scan took longer than {SCAN_S_MAX:.0f} s", remedy="scan smaller ranges"
                        )
        finally:
            self._scans -= 1

    async def Count(self, request: data_pb2.CountRequest, context: Context) -> data_pb2.CountResponse:
        """How many keys there are."""
        async with answering_errors(context):
            state = self._state()
            count = state.count(_readable(request.realm), request.start, request.end)
            return data_pb2.CountResponse(count=count, lsn=state.applied.lsn)
        raise AssertionError("aborted")

    async def Realms(
        self, request: data_pb2.RealmsRequest, context: Context
    ) -> AsyncIterator[data_pb2.RealmsPage]:
        """All realms but the system's own, in order of their paths."""
        async with answering_errors(context):
            state = self._state()
            with state.store.hold() as snapshot:
                heads = list(state.realms().items())
                for start in range(0, max(len(heads), 1), PAGE_PAIRS):
                    page = data_pb2.RealmsPage()
                    for path, head in heads[start : start + PAGE_PAIRS]:
                        if is_system_realm(path):
                            continue
                        row = snapshot.realm(path)
                        known = row is not None and row.id == head.id
                        page.realms.add(
                            path=path,
                            version=head.version,
                            entries=row.entries if row is not None and known else 0,
                            bytes=row.bytes if row is not None and known else 0,
                        )
                    yield page
                    await asyncio.sleep(0)

    async def Commit(
        self, request_iterator: AsyncIterator[data_pb2.CommitRequest], context: Context
    ) -> AsyncIterator[data_pb2.CommitResponse]:
        """Refused: this is not a primary."""
        async with answering_errors(context):
            raise NotPrimary("this server is a replica", remedy="write to the primary, or promote this one")
        yield data_pb2.CommitResponse()

    async def DropRealm(
        self, request: data_pb2.DropRealmRequest, context: Context
    ) -> data_pb2.DropRealmResponse:
        """Refused: this is not a primary."""
        async with answering_errors(context):
            raise NotPrimary("this server is a replica", remedy="write to the primary, or promote this one")
        raise AssertionError("aborted")


def _readable(path: str) -> str:
    check_realm_path(path)
    if is_system_realm(path):
        raise NotPermitted(f"realm {path} is the system's own")
    return path
