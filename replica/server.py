"""A replica that serves: its node behind gRPC (status, promotion, reads), opened and closed in order."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from understudy.common.access_interceptor import AccessInterceptor
from understudy.common.admin_service import AdminService
from understudy.common.authority import Authority
from understudy.common.directory import DataDirectory
from understudy.common.errors import NotPrimary
from understudy.common.events import log
from understudy.common.follow_table import Decision
from understudy.common.metrics import EngineMetrics, StatusCollector
from understudy.common.metrics_server import serve_metrics
from understudy.common.read_service import Context, ReadService
from understudy.common.rpc import Listener, answering_errors, check_free, first_message
from understudy.common.settings import ReplicaSettings
from understudy.replica.accounts_service import ReplicaAccountsService
from understudy.replica.node import ReplicaNode
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

STOP_GRACE_S = 0.5
_SERVICES = (
    "understudy.v1.Data",
    "understudy.v1.Replication",
    "understudy.v1.Sync",
    "understudy.v1.Admin",
    "understudy.v1.Accounts",
)


class ReplicaServer:
    """A serving replica."""

    def __init__(self, node: ReplicaNode, listener: Listener) -> None:
        self.node = node
        self._listener = listener

    @property
    def address(self) -> str:
        """Where it listens, with the real port."""
        return self._listener.address


@contextlib.asynccontextmanager
async def serving_replica(settings: ReplicaSettings) -> AsyncIterator[ReplicaServer]:
    """Opens the directory, follows and serves until the block ends.

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
        listener = Listener(_SERVICES, [AccessInterceptor(authority)])
        data_pb2_grpc.add_DataServicer_to_server(
            ReadService(lambda: node.engine.state, authority), listener.server
        )
        replication_pb2_grpc.add_ReplicationServicer_to_server(_NotPrimaryService(), listener.server)
        sync_pb2_grpc.add_SyncServicer_to_server(_NotPrimarySyncService(), listener.server)
        admin_pb2_grpc.add_AdminServicer_to_server(_ReplicaAdminService(node, authority), listener.server)
        accounts_pb2_grpc.add_AccountsServicer_to_server(ReplicaAccountsService(), listener.server)
        await listener.start(settings.listen, directory.control, node.tls)
        stack.push_async_callback(lambda: listener.stop(grace_s=STOP_GRACE_S))
        if settings.metrics is not None:
            metrics.registry.register(StatusCollector(node.status))
            stack.enter_context(serve_metrics(settings.metrics, metrics.registry, node.tls))
        node.start()
        log.info("serving", role="replica", address=listener.address, primary=settings.primary)
        yield ReplicaServer(node, listener)
        log.info("stopping")


class _ReplicaAdminService(AdminService):
    """Adds ``Promote``."""

    def __init__(self, node: ReplicaNode, authority: Authority) -> None:
        super().__init__(node.status, lambda: node.engine, authority)
        self._node = node

    async def Promote(self, request: admin_pb2.PromoteRequest, context: Context) -> admin_pb2.PromoteResponse:
        """Makes this copy a primary's; the process ends once this is answered."""
        async with answering_errors(context):
            promotion = await self._node.promote()
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
        self._node.leave()


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
