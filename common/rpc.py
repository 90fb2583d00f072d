"""gRPC's edge: how channels are made, and how our errors cross the wire.

An error travels as a gRPC status with the class name in the trailing metadata and comes out as the same class.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from understudy.common.addresses import is_loopback, split_address
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
from understudy.common.proving_channel import KINDS
from understudy.common.tls import handshake_error
from understudy.common.types import MESSAGE_BYTES_MAX

CODE_METADATA = "understudy-code"
REMEDY_METADATA = "understudy-remedy-bin"  # "-bin": gRPC carries any bytes there, elsewhere only ASCII
FIRST_MESSAGE_S_MAX = 10.0

MESSAGE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)
_CHANNEL_OPTIONS = (
    *MESSAGE_OPTIONS,
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


def note_process() -> None:
    """Notes that this process uses gRPC.

    Raises:
        UsageError: it is a fork of one that has used it.
    """
    global _process
    check_not_forked()
    _process = os.getpid()


# -- channels ------------------------------------------------------------------------------------------------


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
    note_process()
    ignore_stray_events(asyncio.get_running_loop())
    if credentials.tls is None:
        if credentials.token is not None:
            _check_stays_here(target)
        channel = grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
    else:
        channel = grpc.aio.secure_channel(target, credentials.tls.credentials(), options=_CHANNEL_OPTIONS)
    return proving(cast(grpc.aio.Channel, _ParsingChannel(channel)), credentials)


class _Undecodable(BaseException):
    """An answer that is no message. An ``Exception`` gRPC would keep to itself, and hand out None for the answer:
    whoever reads a stream would take that for its end, and wait for a status that never comes.
    """


class _ParsingChannel:
    """``channel`` as the generated stubs use it; an answer that can't be decoded is an error."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._channel, name)
        return functools.partial(_begin, found) if name in KINDS else found

    async def __aenter__(self) -> _ParsingChannel:
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._channel.__aexit__(*error)


def _begin(
    kind: Callable[..., Any],
    method: str,
    *,
    response_deserializer: Callable[[bytes], Any] | None = None,
    **options: Any,
) -> Any:
    def parsed(raw: bytes) -> Any:
        try:
            return raw if response_deserializer is None else response_deserializer(raw)
        except DecodeError as error:
            raise _Undecodable(str(error)) from None

    return kind(method, response_deserializer=parsed, **options)


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
    except _Undecodable as error:
        raise ProtocolError(
            f"{address} sent what can't be decoded: {error}",
            remedy="does a server of Understudy listen there?",
        ) from None
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
