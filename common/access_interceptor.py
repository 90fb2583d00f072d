"""At the door of every call: who it is, whether it may make this call at all, and whether it still is who it was.

Services find the caller with :func:`understudy.common.access.caller`, and ask the authority about realms themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import ipaddress
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from understudy.common.access import (
    ANONYMOUS,
    LOCAL,
    OPEN,
    REMEDIES,
    REQUIRES,
    USER_REMEDY,
    Door,
    Kind,
    Principal,
    Requires,
    meets,
    peer_host,
    set_caller,
)
from understudy.common.authority import Authority
from understudy.common.errors import (
    NotAuthenticated,
    NotPermitted,
    Overloaded,
    ProtocolError,
    UnderstudyError,
)
from understudy.common.events import log
from understudy.common.proving_channel import AUTHORIZATION_METADATA
from understudy.common.rpc import answering_errors
from understudy.common.unary_requests import UnaryRequests

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Enter: TypeAlias = Callable[[Context], contextlib.AbstractAsyncContextManager[Principal]]
Read: TypeAlias = Callable[[Principal, Context], Awaitable[Any]]

# Calls under way of one user, or of one host where there is no user. Our clients have one or two; each costs some
# tens of kilobytes.
CALLS_MAX = 4_000
ANONYMOUS_CALLS_MAX = 100
CHECK_S = 1.0  # how often it is looked at whether a stream's caller still is who it was

_UNIX = "unix:"


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls that :data:`REQUIRES` does not allow their callers."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._guarded: dict[str, tuple[Handler, Handler]] = {}  # and what stands before it, by method
        self._calls: Counter[str] = Counter()
        self._requests = UnaryRequests()
        self._streams: dict[asyncio.Task[Any], Principal] = {}
        self._ended: dict[asyncio.Task[Any], UnderstudyError] = {}
        self._watcher: asyncio.Task[None] | None = None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler of a call, behind the door; no handler where there is no such call."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # and not kept: unknown names come from outside, and must not fill our memory
        known, guarded = self._guarded.get(method, (None, None))
        if guarded is None or known is not handler:  # another after a promotion
            guarded = self._guard(handler, method)
            self._guarded[method] = handler, guarded
        return guarded

    def _guard(self, handler: Handler, method: str) -> Handler:
        behaviour = next(
            one
            for one in (
                handler.unary_unary,
                handler.unary_stream,
                handler.stream_unary,
                handler.stream_stream,
            )
            if one is not None
        )
        is_stream = bool(handler.request_streaming or handler.response_streaming)
        enter = functools.partial(self._entered, REQUIRES.get(method), method, is_stream=is_stream)
        read = None if handler.request_streaming else self._requests.read
        # Never gRPC's unary requests: those are read before we are asked. On the wire there is no difference.
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(
            _behind(behaviour, enter, read),
            request_deserializer=_parser(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    @contextlib.asynccontextmanager
    async def _entered(
        self, requires: Requires | None, method: str, context: Context, *, is_stream: bool
    ) -> AsyncIterator[Principal]:
        async with answering_errors(context):
            if requires is None:
                raise NotPermitted(f"nothing says who may call {method}")
            principal = ANONYMOUS if requires is Requires.NOTHING else self._identify(context)
            if not meets(principal, requires):
                raise NotPermitted(
                    f"{method} needs {requires.value}; the caller is {principal}",
                    remedy=REMEDIES.get(requires, USER_REMEDY),
                )
            self._count(principal, method, context)
            set_caller(principal)
            if is_stream:
                async with self._watched(principal, context):
                    yield principal
            else:
                yield principal

    # -- who it is -----------------------------------------------------------------------------------------

    def _identify(self, context: Context) -> Principal:
        peer = context.peer()
        door = self._authority.door(unix=peer.startswith(_UNIX), loopback=_is_loopback(peer))
        match door:
            case Door.LOCAL:
                return LOCAL
            case Door.OPEN:
                return OPEN
            case Door.PROOF:
                return self._proved(context)
            case Door.CLOSED:
                raise NotAuthenticated(
                    "this server takes only peers on its own machine",
                    remedy="give it TLS and make users: see `understudy user --help`",
                )

    def _proved(self, context: Context) -> Principal:
        metadata = tuple(context.invocation_metadata() or ())
        shown = [str(value) for key, value in metadata if key == AUTHORIZATION_METADATA]
        if len(shown) > 1:
            raise NotAuthenticated("more than one token was shown")
        if shown:
            scheme, _, token = shown[0].partition(" ")
            if scheme.lower() != "bearer":
                raise NotAuthenticated("the token was not shown as `Bearer TOKEN`")
            return self._authority.by_token(token)
        return self._authority.by_certificate(metadata)

    def _count(self, principal: Principal, method: str, context: Context) -> None:
        """Bounds the calls of one peer (G9).

        Unauthenticated ones of a host are counted apart, by method: who watches its health for hours must not keep
        others behind the same address from logging in.
        """
        if principal.kind is Kind.LOCAL:
            return
        is_anonymous = principal.kind is Kind.ANONYMOUS
        host = peer_host(context.peer())
        name = principal.user_id or f"{method if is_anonymous else ''} {host}"
        most = ANONYMOUS_CALLS_MAX if is_anonymous else CALLS_MAX
        if self._calls[name] >= most:
            raise Overloaded(f"{most} calls of this peer are under way already", remedy="try again later")
        self._calls[name] += 1

        def done(_: object) -> None:
            self._calls[name] -= 1
            if not self._calls[name]:
                del self._calls[name]

        context.add_done_callback(done)  # type: ignore[arg-type]  # the stubs name its parameters

    # -- whether it still is ---------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _watched(self, principal: Principal, context: Context) -> AsyncIterator[None]:
        task = asyncio.current_task()
        assert task is not None
        if principal.kind is not Kind.LOCAL and principal.kind is not Kind.ANONYMOUS:
            self._streams[task] = principal
            context.add_done_callback(lambda _: self._forget(task))  # type: ignore[arg-type]
            if self._watcher is None:
                self._watcher = asyncio.create_task(self._watch(), name="watch callers")
        try:
            yield
        except asyncio.CancelledError:
            error = self._ended.pop(task, None)
            if error is None:
                raise
            task.uncancel()
            raise error from None
        finally:
            self._streams.pop(task, None)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._streams.pop(task, None)
        self._ended.pop(task, None)

    async def _watch(self) -> None:
        try:
            while self._streams:
                await asyncio.sleep(CHECK_S)
                self.end_invalid()
        finally:
            self._watcher = None

    def end_invalid(self) -> None:
        """Ends the streams whose callers are nobody any more."""
        for task, principal in list(self._streams.items()):
            try:
                self._authority.check_valid(principal)
            except UnderstudyError as error:
                log.info("stream_ended", caller=str(principal), reason=error.message)
                del self._streams[task]
                self._ended[task] = error
                task.cancel()


def _parser(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """``parse`` with our error for bytes that are no message: of another one gRPC would log a trace for each call."""

    if parse is None:
        return None

    def parsed(raw: bytes) -> Any:
        try:
            return parse(raw)
        except DecodeError as error:
            raise ProtocolError("a message that can't be decoded") from error

    return parsed


def _behind(behaviour: Callable[..., Any], enter: Enter, read: Read | None) -> Callable[..., Any]:
    """``behaviour``, entered through ``enter``, of the same nature: gRPC looks at whether it is a generator.

    With ``read``, it takes one request, which is read once the caller has been let in.
    """

    async def request_of(requests: object, principal: Principal, context: Context) -> object:
        return requests if read is None else await read(principal, context)

    if inspect.isasyncgenfunction(behaviour):

        async def pages(requests: object, context: Context) -> AsyncIterator[Any]:
            async with enter(context) as principal:
                async for page in behaviour(await request_of(requests, principal, context), context):
                    yield page

        return pages

    async def answer(requests: object, context: Context) -> Any:
        async with enter(context) as principal:
            return await behaviour(await request_of(requests, principal, context), context)

    return answer


def _is_loopback(peer: str) -> bool:
    try:
        address = ipaddress.ip_address(peer_host(peer))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # as a socket for both families shows it
    return bool((mapped or address).is_loopback)
