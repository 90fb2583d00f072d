"""gRPC's edge: how servers are made, where they may listen, and how our errors cross the wire.

An error travels as a gRPC status with the class name in the trailing metadata and comes out as the same class.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from understudy.common.credentials import ANONYMOUS, Credentials, proving
from understudy.common.errors import (
    DirectoryError,
    NotAuthenticated,
    NotPermitted,
    PeerError,
    PeerUnreachable,
    ProtocolError,
    ResetNeeded,
    Unavailable,
    UnderstudyError,
    UnknownRealm,
    UsageError,
    from_code,
)
from understudy.common.events import log
from understudy.common.grpc_loop import ignore_stray_events
from understudy.common.service_table import Add, ServiceTable
from understudy.common.tls import ServerTls, handshake_error
from understudy.common.types import MESSAGE_BYTES_MAX

CODE_METADATA = "understudy-code"
REMEDY_METADATA = "understudy-remedy-bin"  # "-bin": gRPC carries any bytes there, elsewhere only ASCII
FIRST_MESSAGE_S_MAX = 10.0
PORT_MAX = 65535
STREAMS_MAX = 1_000  # a connection: more concurrent calls than that wait

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)
_SERVER_OPTIONS = (
    *_OPTIONS,
    ("grpc.so_reuseport", 0),  # two servers on one port would share connections without a word
    ("grpc.max_concurrent_streams", STREAMS_MAX),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
_CHANNEL_OPTIONS = (
    *_OPTIONS,
    ("grpc.enable_http_proxy", 0),  # a variable of the environment must not lead tokens elsewhere
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # One connection a channel of ours: a dead one must not be shared behind our back.
    ("grpc.use_local_subchannel_pool", 1),
)

_STATUS: tuple[tuple[type[UnderstudyError], grpc.StatusCode], ...] = (
    (UnknownRealm, grpc.StatusCode.NOT_FOUND),
    (UsageError, grpc.StatusCode.INVALID_ARGUMENT),
    (ResetNeeded, grpc.StatusCode.FAILED_PRECONDITION),
    (DirectoryError, grpc.StatusCode.FAILED_PRECONDITION),
    (PeerError, grpc.StatusCode.FAILED_PRECONDITION),
    (NotAuthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (NotPermitted, grpc.StatusCode.PERMISSION_DENIED),
    (Unavailable, grpc.StatusCode.RESOURCE_EXHAUSTED),
)

# Without brackets, the last group of `::1:7850` could be a port or not.
_ADDRESS = re.compile(r"(?:\[(?P<ipv6>[^\[\]]+)\]|(?P<host>[^\[\]:/,\s]+)):(?P<port>[0-9]{1,5})")


# -- addresses -----------------------------------------------------------------------------------------------


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 host stands in brackets, and is returned without them.

    Raises:
        UsageError: it is not of that form.
    """
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if match is None or int(match["port"]) > PORT_MAX or not _is_ipv6_or_none(match["ipv6"]):
        raise UsageError(
            f"bad address {address!r:.200}", remedy="give HOST:PORT, for example 127.0.0.1:7850 or [::1]:7850"
        )
    return match["ipv6"] or match["host"], int(match["port"])


def _is_ipv6_or_none(host: str | None) -> bool:
    try:
        return host is None or bool(ipaddress.IPv6Address(host).packed)
    except ValueError:
        return False


def check_listen(address: str, *, has_tls: bool) -> None:
    """Refuses to listen beyond this machine in the clear (G10): without TLS, a server is in protected mode.

    Raises:
        NotPermitted: the address is not loopback and there is no TLS.
        UsageError: it is no address.
    """
    host, _ = split_address(address)
    if not has_tls and not is_loopback(host):
        raise NotPermitted(
            f"refusing to listen on {address} without TLS: in protected mode, only peers on this machine are served",
            remedy="listen on 127.0.0.1, or give --tls-cert and --tls-key: "
            "`understudy keys init DIR --host NAME` makes them",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached by that name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_free(address: str) -> None:
    """Refuses an address that can't be listened on, before anything is made on disk.

    Raises:
        UsageError: it is in use, or not an address of this machine.
    """
    host, port = split_address(address)
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen()
    except OSError as error:
        raise _not_listening(address) from error


def _not_listening(address: str) -> UsageError:
    return UsageError(
        f"can't listen on {address}: it is in use, or not an address of this machine",
        remedy="choose another --listen address",
    )


# -- forks ---------------------------------------------------------------------------------------------------

FORK_REMEDY = "start processes with subprocess or multiprocessing's `spawn`, or fork before you connect"
_process: int | None = None  # that uses gRPC


def is_forked() -> bool:
    """Whether this is a fork of a process that has used gRPC."""
    return _process not in (None, os.getpid())


def check_not_forked() -> None:
    """Refuses gRPC in a fork of a process that has used it: its threads are missing, and every call would hang.

    Raises:
        UsageError.
    """
    if is_forked():
        raise UsageError(
            f"gRPC is in use by process {_process}, of which this one is a fork", remedy=FORK_REMEDY
        )


def _note_process() -> None:
    global _process
    check_not_forked()
    _process = os.getpid()


# -- servers and channels ------------------------------------------------------------------------------------


class Listener:
    """A gRPC server with health and reflection, and the services that :meth:`answer_with` gives it."""

    def __init__(
        self, services: Sequence[str], interceptors: Sequence[grpc.aio.ServerInterceptor] = ()
    ) -> None:
        _note_process()
        ignore_stray_events(asyncio.get_running_loop())
        self._server = grpc.aio.server(interceptors=interceptors, options=_SERVER_OPTIONS)
        self._table = ServiceTable()
        self._server.add_generic_rpc_handlers((self._table,))
        self.address = ""
        self._health = health.aio.HealthServicer()
        self._services = services
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            [*services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
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
            raise _not_listening(listen) from error
        _remove_stale(control)
        with short_socket_path(control) as path:
            self._server.add_insecure_port(f"unix:{path}")
            await self._server.start()
        _close_to_others(control)
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        for service in ("", *self._services):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return self.address

    async def stop(self, *, grace_s: float) -> None:
        """Stops accepting, lets what is under way finish for ``grace_s``, then closes."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _remove_stale(socket: Path) -> None:
    # Left by a process that was killed; whoever calls this owns the directory.
    socket.unlink(missing_ok=True)


def _close_to_others(socket: Path) -> None:
    # Whoever may open it may do everything, whatever the umask was.
    socket.chmod(0o600)


@contextlib.contextmanager
def short_socket_path(path: Path) -> Iterator[str]:
    """A name for a Unix socket that fits into 107 bytes, however deep the directory lies."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def open_channel(target: str, credentials: Credentials = ANONYMOUS) -> grpc.aio.Channel:
    """A channel to ``HOST:PORT`` or ``unix:PATH``; it connects when first used, and each call says who calls.

    Raises:
        UsageError: this process is a fork of one that has used gRPC, or a file of ``credentials`` can't be used.
        NotPermitted: a token would go through a network in the clear, or others may read a file with a secret.
    """
    _note_process()
    ignore_stray_events(asyncio.get_running_loop())
    if credentials.tls is None:
        if credentials.token is not None:
            _check_stays_here(target)
        channel = grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
    else:
        channel = grpc.aio.secure_channel(target, credentials.tls.credentials(), options=_CHANNEL_OPTIONS)
    return proving(channel, credentials)


def _check_stays_here(target: str) -> None:
    if not target.startswith("unix:") and not is_loopback(split_address(target)[0]):
        raise NotPermitted(
            f"refusing to send a token to {target} in the clear",
            remedy="give --ca FILE, the CA that has signed the server's certificate",
        )


async def first_message(context: grpc.aio.ServicerContext) -> Any:  # type: ignore[type-arg]
    """The first message of a stream, or ``grpc.aio.EOF``. A stream on which nobody speaks must not be held for ever.

    Raises:
        ProtocolError: none came within :data:`FIRST_MESSAGE_S_MAX`.
    """
    try:
        async with asyncio.timeout(FIRST_MESSAGE_S_MAX):
            return await context.read()
    except TimeoutError:
        raise ProtocolError(f"no first message came for {FIRST_MESSAGE_S_MAX:g} s") from None


# -- errors --------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def answering_errors(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:  # type: ignore[type-arg]
    """Turns our errors into the call's status."""
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError as error:
        log.debug("peer_gone", error=str(error))  # in the middle of an answer: nobody is left to hear of it
    except UnderstudyError as error:
        status = next((code for kind, code in _STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
        await context.abort(
            status,
            _sendable(str(error)).decode(),
            trailing_metadata=((CODE_METADATA, error.code), (REMEDY_METADATA, _sendable(error.remedy))),
        )


def _sendable(text: str) -> bytes:
    """``text`` in UTF-8: a path may hold bytes that are none, and gRPC would fail with a trace instead."""
    return text.encode(errors="backslashreplace")


@contextlib.contextmanager
def peer_errors(address: str) -> Iterator[None]:
    """Turns a failed call to ``address`` into one of our errors."""
    before = _cancellations()
    try:
        yield
    except asyncio.CancelledError:
        # gRPC raises it for a call that was cancelled, too: by the server, or by closing the channel. Taken for
        # a cancellation of this task, it would end the task without a word.
        if _cancellations() > before:
            raise
        raise PeerUnreachable(f"the call to {address} was cancelled") from None
    except grpc.aio.AioRpcError as error:
        # It takes the place of a cancellation that comes while the call ends: the task would go on for ever.
        if _cancellations() > before:
            raise asyncio.CancelledError from None
        raise from_rpc(error, address) from None  # gRPC's own trace says nothing more
    except grpc.aio.UsageError as error:
        raise PeerUnreachable(f"the connection to {address} is closed") from error
    except asyncio.InvalidStateError as error:
        # Instead of the call's status, where it ended before it was written to.
        raise PeerUnreachable(f"{address} is not reachable: it has ended the call") from error


# What gRPC makes of a call that was ended while it was being written to; the status that it was ended with is lost.
_ENDED_WHILE_WRITING = "Internal error from Core"


def _cancellations() -> int:
    """How often this task was asked to end: what it has lived through counts for good, or until it takes that back."""
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


def from_rpc(error: grpc.aio.AioRpcError, address: str) -> UnderstudyError:
    """Our error for a failed call."""
    metadata = error.trailing_metadata() or grpc.aio.Metadata()
    details = error.details() or error.code().name
    code = metadata.get(CODE_METADATA)
    if code is not None:
        remedy = metadata.get(REMEDY_METADATA, b"")
        return _sent(str(code), details, remedy.decode(errors="replace") if isinstance(remedy, bytes) else "")
    match error.code():
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.CANCELLED:
            handshake = handshake_error(details, address)
            if handshake is not None:
                return handshake
            why = "connection refused" if "Connection refused" in details else details
            return PeerUnreachable(
                f"{address} is not reachable: {why}", remedy="is it running, and is the address right?"
            )
        case grpc.StatusCode.INTERNAL if details == _ENDED_WHILE_WRITING:
            return PeerUnreachable(f"{address} is not reachable: it has ended the call")
        case grpc.StatusCode.UNIMPLEMENTED:
            return ProtocolError(f"{address} does not speak this protocol: {details}")
        case _:
            return ProtocolError(f"{address} answered {error.code().name}: {details}")


def _sent(code: str, text: str, remedy: str) -> UnderstudyError:
    """The error that was sent as ``code`` and :func:`str`, with its remedy apart again."""
    return from_code(code, text.removesuffix(f" ({remedy})") if remedy else text, remedy)
