"""Reads over gRPC: the same on a primary and on a replica."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from understudy.common.access import Level, caller
from understudy.common.authority import Authority
from understudy.common.errors import NotPrimary
from understudy.common.reader import Reader
from understudy.common.rpc import answering_errors
from understudy.common.state import State
from understudy.common.types import RealmPath, check_realm_path
from understudy.v1 import data_pb2, data_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class ReadService(data_pb2_grpc.DataServicer):
    """``Get``, ``Scan``, ``Count`` and ``Realms`` over the applied state; writes are refused."""

    def __init__(self, state: Callable[[], State], authority: Authority) -> None:
        """``state`` gives the present state, or raises where there is none to read from."""
        self._reader = Reader(state)
        self._authority = authority

    def _readable(self, path: str) -> RealmPath:
        """``path`` as the log has it, where the caller may read it.

        Raises:
            BadRealmPath, NotPermitted.
        """
        return self._authority.permitted(caller(), check_realm_path(path), Level.READ)

    async def Get(self, request: data_pb2.GetRequest, context: Context) -> data_pb2.GetResponse:
        """Values of some keys, all at one LSN."""
        async with answering_errors(context):
            values, lsn = self._reader.get(self._readable(request.realm), request.keys)
            return data_pb2.GetResponse(
                lsn=lsn,
                present=[value is not None for value in values],
                values=[value or b"" for value in values],
            )
        raise AssertionError("aborted")

    async def Scan(self, request: data_pb2.ScanRequest, context: Context) -> AsyncIterator[data_pb2.ScanPage]:
        """Pages of one consistent state."""
        async with answering_errors(context):
            with self._reader.scan(
                self._readable(request.realm),
                request.start,
                request.end,
                limit=request.limit or None,
                reverse=request.reverse,
            ) as scan:
                while not scan.at_end:
                    self._readable(request.realm)  # as long as it may
                    keys, values = scan.page()
                    yield data_pb2.ScanPage(keys=keys, values=values, lsn=scan.lsn, version=scan.version)

    async def Count(self, request: data_pb2.CountRequest, context: Context) -> data_pb2.CountResponse:
        """How many keys there are."""
        async with answering_errors(context):
            count, lsn = await self._reader.count(self._readable(request.realm), request.start, request.end)
            return data_pb2.CountResponse(count=count, lsn=lsn)
        raise AssertionError("aborted")

    async def Realms(
        self, request: data_pb2.RealmsRequest, context: Context
    ) -> AsyncIterator[data_pb2.RealmsPage]:
        """All realms that the caller may read, in order of their paths."""
        async with answering_errors(context):
            principal = caller()
            async for realms in self._reader.realms():
                page = data_pb2.RealmsPage()
                for realm in realms:
                    if self._authority.may(principal, realm.path, Level.READ):
                        page.realms.add(
                            path=realm.path, version=realm.version, entries=realm.entries, bytes=realm.bytes
                        )
                yield page

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
