"""A primary inside an application: the application is the server, replicas and clients connect to it as to any."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from understudy.common import portal
from understudy.common.arguments import (
    check_bounds,
    check_limit,
    check_timeout,
    check_timeout_or_none,
    checked_keys,
    parse_durability,
)
from understudy.common.errors import OutcomeUnknown, Overloaded, UnderstudyError, UsageError
from understudy.common.memtable import Receipt
from understudy.common.operations import Operation, to_protos
from understudy.common.reader import OpenScan, Reader
from understudy.common.rpc import check_not_forked, is_forked
from understudy.common.settings import PrimarySettings
from understudy.common.transaction import TransactionBuilder
from understudy.common.types import Durability, Lsn, RealmInfo, check_realm_path, new_id
from understudy.primary.server import PrimaryServer, serving_primary
from understudy.v1 import admin_pb2, data_pb2

TIMEOUT_S = 30.0
_LATE_MAX = 10_000  # transactions that were not answered in time, kept until somebody asks

_T = TypeVar("_T")


class Primary:
    """An embedded primary. Calls may come from any thread; they have the direct client's names and meanings."""

    def __init__(self, server: PrimaryServer, stack: contextlib.AsyncExitStack) -> None:
        self._server = server
        self._node = server.node
        self._stack = stack
        self._client = new_id()
        self._numbers = itertools.count(1)
        self._late: OrderedDict[int, asyncio.Future[Receipt]] = OrderedDict()  # not answered in time
        self._reader = Reader(lambda: self._node.engine.state)
        self._closed = False

    @classmethod
    def open(
        cls,
        data_dir: str | os.PathLike[str],
        *,
        listen: str = "127.0.0.1:7850",
        durability: str = "local",
        sync_replicas: int = 1,
        degrade_after_s: float | None = None,
        tls_cert: str | os.PathLike[str] | None = None,
        tls_key: str | os.PathLike[str] | None = None,
        tls_ca: str | os.PathLike[str] | None = None,
    ) -> Primary:
        """Opens ``data_dir`` (made if absent or empty) and serves on ``listen``; a context manager.

        Without TLS, ``listen`` has to be a loopback address.

        Args:
            data_dir: absent, empty, or a primary's.
            listen: ``HOST:PORT``; port 0 takes a free one.
            durability: ``local``, ``replica`` or ``applied``.
            sync_replicas: how many replicas that takes.
            degrade_after_s: falls to ``local`` after so long without them; None waits.
            tls_cert, tls_key: files with the server's certificate and its key, in PEM.
            tls_ca: a file with the CA that signs clients' certificates.

        Raises:
            UsageError, NotPermitted: a setting can't be.
            DirectoryError, CorruptionError, StorageFailed, DiskFull: of the directory.
        """
        settings = PrimarySettings(
            data_dir=Path(data_dir),
            listen=listen,
            durability=Durability.parse(durability),
            sync_replicas=sync_replicas,
            degrade_after_s=degrade_after_s,
            tls_cert=None if tls_cert is None else Path(tls_cert),
            tls_key=None if tls_key is None else Path(tls_key),
            tls_ca=None if tls_ca is None else Path(tls_ca),
        )
        settings.validate()
        check_not_forked()

        async def opened() -> tuple[PrimaryServer, contextlib.AsyncExitStack]:
            async with contextlib.AsyncExitStack() as stack:
                server = await stack.enter_async_context(serving_primary(settings))
                return server, stack.pop_all()

        return cls(*portal.call(opened()))

    def close(self) -> None:
        """Finishes what was taken in and closes the directory; in a fork of the process that has it, does nothing."""
        if not self._closed and not is_forked():
            self._closed = True
            portal.call(self._stack.aclose())

    def __enter__(self) -> Primary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where it listens, with the real port."""
        return self._server.address

    def _call(self, work: Coroutine[Any, Any, _T], timeout_s: float | None = None) -> _T:
        async def in_time() -> _T:
            try:
                async with asyncio.timeout(timeout_s):
                    return await work
            except TimeoutError:
                raise Overloaded(f"not answered within {timeout_s:g} s", remedy="try again later") from None

        if self._closed:
            work.close()
            raise UsageError("this primary is closed")
        try:
            check_not_forked()  # in a fork, the loop that would answer does not run
        except UsageError:
            work.close()
            raise
        return portal.call(in_time())

    # -- writing -------------------------------------------------------------------------------------------

    def commit(
        self,
        realm: str,
        operations: Iterable[Operation],
        *,
        durability: str | None = None,
        timeout_s: float | None = TIMEOUT_S,
    ) -> Receipt:
        """Commits one transaction and returns its receipt.

        Raises:
            UsageError: the transaction can't be.
            OutcomeUnknown: it was not durable enough in time, and :meth:`wait` tells when it is; or the primary was
                fenced or closed meanwhile.
            Overloaded: too much waits for replicas already; it was not taken in.
            DiskFull, Fenced, StorageFailed: no writes; it was not taken in.
        """
        check_timeout_or_none(timeout_s)
        transaction = data_pb2.Transaction(
            realm=check_realm_path(realm),
            durability=parse_durability(durability),
            operations=to_protos(operations),
        )
        return self._call(self._commit(transaction, timeout_s))

    async def _commit(self, transaction: data_pb2.Transaction, timeout_s: float | None) -> Receipt:
        answer: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()

        def done(receipt: Receipt) -> None:
            if not answer.done():
                answer.set_result(receipt)

        try:
            async with asyncio.timeout(timeout_s) as deadline:
                await self._node.wait_for_room()
        except TimeoutError:
            raise Overloaded("too many transactions are unanswered", remedy="try again later") from None
        transaction.number = next(self._numbers)
        self._node.submit(self._client, transaction, done)
        return await self._answered(transaction.number, answer, deadline.when())

    async def _answered(
        self, number: int, answer: asyncio.Future[Receipt], deadline: float | None
    ) -> Receipt:
        try:
            async with asyncio.timeout_at(deadline):
                return await self._node.answered(answer, f"transaction {number}", number=number)
        except TimeoutError:
            self._late[number] = answer
            while len(self._late) > _LATE_MAX:
                self._late.popitem(last=False)
            raise OutcomeUnknown(
                f"transaction {number} was not durable enough in time",
                remedy="are enough replicas connected? see `understudy status`; wait() tells when it is",
                number=number,
            ) from None

    def wait(self, number: int, *, timeout_s: float | None = TIMEOUT_S) -> Receipt:
        """The receipt of a transaction that :class:`OutcomeUnknown` was raised for.

        Raises:
            UsageError: no transaction of that number is unanswered.
            OutcomeUnknown: still no answer; or there will be none, the primary having been fenced or closed.
        """
        check_timeout_or_none(timeout_s)

        async def waited() -> Receipt:
            answer = self._late.get(number)
            if answer is None:
                raise UsageError(f"transaction {number} of this primary is not unanswered")
            deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
            return await self._answered(number, answer, deadline)

        return self._call(waited())

    @contextlib.contextmanager
    def transaction(
        self, realm: str, *, durability: str | None = None, timeout_s: float | None = TIMEOUT_S
    ) -> Iterator[TransactionBuilder]:
        """Collects operations, and commits them when the block ends without an error."""
        builder = TransactionBuilder()
        yield builder
        builder.committed(self.commit(realm, builder.end(), durability=durability, timeout_s=timeout_s))

    def drop_realm(self, realm: str, *, timeout_s: float = TIMEOUT_S) -> Lsn:
        """Drops a realm and everything in it; returns the LSN.

        Raises:
            UnknownRealm.
            OutcomeUnknown: it was not durable enough in time; it may become so later.
        """
        check_timeout(timeout_s)
        path = check_realm_path(realm)

        async def dropped() -> Lsn:
            try:
                async with asyncio.timeout(timeout_s):
                    return (await self._node.drop_realm(path)).lsn
            except TimeoutError:
                raise OutcomeUnknown(
                    f"the drop of {path} was not durable enough within {timeout_s:g} s",
                    remedy="look before you repeat it",
                ) from None

        return self._call(dropped())

    # -- reading -------------------------------------------------------------------------------------------

    def get(self, realm: str, key: bytes, *, timeout_s: float = TIMEOUT_S) -> bytes | None:
        """The value at ``key``, or None.

        Raises:
            UnknownRealm, BadKey.
        """
        return self.get_many(realm, [key], timeout_s=timeout_s)[0]

    def get_many(
        self, realm: str, keys: Sequence[bytes], *, timeout_s: float = TIMEOUT_S
    ) -> list[bytes | None]:
        """The values at ``keys``, all as of one LSN."""
        check_timeout(timeout_s)
        wanted = checked_keys(keys)

        async def got() -> list[bytes | None]:
            return self._reader.get(realm, wanted)[0]

        return self._call(got(), timeout_s)

    def count(self, realm: str, *, start: bytes = b"", end: bytes = b"", timeout_s: float = TIMEOUT_S) -> int:
        """How many keys there are from ``start`` to before ``end``."""
        check_timeout(timeout_s)
        check_bounds(start, end)

        async def counted() -> int:
            return (await self._reader.count(realm, start, end))[0]

        return self._call(counted(), timeout_s)

    def scan(
        self,
        realm: str,
        *,
        start: bytes = b"",
        end: bytes = b"",
        limit: int | None = None,
        reverse: bool = False,
        timeout_s: float | None = None,
    ) -> Iterator[tuple[bytes, bytes]]:
        """Pairs from ``start`` to before ``end``, in key order, all as of one LSN; ``timeout_s`` is for each page."""
        check_timeout_or_none(timeout_s)
        check_bounds(start, end)
        check_limit(limit)
        return self._scan(realm, start, end, limit, timeout_s, reverse=reverse)

    def _scan(
        self,
        realm: str,
        start: bytes,
        end: bytes,
        limit: int | None,
        timeout_s: float | None,
        *,
        reverse: bool,
    ) -> Iterator[tuple[bytes, bytes]]:
        opened = contextlib.ExitStack()
        scan: OpenScan | None = None

        async def page() -> tuple[list[bytes], list[bytes]]:
            nonlocal scan
            if scan is None:  # together with its first page: until that is made, the state must not change
                scan = opened.enter_context(
                    self._reader.scan(realm, start, end, limit=limit, reverse=reverse)
                )
            return ([], []) if scan.at_end else scan.page()

        async def closed() -> None:
            opened.close()

        try:
            while scan is None or not scan.at_end:
                yield from zip(*self._call(page(), timeout_s), strict=True)
        finally:
            # Not waited for: the garbage collector may run this on the portal's own thread.
            portal.post(closed())

    def realms(self, *, timeout_s: float = TIMEOUT_S) -> list[RealmInfo]:
        """All realms, in order of their paths."""
        check_timeout(timeout_s)
        return self._call(self._realms(), timeout_s)

    async def _realms(self) -> list[RealmInfo]:
        return [realm async for page in self._reader.realms() for realm in page]

    def status(self, *, timeout_s: float = TIMEOUT_S) -> admin_pb2.StatusResponse:
        """The same account that ``understudy status`` shows."""
        check_timeout(timeout_s)

        async def told() -> admin_pb2.StatusResponse:
            status = self._node.status()
            status.access = self._server.authority.access
            return status

        return self._call(told(), timeout_s)

    @property
    def failure(self) -> UnderstudyError | None:
        """Why nothing is acknowledged any more: storage has failed. Close, and open again."""
        return self._node.engine.failed
