"""A server's gRPC: where it listens, what it answers with, how it stops."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from understudy.common.addresses import check_listen, not_listening, split_address
from understudy.common.grpc_loop import ignore_stray_events
from understudy.common.rpc import MESSAGE_OPTIONS, note_process, short_socket_path
from understudy.common.service_table import Add, ServiceTable
from understudy.common.tls import ServerTls

STREAMS_MAX = 1_000  # a connection: more concurrent calls than that wait
# How long calls under way may take to finish when a server is stopped.
STOP_GRACE_S = 0.5
# What primaries and replicas answer alike: one can become the other behind its listener.
_SERVICES = (
    "understudy.v1.Data",
    "understudy.v1.Sync",
    "understudy.v1.Replication",
    "understudy.v1.Admin",
    "understudy.v1.Accounts",
)

_SERVER_OPTIONS = (
    *MESSAGE_OPTIONS,
    ("grpc.so_reuseport", 0),  # two servers on one port would share connections without a word
    ("grpc.max_concurrent_streams", STREAMS_MAX),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


class Listener:
    """A gRPC server with health and reflection, and the services that :meth:`answer_with` gives it."""

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> None:
        note_process()
        ignore_stray_events(asyncio.get_running_loop())
        self._server = grpc.aio.server(interceptors=interceptors, options=_SERVER_OPTIONS)
        self._table = ServiceTable()
        self._server.add_generic_rpc_handlers((self._table,))
        self.address = ""
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            [*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )

    def answer_with(self, add: Add) -> None:
        """Answers new calls with the services that ``add`` adds to what it is given, instead of the present ones."""
        self._table.replace(add)

    async def start(self, listen: str, control: Path, tls: ServerTls | None = None) -> str:
        """Listens on ``listen`` and on the Unix socket ``control``; returns the address with the real port.

        The socket has no TLS: its directory's permissions say who may use it.

        Raises:
            UsageError: the address can't be used, for example because it is in use.
            NotPermitted: it is not loopback, and there is no TLS.
        """
        check_listen(listen, has_tls=tls is not None)
        host, _ = split_address(listen)
        try:
            if tls is None:
                port = self._server.add_insecure_port(listen)
            else:
                port = self._server.add_secure_port(listen, tls.credentials())
        except RuntimeError as error:
            raise not_listening(listen) from error
        _remove_stale(control)
        with short_socket_path(control) as path:
            self._server.add_insecure_port(f"unix:{path}")
            await self._server.start()
        _close_to_others(control)
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        for service in ("", *_SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return self.address

    async def stop(self) -> None:
        """Stops accepting, lets what is under way finish for :data:`STOP_GRACE_S`, then closes."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(STOP_GRACE_S)


def _remove_stale(socket: Path) -> None:
    # Left by a process that was killed; whoever calls this owns the directory.
    socket.unlink(missing_ok=True)


def _close_to_others(socket: Path) -> None:
    # Whoever may open it may do everything, whatever the umask was.
    socket.chmod(0o600)
