"""gRPC's edge: which addresses are ones, and how errors come over the wire."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc.aio
import pytest
from harness import DEADLINE_S
from nodes import GarbageServer

from understudy.common import errors, portal
from understudy.common.addresses import check_listen, split_address
from understudy.common.credentials import Credentials
from understudy.common.errors import NotPermitted, PeerUnreachable, ProtocolError, UnderstudyError, UsageError
from understudy.common.rpc import answering_errors, open_channel, peer_errors
from understudy.v1 import admin_pb2, admin_pb2_grpc

# -- addresses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("127.0.0.1:7850", ("127.0.0.1", 7850)),
        ("some-host.example:1", ("some-host.example", 1)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("[2001:db8::7]:7850", ("2001:db8::7", 7850)),
    ],
)
def test_an_address_is_host_and_port(address: str, found: tuple[str, int]) -> None:
    """HOST:PORT, where an IPv6 host stands in brackets and comes out without them."""
    assert split_address(address) == found


@pytest.mark.parametrize(
    "address",
    [
        *(
            "",
            "127.0.0.1",
            ":7850",
            "host:",
            "host:port",
            "host:-1",
            "host:65536",
            "host:7850x",
            "unix:/tmp/x",
        ),
        *("::1:7850", "[::1]", "[::1:7850", "::1]:7850", "[host]:7850", "[]:7850", "http://host:7850"),
        *("ho st:7850", "a:1,b:2", "host:\u0661", "host:\u00b2", "host:" + "9" * 5_000),
        *(None, b"127.0.0.1:7850", 7850),
    ],
)
def test_what_is_no_address_is_refused_with_an_example_of_one(address: str) -> None:
    """Without a port, out of range, of another type: a UsageError that shows what an address looks like."""
    with pytest.raises(UsageError, match=r"bad address .*HOST:PORT"):
        split_address(address)


@pytest.mark.parametrize("address", ["0.0.0.0:7850", "[::]:7850", "192.0.2.1:7850", "example.org:7850"])
def test_only_loopback_is_listened_on_in_the_clear(address: str) -> None:
    """G10: any other address needs TLS."""
    with pytest.raises(NotPermitted, match="--tls-cert"):
        check_listen(address, has_tls=False)
    check_listen(address, has_tls=True)
    for loopback in ("127.0.0.1:0", "[::1]:0", "localhost:0"):
        check_listen(loopback, has_tls=False)


@pytest.mark.parametrize("target", ["192.0.2.1:7850", "example.org:7850", "[2001:db8::7]:7850"])
def test_a_token_is_not_sent_in_the_clear(target: str) -> None:
    """G10: beyond this machine a token needs TLS; on loopback and on a Unix socket it does not."""
    credentials = Credentials(token="secret")

    async def opened(to: str) -> None:
        await open_channel(to, credentials).close()

    with pytest.raises(NotPermitted, match="--ca"):
        portal.call(opened(target))
    for here in ("127.0.0.1:7850", "[::1]:7850", "localhost:7850", "unix:/tmp/socket"):
        portal.call(opened(here))


def test_each_call_shows_the_token() -> None:
    """Of every kind of call, in the metadata, beside what the caller puts there itself."""
    shown: list[dict[str, str]] = []

    def note(context: grpc.aio.ServicerContext) -> None:  # type: ignore[type-arg]
        shown.append({key: str(value) for key, value in context.invocation_metadata() or ()})

    async def asked() -> None:
        async with _serving(note) as address, open_channel(address, Credentials(token="a.b-c")) as channel:
            status = admin_pb2_grpc.AdminStub(channel).Status
            await status(admin_pb2.StatusRequest(), timeout=DEADLINE_S)
            await status(admin_pb2.StatusRequest(), timeout=DEADLINE_S, metadata=(("own", "1"),))

    portal.call(asked())
    assert [one.get("authorization") for one in shown] == ["Bearer a.b-c"] * 2
    assert shown[1]["own"] == "1"


# -- errors over the wire --------------------------------------------------------------------------------------


class _Server(admin_pb2_grpc.AdminServicer):
    """Answers `Status` by doing what it was given to do."""

    def __init__(self, act: Callable[[grpc.aio.ServicerContext], None]) -> None:  # type: ignore[type-arg]
        self._act = act

    async def Status(self, request: object, context: grpc.aio.ServicerContext) -> admin_pb2.StatusResponse:  # type: ignore[type-arg]
        async with answering_errors(context):
            self._act(context)
        return admin_pb2.StatusResponse()


@contextlib.asynccontextmanager
async def _serving(act: Callable[[grpc.aio.ServicerContext], None]) -> AsyncIterator[str]:  # type: ignore[type-arg]
    server = grpc.aio.server()
    admin_pb2_grpc.add_AdminServicer_to_server(_Server(act), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def _ask(address: str) -> None:
    async with open_channel(address) as channel:
        with peer_errors(address):
            await admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=DEADLINE_S)


def _error_from(act: Callable[[grpc.aio.ServicerContext], None]) -> UnderstudyError:  # type: ignore[type-arg]
    """What a caller gets where the server does ``act``."""

    async def asked() -> UnderstudyError:
        async with _serving(act) as address:
            with pytest.raises(UnderstudyError) as raised:
                await _ask(address)
            return raised.value

    return portal.call(asked())


def _tree(cls: type[UnderstudyError]) -> list[type[UnderstudyError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _tree(sub))]


_CLASSES = [cls for cls in _tree(UnderstudyError) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", _CLASSES)
@pytest.mark.parametrize("remedy", ["", "tu \u00e9crire (ceci)"])
def test_an_error_comes_over_the_wire_as_it_was_raised(cls: type[UnderstudyError], remedy: str) -> None:
    """Every class of the tree, with its message and its remedy, each for itself."""
    message = "what (ever) \u00fcber\nlines: 100 %"

    def fail(_: object) -> None:
        raise cls(message, remedy=remedy)

    error = _error_from(fail)
    assert type(error) is cls
    assert (error.message, error.remedy) == (message, remedy)
    assert str(error) == str(cls(message, remedy=remedy))
    assert error.exit_code == cls.exit_code


def test_an_error_that_names_a_path_of_odd_bytes_comes_over_the_wire() -> None:
    """File names need not be text; what can't be sent is written out."""

    def fail(_: object) -> None:
        raise errors.DiskFull("no space left in /data\udcff", remedy="look at /data\udcff")

    error = _error_from(fail)
    assert type(error) is errors.DiskFull
    assert "no space left in /data\\udcff" in error.message


def test_an_error_of_a_class_that_this_version_does_not_know_is_still_ours() -> None:
    """A newer server's error comes out as the base class, with its words."""

    class LaterError(UnderstudyError):
        pass

    LaterError.__name__ = "NotInAnyTree"

    def fail(_: object) -> None:
        error = LaterError("something new", remedy="read on")
        LaterError.__name__ = "SomethingElse"  # the receiver looks names up in the same process
        raise error

    error = _error_from(fail)
    assert str(error) == "something new (read on)"


def test_a_call_that_the_server_cancels_is_an_error_and_no_cancellation() -> None:
    """gRPC raises CancelledError then, which would end the task that asked without a word."""

    def fail(context: grpc.aio.ServicerContext) -> None:  # type: ignore[type-arg]
        raise asyncio.CancelledError

    assert isinstance(_error_from(fail), PeerUnreachable)


def test_a_call_under_way_fails_when_its_channel_is_closed() -> None:
    """Whoever waits for it gets one of our errors."""

    async def story() -> None:
        reached = asyncio.Event()
        silence = asyncio.Event()

        class Silent(admin_pb2_grpc.AdminServicer):
            async def Status(self, request: object, context: object) -> admin_pb2.StatusResponse:
                reached.set()
                await silence.wait()
                return admin_pb2.StatusResponse()

        server = grpc.aio.server()
        admin_pb2_grpc.add_AdminServicer_to_server(Silent(), server)  # type: ignore[abstract]
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        channel = open_channel(address)

        async def ask() -> None:
            with peer_errors(address):
                await admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest())

        asked = asyncio.create_task(ask())
        await reached.wait()
        await channel.close()
        with pytest.raises(PeerUnreachable, match=address):
            await asked
        silence.set()
        await server.stop(None)

    portal.call(story())


def test_a_task_that_is_cancelled_while_it_calls_is_cancelled() -> None:
    """Only a cancellation that nobody asked this task for is taken for the peer's."""

    async def story() -> None:
        task = asyncio.create_task(_call_and_be_cancelled())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def _call_and_be_cancelled() -> None:
        with peer_errors("host:1"):
            await asyncio.Event().wait()

    portal.call(story())


def test_a_task_that_has_lived_through_a_cancellation_is_told_what_went_wrong() -> None:
    """An error is no cancellation, though the task was asked to end before: by a task group of its own, for one."""

    async def story() -> None:
        task = asyncio.create_task(_go_on_and_call())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(PeerUnreachable):
            await task

    async def _go_on_and_call() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await _ask("127.0.0.1:1")

    portal.call(story())


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, PeerUnreachable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, PeerUnreachable),
        (grpc.StatusCode.UNIMPLEMENTED, ProtocolError),
        (grpc.StatusCode.INTERNAL, ProtocolError),
        (grpc.StatusCode.UNKNOWN, ProtocolError),
    ],
)
def test_a_status_that_is_not_ours_names_the_peer(code: grpc.StatusCode, kind: type[UnderstudyError]) -> None:
    """Of a proxy, or of another program: which address, and whether to try again."""

    async def story() -> None:
        class Foreign(admin_pb2_grpc.AdminServicer):
            async def Status(self, request: object, context: grpc.aio.ServicerContext) -> None:  # type: ignore[type-arg,override]
                await context.abort(code, "in other words")

        server = grpc.aio.server()
        admin_pb2_grpc.add_AdminServicer_to_server(Foreign(), server)  # type: ignore[abstract]
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        with pytest.raises(kind, match="in other words") as raised:
            await _ask(address)
        assert type(raised.value) is kind
        assert address in str(raised.value)
        await server.stop(None)

    portal.call(story())


def test_a_peer_that_speaks_garbage_is_unreachable() -> None:
    """What is no gRPC ends in one of our errors, with the address in it."""
    with GarbageServer() as garbage, pytest.raises(PeerUnreachable, match=garbage.address):
        portal.call(_ask(garbage.address))


def test_nobody_there_is_unreachable() -> None:
    """Connection refused, in words."""
    with pytest.raises(PeerUnreachable, match=r"127\.0\.0\.1:1 is not reachable: connection refused"):
        portal.call(_ask("127.0.0.1:1"))
