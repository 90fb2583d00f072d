"""A primary inside an application: the application is the server, replicas and clients connect to it as to any."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Coroutine, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from understudy.common import portal
from understudy.common.errors import OutcomeUnknown, UnderstudyError, UsageError
from understudy.common.memtable import Receipt
from understudy.common.operations import Operation, to_protos
from understudy.common.read_service import PAGE_BYTES, PAGE_PAIRS
from understudy.common.scan import Scan
from understudy.common.settings import PrimarySettings
from understudy.common.transaction import TransactionBuilder
from understudy.common.types import Durability, Lsn, check_key, check_realm_path, new_id
from understudy.primary.server import PrimaryServer, serving_primary
from understudy.v1 import admin_pb2, data_pb2

TIMEOUT_S = 30.0

_T = TypeVar("_T")


class Primary:
    """An embedded primary. Calls may come from any thread; they have the direct client's names and meanings."""

    def __init__(self, server: PrimaryServer, stack: contextlib.AsyncExitStack) -> None:
        self._server = server
        self._node = server.node
        self._stack = stack
        self._client = new_id()
        self._numbers = itertools.count(1)
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
        insecure: bool = False,
    ) -> Primary:
        """Opens ``data_dir`` (made if absent or empty) and serves on ``listen``; a context manager.

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
            insecure=insecure,
        )
        settings.validate()

        async def opened() -> tuple[PrimaryServer, contextlib.AsyncExitStack]:
            async with contextlib.AsyncExitStack() as stack:
                server = await stack.enter_async_context(serving_primary(settings))
                return server, stack.pop_all()

        return cls(*portal.call(opened()))

    def close(self) -> None:
        """Finishes what was taken in and closes the directory."""
        if not self._closed:
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

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._closed:
            work.close()
            raise UsageError("this primary is closed")
        return portal.call(work)

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
            OutcomeUnknown: it was not durable enough in time; it may become so later.
            DiskFull, Fenced, StorageFailed: no writes.
        """
        transaction = data_pb2.Transaction(
            realm=check_realm_path(realm),
            durability=data_pb2.DURABILITY_UNSPECIFIED
            if durability is None
            else data_pb2.Durability.ValueType(Durability.parse(durability).value),
            operations=to_protos(operations),
        )
        return self._call(self._commit(transaction, timeout_s))

    async def _commit(self, transaction: data_pb2.Transaction, timeout_s: float | None) -> Receipt:
        answer: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()

        def done(receipt: Receipt) -> None:
            if not answer.done():
                answer.set_result(receipt)

        async with self._in_time(transaction, timeout_s):
            await self._node.wait_for_room()
            transaction.number = next(self._numbers)
            self._node.submit(self._client, transaction, done)
            return await self._node.answered(answer)

    @contextlib.asynccontextmanager
    async def _in_time(self, transaction: data_pb2.Transaction, timeout_s: float | None) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise OutcomeUnknown(
                f"a transaction on {transaction.realm} was not durable enough within {timeout_s:g} s",
                remedy="are enough replicas connected? see `understudy status`",
                number=transaction.number,
            ) from None

    @contextlib.contextmanager
    def transaction(
        self, realm: str, *, durability: str | None = None, timeout_s: float | None = TIMEOUT_S
    ) -> Iterator[TransactionBuilder]:
        """Collects operations, and commits them when the block ends without an error."""
        builder = TransactionBuilder()
        yield builder
        builder.committed(self.commit(realm, builder.operations, durability=durability, timeout_s=timeout_s))

    def drop_realm(self, realm: str) -> Lsn:
        """Drops a realm and everything in it; returns the LSN.

        Raises:
            UnknownRealm.
        """
        return self._call(self._node.drop_realm(check_realm_path(realm))).lsn

    # -- reading -------------------------------------------------------------------------------------------

    def get(self, realm: str, key: bytes) -> bytes | None:
        """The value at ``key``, or None.

        Raises:
            UnknownRealm, BadKey.
        """
        check_key(key)

        async def got() -> bytes | None:
            return self._node.engine.state.get(check_realm_path(realm), key)

        return self._call(got())

    def count(self, realm: str, *, start: bytes = b"", end: bytes = b"") -> int:
        """How many keys there are from ``start`` to before ``end``."""

        async def counted() -> int:
            return self._node.engine.state.count(check_realm_path(realm), start, end)

        return self._call(counted())

    def scan(
        self,
        realm: str,
        *,
        start: bytes = b"",
        end: bytes = b"",
        limit: int | None = None,
        reverse: bool = False,
    ) -> Iterator[tuple[bytes, bytes]]:
        """Pairs from ``start`` to before ``end``, in key order, all as of one LSN."""

        left = limit
        scan: Scan | None = None

        async def page() -> tuple[list[bytes], list[bytes], bool]:
            nonlocal scan
            if (
                scan is None
            ):  # opened together with its first page: until that is made, the state must not change
                scan = self._node.engine.state.scan(check_realm_path(realm), start, end, reverse=reverse)
            return scan.page(
                bytes_max=PAGE_BYTES, pairs_max=PAGE_PAIRS if left is None else min(left, PAGE_PAIRS)
            )

        async def closed() -> None:
            if scan is not None:
                scan.close()

        try:
            at_end = left == 0
            while not at_end and left != 0:
                keys, values, at_end = self._call(page())
                left = None if left is None else left - len(keys)
                yield from zip(keys, values, strict=True)
        finally:
            portal.post(
                closed()
            )  # not waited for: the garbage collector may run this on the portal's own thread

    def status(self) -> admin_pb2.StatusResponse:
        """The same account that ``understudy status`` shows."""

        async def told() -> admin_pb2.StatusResponse:
            return self._node.status()

        return self._call(told())

    @property
    def failure(self) -> UnderstudyError | None:
        """Why nothing is acknowledged any more: storage has failed. Close, and open again."""
        return self._node.engine.failed
