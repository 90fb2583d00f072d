"""Synced realms over gRPC: one stream a client's directory, and what comes home."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, cast

import grpc.aio

from understudy.common.access import Level, Principal, caller
from understudy.common.authority import Authority
from understudy.common.client_ids import owns
from understudy.common.entries import with_hmacs
from understudy.common.errors import (
    NotPermitted,
    ProtocolError,
    ReceiptExpired,
    Unavailable,
    UnderstudyError,
)
from understudy.common.follow_table import PROTOCOL_VERSION
from understudy.common.locator import EpochSpan, span_of
from understudy.common.memtable import Receipt
from understudy.common.read_service import Context
from understudy.common.rpc import answering_errors, first_message
from understudy.common.store_expiry import CLIENT_KEPT_US
from understudy.common.tasks import spawn
from understudy.common.types import ID_BYTES, check_realm_path
from understudy.primary.admission import admit
from understudy.primary.homecoming import add_up, runs_of, take_home
from understudy.primary.incoming_tails import TailRoom
from understudy.primary.node import PrimaryNode
from understudy.primary.sync_feed import Feed, SyncStream
from understudy.primary.sync_host import Histories, Pages
from understudy.primary.sync_session import SyncSession, TailHome
from understudy.v1 import data_pb2, sync_pb2, sync_pb2_grpc

STREAMS_MAX = 2_000  # directories connected at one time
USER_STREAMS_MAX = 500  # of one user, who must not keep all others out
MESSAGE_TRANSACTIONS_MAX = 1_000  # as for direct clients
_POLL_S = 1.0
_SETTLE_S_MAX = 2.0


class SyncService(sync_pb2_grpc.SyncServicer):
    """``Sync`` and ``Salvage``."""

    def __init__(self, node: PrimaryNode, authority: Authority) -> None:
        self._node = node
        self._authority = authority
        self._feed = Feed()
        self._tail_room = TailRoom()
        node.committer.on_shown = self._feed.on_shown

    async def Sync(self, _: object, context: Context) -> None:  # type: ignore[override]
        """One client's directory, until it goes away."""
        async with answering_errors(context):
            await self._sync(context)

    async def _sync(self, context: Context) -> None:
        first = await first_message(context)
        if first is grpc.aio.EOF:
            return
        hello = _hello(first)
        if len(self._feed.streams) >= STREAMS_MAX:
            raise Unavailable(f"{STREAMS_MAX:,} clients are connected already", remedy="try again later")
        user_id = caller().user_id
        if user_id and self._feed.count_of(user_id) >= USER_STREAMS_MAX:
            raise Unavailable(
                f"{USER_STREAMS_MAX:,} clients of this user are connected already", remedy="try again later"
            )
        node = self._node
        if hello.cluster == node.engine.directory.cluster:
            admit(node, hello.epoch, hello.proof)
        node.refuse_if_fenced()
        task = cast("asyncio.Task[None]", asyncio.current_task())
        stream = SyncStream(hello.client, hello.run, hello.previous_run, task, user_id, hello.secret)
        stream.session = SyncSession(
            _Host(node, self._feed, stream, self._authority, caller(), self._tail_room)
        )
        node.streams.add(task)
        try:
            is_only = self._feed.seat(stream)
            welcome = sync_pb2.SyncWelcome(
                cluster=node.engine.directory.cluster,
                epoch=node.engine.epoch,
                proof=node.epoch_proof,
                new_id=not is_only,
            )
            await context.write(sync_pb2.SyncResponse(welcome=welcome))
            await _Conversation(node, stream, context, self._feed).run()
        except asyncio.CancelledError:
            node.refuse_if_fenced()
            if stream.replaced:  # gRPC tells nobody that a call was cancelled here
                raise Unavailable("a newer connection of this client has taken over") from None
            raise
        finally:
            node.streams.discard(task)
            self._feed.leave(stream)
            stream.session.close()

    async def Salvage(
        self, requests: AsyncIterator[sync_pb2.SalvageRequest], context: Context
    ) -> sync_pb2.SalvageResponse:
        """Takes in what a rewind has exported."""
        async with answering_errors(context):
            self._node.refuse_if_fenced()
            total = sync_pb2.Homecoming()
            async for request in requests:
                _check_version(request.protocol_version, "the export's sender")
                for path, run in runs_of(with_hmacs(request.changes, request.hmacs)):
                    add_up(total, await take_in(self._node, b"", path, run, may_renew=True))
            return sync_pb2.SalvageResponse(homecoming=total)
        raise AssertionError("aborted")


class _Conversation:
    """What goes to and fro on one stream."""

    def __init__(self, node: PrimaryNode, stream: SyncStream, context: Context, feed: Feed) -> None:
        self._node = node
        self._stream = stream
        self._session = stream.session
        self._context = context
        self._feed = feed
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._written = asyncio.Event()

    async def run(self) -> None:
        """Until the client goes away, or something fails."""
        tasks = [spawn(self._send_forever(), self._fail), spawn(self._poll_forever(), self._fail)]
        reader = asyncio.create_task(self._read())
        tasks.append(reader)
        try:
            await asyncio.wait([reader, self._failed], return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            await reader
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._failed.done():
                self._failed.exception()

    def _fail(self, error: UnderstudyError) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    async def _read(self) -> None:
        while (message := await self._context.read()) is not grpc.aio.EOF:
            message.DiscardUnknownFields()  # nothing enters the log that was not looked at
            if message.WhichOneof("message") == "upload":
                await self._admit_upload(message.upload)
            elif message.WhichOneof("message") == "bind":
                _check_owned(self._stream.secret, message.bind.clients)
            home = self._session.receive(message)
            self._stream.wake.set()
            if home is not None:
                await self._bring_home(home)  # here, so that a client has one at a time in memory
            await self._wait_for_reader()

    async def _wait_for_reader(self) -> None:
        while not self._session.has_room:
            self._written.clear()
            await self._written.wait()

    async def _admit_upload(self, upload: sync_pb2.Upload) -> None:
        if len(upload.transactions) > MESSAGE_TRANSACTIONS_MAX:
            raise ProtocolError(
                f"a message of {len(upload.transactions)} transactions",
                remedy=f"send at most {MESSAGE_TRANSACTIONS_MAX} at once",
            )
        if not self._node.heal_window.is_open(time.monotonic()):
            await self._node.wait_for_room()

    async def _bring_home(self, home: TailHome) -> None:
        taken = await take_in(
            self._node, self._stream.client, home.path, home.changes, may_renew=home.may_renew
        )
        self._session.on_tail_taken(home.ref, taken)
        self._stream.wake.set()

    async def _send_forever(self) -> None:
        sent_s = 0.0
        while True:
            await self._stream.wake.wait()
            await asyncio.sleep(sent_s + self._feed.pace_s - time.monotonic())
            self._stream.wake.clear()
            while (message := self._session.next_message()) is not None or self._session.is_busy:
                if message is None:
                    await asyncio.sleep(0)
                    continue
                await self._context.write(message)
                self._written.set()
            sent_s = time.monotonic()

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            self._session.check_time(time.monotonic())
            self._session.poll()
            self._stream.wake.set()


async def take_in(
    node: PrimaryNode,
    client: bytes,
    path: str,
    changes: Sequence[tuple[bytes, bytes]],
    *,
    may_renew: bool,
) -> sync_pb2.Homecoming:
    """Takes home what is missing of a realm, and returns when that has reached the server's durability.

    Between two steps everybody else has a turn at this event loop, and what was taken in may have to find room.

    Raises:
        Unavailable: this server came to its end.
    """
    await node.wait_for_space()
    with contextlib.suppress(TimeoutError):  # a realm that is written to without a pause does without
        async with asyncio.timeout(_SETTLE_S_MAX):
            await node.settled(path)
    taken: asyncio.Future[sync_pb2.Homecoming] = asyncio.get_running_loop().create_future()

    def on_taken(homecoming: sync_pb2.Homecoming) -> None:
        node.heal_window.note(client, path, homecoming)  # also where whoever brought it has gone
        if not taken.done():
            taken.set_result(homecoming)

    steps = take_home(
        path,
        changes,
        state=node.engine.state,
        taker=node.committer,
        history_key=node.engine.history_key,
        may_renew=may_renew,
        on_taken=on_taken,
    )
    async with node.heal_window.turn:
        with contextlib.closing(steps):
            for _ in steps:
                node.flush_soon()
                await asyncio.sleep(0)
                await node.wait_for_space()
                if node.over.done():
                    break
    node.flush_soon()
    either: list[asyncio.Future[Any]] = [taken, node.over]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not taken.done():
        raise Unavailable("this server came to its end before what came home was committed")
    return taken.result()


class _Host:
    """The server as one client may see it."""

    def __init__(
        self,
        node: PrimaryNode,
        feed: Feed,
        stream: SyncStream,
        authority: Authority,
        principal: Principal,
        tail_room: TailRoom,
    ) -> None:
        self._node = node
        self._feed = feed
        self._stream = stream
        self._authority = authority
        self._principal = principal
        self.tail_room = tail_room
        self.client_kept_us = CLIENT_KEPT_US

    @property
    def state(self) -> Histories:
        return self._node.engine.state

    @property
    def cluster(self) -> bytes:
        return self._node.engine.directory.cluster

    @property
    def epochs(self) -> Sequence[EpochSpan]:
        return [span_of(row.info) for row in self._node.engine.state.epochs]

    @property
    def shown_lsn(self) -> int:
        return self._node.committer.shown_lsn

    @property
    def safe_lsn(self) -> int:
        return self._node.committer.safe_lsn

    def resolve(self, path: str) -> str:
        return self._authority.permitted(self._principal, check_realm_path(path), Level.READ)

    def may_write(self, path: str) -> bool:
        return self._authority.may(self._principal, path, Level.WRITE)

    def forbids_recovery(self, path: str) -> bool:
        return self._authority.accounts.is_recovery_forbidden(path)

    def size(self, path: str) -> tuple[int, int]:
        row = self._node.engine.state.store.current.realm(path)
        return (row.entries, row.bytes) if row is not None else (0, 0)

    def scan(self, path: str, after: bytes) -> Pages:
        return self._node.engine.state.scan(path, after + b"\0" if after else b"")

    def submit(self, client: bytes, transaction: data_pb2.Transaction) -> None:
        if self._node.heal_window.is_open(time.monotonic()):
            raise Unavailable("this server takes only what comes home for now", remedy="try again later")
        self._authority.permitted(self._principal, transaction.realm, Level.WRITE)
        path, number = transaction.realm, transaction.number
        if self._node.committer.was_renewed(path, client, number):
            raise ReceiptExpired(f"transaction {number} on {path} has come home already, as a new change")
        self._node.submit(client, transaction, _heard_in_the_stream)

    def follow(self, path: str) -> None:
        self._feed.follow(path, self._stream)

    def unfollow(self, path: str) -> None:
        self._feed.unfollow(path, self._stream)


def _heard_in_the_stream(_: Receipt) -> None:
    """A synced client's own changes come back among all others: that is its answer."""


def _hello(message: sync_pb2.SyncRequest) -> sync_pb2.SyncHello:
    if message.WhichOneof("message") != "hello":
        raise ProtocolError("the first message of a stream says hello")
    hello = message.hello
    _check_version(hello.protocol_version, "the client")
    if any(len(one) != ID_BYTES for one in (hello.client, hello.run, hello.secret)):
        raise ProtocolError(f"ids of clients and runs, and secrets, have {ID_BYTES} bytes")
    _check_owned(hello.secret, [hello.client])
    return hello


def _check_owned(secret: bytes, clients: Iterable[bytes]) -> None:
    """All who read a realm see its clients' ids: with an id alone, nobody may use its numbers up."""
    if not all(owns(secret, one) for one in clients):
        raise NotPermitted("a client id was shown that is another directory's")


def _check_version(version: int, who: str) -> None:
    if version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"{who} speaks protocol version {version}, this server {PROTOCOL_VERSION}",
            remedy="use the same version of Understudy on both sides",
        )
