"""The direct client, asynchronous: transactions and reads on a server, online.

Any number of tasks share one stream. What they commit while the last message was on its way goes out with the
next. A transaction keeps its number until it is answered, over any number of connections and servers, and so is
applied once (G6).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc.aio

from understudy.common.directory import Role
from understudy.common.errors import (
    Fenced,
    ForeignCluster,
    NotPrimary,
    OutcomeUnknown,
    Overloaded,
    PeerUnreachable,
    ProtocolError,
    Unavailable,
    UnderstudyError,
    UsageError,
    from_code,
)
from understudy.common.follow_table import PROTOCOL_VERSION
from understudy.common.memtable import Receipt
from understudy.common.operations import Operation, to_protos
from understudy.common.rpc import open_channel, peer_errors, split_address
from understudy.common.tasks import spawn
from understudy.common.transaction import TransactionBuilder
from understudy.common.types import DIGEST_BYTES, Digest, Durability, Lsn, check_key, check_realm_path, new_id
from understudy.v1 import admin_pb2, admin_pb2_grpc, data_pb2, data_pb2_grpc, replication_pb2

TIMEOUT_S = 30.0
MESSAGE_TRANSACTIONS_MAX = 256
MESSAGE_BYTES_TARGET = 1 << 20
# Sent and not answered: what must be kept for sending again, and what a server may be asked to hold for us.
IN_FLIGHT_MAX = 10_000
IN_FLIGHT_BYTES_MAX = 16 << 20
_BACKOFF_S = (0.02, 1.0)
_DEADLINE_CHECK_S = 0.02
_LATE_MAX = 10_000  # outcomes that came after their deadline, kept until somebody asks
_BIND_S_MAX = 5.0
_SURVEY_S_MAX = 1.0  # an address that does not answer must not keep us from one that does

# Trying the same address again will not help.
_FINAL = (NotPrimary, Fenced, ForeignCluster, ProtocolError, UsageError)

_T = TypeVar("_T")
_Stream = grpc.aio.StreamStreamCall[data_pb2.CommitRequest, data_pb2.CommitResponse]


@dataclass(slots=True)
class _Commit:
    message: data_pb2.Transaction
    size: int
    answer: asyncio.Future[Receipt]  # made anew when a deadline passes: the old one then says so
    deadline_s: float | None
    sent: bool = False  # ever: then a server may have it


@dataclass(frozen=True, slots=True, kw_only=True)
class RealmInfo:
    """A realm as a server lists it; ``entries`` and ``bytes`` are as of its last checkpoint."""

    path: str
    version: int
    entries: int
    bytes: int


class AsyncServer:
    """A connection to whichever of ``addresses`` is the primary. Made by :func:`aconnect`."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._channels = {address: open_channel(address) for address in addresses}
        self._current = 0  # index of the address last found to be right
        self._client = new_id()
        self._numbers = itertools.count(1)
        self._cluster = b""
        self._epoch = 0
        self._proof = replication_pb2.EpochProof()
        self._unanswered: dict[int, _Commit] = {}
        self._unanswered_bytes = 0
        self._unsent: deque[_Commit] = deque()
        self._late: OrderedDict[int, Receipt | UnderstudyError] = OrderedDict()
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._bound = asyncio.Event()
        self._last_error: UnderstudyError | None = None
        self._runner: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._closed = False

    # -- life ----------------------------------------------------------------------------------------------

    async def ready(self, *, timeout_s: float = TIMEOUT_S) -> None:
        """Returns once a server answers; with several addresses, once the primary among them is found.

        Raises:
            PeerUnreachable, NotPrimary, Fenced, ProtocolError: after ``timeout_s``, why not.
        """
        if len(self._addresses) > 1:
            await self._bound_within(timeout_s)
        else:
            await self.status(timeout_s=timeout_s)

    async def _bound_within(self, timeout_s: float) -> None:
        self._run()
        try:
            async with asyncio.timeout(timeout_s):
                await self._bound.wait()
        except TimeoutError:
            raise self._last_error or self._unreachable(timeout_s) from None

    def _unreachable(self, timeout_s: float) -> PeerUnreachable:
        return PeerUnreachable(
            f"none of {', '.join(self._addresses)} answered within {timeout_s:g} s",
            remedy="is it running, and is the address right?",
        )

    async def close(self) -> None:
        """Closes the connection. What was not answered fails with :class:`OutcomeUnknown`."""
        self._closed = True
        for task in (self._runner, self._watcher):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._give_up()
        for channel in self._channels.values():
            await channel.close()

    # -- writing -------------------------------------------------------------------------------------------

    async def commit(
        self,
        realm: str,
        operations: Iterable[Operation],
        *,
        durability: str | None = None,
        timeout_s: float | None = TIMEOUT_S,
    ) -> Receipt:
        """Commits one transaction and returns its receipt.

        Args:
            realm: path; the realm comes into being with its first transaction.
            operations: applied in order, all or nothing.
            durability: ``local``, ``replica`` or ``applied``, if more than the server's own level is wanted.
            timeout_s: None waits as long as it takes.

        Raises:
            UsageError: the transaction can't be; nothing was sent.
            OutcomeUnknown: no answer in time. The client goes on trying while it is open; :meth:`wait` tells.
            DiskFull, Overloaded, Fenced, NotPermitted: refused; it was not applied.
        """
        self._check_open()
        message = data_pb2.Transaction(
            realm=check_realm_path(realm),
            durability=_durability(durability),
            operations=to_protos(operations),
        )
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._has_room:
            await self._wait_for_room(deadline_s)
            self._check_open()
        message.number = next(self._numbers)  # only now: numbers must be sent in their order
        answer: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        commit = _Commit(message, message.ByteSize(), answer, deadline_s)
        self._unanswered[message.number] = commit
        self._unanswered_bytes += commit.size
        self._unsent.append(commit)
        self._work.set()
        self._run()
        return await answer

    async def wait(self, number: int, *, timeout_s: float | None = TIMEOUT_S) -> Receipt:
        """The receipt of a transaction that :class:`OutcomeUnknown` was raised for.

        Raises:
            UsageError: this client has no unanswered transaction of that number.
            OutcomeUnknown: still no answer.
        """
        if number in self._late:
            outcome = self._late[number]
            if isinstance(outcome, UnderstudyError):
                raise outcome
            return outcome
        commit = self._unanswered.get(number)
        if commit is None:
            raise UsageError(f"transaction {number} of this client is not unanswered")
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(commit.answer)  # others may wait for it, too
        except TimeoutError:
            raise self._outcome_unknown(commit.message) from None

    async def _watch_deadlines(self) -> None:
        """One task for all transactions: a timer for each would cost more than the rest of a commit."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_DEADLINE_CHECK_S)
            now_s = time.monotonic()
            for commit in self._unanswered.values():
                if commit.deadline_s is not None and commit.deadline_s <= now_s:
                    late, commit.answer, commit.deadline_s = commit.answer, loop.create_future(), None
                    commit.answer.add_done_callback(partial(self._note_late, commit.message.number))
                    _fail(late, self._outcome_unknown(commit.message))

    def _note_late(self, number: int, answer: asyncio.Future[Receipt]) -> None:
        """Keeps what came after the deadline, for :meth:`wait`."""
        if answer.cancelled():
            return
        error = answer.exception()
        self._late[number] = error if isinstance(error, UnderstudyError) else answer.result()
        while len(self._late) > _LATE_MAX:
            self._late.popitem(last=False)

    def _outcome_unknown(self, message: data_pb2.Transaction) -> OutcomeUnknown:
        why = f": {self._last_error}" if self._last_error else ""
        return OutcomeUnknown(
            f"transaction {message.number} on {message.realm} was not answered in time{why}",
            remedy="it may or may not have been applied; wait() for it, or let this client go on trying",
            number=message.number,
        )

    @property
    def _has_room(self) -> bool:
        return len(self._unanswered) < IN_FLIGHT_MAX and self._unanswered_bytes < IN_FLIGHT_BYTES_MAX

    async def _wait_for_room(self, deadline: float | None) -> None:
        while not self._has_room and not self._closed:
            self._room.clear()
            try:
                async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                    await self._room.wait()
            except TimeoutError:
                raise Overloaded(
                    f"{len(self._unanswered)} transactions of this client are unanswered",
                    remedy="try again later",
                ) from None

    @contextlib.asynccontextmanager
    async def transaction(
        self, realm: str, *, durability: str | None = None, timeout_s: float | None = TIMEOUT_S
    ) -> AsyncIterator[TransactionBuilder]:
        """Collects operations, and commits them when the block ends without an error."""
        builder = TransactionBuilder()
        yield builder
        builder.committed(
            await self.commit(realm, builder.operations, durability=durability, timeout_s=timeout_s)
        )

    async def drop_realm(self, realm: str, *, timeout_s: float = TIMEOUT_S) -> Lsn:
        """Drops a realm and everything in it; returns the LSN.

        Raises:
            UnknownRealm, NotPrimary.
            OutcomeUnknown: no answer came.
        """
        request = data_pb2.DropRealmRequest(realm=check_realm_path(realm))
        address = await self._reading_address(timeout_s)
        try:
            with peer_errors(address):
                response = await data_pb2_grpc.DataStub(self._channels[address]).DropRealm(
                    request, timeout=timeout_s
                )
        except PeerUnreachable as error:
            # Not tried again: by now somebody may have begun a new realm of that name.
            raise OutcomeUnknown(
                f"{realm} may or may not have been dropped: {error.message}",
                remedy="look before you repeat it",
            ) from None
        return Lsn(response.lsn)

    # -- reading -------------------------------------------------------------------------------------------

    async def get(self, realm: str, key: bytes, *, timeout_s: float = TIMEOUT_S) -> bytes | None:
        """The value at ``key``, or None.

        Raises:
            UnknownRealm, BadKey, PeerUnreachable.
        """
        return (await self.get_many(realm, [key], timeout_s=timeout_s))[0]

    async def get_many(
        self, realm: str, keys: Sequence[bytes], *, timeout_s: float = TIMEOUT_S
    ) -> list[bytes | None]:
        """The values at ``keys``, all as of one LSN."""
        for key in keys:
            check_key(key)
        request = data_pb2.GetRequest(realm=check_realm_path(realm), keys=keys)
        response = await self._data(lambda stub: stub.Get(request, timeout=timeout_s), timeout_s)
        return [
            value if present else None
            for value, present in zip(response.values, response.present, strict=True)
        ]

    async def count(
        self, realm: str, *, start: bytes = b"", end: bytes = b"", timeout_s: float = TIMEOUT_S
    ) -> int:
        """How many keys there are from ``start`` to before ``end``."""
        request = data_pb2.CountRequest(realm=check_realm_path(realm), start=start, end=end)
        return int((await self._data(lambda stub: stub.Count(request, timeout=timeout_s), timeout_s)).count)

    async def scan(
        self,
        realm: str,
        *,
        start: bytes = b"",
        end: bytes = b"",
        limit: int | None = None,
        reverse: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncIterator[tuple[bytes, bytes]]:
        """Pairs from ``start`` (included) to ``end`` (excluded), in key order, all as of one LSN.

        Raises:
            UnknownRealm; PeerUnreachable: also in the middle, when the server goes away.
        """
        if limit == 0:
            return
        request = data_pb2.ScanRequest(
            realm=check_realm_path(realm), start=start, end=end, limit=limit or 0, reverse=reverse
        )
        address = await self._reading_address(timeout_s or TIMEOUT_S)
        call = data_pb2_grpc.DataStub(self._channels[address]).Scan(request, timeout=timeout_s)
        try:
            with peer_errors(address):
                async for page in call:
                    for pair in zip(page.keys, page.values, strict=True):
                        yield pair
        finally:
            call.cancel()

    async def realms(self, *, timeout_s: float = TIMEOUT_S) -> list[RealmInfo]:
        """All realms, in order of their paths."""
        address = await self._reading_address(timeout_s)
        found = []
        with peer_errors(address):
            stub = data_pb2_grpc.DataStub(self._channels[address])
            async for page in stub.Realms(data_pb2.RealmsRequest(), timeout=timeout_s):
                found += [
                    RealmInfo(path=one.path, version=one.version, entries=one.entries, bytes=one.bytes)
                    for one in page.realms
                ]
        return found

    async def status(self, *, timeout_s: float = TIMEOUT_S) -> admin_pb2.StatusResponse:
        """The server's own account of itself."""
        address = await self._reading_address(timeout_s)
        with peer_errors(address):
            stub = admin_pb2_grpc.AdminStub(self._channels[address])
            return await stub.Status(admin_pb2.StatusRequest(), timeout=timeout_s)

    async def _reading_address(self, timeout_s: float) -> str:
        """Where to read: the only address, or the primary among several (a replica may be behind)."""
        self._check_open()
        if len(self._addresses) > 1:
            await self._bound_within(timeout_s)
        return self._addresses[self._current]

    async def _data(self, call: Callable[[Any], grpc.aio.UnaryUnaryCall[Any, _T]], timeout_s: float) -> _T:
        deadline = time.monotonic() + timeout_s
        while True:
            address = await self._reading_address(max(deadline - time.monotonic(), 0.001))
            try:
                with peer_errors(address):
                    return await call(data_pb2_grpc.DataStub(self._channels[address]))
            except (PeerUnreachable, NotPrimary):
                # With several addresses, another one may be primary by now.
                if len(self._addresses) == 1 or time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(_BACKOFF_S[0])

    # -- the stream ----------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this connection is closed")

    def _run(self) -> None:
        if self._runner is None or self._runner.done():
            self._runner = spawn(self._run_forever(), self._on_crash)
        if self._watcher is None:
            self._watcher = spawn(self._watch_deadlines(), self._on_crash)

    def _on_crash(self, error: UnderstudyError) -> None:
        for commit in self._unanswered.values():
            _fail(commit.answer, error)

    async def _run_forever(self) -> None:
        backoff_s = _BACKOFF_S[0]
        while True:
            for index in await self._in_order():
                was_bound = await self._converse(index)
                if was_bound:
                    backoff_s = _BACKOFF_S[0]
                    break
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))
            backoff_s = min(2 * backoff_s, _BACKOFF_S[1])

    async def _in_order(self) -> list[int]:
        """Which addresses to try, the primary of the highest epoch first.

        An old primary that does not know yet that its reign is over would take writes, too. So all are asked, and
        who still calls itself primary in an earlier epoch is shown the later one, and fences itself.
        """
        if len(self._addresses) == 1:
            return [0]
        answers = await asyncio.gather(*(self._survey(address) for address in self._addresses))
        known = [answer for answer in answers if answer is not None]
        highest = max(known, key=lambda answer: answer.epoch, default=None)
        if highest is not None and highest.epoch > self._epoch and self._cluster in (b"", highest.cluster):
            self._cluster, self._epoch, self._proof = highest.cluster, highest.epoch, highest.proof
        stale = [
            index
            for index, answer in enumerate(answers)
            if answer is not None and answer.role == Role.PRIMARY and answer.epoch < self._epoch
        ]
        await asyncio.gather(*(self._show_epoch(index) for index in stale))

        def rank(index: int) -> tuple[bool, int]:
            answer = answers[index]
            reigns = answer is not None and answer.role == Role.PRIMARY and index not in stale
            return (not reigns, (index - self._current) % len(self._addresses))

        return sorted(range(len(self._addresses)), key=rank)

    async def _survey(self, address: str) -> admin_pb2.StatusResponse | None:
        try:
            stub = admin_pb2_grpc.AdminStub(self._channels[address])
            return await stub.Status(admin_pb2.StatusRequest(), timeout=_SURVEY_S_MAX)
        except grpc.aio.AioRpcError:
            return None

    async def _show_epoch(self, index: int) -> None:
        address = self._addresses[index]
        call = data_pb2_grpc.DataStub(self._channels[address]).Commit(timeout=_SURVEY_S_MAX)
        try:
            with peer_errors(address):
                await self._bind(call)
        except UnderstudyError as error:
            self._last_error = error
        finally:
            call.cancel()

    async def _converse(self, index: int) -> bool:
        """Binds to one address and sends and receives until that ends; whether it was bound."""
        address = self._addresses[index]
        call = data_pb2_grpc.DataStub(self._channels[address]).Commit()
        bound = False
        try:
            with peer_errors(address):
                async with asyncio.timeout(_BIND_S_MAX):
                    await self._bind(call)
                bound = True
                self._current = index
                self._bound.set()
                await self._exchange(call)
        except TimeoutError:
            self._last_error = PeerUnreachable(f"{address} did not answer within {_BIND_S_MAX:g} s")
        except UnderstudyError as error:
            self._last_error = error
            if len(self._addresses) == 1 and isinstance(error, _FINAL):
                self._fail_unsent(error)
        finally:
            self._bound.clear()
            call.cancel()
        return bound

    async def _bind(self, call: _Stream) -> None:
        await call.write(
            data_pb2.CommitRequest(
                bind=data_pb2.Bind(
                    protocol_version=PROTOCOL_VERSION,
                    client=self._client,
                    cluster=self._cluster,
                    epoch=self._epoch,
                    proof=self._proof,
                )
            )
        )
        answer = await call.read()
        if not isinstance(answer, data_pb2.CommitResponse):
            raise await _ended(call)
        if answer.WhichOneof("message") != "bound":
            raise ProtocolError("the server did not answer the bind")
        bound = answer.bound
        if bound.epoch < self._epoch:
            raise Fenced(f"the server is in epoch {bound.epoch}, this client has met epoch {self._epoch}")
        self._cluster, self._epoch, self._proof = bound.cluster, bound.epoch, bound.proof

    async def _exchange(self, call: _Stream) -> None:
        self._unsent = deque(self._unanswered.values())  # in order of their numbers
        sender = asyncio.create_task(self._send_forever(call))
        try:
            while isinstance(message := await call.read(), data_pb2.CommitResponse):
                self._take_results(message.results)
            raise await _ended(call)
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _send_forever(self, call: _Stream) -> None:
        while True:
            while not self._unsent:
                self._work.clear()
                await self._work.wait()
            batch: list[data_pb2.Transaction] = []
            size = 0
            while self._unsent and len(batch) < MESSAGE_TRANSACTIONS_MAX and size < MESSAGE_BYTES_TARGET:
                if batch and size + self._unsent[0].size > MESSAGE_BYTES_TARGET:
                    break
                commit = self._unsent.popleft()
                commit.sent = True
                batch.append(commit.message)
                size += commit.size
            await call.write(data_pb2.CommitRequest(transactions=data_pb2.Transactions(transactions=batch)))

    def _take_results(self, results: data_pb2.Results) -> None:
        digests = results.digests
        rows = zip(results.numbers, results.lsns, results.versions, strict=True)
        for index, (number, lsn, version) in enumerate(rows):
            commit = self._answer(number)
            if commit is not None and not commit.answer.done():
                digest = Digest(digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])
                commit.answer.set_result(Receipt(commit.message.realm, version, Lsn(lsn), digest))
        for refusal in results.refusals:
            commit = self._answer(refusal.number)
            if commit is not None:
                _fail(commit.answer, from_code(refusal.code, refusal.message))
        self._room.set()

    def _answer(self, number: int) -> _Commit | None:
        commit = self._unanswered.pop(number, None)
        if commit is not None:
            self._unanswered_bytes -= commit.size
        return commit

    def _fail_unsent(self, error: UnderstudyError) -> None:
        """The only server there is will not take writes: what it has never seen was certainly not applied."""
        for number in [number for number, commit in self._unanswered.items() if not commit.sent]:
            commit = self._answer(number)
            if commit is not None:
                _fail(commit.answer, error)
        self._room.set()

    def _give_up(self) -> None:
        for number, commit in self._unanswered.items():
            what = f"the client was closed before transaction {number} was answered"
            _fail(commit.answer, OutcomeUnknown(what, number=number))
        self._unanswered.clear()
        self._unanswered_bytes = 0
        self._room.set()


async def _ended(call: _Stream) -> UnderstudyError | grpc.aio.AioRpcError:
    """The error for a stream that ended; a server that is stopped ends it without one."""
    code = await call.code()
    if code is grpc.StatusCode.OK:
        return Unavailable("the server has ended the stream")
    return grpc.aio.AioRpcError(
        code,
        await call.initial_metadata(),
        await call.trailing_metadata(),
        details=await call.details(),
    )


def _fail(answer: asyncio.Future[Receipt], error: UnderstudyError) -> None:
    if not answer.done():
        answer.set_exception(error)
        answer.exception()  # whoever gave up waiting does not want to hear of it


def _durability(name: str | None) -> data_pb2.Durability.ValueType:
    if name is None:
        return data_pb2.DURABILITY_UNSPECIFIED
    return data_pb2.Durability.ValueType(Durability.parse(name).value)


def parse_addresses(text: str) -> list[str]:
    """The addresses of ``"a:7850,b:7850"``.

    Raises:
        UsageError: one of them is not ``HOST:PORT``.
    """
    addresses = [part.strip() for part in text.split(",")]
    for address in addresses:
        split_address(address)
    return addresses


@contextlib.asynccontextmanager
async def aconnect(addresses: str, *, timeout_s: float = TIMEOUT_S) -> AsyncIterator[AsyncServer]:
    """Connects to ``"HOST:PORT"``, or to the primary among ``"a:7850,b:7850"``.

    Raises:
        UsageError: a bad address.
        PeerUnreachable, NotPrimary, Fenced, ProtocolError: nobody suitable answered within ``timeout_s``.
    """
    server = AsyncServer(parse_addresses(addresses))
    try:
        await server.ready(timeout_s=timeout_s)
        yield server
    finally:
        await server.close()


__all__ = ["AsyncServer", "RealmInfo", "aconnect"]
