"""The direct client: whom it binds to, what it sends again, what it says of mistakes; nobody waits in vain."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest
from faulty_proxy import FaultyProxy
from harness import DEADLINE_S, Process, Processes, wait_until
from nodes import GarbageServer, Pair, assert_left_alone, pairs, put, status, until_said, wait_until_caught_up

from understudy import client
from understudy.client import (
    Add,
    AsyncServer,
    Delete,
    DeleteRange,
    DiskFull,
    Diverged,
    OutcomeUnknown,
    Overloaded,
    PeerUnreachable,
    Put,
    Realm,
    Receipt,
    Server,
    Update,
    UsageError,
    aconnect,
    connect,
    direct,
    stream,
)
from understudy.common import errors, portal
from understudy.common.backoff import Backoff
from understudy.common.errors import BadOperation, Fenced, ProtocolError, UnderstudyError
from understudy.common.rpc import open_channel
from understudy.primary import Primary
from understudy.v1 import admin_pb2, admin_pb2_grpc, data_pb2, data_pb2_grpc

_CLUSTER = b"c" * 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A connection to a primary that does nothing odd, with one realm of three keys."""
    started = Processes(tmp_path_factory.mktemp("processes"))
    try:
        primary = started.primary(tmp_path_factory.mktemp("data") / "p")
        with connect(primary.address) as connection:
            connection.commit("/realm", [Put(b"%d" % number, b"value") for number in range(3)])
            yield connection
    finally:
        started.close()


@contextlib.contextmanager
def _stopped(process: Process) -> Iterator[None]:
    """While it lasts, the process is there and does nothing."""
    process.send(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send(signal.SIGCONT)


# -- mistakes --------------------------------------------------------------------------------------------------

_NO_REALMS: list[Any] = [None, b"/realm", 5, ["/realm"], "realm", ""]
_NO_KEYS: list[Any] = ["key", None, 5, bytearray(b"key"), b"", b"k" * 481]
_NO_BYTES: list[Any] = ["value", None, 5, bytearray(b"value")]
_NO_OPERATIONS: list[Any] = [None, 5, "abc", b"abc", [], [None], [("put", b"k", b"v")], Put(b"k", b"v")]
_NO_AMOUNTS: list[Any] = ["1", None, 1.0, True, 1 << 63, -(1 << 63) - 1]
_NO_LIMITS: list[Any] = [-1, "1", 1.5, True, 1 << 64]
_NO_TIMEOUTS: list[Any] = [-1, -0.001, "1", b"1", True, float("nan"), float("inf"), 1e30]
_NO_ADDRESSES: list[Any] = [
    *("", " ", ",", "127.0.0.1", "127.0.0.1:", ":7850", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:7850,"),
    *(b"127.0.0.1:7850", None, 7850, ["127.0.0.1:7850"]),
]


def _calls(server: Server, timeout_s: Any) -> dict[str, Callable[[], object]]:
    return {
        "commit": lambda: server.commit("/realm", [Put(b"key", b"value")], timeout_s=timeout_s),
        "wait": lambda: server.wait(1, timeout_s=timeout_s),
        "get": lambda: server.get("/realm", b"key", timeout_s=timeout_s),
        "get_many": lambda: server.get_many("/realm", [b"key"], timeout_s=timeout_s),
        "count": lambda: server.count("/realm", timeout_s=timeout_s),
        "scan": lambda: list(server.scan("/realm", timeout_s=timeout_s)),
        "realms": lambda: server.realms(timeout_s=timeout_s),
        "drop_realm": lambda: server.drop_realm("/other", timeout_s=timeout_s),
        "status": lambda: server.status(timeout_s=timeout_s),
    }


_CALLS = ["commit", "wait", "get", "get_many", "count", "scan", "realms", "drop_realm", "status"]


@pytest.mark.parametrize("realm", _NO_REALMS, ids=repr)
def test_what_is_no_realm_is_refused(server: Server, realm: Any) -> None:
    """By every call that takes one, with what a realm path looks like."""
    for call in (
        lambda: server.commit(realm, [Put(b"key", b"value")]),
        lambda: server.get(realm, b"key"),
        lambda: server.get_many(realm, [b"key"]),
        lambda: server.count(realm),
        lambda: list(server.scan(realm)),
        lambda: server.drop_realm(realm),
    ):
        with pytest.raises(UsageError, match=r"bad realm path .*/inventory"):
            call()


@pytest.mark.parametrize("key", _NO_KEYS, ids=repr)
def test_what_is_no_key_is_refused(server: Server, key: Any) -> None:
    """In reads and in operations, where an empty one is a range without bound only to DeleteRange."""
    for operation in (Put(key, b"value"), Update(key, b"value"), Delete(key), Add(key, 1)):
        with pytest.raises(UsageError):
            server.commit("/realm", [operation])
    for read in (lambda: server.get("/realm", key), lambda: server.get_many("/realm", [b"0", key])):
        with pytest.raises(UsageError, match="bad key"):
            read()


@pytest.mark.parametrize("keys", [None, 5, b"ab", "ab"], ids=repr)
def test_what_is_no_list_of_keys_is_refused(server: Server, keys: Any) -> None:
    """Bytes are not taken for a list of numbers."""
    with pytest.raises(UsageError, match="not a list of keys"):
        server.get_many("/realm", keys)


@pytest.mark.parametrize("value", _NO_BYTES, ids=repr)
def test_what_is_not_bytes_is_no_value_and_no_bound(server: Server, value: Any) -> None:
    """None is not taken for an empty value, nor for no bound."""
    for operation in (
        Put(b"k", value),
        Update(b"k", value),
        DeleteRange(value, b""),
        DeleteRange(b"", value),
    ):
        with pytest.raises(UsageError, match="are bytes"):
            server.commit("/realm", [operation])
    for read in (
        lambda: list(server.scan("/realm", start=value)),
        lambda: list(server.scan("/realm", end=value)),
        lambda: server.count("/realm", start=value),
        lambda: server.count("/realm", end=value),
    ):
        with pytest.raises(UsageError, match="not bytes"):
            read()


@pytest.mark.parametrize("operations", _NO_OPERATIONS, ids=repr)
def test_what_is_no_list_of_operations_is_refused(server: Server, operations: Any) -> None:
    """An empty one, too."""
    with pytest.raises(UsageError):
        server.commit("/realm", operations)


def test_a_transaction_of_nothing_is_a_mistake_everywhere(server: Server, tmp_path: Path) -> None:
    """Direct, synced or embedded, the block that collected no operation says so, and nothing is committed."""
    with (
        Primary.open(tmp_path / "primary", listen="127.0.0.1:0") as primary,
        Realm.open("/nothing", server=None, directory=tmp_path / "local") as realm,
    ):
        blocks: list[contextlib.AbstractContextManager[object]] = [
            server.transaction("/nothing"),
            primary.transaction("/nothing"),
            realm.transaction(),
        ]
        for block in blocks:
            with pytest.raises(BadOperation, match=r"at least one operation \(begin one only"), block:
                pass
        assert not realm.state.pending_changes
    assert "/nothing" not in [realm.path for realm in server.realms()]


def _named_errors(api: object) -> set[str]:
    """The errors that the docstrings of ``api`` and its methods name."""
    documented = [api, *vars(api).values()] if isinstance(api, type) else [api]
    text = "\n".join(str(getattr(one, "__doc__", "")) for one in documented)
    raised = "\n".join(part.split("\n\n")[0] for part in text.split("Raises:")[1:])
    return set(re.findall(r"\w+", raised)) & set(vars(errors))


def test_what_an_application_may_catch_is_there_to_be_imported() -> None:
    """Every error that a docstring of the client's names, and every mistake of the caller's."""
    mistakes = {one.__name__ for one in UsageError.__subclasses__()} - {"BadImport"}
    named = set().union(*(_named_errors(getattr(client, name)) for name in client.__all__))
    assert {"Overloaded", "BadKey"} <= named
    assert named | mistakes | {"ReceiptExpired"} <= set(client.__all__)


@pytest.mark.parametrize("amount", _NO_AMOUNTS, ids=repr)
def test_what_does_not_fit_a_counter_is_refused(server: Server, amount: Any) -> None:
    """An amount is a whole number of 64 bits, signed."""
    with pytest.raises(UsageError, match="whole numbers of 64 bits"):
        server.commit("/realm", [Add(b"counter", amount)])


@pytest.mark.parametrize("limit", _NO_LIMITS, ids=repr)
def test_what_is_no_limit_is_refused(server: Server, limit: Any) -> None:
    """A scan's limit counts pairs; 0 gives none, None gives all."""
    with pytest.raises(UsageError, match="bad limit"):
        list(server.scan("/realm", limit=limit))
    assert list(server.scan("/realm", limit=0)) == []
    assert len(list(server.scan("/realm", end=b"3", limit=None))) == 3


@pytest.mark.parametrize("timeout_s", _NO_TIMEOUTS, ids=repr)
@pytest.mark.parametrize("call", _CALLS)
def test_what_is_no_time_to_wait_is_refused(server: Server, call: str, timeout_s: Any) -> None:
    """By every call, and by connecting."""
    with pytest.raises(UsageError, match="bad timeout_s"):
        _calls(server, timeout_s)[call]()
    for addresses in ("127.0.0.1:1", "127.0.0.1:1,127.0.0.1:2"):
        with pytest.raises(UsageError, match="bad timeout_s"):
            connect(addresses, timeout_s=timeout_s)


def test_any_time_to_wait_from_none_to_years_is_taken(processes: Processes, tmp_path: Path) -> None:
    """0 means at once: an answer that is there, or an error of ours, but no waiting."""
    primary = processes.primary(tmp_path / "p")
    with connect(primary.address, timeout_s=1e9) as server:
        server.commit("/realm", [Put(b"key", b"value")], timeout_s=None)
        assert server.get("/realm", b"key", timeout_s=1e9) == b"value"
        with _stopped(primary):
            for name, call in _calls(server, 0).items():
                with pytest.raises((PeerUnreachable, OutcomeUnknown, UsageError)) as raised:
                    call()
                assert isinstance(raised.value, UsageError) is (name == "wait")


@pytest.mark.parametrize("addresses", _NO_ADDRESSES, ids=repr)
def test_what_is_no_address_is_refused(addresses: Any) -> None:
    """By both ways to connect, before anything is opened."""

    async def open_it() -> None:
        async with aconnect(addresses):
            pass

    with pytest.raises(UsageError, match="bad address"):
        connect(addresses)
    with pytest.raises(UsageError, match="bad address"):
        asyncio.run(open_it())


@pytest.mark.parametrize("durability", ["much", "", b"local", 5])
def test_what_is_no_durability_is_refused(server: Server, durability: Any) -> None:
    """With the three that there are."""
    with pytest.raises(UsageError, match="local, replica or applied"):
        server.commit("/realm", [Put(b"key", b"value")], durability=durability)


def test_a_part_of_a_realm_is_counted_over_many_pages(server: Server) -> None:
    """From the first key of the range to before its end, however many pages a walk through it takes."""
    for start in range(0, 9_000, 3_000):
        server.commit("/many", [Put(b"%05d" % number, b"") for number in range(start, start + 3_000)])
    assert server.count("/many", start=b"00001") == 8_999
    assert server.count("/many", start=b"00001", end=b"08000") == 7_999
    assert server.count("/many", end=b"00000") == 0


def test_a_mistake_leaves_the_connection_as_it_was(server: Server) -> None:
    """What was refused here was never sent, and the next call works."""
    before = server.status().lsn
    with pytest.raises(UsageError):
        server.commit("/realm", [Put(b"key", b"value"), Put(b"", b"")])
    with pytest.raises(UsageError), server.transaction("/realm"):
        pass  # empty
    assert server.status().lsn == before
    assert server.get("/realm", b"0") == b"value"


def test_a_scan_s_arguments_are_checked_before_it_is_walked(server: Server) -> None:
    """A mistake is told where it was made, though nobody has asked for the first pair yet."""
    wrong: dict[str, Any] = {"start": "a", "end": None, "limit": -1, "timeout_s": -1}
    for connection in (server, server._server):
        for name, value in wrong.items():
            with pytest.raises(UsageError, match=name):
                connection.scan("/realm", **{name: value})
        with pytest.raises(UsageError, match="bad realm path"):
            connection.scan("realm")


# -- closed, shared, forked ------------------------------------------------------------------------------------


def test_a_closed_connection_says_so(processes: Processes, tmp_path: Path) -> None:
    """Every call raises UsageError; closing twice is nothing."""
    server = connect(processes.primary(tmp_path / "p").address)
    server.close()
    server.close()
    for call in _calls(server, 1).values():
        with pytest.raises(UsageError, match="closed"):
            call()


def test_closing_lets_go_of_whoever_waits(processes: Processes, tmp_path: Path) -> None:
    """Reads and writes under way end with errors of ours, though the server says nothing."""
    primary = processes.primary(tmp_path / "p")
    server = connect(primary.address)
    server.commit("/realm", [Put(b"key", b"value")])
    with _stopped(primary), ThreadPoolExecutor() as pool:
        calls = [pool.submit(call) for name, call in _calls(server, DEADLINE_S).items() if name != "wait"]
        with pytest.raises(OutcomeUnknown) as unknown:  # so that the others are under way, too
            server.commit("/realm", [Put(b"key", b"value")], timeout_s=0.3)
        calls.append(pool.submit(server.wait, unknown.value.number, timeout_s=None))
        server.close()
        for one in calls:
            assert isinstance(one.exception(DEADLINE_S), UnderstudyError)


def test_closing_lets_go_of_whoever_looks_for_the_primary() -> None:
    """Nobody is there; who waits for one to come is told that the connection is closed."""

    async def story() -> None:
        client = AsyncServer(["127.0.0.1:1", "127.0.0.1:2"])
        with pytest.raises(PeerUnreachable):  # 0 is at once, and not no limit
            await asyncio.wait_for(anext(client.scan("/realm", timeout_s=0)), DEADLINE_S / 4)
        reads = [asyncio.create_task(client.get("/realm", b"key")) for _ in range(2)]
        await asyncio.sleep(0)  # they begin
        await client.close()
        for one in reads:
            with pytest.raises(UsageError, match="closed"):
                await asyncio.wait_for(one, DEADLINE_S / 4)

    portal.call(story())


def test_threads_share_a_blocking_connection(server: Server) -> None:
    """Each of many threads gets the answers to its own calls."""

    def work(thread: int) -> list[Receipt]:
        realm = f"/threads/{thread}"
        receipts = [server.commit(realm, [Put(b"%d" % number, b"%d" % thread)]) for number in range(20)]
        assert dict(server.scan(realm)) == {b"%d" % number: b"%d" % thread for number in range(20)}
        assert server.get_many(realm, [b"0", b"none"]) == [b"%d" % thread, None]
        return receipts

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    assert all([receipt.version for receipt in receipts] == list(range(1, 21)) for receipts in found)
    assert len({receipt.lsn for receipts in found for receipt in receipts}) == 160


def test_an_asynchronous_connection_belongs_to_its_loop(server: Server) -> None:
    """Used from another one it would wait for ever; it says what to use instead."""
    inner: AsyncServer = server._server
    with pytest.raises(UsageError, match=r"another event loop .*connect"):
        asyncio.run(inner.get("/realm", b"0"))
    with pytest.raises(UsageError, match="another event loop"):
        asyncio.run(inner.close())


def test_blocking_and_asynchronous_connections_take_turns(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Loops that come and go in one process leave no errors of gRPC's with those that stay, or come after."""
    address = server._server._peers.addresses[0]

    async def commit() -> None:
        async with aconnect(address) as other:
            await other.commit("/turns", [Add(b"count", 1)])

    for _ in range(20):
        asyncio.run(commit())
        asyncio.run(commit())
        server.commit("/turns", [Add(b"count", 1)])
    assert server.get("/turns", b"count") == b"60"
    assert not [record.getMessage() for record in caplog.records if record.name == "asyncio"]


def test_other_errors_of_a_loop_are_still_reported(caplog: pytest.LogCaptureFixture) -> None:
    """What an application's own callbacks raise on a loop that has a connection is logged as ever."""

    async def fail() -> None:
        client = AsyncServer(["127.0.0.1:1"])
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await client.close()
        await asyncio.sleep(0)

    asyncio.run(fail())
    assert "ZeroDivisionError" in caplog.text


def test_a_connection_that_failed_is_not_tried_again_once_it_is_closed() -> None:
    """Also while somebody keeps the error: nothing goes on in the background."""
    with GarbageServer() as refused, GarbageServer() as clock:
        with pytest.raises(UnderstudyError) as kept:
            connect(refused.address, timeout_s=DEADLINE_S)
        assert_left_alone(refused, clock)
        assert kept.value


@contextlib.contextmanager
def _as_a_fork() -> Iterator[None]:
    """While it lasts, this process takes itself for a fork.

    A real one, of a process with gRPC's threads in it, now and then crashes before any of our code runs.
    """

    def hang(_: object) -> None:
        raise AssertionError("it would wait for a thread that a fork does not have")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        patch.setattr(portal, "call", hang)
        patch.setattr(portal, "post", hang)
        yield


def test_a_fork_is_told_that_the_connection_is_its_parent_s(server: Server) -> None:
    """It neither waits nor disturbs the parent: every call but close names the remedy, and so does connecting."""
    scan = server.scan("/realm")
    next(scan)
    with _as_a_fork():
        server.close()
        for call in (*_calls(server, 1).values(), lambda: connect("127.0.0.1:1")):
            with pytest.raises(UsageError, match="one is a fork") as raised:
                call()
            assert "`spawn`" in raised.value.remedy
    assert len(list(scan)) >= 2
    assert server.get("/realm", b"0") == b"value"


def test_a_fork_is_told_so_by_an_asynchronous_connection_too(server: Server) -> None:
    """The fork runs a copy of the loop, but not of the threads that would answer."""

    async def story(address: str) -> None:
        async with aconnect(address) as connection:
            await connection.commit("/realm", [Put(b"async", b"value")])
            with _as_a_fork():
                await connection.close()
                with pytest.raises(UsageError, match="one is a fork"):
                    await connection.get("/realm", b"0")
                with pytest.raises(UsageError, match="one is a fork"):
                    await connection.commit("/realm", [Put(b"async", b"other")])
                with pytest.raises(UsageError, match="one is a fork"):
                    async with aconnect(address):
                        pass
            assert await connection.get("/realm", b"async") == b"value"

    asyncio.run(story(_address(server)))


def _address(server: Server) -> str:
    return server._server._peers.addresses[0]


# -- sending, and sending again --------------------------------------------------------------------------------


class _CuttingProxy(FaultyProxy):
    """Cuts all connections in the middle of what the server sends, as often as it is told to."""

    cuts_left = 0

    def _flipped(self, data: bytes) -> bytes:
        # What comes in answer to many transactions is longer than gRPC's own frames, and than the answer to a bind.
        if not self.cuts_left or len(data) < 700:
            return data
        self.cuts_left -= 1
        for one in self._sockets[1:]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        return data[:30]


def test_transactions_keep_their_numbers_over_connections(processes: Processes, tmp_path: Path) -> None:
    """G6: though connections are cut in the middle of answers again and again, each transaction is applied once."""
    primary = processes.primary(tmp_path / "p")

    async def story(address: str) -> list[Receipt]:
        async with aconnect(address) as client:

            async def write(writer: int) -> list[Receipt]:
                return [
                    await client.commit("/realm", [Add(b"counter", 1), Put(b"%d/%d" % (writer, number), b"")])
                    for number in range(2)
                ]

            proxy.cuts_left = 10
            return list(itertools.chain(*await asyncio.gather(*(write(writer) for writer in range(40)))))

    proxy = _CuttingProxy(primary.address)
    with proxy:
        receipts = asyncio.run(story(proxy.address))
        assert proxy.cuts_left == 0
    assert sorted(receipt.version for receipt in receipts) == list(range(1, 81))
    found = pairs(primary.address, "/realm")
    assert (found.pop(b"counter"), len(found)) == (b"80", 80)


def test_wait_tells_what_became_of_a_transaction_sent_to_a_silent_server(
    processes: Processes, tmp_path: Path
) -> None:
    """G6, G9: a write gives up in time though the server takes nothing in, however large it is; then it is applied."""
    primary = processes.primary(tmp_path / "p")
    large = b"v" * (8 << 20)
    with connect(primary.address) as client:
        client.commit("/realm", [Add(b"counter", 1)])
        with _stopped(primary):
            unknown = []
            for _ in range(2):
                with pytest.raises(OutcomeUnknown, match=r"wait\(\)") as raised:
                    client.commit("/realm", [Add(b"counter", 1), Put(b"large", large)], timeout_s=0.3)
                unknown.append(raised.value.number)
            with pytest.raises(OutcomeUnknown):
                client.wait(unknown[0], timeout_s=0)
        for _ in range(2):  # what it said once, it says again
            assert [client.wait(number).version for number in unknown] == [2, 3]
        assert client.get("/realm", b"counter") == b"3"
        with pytest.raises(UsageError, match="not unanswered"):
            client.wait(unknown[-1] + 1)


# -- servers that misbehave ------------------------------------------------------------------------------------

Context = grpc.aio.ServicerContext[Any, Any]


class _FakePrimary(data_pb2_grpc.DataServicer, admin_pb2_grpc.AdminServicer):
    """Binds clients, and lets a function do the rest of each commit stream."""

    def __init__(self, role: str = "primary", epoch: int = 1, proof: bytes = b"first") -> None:
        self.binds = 0
        self.drops = 0
        self.numbers: list[int] = []
        self.clients: set[bytes] = set()
        self.binds_nobody = False
        self.failures_left = 0  # so many calls fail before one is answered
        self.left_s: list[float] = []  # of the deadline of each call, when it came
        self.address = ""
        self.role, self.epoch, self.proof = role, epoch, proof
        self.rest: Callable[[Context], Any] = self.answer_all

    async def _begin(self, context: Context) -> None:
        self.left_s.append(context.time_remaining())
        if self.failures_left:
            self.failures_left -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not today")

    async def Status(self, request: object, context: Context) -> admin_pb2.StatusResponse:
        await self._begin(context)
        answer = admin_pb2.StatusResponse(role=self.role, cluster=_CLUSTER, epoch=self.epoch)
        answer.proof.entry = self.proof
        return answer

    async def Commit(self, _: object, context: Context) -> None:  # type: ignore[override]
        if self.binds_nobody:
            await context.abort(grpc.StatusCode.INTERNAL, "nobody is bound")
        self.clients.add((await context.read()).bind.client)
        bound = data_pb2.Bound(cluster=_CLUSTER, epoch=self.epoch)
        bound.proof.entry = self.proof
        self.binds += 1
        await context.write(data_pb2.CommitResponse(bound=bound))
        await self.rest(context)

    async def answer_all(self, context: Context) -> None:
        """What a good server does, without applying anything."""
        while (message := await context.read()) is not grpc.aio.EOF:
            numbers = [one.number for one in message.transactions.transactions]
            self.numbers += numbers
            rows = data_pb2.Results(
                numbers=numbers, lsns=numbers, versions=numbers, digests=bytes(32 * len(numbers))
            )
            await context.write(data_pb2.CommitResponse(results=rows))

    async def Realms(  # type: ignore[override]
        self, request: object, context: Context
    ) -> AsyncIterator[data_pb2.RealmsPage]:
        await self._begin(context)
        yield data_pb2.RealmsPage(realms=[data_pb2.RealmInfo(path="/realm")])

    async def Scan(  # type: ignore[override]
        self, request: object, context: Context
    ) -> AsyncIterator[data_pb2.ScanPage]:
        await self._begin(context)
        yield data_pb2.ScanPage(keys=[b"key"], values=[b"value"])

    async def DropRealm(self, request: object, context: Context) -> data_pb2.DropRealmResponse:
        await self._begin(context)
        self.drops += 1
        await context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
        raise AssertionError("aborted")

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Its address, while it serves."""
        server = grpc.aio.server()
        data_pb2_grpc.add_DataServicer_to_server(self, server)
        admin_pb2_grpc.add_AdminServicer_to_server(self, server)
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield self.address
        finally:
            await server.stop(None)


_NOBODY = ",127.0.0.1:1"  # a second address, where nobody is


def _with_fake(story: Callable[[_FakePrimary, AsyncServer], Any], others: str = "") -> None:
    async def run() -> None:
        fake = _FakePrimary()  # type: ignore[abstract]
        async with fake.serving() as address, aconnect(address + others) as client:
            await asyncio.wait_for(story(fake, client), DEADLINE_S)

    portal.call(run())


def test_numbers_are_sent_in_their_order_though_commits_had_to_wait_for_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G6, G9: a server refuses a number below one that it knows, so none may be given before there is room."""
    monkeypatch.setattr(stream, "IN_FLIGHT_MAX", 4)

    async def story(fake: _FakePrimary, client: AsyncServer) -> None:
        # The large ones wait for room, and the others come while they do.
        monkeypatch.setattr(stream, "IN_FLIGHT_BYTES_MAX", 2_000)
        sizes = itertools.cycle([1, 1_500, 1, 1, 900])
        await asyncio.gather(
            *(client.commit("/realm", [Put(b"key", b"v" * next(sizes))]) for _ in range(100))
        )
        assert fake.numbers == list(range(1, 101))

    _with_fake(story)


def test_a_commit_that_finds_no_room_in_time_was_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: what a client holds unanswered is bounded; beyond it, Overloaded means that nothing happened."""
    monkeypatch.setattr(stream, "IN_FLIGHT_MAX", 2)

    async def story(fake: _FakePrimary, client: AsyncServer) -> None:
        release = asyncio.Event()

        async def answer_later(context: Context) -> None:
            await release.wait()
            await fake.answer_all(context)

        fake.rest = answer_later
        first = [asyncio.create_task(client.commit("/realm", [Put(b"key", b"")])) for _ in range(2)]
        await asyncio.sleep(0)  # they begin
        with pytest.raises(Overloaded, match="2 transactions"):
            await client.commit("/realm", [Put(b"key", b"")], timeout_s=0.1)
        waiting = asyncio.create_task(client.commit("/realm", [Put(b"key", b"")], timeout_s=None))
        release.set()
        await asyncio.gather(*first, waiting)
        assert fake.numbers == [1, 2, 3]

    _with_fake(story)


def test_a_server_that_binds_and_then_fails_is_left_alone_longer_and_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G9: only an acknowledgement makes the pauses short again, a stream that opens does not."""
    pauses: list[float] = []
    next_s = Backoff.next_s

    def noted(self: Backoff, _: float) -> float:
        pauses.append(next_s(self, 0.5))
        return 0.0

    monkeypatch.setattr(Backoff, "next_s", noted)
    first, last = stream.BACKOFF_S

    async def story(fake: _FakePrimary, client: AsyncServer) -> None:
        async def fail(context: Context) -> None:
            if len(pauses) < 9:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "not today")
            await fake.answer_all(context)

        fake.rest = fail
        await client.commit("/realm", [Put(b"key", b"value")])
        assert pauses == [min(first * 2**number, last) for number in range(9)]
        assert fake.binds == 10

    _with_fake(story)

    pauses.clear()

    async def acknowledged(fake: _FakePrimary, client: AsyncServer) -> None:
        async def answer_one(context: Context) -> None:
            message = await context.read()
            numbers = [one.number for one in message.transactions.transactions][:1]
            rows = data_pb2.Results(numbers=numbers, lsns=numbers, versions=numbers, digests=bytes(32))
            await context.write(data_pb2.CommitResponse(results=rows))

        fake.rest = answer_one
        await asyncio.gather(*(client.commit("/realm", [Put(b"key", b"value")]) for _ in range(5)))
        assert pauses[:4] == [first] * 4

    _with_fake(acknowledged)


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.OK])
def test_a_stream_that_ends_in_any_way_is_opened_anew(code: grpc.StatusCode) -> None:
    """G6: what was not answered on it is sent again, though gRPC takes a cancelled stream for a cancelled task."""

    async def story(fake: _FakePrimary, client: AsyncServer) -> None:
        async def fail(context: Context) -> None:
            if fake.binds > 3:
                await fake.answer_all(context)
            await context.read()
            if code is not grpc.StatusCode.OK:
                await context.abort(code, "enough")

        fake.rest = fail
        receipt = await client.commit("/realm", [Put(b"key", b"value")], timeout_s=None)
        assert (receipt.version, fake.binds) == (1, 4)
        assert len(fake.clients) == 1

    _with_fake(story)


def test_results_that_make_no_sense_are_the_server_s_fault() -> None:
    """Columns of different lengths end the stream and are told; they do not end the client."""

    async def story(fake: _FakePrimary, client: AsyncServer) -> None:
        async def babble(context: Context) -> None:
            await context.read()
            rows = data_pb2.Results(numbers=[1], lsns=[1, 2], versions=[1], digests=b"short")
            await context.write(data_pb2.CommitResponse(results=rows))
            await context.read()

        fake.rest = babble
        with pytest.raises(OutcomeUnknown) as unknown:
            await client.commit("/realm", [Put(b"key", b"value")], timeout_s=0.1)
        await until_said(client, unknown.value.number, "columns")
        with pytest.raises(ProtocolError, match="columns"):
            # A server that has never seen it certainly did not apply it.
            await asyncio.gather(
                *(client.commit("/realm", [Put(b"key", b"v" * (2 << 20))], timeout_s=None) for _ in range(5))
            )
        fake.rest = fake.answer_all
        assert (await client.wait(unknown.value.number)).version == 1

    _with_fake(story)


def test_dropping_a_realm_is_not_tried_again() -> None:
    """G6: it has no number, and meanwhile somebody may have begun a new realm of that name."""

    async def story(fake: _FakePrimary, client: AsyncServer) -> None:
        with pytest.raises(OutcomeUnknown, match="may or may not have been dropped") as unknown:
            await client.drop_realm("/realm")
        assert fake.drops == 1
        assert unknown.value.number == 0

    _with_fake(story)


@pytest.mark.parametrize("outcome", ["applied", "refused"])
def test_a_late_answer_is_told_to_who_asks_as_it_comes(monkeypatch: pytest.MonkeyPatch, outcome: str) -> None:
    """G6: a transaction is unanswered, or its answer is known; there is no moment between."""
    waiting: list[asyncio.Task[Receipt]] = []
    take_results = stream.CommitStream._take_results

    async def story(fake: _FakePrimary, client: AsyncServer) -> None:
        given_up = asyncio.Event()

        async def answer_late(context: Context) -> None:
            await given_up.wait()
            if outcome == "applied":
                await fake.answer_all(context)
            refusal = data_pb2.Refusal(number=1, code="DiskFull", message="full")
            await context.write(data_pb2.CommitResponse(results=data_pb2.Results(refusals=[refusal])))
            await context.read()

        def noted(self: stream.CommitStream, results: data_pb2.Results) -> None:
            if results.numbers or results.refusals:
                waiting.append(asyncio.create_task(client.wait(1)))  # it runs right after what follows
            take_results(self, results)

        monkeypatch.setattr(stream.CommitStream, "_take_results", noted)
        fake.rest = answer_late
        with pytest.raises(OutcomeUnknown) as unknown:
            await client.commit("/realm", [Put(b"key", b"value")], timeout_s=0.1)
        assert unknown.value.number == 1
        first = asyncio.create_task(client.wait(1))
        await asyncio.sleep(0)  # it begins
        given_up.set()
        await asyncio.wait([first])
        (second,) = waiting
        for one in (first, second, asyncio.create_task(client.wait(1))):
            if outcome == "applied":
                assert (await one).version == 1
            else:
                with pytest.raises(DiskFull):
                    await one

    _with_fake(story)


def test_what_was_refused_unsent_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: against a server that takes nobody for a long time, a client that goes on trying does not grow."""
    monkeypatch.setattr(Backoff, "next_s", lambda *_: 0.0)

    async def story(fake: _FakePrimary, client: AsyncServer) -> None:
        fake.binds_nobody = True
        for _ in range(20):
            with pytest.raises(ProtocolError, match="nobody"):
                await client.commit("/realm", [Put(b"key", b"value")])
        assert not client._stream._unsent
        fake.binds_nobody = False
        await client.commit("/realm", [Put(b"key", b"value")])
        assert fake.numbers == [21]

    _with_fake(story)


@pytest.mark.parametrize("then", ["wait", "commit"])
def test_after_a_crash_nobody_is_told_that_a_transaction_failed_which_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """G6: its outcome is unknown until somebody waits for it, or the next one needs its place."""
    take_results = stream.CommitStream._take_results
    crashes = iter([ZeroDivisionError("a mistake")])

    def crash_once(self: stream.CommitStream, results: data_pb2.Results) -> None:
        if results.numbers and (mistake := next(crashes, None)):
            raise mistake
        take_results(self, results)

    monkeypatch.setattr(stream.CommitStream, "_take_results", crash_once)
    monkeypatch.setattr(stream, "IN_FLIGHT_MAX", 1)

    async def story(fake: _FakePrimary, client: AsyncServer) -> None:
        with pytest.raises(OutcomeUnknown, match="a mistake") as unknown:
            await client.commit("/realm", [Put(b"key", b"value")], timeout_s=None)
        if then == "commit":
            await client.commit("/realm", [Put(b"key", b"value")], timeout_s=None)
        assert (await client.wait(unknown.value.number, timeout_s=None)).version == 1
        assert fake.numbers == [1, 1] + [2] * (then == "commit")

    _with_fake(story)


def test_reads_are_tried_again_where_another_server_may_be_primary_by_now() -> None:
    """Those of the server's own affairs, too; with one address alone, its failure is told at once."""

    async def again(fake: _FakePrimary, client: AsyncServer) -> None:
        fake.failures_left = 2
        assert [realm.path for realm in await client.realms()] == ["/realm"]
        fake.failures_left = 2
        assert (await client.status()).role == "primary"
        assert fake.failures_left == 0

    async def once(fake: _FakePrimary, client: AsyncServer) -> None:
        fake.failures_left = 2
        for call in (client.realms, client.status):
            with pytest.raises(PeerUnreachable, match="not today"):
                await call()

    _with_fake(again, _NOBODY)
    _with_fake(once)


@pytest.mark.parametrize("call", ["drop_realm", "scan", "realms", "status"])
def test_looking_for_the_primary_is_part_of_a_call_s_time(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """G9: what took 900 of its 1,000 seconds to find the primary has 100 left to ask it."""
    now_s = 0.0
    bound_within = stream.CommitStream.bound_within

    async def bound_late(self: stream.CommitStream, timeout_s: float) -> None:
        nonlocal now_s
        await bound_within(self, timeout_s)
        now_s += 900

    monkeypatch.setattr(stream.CommitStream, "bound_within", bound_late)
    monkeypatch.setattr(direct, "time", SimpleNamespace(monotonic=lambda: now_s))

    async def story(fake: _FakePrimary, client: AsyncServer) -> None:
        match call:
            case "drop_realm":
                with pytest.raises(OutcomeUnknown):
                    await client.drop_realm("/realm", timeout_s=1_000)
            case "scan":
                assert [pair async for pair in client.scan("/realm", timeout_s=1_000)] == [(b"key", b"value")]
            case _:
                await getattr(client, call)(timeout_s=1_000)
        assert fake.left_s[-1] < 200  # gRPC rounds up what it sends

    _with_fake(story, _NOBODY)


# -- whom to believe -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("patient_clients")
@pytest.mark.parametrize("old_first", [True, False])
def test_the_primary_of_the_latest_epoch_is_found_and_the_earlier_one_shown_its_proof(
    processes: Processes, tmp_path: Path, old_first: bool
) -> None:
    """G7: among old primary, new primary and a replica, whatever their order; the old one stays fenced."""
    pair = Pair(processes, tmp_path)
    put(pair.primary.address, "/realm", (b"key", b"before"))
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    new = pair.fail_over()
    replica = processes.replica(tmp_path / "c", new.address, "--id", "c")
    wait_until_caught_up(new.address, replica.address)
    old = processes.primary(pair.a)
    addresses = [old.address, replica.address, new.address]
    with connect(",".join(addresses if old_first else reversed(addresses))) as client:
        client.commit("/realm", [Put(b"key", b"after")])
        assert client.get("/realm", b"key") == b"after"
        assert status(old.address).role == "fenced"
    assert pairs(new.address, "/realm") == {b"key": b"after"}
    assert pairs(old.address, "/realm") == {b"key": b"before"}
    with connect(old.address) as client, pytest.raises(Fenced):
        client.commit("/realm", [Put(b"key", b"late")])


def test_a_fenced_primary_leaves_no_caller_waiting(processes: Processes, tmp_path: Path) -> None:
    """G7: who waits for it without a deadline is told that the outcome is unknown, and who comes then is refused."""
    primary = processes.primary(tmp_path / "p", "--durability", "replica")  # and there is none

    async def story() -> None:
        async with aconnect(primary.address) as client, open_channel(primary.address) as channel:
            waiting = [
                asyncio.create_task(client.commit("/realm", [Put(b"key", b"value")], timeout_s=None))
                for _ in range(3)
            ]
            with pytest.raises(OutcomeUnknown) as unknown:
                await client.commit("/realm", [Put(b"key", b"value")], timeout_s=0.3)
            waiting.append(asyncio.create_task(client.wait(unknown.value.number, timeout_s=DEADLINE_S)))
            await admin_pb2_grpc.AdminStub(channel).Fence(admin_pb2.FenceRequest())
            for one in waiting[:3]:
                with pytest.raises(OutcomeUnknown, match="fenced"):
                    await asyncio.wait_for(one, DEADLINE_S)
            with pytest.raises(Fenced):
                await asyncio.wait_for(
                    client.commit("/realm", [Put(b"key", b"late")], timeout_s=None), DEADLINE_S
                )
            waiting[3].cancel()

    asyncio.run(story())


class _Split:
    """Two replicas of one primary, both promoted from where it died: two primaries of one epoch."""

    def __init__(self, processes: Processes, folder: Path) -> None:
        self._processes = processes
        primary = processes.primary(folder / "a")
        self.folders = [folder / name for name in "bc"]
        replicas = [processes.replica(path, primary.address, "--id", path.name) for path in self.folders]
        self.addresses = [replica.address for replica in replicas]
        put(primary.address, "/realm", (b"key", b"shared"))
        wait_until_caught_up(primary.address, *self.addresses)
        primary.kill()
        for path, replica in zip(self.folders, replicas, strict=True):
            processes.run("promote", path)
            replica.wait()

    @property
    def both(self) -> str:
        """Their addresses, for one client."""
        return ",".join(self.addresses)

    def start(self, index: int) -> Process:
        """Starts one of them where it was."""
        return self._processes.primary(self.folders[index], "--listen", self.addresses[index])

    def check(self, error: Diverged) -> None:
        """Says who they are and what to do."""
        assert all(address in error.message for address in self.addresses)
        assert "understudy rewind" in error.remedy


@pytest.mark.usefixtures("patient_clients")
def test_a_client_that_meets_two_primaries_of_one_epoch_chooses_neither(
    processes: Processes, tmp_path: Path
) -> None:
    """G3, G7: split brain is told at once, with both addresses; rewound to one, clients come and go again."""
    split = _Split(processes, tmp_path)
    first, second = split.start(0), split.start(1)
    assert status(first.address).epoch == status(second.address).epoch == 2
    with pytest.raises(Diverged, match="split brain") as raised:
        connect(split.both, timeout_s=DEADLINE_S)
    split.check(raised.value)
    second.terminate()
    processes.run("rewind", split.folders[1], "--to", first.address, "--id", "c")
    processes.replica(split.folders[1], first.address, "--id", "c", "--listen", split.addresses[1])
    with connect(split.both) as client:
        client.commit("/realm", [Put(b"key", b"healed")])
    assert pairs(first.address, "/realm") == {b"key": b"healed"}


@pytest.mark.usefixtures("patient_clients")
def test_a_client_that_was_bound_to_one_does_not_go_over_to_the_other(
    processes: Processes, tmp_path: Path
) -> None:
    """G3, G7: what it was acknowledged there may not be here; reads and writes fail, and nothing arrives."""
    split = _Split(processes, tmp_path)
    first = split.start(0)
    with connect(split.both) as client:
        client.commit("/realm", [Put(b"key", b"first")])
        second = split.start(1)
        client.commit("/realm", [Put(b"key", b"first again")])  # as long as it holds, nothing is met
        first.kill()
        with pytest.raises(Diverged) as raised:
            client.get("/realm", b"key", timeout_s=DEADLINE_S)
        split.check(raised.value)
        with pytest.raises(Diverged):
            client.commit("/realm", [Put(b"key", b"lost")], timeout_s=DEADLINE_S)
        split.start(0)  # both are there: whom it was bound to is no more to be trusted than the other
        with pytest.raises(Diverged):
            client.commit("/realm", [Put(b"key", b"lost")], timeout_s=DEADLINE_S)
    assert pairs(second.address, "/realm") == {b"key": b"shared"}
    assert pairs(split.addresses[0], "/realm") == {b"key": b"first again"}


@pytest.mark.usefixtures("patient_clients")
def test_split_brain_is_told_only_while_it_is_there_to_be_seen() -> None:
    """When both primaries are gone, a client says that nobody answers."""

    serving = contextlib.AsyncExitStack()

    async def start() -> AsyncServer:
        fakes = [_FakePrimary(proof=proof) for proof in (b"first", b"second")]  # type: ignore[abstract]
        return AsyncServer([await serving.enter_async_context(fake.serving()) for fake in fakes])

    def error(timeout_s: float) -> type[UnderstudyError]:
        with pytest.raises(UnderstudyError) as raised:
            client.get("/realm", b"key", timeout_s=timeout_s)
        return raised.type

    with Server(portal.call(start())) as client:
        assert error(DEADLINE_S) is Diverged
        portal.call(serving.aclose())
        wait_until(lambda: error(0.1) is PeerUnreachable, deadline_s=DEADLINE_S / 4)


def test_another_primary_of_the_same_epoch_behind_one_address_is_noticed() -> None:
    """G3: a name that is pointed elsewhere, or a proxy: the proof of the epoch is compared, not its number alone."""

    async def story(fake: _FakePrimary, client: AsyncServer) -> None:
        async def answer_one(context: Context) -> None:
            message = await context.read()
            number = message.transactions.transactions[0].number
            rows = data_pb2.Results(numbers=[number], lsns=[1], versions=[1], digests=bytes(32))
            await context.write(data_pb2.CommitResponse(results=rows))

        fake.rest = answer_one
        await client.commit("/realm", [Put(b"key", b"value")])
        fake.rest, fake.proof = fake.answer_all, b"second"
        # Unknown, if it was on its way to the first before that was seen to be gone.
        with pytest.raises((Diverged, OutcomeUnknown), match="split brain"):
            await client.commit("/realm", [Put(b"key", b"value")])
        assert fake.numbers == []
        fake.epoch, fake.proof = 2, b"third"  # a later epoch is another matter
        await client.commit("/realm", [Put(b"key", b"value")])
        assert fake.numbers

    _with_fake(story)


def test_g7_a_server_of_an_earlier_epoch_than_was_met_gets_no_transaction() -> None:
    """G7: an old primary behind the address of a later one, which does not know yet that its reign is over."""

    async def story(fake: _FakePrimary, client: AsyncServer) -> None:
        async def answer_none(context: Context) -> None:
            await context.read()
            was_sent.set()

        was_sent = asyncio.Event()
        fake.epoch, fake.proof, fake.rest = 2, b"second", answer_none
        with pytest.raises(OutcomeUnknown):
            await client.commit("/realm", [Put(b"key", b"value")], timeout_s=0.1)
        await was_sent.wait()  # and so it was bound
        fake.epoch, fake.proof, fake.rest = 1, b"first", fake.answer_all
        met = fake.binds
        await asyncio.to_thread(wait_until, lambda: fake.numbers or fake.binds >= met + 3)
        assert fake.numbers == []
        fake.epoch, fake.proof = 2, b"second"
        await client.wait(1, timeout_s=DEADLINE_S)
        assert fake.numbers == [1]

    _with_fake(story)
