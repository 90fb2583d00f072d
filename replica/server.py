"""A replica that serves: its node behind gRPC (status, promotion, reads), opened and closed in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Protocol

import grpc.aio

from understudy.common.access_interceptor import AccessInterceptor
from understudy.common.addresses import check_free
from understudy.common.admin_service import AdminService
from understudy.common.authority import Authority
from understudy.common.backup_worker import backing_up
from understudy.common.directory import DataDirectory
from understudy.common.engine import Engine
from understudy.common.errors import NotPrimary, UnderstudyError, WrongRole
from understudy.common.events import log
from understudy.common.follow_table import Decision
from understudy.common.listener import Listener
from understudy.common.metrics import EngineMetrics, StatusCollector
from understudy.common.metrics_server import serve_metrics
from understudy.common.read_service import Context, ReadService
from understudy.common.rpc import answering_errors, first_message
from understudy.common.settings import ReplicaSettings
from understudy.common.tls import ServerTls
from understudy.replica.accounts_service import ReplicaAccountsService
from understudy.replica.node import ReplicaNode
from understudy.replica.promote import Promotion
from understudy.v1 import (
    accounts_pb2_grpc,
    admin_pb2,
    admin_pb2_grpc,
    data_pb2_grpc,
    replication_pb2,
    replication_pb2_grpc,
    sync_pb2,
    sync_pb2_grpc,
)


class Successor(Protocol):
    """The primary that goes on with a promoted copy, as far as the replica's process knows it."""

    @property
    def failed(self) -> asyncio.Future[UnderstudyError]:
        """Done once it has to end."""

    def status(self) -> admin_pb2.StatusResponse:
        """All that ``understudy status`` shows."""


class Succession(Protocol):
    """How a promoted copy is served."""

    def __call__(
        self, engine: Engine, authority: Authority, listener: Listener, tls: ServerTls | None
    ) -> contextlib.AbstractAsyncContextManager[Successor]:
        """Serves until the block ends.

        Args:
            engine: of the copy, at work; closed when the block ends.
            authority: says what callers may, as before.
            listener: goes on listening; stopped when the block ends.
            tls: what the listener shows.
        """


class ReplicaServer:
    """A serving replica, which can go on as a primary once it is promoted."""

    def __init__(
        self, node: ReplicaNode, authority: Authority, listener: Listener, succession: Succession | None
    ) -> None:
        self.node = node
        self._authority = authority
        self._listener = listener
        self._succession = succession
        self._promotion: Promotion | None = None
        self._serves = False  # once promoted
        self._successor: Successor | None = None
        self._changing = asyncio.Lock()
        self._stack = contextlib.AsyncExitStack()

    @property
    def address(self) -> str:
        """Where it listens, with the real port."""
        return self._listener.address

    def status(self) -> admin_pb2.StatusResponse:
        """All that ``understudy status`` shows, in the role that it has now."""
        return (self._successor or self.node).status()

    async def promote(self, *, serve: bool) -> Promotion:
        """Makes the copy a primary's; serves it, too, or leaves that to another process and has this one end.

        Raises:
            WrongRole: it can't serve it.
            UnderstudyError: the promotion failed, or serving.
        """
        # Whoever asked may be gone before it is done, and half a promotion would be neither.
        return await asyncio.shield(asyncio.create_task(self._promote(serve=serve)))

    async def _promote(self, *, serve: bool) -> Promotion:
        async with self._changing:
            if serve and self._succession is None:
                raise WrongRole(
                    "this process can't go on as a primary",
                    remedy="promote without --serve, then start a primary",
                )
            if self._promotion is None:  # else two have asked at a time
                self._promotion = await self.node.promote()
                self._serves = serve
            if serve != self._serves:
                raise WrongRole(
                    f"somebody else has just promoted this replica, and its process {'serves' if not serve else 'ends'}"
                )
            if serve and self._successor is None:
                await self._succeed()
            return self._promotion

    async def _succeed(self) -> None:
        assert self._succession is not None
        engine = await self.node.hand_over()
        try:
            succession = self._succession(engine, self._authority, self._listener, self.node.tls)
            self._successor = await self._stack.enter_async_context(succession)
        except BaseException as error:
            # A primary's directory, and nobody serves it: this process must not look as if it did.
            ours = (
                error if isinstance(error, UnderstudyError) else UnderstudyError(f"internal error: {error!r}")
            )
            self.node.leave(ours)
            raise
        self._successor.failed.add_done_callback(self._end_with)

    def _end_with(self, failed: asyncio.Future[UnderstudyError]) -> None:
        if not failed.cancelled():
            self.node.leave(failed.result())

    async def close(self) -> None:
        """Ends the primary that it has become, if it has."""
        async with self._changing:
            self._succession = None
            await self._stack.aclose()


@contextlib.asynccontextmanager
async def serving_replica(
    settings: ReplicaSettings, succession: Succession | None = None
) -> AsyncIterator[ReplicaServer]:
    """Opens the directory, follows and serves until the block ends.

    Args:
        settings: of the replica.
        succession: makes the primary that goes on in this process once the copy is promoted, if that is asked for;
            None: it can't be.

    Raises:
        UnderstudyError: of the directory, the log, the store, or the address.
    """
    metrics = EngineMetrics()
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(DataDirectory.open(settings.data_dir))
        if directory.is_new:
            for address in filter(None, (settings.listen, settings.metrics)):
                check_free(address)  # before anything is made there
        node = ReplicaNode(directory, settings, metrics)
        stack.push_async_callback(node.close)
        node.prepare()
        authority = Authority(lambda: node.engine.state, cluster=lambda: directory.cluster, tls=node.tls)
        listener = Listener([AccessInterceptor(authority)])
        server = ReplicaServer(node, authority, listener, succession)
        listener.answer_with(lambda table: _add_services(table, server, authority))
        await listener.start(settings.listen, directory.control, node.tls)
        stack.push_async_callback(listener.stop)
        stack.push_async_callback(server.close)
        if settings.metrics is not None:
            metrics.registry.register(StatusCollector(server.status))
            stack.enter_context(serve_metrics(settings.metrics, metrics.registry, node.tls))
        node.start()
        await stack.enter_async_context(backing_up(directory, settings.backup_policies))
        log.info("serving", role="replica", address=listener.address, primary=settings.primary)
        yield server
        log.info("stopping")


def _add_services(table: grpc.aio.Server, server: ReplicaServer, authority: Authority) -> None:
    node = server.node
    data_pb2_grpc.add_DataServicer_to_server(ReadService(lambda: node.engine.state, authority), table)
    replication_pb2_grpc.add_ReplicationServicer_to_server(_NotPrimaryService(), table)
    sync_pb2_grpc.add_SyncServicer_to_server(_NotPrimarySyncService(), table)
    admin_pb2_grpc.add_AdminServicer_to_server(_ReplicaAdminService(server, authority), table)
    accounts_pb2_grpc.add_AccountsServicer_to_server(ReplicaAccountsService(), table)


class _ReplicaAdminService(AdminService):
    """Adds ``Promote``."""

    def __init__(self, server: ReplicaServer, authority: Authority) -> None:
        super().__init__(server.status, lambda: server.node.engine, server.node.directory, authority)
        self._server = server

    async def Promote(self, request: admin_pb2.PromoteRequest, context: Context) -> admin_pb2.PromoteResponse:
        """Makes this copy a primary's; the process serves it, or ends once this is answered."""
        async with answering_errors(context):
            promotion = await self._server.promote(serve=request.serve)
            if not request.serve:
                context.add_done_callback(self._leave)  # type: ignore[arg-type]  # the stubs name its parameters
            return admin_pb2.PromoteResponse(
                epoch=promotion.epoch,
                lsn=promotion.lsn,
                digest=promotion.digest,
                seconds=promotion.seconds,
                warnings=promotion.warnings,
            )
        raise AssertionError("aborted")

    def _leave(self, *_: object) -> None:
        self._server.node.leave(None)


class _NotPrimaryService(replication_pb2_grpc.ReplicationServicer):
    """Answers who wants to follow a replica, or fetch from it, that it is no primary."""

    async def Follow(self, _: object, context: Context) -> None:  # type: ignore[override]
        """Refused in the protocol's own words."""
        await context.read()
        await context.write(
            replication_pb2.FollowResponse(answer=replication_pb2.Answer(decision=Decision.NOT_PRIMARY))
        )

    async def PinSnapshot(
        self, request: replication_pb2.PinSnapshotRequest, context: Context
    ) -> replication_pb2.SnapshotInfo:
        """Refused."""
        async with answering_errors(context):
            raise _not_primary()
        raise AssertionError("aborted")

    async def DigestSnapshot(
        self, request: replication_pb2.DigestSnapshotRequest, context: Context
    ) -> AsyncIterator[replication_pb2.RangeDigests]:
        """Refused."""
        async with answering_errors(context):
            raise _not_primary()
        yield replication_pb2.RangeDigests()

    async def ReadSnapshot(
        self, request: replication_pb2.ReadSnapshotRequest, context: Context
    ) -> AsyncIterator[replication_pb2.RangeData]:
        """Refused."""
        async with answering_errors(context):
            raise _not_primary()
        yield replication_pb2.RangeData()

    async def ReleaseSnapshot(
        self, request: replication_pb2.ReleaseSnapshotRequest, context: Context
    ) -> replication_pb2.ReleaseSnapshotResponse:
        """Refused."""
        async with answering_errors(context):
            raise _not_primary()
        raise AssertionError("aborted")


class _NotPrimarySyncService(sync_pb2_grpc.SyncServicer):
    """Clients with local copies, too, go to the primary."""

    async def Sync(self, _: object, context: Context) -> None:  # type: ignore[override]
        """Refused."""
        async with answering_errors(context):
            await first_message(context)  # whoever is refused while it writes does not hear why
            raise _not_primary()

    async def Salvage(
        self, requests: AsyncIterator[sync_pb2.SalvageRequest], context: Context
    ) -> sync_pb2.SalvageResponse:
        """Refused."""
        async with answering_errors(context):
            await anext(requests, None)
            raise _not_primary()
        raise AssertionError("aborted")


def _not_primary() -> NotPrimary:
    return NotPrimary("this server is a replica", remedy="ask the primary")
