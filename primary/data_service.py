"""Transactions over gRPC: one stream a client, many transactions a message, results as they are reached."""

from __future__ import annotations

import asyncio
import hashlib
import time
from functools import partial

import grpc.aio

from understudy.common.access import Level, Principal, caller
from understudy.common.authority import Authority
from understudy.common.errors import (
    ForeignCluster,
    Overloaded,
    ProtocolError,
    UnderstudyError,
)
from understudy.common.follow_table import PROTOCOL_VERSION
from understudy.common.memtable import Receipt
from understudy.common.read_service import Context, ReadService
from understudy.common.rpc import answering_errors, first_message
from understudy.common.types import ID_BYTES, check_realm_path
from understudy.primary.admission import admit
from understudy.primary.node import PrimaryNode
from understudy.v1 import data_pb2

# Results not yet taken by a client that does not read: its transactions are not read either then.
UNREAD_RESULTS_MAX = 20_000
# Our client sends a quarter of it. Taking so many in is done in some 20 ms, in which nobody else gets a turn.
MESSAGE_TRANSACTIONS_MAX = 1_000
# Messages of all clients that were read and wait for room; with more, the streams of the next ones are ended.
HELD_BYTES_MAX = 64 << 20


class PrimaryDataService(ReadService):
    """``Commit`` and ``DropRealm``, and the reads."""

    def __init__(self, node: PrimaryNode, authority: Authority) -> None:
        super().__init__(lambda: node.engine.state, authority)
        self._node = node
        self._held_bytes = 0

    async def Commit(self, _: object, context: Context) -> None:  # type: ignore[override]
        """One client's transactions, until it goes away."""
        async with answering_errors(context):
            await self._commit(context)

    async def _commit(self, context: Context) -> None:
        first = await first_message(context)
        if first is grpc.aio.EOF:
            return
        bind = _bound(first)
        self._admit(bind)
        node = self._node
        await context.write(
            data_pb2.CommitResponse(
                bound=data_pb2.Bound(
                    cluster=node.engine.directory.cluster,
                    epoch=node.engine.epoch,
                    proof=node.epoch_proof,
                )
            )
        )
        answers = _Answers(node)
        sender = asyncio.create_task(answers.send_forever(context))
        stream = asyncio.current_task()
        assert stream is not None
        node.streams.add(stream)
        try:
            await self._take_in(_client_id(caller(), bind.client), context, answers)
            await answers.drained()
        except asyncio.CancelledError:
            # Fenced: what is unanswered will never be answered here, so that the client should look elsewhere.
            self._node.refuse_if_fenced()
            raise
        finally:
            node.streams.discard(stream)
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    def _admit(self, bind: data_pb2.Bind) -> None:
        engine = self._node.engine
        if bind.protocol_version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the client speaks protocol version {bind.protocol_version}, this server {PROTOCOL_VERSION}",
                remedy="use the same version of Understudy on both sides",
            )
        if len(bind.client) != ID_BYTES:
            raise ProtocolError(f"a client id has {ID_BYTES} bytes, not {len(bind.client)}")
        if bind.cluster and bind.cluster != engine.directory.cluster:
            raise ForeignCluster(
                "this server belongs to another cluster than the one this client has met before"
            )
        admit(self._node, bind.epoch, bind.proof)

    async def _take_in(self, client: bytes, context: Context, answers: _Answers) -> None:
        node, principal = self._node, caller()
        while True:
            await node.wait_for_room()
            await answers.wait_for_reader()
            message = await context.read()
            if message is grpc.aio.EOF:
                return
            if message.WhichOneof("message") != "transactions":
                raise ProtocolError("transactions come after the first message, nothing else")
            self._node.refuse_if_fenced()
            message.DiscardUnknownFields()  # nothing enters the log that was not looked at
            transactions = message.transactions.transactions
            if len(transactions) > MESSAGE_TRANSACTIONS_MAX:
                raise ProtocolError(
                    f"a message of {len(transactions)} transactions",
                    remedy=f"send at most {MESSAGE_TRANSACTIONS_MAX} at once",
                )
            await self._wait_with(message.ByteSize())
            arrived_s = time.monotonic()
            for transaction in transactions:
                answers.owed += 1
                try:
                    permitted = self._authority.permitted(principal, transaction.realm, Level.WRITE)
                    if permitted != transaction.realm:
                        transaction.realm = permitted
                    node.submit(client, transaction, partial(answers.add, transaction.number, arrived_s))
                except UnderstudyError as error:
                    answers.refuse(transaction.number, error)

    async def _wait_with(self, size: int) -> None:
        """Returns when there is room for a message of ``size`` bytes that is at hand.

        Raises:
            Overloaded: too much waits already. It ends the stream, after which the client sends again: to refuse the
                transactions would say that they were never applied, and one sent before may have been (G6).
        """
        if self._node.committer.has_room:
            return
        if self._held_bytes + size > HELD_BYTES_MAX:
            raise Overloaded(
                f"{self._held_bytes >> 20} MiB of transactions wait for room already",
                remedy="try again later",
            )
        self._held_bytes += size
        try:
            await self._node.wait_for_room()
        finally:
            self._held_bytes -= size

    async def DropRealm(
        self, request: data_pb2.DropRealmRequest, context: Context
    ) -> data_pb2.DropRealmResponse:
        """Drops a realm."""
        async with answering_errors(context):
            check_realm_path(request.realm)
            path = self._authority.permitted(caller(), request.realm, Level.MANAGE)
            receipt = await self._node.drop_realm(path)
            return data_pb2.DropRealmResponse(lsn=receipt.lsn)
        raise AssertionError("aborted")


def _client_id(principal: Principal, client: bytes) -> bytes:
    """By which a client's numbers are known (G6): a user can't use those of another user's client up."""
    if not principal.user_id:
        return client
    return hashlib.blake2b(client, key=principal.user_id.encode(), digest_size=ID_BYTES).digest()


def _bound(message: data_pb2.CommitRequest) -> data_pb2.Bind:
    if message.WhichOneof("message") != "bind":
        raise ProtocolError("the first message of a stream binds the client")
    return message.bind


class _Answers:
    """Results on their way to one client: what is ready goes out together."""

    def __init__(self, node: PrimaryNode) -> None:
        self.owed = 0
        self._metrics = node.engine.metrics
        self._results = data_pb2.Results()
        self._digests: list[bytes] = []
        self._ready = asyncio.Event()
        self._sent = asyncio.Event()

    def add(self, number: int, arrived_s: float, receipt: Receipt) -> None:
        """A transaction has reached its durability."""
        results = self._results
        results.numbers.append(number)
        results.lsns.append(receipt.lsn)
        results.versions.append(receipt.version)
        self._digests.append(receipt.digest)
        if len(self._digests) == 1:  # one sample a message, of the one that waited longest
            self._metrics.commit_seconds.observe(time.monotonic() - arrived_s)
        self._ready.set()

    def refuse(self, number: int, error: UnderstudyError) -> None:
        """A transaction was not taken in."""
        self._metrics.refusals.labels(error.code).inc()
        self._results.refusals.add(number=number, code=error.code, message=error.message, remedy=error.remedy)
        self._ready.set()

    @property
    def _waiting(self) -> int:
        return len(self._digests) + len(self._results.refusals)

    async def send_forever(self, context: Context) -> None:
        """Sends results as they come."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            results, digests = self._results, self._digests
            count = self._waiting
            self._results, self._digests = data_pb2.Results(), []
            results.digests = b"".join(digests)
            self._metrics.commits.inc(len(digests))
            await context.write(data_pb2.CommitResponse(results=results))
            self.owed -= count
            self._sent.set()

    async def wait_for_reader(self) -> None:
        """Returns once the client has taken enough of its results."""
        while self._waiting >= UNREAD_RESULTS_MAX:
            self._sent.clear()
            await self._sent.wait()

    async def drained(self) -> None:
        """Returns once everything taken in was answered."""
        while self.owed:
            self._sent.clear()
            await self._sent.wait()
