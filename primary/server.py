"""A primary that serves: its node behind gRPC, metrics over HTTP, opened and closed in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import grpc.aio

from understudy.common.access_interceptor import AccessInterceptor
from understudy.common.addresses import check_free
from understudy.common.authority import Authority
from understudy.common.backup_worker import backing_up
from understudy.common.directory import DataDirectory
from understudy.common.engine import Engine
from understudy.common.errors import UnderstudyError
from understudy.common.events import log
from understudy.common.listener import Listener
from understudy.common.metrics import EngineMetrics, StatusCollector
from understudy.common.metrics_server import serve_metrics
from understudy.common.settings import PrimarySettings
from understudy.common.tasks import spawn
from understudy.common.tls import ServerTls
from understudy.primary.accounts_service import AccountsService
from understudy.primary.admin_service import PrimaryAdminService
from understudy.primary.admin_token import ensure_admin_token
from understudy.primary.data_service import PrimaryDataService
from understudy.primary.node import PrimaryNode
from understudy.primary.replication_service import ReplicationService
from understudy.primary.snapshots import PinBoard
from understudy.primary.sync_service import SyncService
from understudy.v1 import (
    accounts_pb2_grpc,
    admin_pb2,
    admin_pb2_grpc,
    data_pb2_grpc,
    replication_pb2_grpc,
    sync_pb2_grpc,
)


class PrimaryServer:
    """A serving primary."""

    def __init__(self, node: PrimaryNode, authority: Authority, listener: Listener) -> None:
        self.node = node
        self.authority = authority
        self._listener = listener

    @property
    def address(self) -> str:
        """Where it listens, with the real port."""
        return self._listener.address

    @property
    def failed(self) -> asyncio.Future[UnderstudyError]:
        """Done once it has to end."""
        return self.node.failed

    def status(self) -> admin_pb2.StatusResponse:
        """All that ``understudy status`` shows."""
        return self.node.status()


@contextlib.asynccontextmanager
async def serving_primary(settings: PrimarySettings) -> AsyncIterator[PrimaryServer]:
    """Opens the directory, serves until the block ends, then finishes what was taken in.

    Raises:
        UnderstudyError: of the directory, the log, the store, or the address.
    """
    metrics = EngineMetrics()
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(DataDirectory.open(settings.data_dir))
        if directory.is_new:
            for address in filter(None, (settings.listen, settings.metrics)):
                check_free(address)  # before anything is made there
        node = PrimaryNode.open(directory, settings, metrics)
        stack.push_async_callback(node.close)
        await node.start()
        authority = Authority(lambda: node.engine.state, cluster=lambda: directory.cluster, tls=node.tls)
        listener = Listener([AccessInterceptor(authority)])
        stack.enter_context(_answering(node, authority, listener))
        await listener.start(settings.listen, directory.control, node.tls)
        stack.push_async_callback(listener.stop)
        if settings.metrics is not None:
            metrics.registry.register(StatusCollector(node.status))
            stack.enter_context(serve_metrics(settings.metrics, metrics.registry, node.tls))
        await stack.enter_async_context(backing_up(directory, settings.backup_policies))
        log.info("serving", role="primary", address=listener.address, lsn=node.engine.durable.lsn)
        yield PrimaryServer(node, authority, listener)
        log.info("stopping")


@contextlib.asynccontextmanager
async def succeeding(
    settings: PrimarySettings, engine: Engine, authority: Authority, listener: Listener, tls: ServerTls | None
) -> AsyncIterator[PrimaryServer]:
    """Serves in the place of a replica that was promoted just now, with its engine and behind its address.

    Args:
        settings: its address, certificates and address of metrics count for nothing: the replica's go on.
        engine: works, and nothing in it is under way; it is closed when the block ends.
        authority: the replica's.
        listener: listens, and is stopped when the block ends.
        tls: what the listener shows.

    Raises:
        UnderstudyError: of the directory or the store.
    """
    async with contextlib.AsyncExitStack() as stack:
        node = PrimaryNode.succeed(engine, settings, tls)
        stack.push_async_callback(node.close)
        await node.start()
        stack.enter_context(_answering(node, authority, listener))
        stack.push_async_callback(listener.stop)
        log.info("serving", role="primary", address=listener.address, lsn=engine.durable.lsn)
        yield PrimaryServer(node, authority, listener)


@contextlib.contextmanager
def _answering(node: PrimaryNode, authority: Authority, listener: Listener) -> Iterator[None]:
    """Lets the listener answer for the node, and does what the services need done meanwhile."""
    engine = node.engine
    with contextlib.ExitStack() as stack:
        pins = PinBoard(engine)
        stack.callback(pins.close)
        accounts = AccountsService(node.commit_system, authority, engine.metrics)

        def add(server: grpc.aio.Server) -> None:
            data_pb2_grpc.add_DataServicer_to_server(PrimaryDataService(node, authority), server)
            replication_pb2_grpc.add_ReplicationServicer_to_server(ReplicationService(node, pins), server)
            sync_pb2_grpc.add_SyncServicer_to_server(SyncService(node, authority), server)
            admin_pb2_grpc.add_AdminServicer_to_server(PrimaryAdminService(node, authority), server)
            accounts_pb2_grpc.add_AccountsServicer_to_server(accounts, server)

        listener.answer_with(add)
        made = spawn(
            ensure_admin_token(engine.directory, authority.accounts, node.commit_system), engine.fail
        )
        stack.callback(made.cancel)
        expiry = spawn(_expire_forever(pins), engine.fail)
        stack.callback(expiry.cancel)
        yield


async def _expire_forever(pins: PinBoard) -> None:
    while True:
        await asyncio.sleep(5.0)
        pins.expire()
