"""The direct client, asynchronous: transactions and reads on a server, online.

Writes share one :mod:`stream <understudy.client.stream>`; each read is a call of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from understudy.client.peers import Peers, kept
from understudy.client.stream import CommitStream
from understudy.common.arguments import (
    check_bounds,
    check_limit,
    check_timeout,
    check_timeout_or_none,
    checked_keys,
    parse_addresses,
    parse_durability,
)
from understudy.common.credentials import ANONYMOUS, Credentials, Token
from understudy.common.errors import (
    NotPrimary,
    OutcomeUnknown,
    PeerUnreachable,
    UnderstudyError,
    UsageError,
)
from understudy.common.follow_table import PROTOCOL_VERSION
from understudy.common.memtable import Receipt
from understudy.common.operations import Operation, to_protos
from understudy.common.rpc import FORK_REMEDY, peer_errors
from understudy.common.transaction import TransactionBuilder
from understudy.common.types import Lsn, RealmInfo, check_realm_path
from understudy.v1 import admin_pb2, data_pb2, sync_pb2

TIMEOUT_S = 30.0
_SALVAGE_MESSAGE_BYTES = 1 << 20
_RETRY_S = 0.02  # between two attempts to read while the primary is looked for

_T = TypeVar("_T")


class AsyncServer:
    """A connection to whichever of ``addresses`` is the primary. Made by :func:`aconnect`."""

    def __init__(self, addresses: Sequence[str], credentials: Credentials = ANONYMOUS) -> None:
        self._peers = Peers(addresses, credentials=credentials)
        self._stream = CommitStream(self._peers)
        self._loop = asyncio.get_running_loop()
        self._process = os.getpid()

    # -- life ----------------------------------------------------------------------------------------------

    async def ready(self, *, timeout_s: float = TIMEOUT_S) -> None:
        """Returns once a server answers; with several addresses, once the primary among them is found.

        Raises:
            PeerUnreachable, NotPrimary, Fenced, ProtocolError: after ``timeout_s``, why not.
            Diverged: there are two primaries of one epoch.
        """
        check_timeout(timeout_s)
        if self._peers.is_one:
            await self.status(timeout_s=timeout_s)
        else:
            await self._reading_address(timeout_s)

    async def close(self) -> None:
        """Closes the connection. What was not answered fails with :class:`OutcomeUnknown`."""
        if self.is_of_another_process:
            return  # it is the parent's, which goes on using it
        self._check_loop()
        await self._stream.close()
        await self._peers.close()

    @property
    def is_of_another_process(self) -> bool:
        """Whether this is a copy of the connection in a fork of the process that made it."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Refuses to work in a fork, where the threads are missing that would do it.

        Raises:
            UsageError.
        """
        if self.is_of_another_process:
            raise UsageError(
                f"this connection was made by process {self._process}, of which this one is a fork",
                remedy=FORK_REMEDY,
            )

    def _check_usable(self) -> None:
        self.check_process()
        self._check_loop()
        self._stream.check_open()

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError(
                "this connection belongs to another event loop",
                remedy="use aconnect() in each loop, or connect(), which all threads may share",
            )

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
            Diverged: there are two primaries of one epoch; it was not sent.
        """
        self._check_usable()
        check_timeout_or_none(timeout_s)
        message = data_pb2.Transaction(
            realm=check_realm_path(realm),
            durability=parse_durability(durability),
            operations=to_protos(operations),
        )
        return await self._stream.commit(message, timeout_s)

    async def wait(self, number: int, *, timeout_s: float | None = TIMEOUT_S) -> Receipt:
        """The receipt of a transaction that :class:`OutcomeUnknown` was raised for.

        Raises:
            UsageError: this client has no unanswered transaction of that number.
            OutcomeUnknown: still no answer.
        """
        self._check_usable()
        check_timeout_or_none(timeout_s)
        return await self._stream.wait(number, timeout_s)

    @contextlib.asynccontextmanager
    async def transaction(
        self, realm: str, *, durability: str | None = None, timeout_s: float | None = TIMEOUT_S
    ) -> AsyncIterator[TransactionBuilder]:
        """Collects operations, and commits them when the block ends without an error."""
        builder = TransactionBuilder()
        yield builder
        builder.committed(await self.commit(realm, builder.end(), durability=durability, timeout_s=timeout_s))

    async def drop_realm(self, realm: str, *, timeout_s: float = TIMEOUT_S) -> Lsn:
        """Drops a realm and everything in it; returns the LSN.

        Raises:
            UnknownRealm, NotPrimary.
            OutcomeUnknown: no answer came.
        """
        request = data_pb2.DropRealmRequest(realm=check_realm_path(realm))
        left_s = _time_left(timeout_s)
        address = await self._reading_address(left_s())
        try:
            with peer_errors(address):
                response = await self._peers.data(address).DropRealm(request, timeout=left_s())
        except PeerUnreachable as error:
            # Not tried again: by now somebody may have begun a new realm of that name.
            raise OutcomeUnknown(
                f"{realm} may or may not have been dropped: {error.message}",
                remedy="look before you repeat it",
            ) from None
        return Lsn(response.lsn)

    async def salvage(self, changes: Iterable[tuple[bytes, bytes]]) -> sync_pb2.Homecoming:
        """Brings home changes that only an old primary had, as ``understudy rewind`` has exported them.

        Args:
            changes: serialized ``Change`` messages with their HMACs, in the order of the log.

        Raises:
            NotPermitted, NotPrimary.
            PeerUnreachable: some may have been taken; it can be repeated.
        """
        address = await self._reading_address(TIMEOUT_S)
        with peer_errors(address):
            response = await self._peers.sync(address).Salvage(_salvage_requests(changes))
        return response.homecoming

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
        request = data_pb2.GetRequest(realm=check_realm_path(realm), keys=checked_keys(keys))
        response = await self._read(
            lambda address, left_s: self._peers.data(address).Get(request, timeout=left_s), timeout_s
        )
        return [
            value if present else None
            for value, present in zip(response.values, response.present, strict=True)
        ]

    async def count(
        self, realm: str, *, start: bytes = b"", end: bytes = b"", timeout_s: float = TIMEOUT_S
    ) -> int:
        """How many keys there are from ``start`` to before ``end``."""
        check_bounds(start, end)
        request = data_pb2.CountRequest(realm=check_realm_path(realm), start=start, end=end)
        response = await self._read(
            lambda address, left_s: self._peers.data(address).Count(request, timeout=left_s), timeout_s
        )
        return response.count

    def scan(
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
            UsageError: for arguments at once, before the first pair is asked for.
            UnknownRealm; PeerUnreachable: also in the middle, when the server goes away.
        """
        check_bounds(start, end)
        check_limit(limit)
        check_timeout_or_none(timeout_s)
        request = data_pb2.ScanRequest(
            realm=check_realm_path(realm), start=start, end=end, limit=limit or 0, reverse=bool(reverse)
        )
        return self._scan(request, limit, timeout_s)

    async def _scan(
        self, request: data_pb2.ScanRequest, limit: int | None, timeout_s: float | None
    ) -> AsyncIterator[tuple[bytes, bytes]]:
        self._check_usable()
        if limit == 0:
            return
        left_s = _time_left(TIMEOUT_S if timeout_s is None else timeout_s)
        address = await self._reading_address(left_s())
        call = self._peers.data(address).Scan(request, timeout=None if timeout_s is None else left_s())
        try:
            with peer_errors(address):
                async for page in call:
                    for pair in zip(page.keys, page.values, strict=True):
                        yield pair
        finally:
            call.cancel()

    async def realms(self, *, timeout_s: float = TIMEOUT_S) -> list[RealmInfo]:
        """All realms, in order of their paths."""

        async def listed(address: str, left_s: float) -> list[RealmInfo]:
            return [
                _realm_info(one)
                async for page in self._peers.data(address).Realms(data_pb2.RealmsRequest(), timeout=left_s)
                for one in page.realms
            ]

        return await self._read(listed, timeout_s)

    def scan_realms(self, *, timeout_s: float | None = None) -> AsyncIterator[RealmInfo]:
        """All realms, in order of their paths, in little memory however many there are.

        One that is made or dropped meanwhile may be among them or not.

        Raises:
            PeerUnreachable: also in the middle, when the server goes away.
        """
        check_timeout_or_none(timeout_s)
        return self._scan_realms(timeout_s)

    async def _scan_realms(self, timeout_s: float | None) -> AsyncIterator[RealmInfo]:
        self._check_usable()
        left_s = _time_left(TIMEOUT_S if timeout_s is None else timeout_s)
        address = await self._reading_address(left_s())
        call = self._peers.data(address).Realms(
            data_pb2.RealmsRequest(), timeout=None if timeout_s is None else left_s()
        )
        try:
            with peer_errors(address):
                async for page in call:
                    for one in page.realms:
                        yield _realm_info(one)
        finally:
            call.cancel()

    async def status(self, *, timeout_s: float = TIMEOUT_S) -> admin_pb2.StatusResponse:
        """The server's own account of itself."""
        request = admin_pb2.StatusRequest()
        return await self._read(
            lambda address, left_s: self._peers.admin(address).Status(request, timeout=left_s), timeout_s
        )

    async def _reading_address(self, timeout_s: float) -> str:
        """Where to read: the only address, or the primary among several (a replica may be behind)."""
        self._check_usable()
        if not self._peers.is_one:
            await self._stream.bound_within(timeout_s)
        return self._peers.addresses[self._peers.current]

    async def _read(self, call: Callable[[str, float], Awaitable[_T]], timeout_s: float) -> _T:
        """What ``call`` returns, given an address and the seconds that are left."""
        left_s = _time_left(timeout_s)
        while True:
            address = await self._reading_address(left_s())
            try:
                with peer_errors(address):
                    return await call(address, left_s())
            except UnderstudyError as error:
                # With several addresses, another one may be primary by now.
                may_be_another = isinstance(error, (PeerUnreachable, NotPrimary)) and not self._peers.is_one
                if not may_be_another or not left_s():
                    raise kept(error) from None
                self._stream.check_open()
                await asyncio.sleep(_RETRY_S)


async def _salvage_requests(changes: Iterable[tuple[bytes, bytes]]) -> AsyncIterator[sync_pb2.SalvageRequest]:
    request = sync_pb2.SalvageRequest(protocol_version=PROTOCOL_VERSION)
    size = 0
    for change, hmac in changes:
        request.changes.append(change)
        request.hmacs += hmac
        size += len(change)
        if size >= _SALVAGE_MESSAGE_BYTES:
            yield request
            request, size = sync_pb2.SalvageRequest(protocol_version=PROTOCOL_VERSION), 0
    yield request


def _realm_info(said: data_pb2.RealmInfo) -> RealmInfo:
    return RealmInfo(path=said.path, version=said.version, entries=said.entries, bytes=said.bytes)


def _time_left(timeout_s: float) -> Callable[[], float]:
    """Tells how much of ``timeout_s`` is left whenever it is asked: seconds, 0 when it is over.

    Raises:
        UsageError: that is no time to wait.
    """
    check_timeout(timeout_s)
    deadline_s = time.monotonic() + timeout_s
    return lambda: max(deadline_s - time.monotonic(), 0.0)


def aconnect(
    addresses: str,
    *,
    ca: str | os.PathLike[str] | None = None,
    cert: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
    token: Token | None = None,
    timeout_s: float = TIMEOUT_S,
) -> contextlib.AbstractAsyncContextManager[AsyncServer]:
    """Connects to ``"HOST:PORT"``, or to the primary among ``"a:7850,b:7850"``.

    Args:
        addresses: one or several.
        ca: a file with the CA that has signed the servers' certificates; TLS is used if it is given.
        cert, key: files with a client certificate and its key.
        token: who calls; ``"@FILE"`` reads it from a file; or a :class:`TokenSource`.
        timeout_s: for the first answer.

    Raises:
        UsageError: a bad address, or a file that can't be used.
        NotPermitted: the server is not trusted, does not let us in, or would get the token in the clear.
        PeerUnreachable, NotPrimary, Fenced, ProtocolError: nobody suitable answered within ``timeout_s``.
        Diverged: there are two primaries of one epoch.
    """
    return aconnect_as(
        Credentials.given(ca=ca, cert=cert, key=key, token=token), addresses, timeout_s=timeout_s
    )


@contextlib.asynccontextmanager
async def aconnect_as(
    credentials: Credentials, addresses: str, *, timeout_s: float = TIMEOUT_S
) -> AsyncIterator[AsyncServer]:
    """The same with credentials at hand."""
    server = AsyncServer(parse_addresses(addresses), credentials)
    try:
        await server.ready(timeout_s=timeout_s)
        yield server
    finally:
        await server.close()


__all__ = ["AsyncServer", "RealmInfo", "aconnect"]
