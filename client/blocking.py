"""The direct client for code without an event loop: the same calls, each waiting for its answer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from understudy.client.direct import TIMEOUT_S, AsyncServer
from understudy.common import portal
from understudy.common.arguments import parse_addresses
from understudy.common.credentials import Credentials, Token
from understudy.common.errors import UsageError
from understudy.common.memtable import Receipt
from understudy.common.operations import Operation
from understudy.common.rpc import check_not_forked
from understudy.common.transaction import TransactionBuilder
from understudy.common.types import Lsn, RealmInfo
from understudy.v1 import admin_pb2

# Fetched from the other thread at a time.
_BATCH_PAIRS = 1_000
_BATCH_BYTES = 1 << 20

_T = TypeVar("_T")


class Server:
    """A connection to a server; see :class:`AsyncServer` for what each call does and raises.

    Any number of threads may share one. A fork of the process may not: all calls raise :class:`UsageError` there.
    """

    def __init__(self, server: AsyncServer) -> None:
        self._server = server

    def close(self) -> None:
        """Closes the connection; in a fork of the process that made it, does nothing."""
        if not self._server.is_of_another_process:
            portal.call(self._server.close())

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            self._server.check_process()  # here: in a fork, the loop that would check does not run
        except UsageError:
            work.close()
            raise
        return portal.call(work)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def commit(
        self,
        realm: str,
        operations: Iterable[Operation],
        *,
        durability: str | None = None,
        timeout_s: float | None = TIMEOUT_S,
    ) -> Receipt:
        """Commits one transaction and returns its receipt."""
        return self._call(self._server.commit(realm, operations, durability=durability, timeout_s=timeout_s))

    def wait(self, number: int, *, timeout_s: float | None = TIMEOUT_S) -> Receipt:
        """The receipt of a transaction whose outcome was unknown."""
        return self._call(self._server.wait(number, timeout_s=timeout_s))

    @contextlib.contextmanager
    def transaction(
        self, realm: str, *, durability: str | None = None, timeout_s: float | None = TIMEOUT_S
    ) -> Iterator[TransactionBuilder]:
        """Collects operations, and commits them when the block ends without an error."""
        builder = TransactionBuilder()
        yield builder
        builder.committed(self.commit(realm, builder.end(), durability=durability, timeout_s=timeout_s))

    def get(self, realm: str, key: bytes, *, timeout_s: float = TIMEOUT_S) -> bytes | None:
        """The value at ``key``, or None."""
        return self._call(self._server.get(realm, key, timeout_s=timeout_s))

    def get_many(
        self, realm: str, keys: Sequence[bytes], *, timeout_s: float = TIMEOUT_S
    ) -> list[bytes | None]:
        """The values at ``keys``, all as of one LSN."""
        return self._call(self._server.get_many(realm, keys, timeout_s=timeout_s))

    def count(self, realm: str, *, start: bytes = b"", end: bytes = b"", timeout_s: float = TIMEOUT_S) -> int:
        """How many keys there are from ``start`` to before ``end``."""
        return self._call(self._server.count(realm, start=start, end=end, timeout_s=timeout_s))

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
        """Pairs from ``start`` to before ``end``, in key order, all as of one LSN."""
        return self._scan(
            self._server.scan(realm, start=start, end=end, limit=limit, reverse=reverse, timeout_s=timeout_s)
        )

    def _scan(self, pairs: AsyncIterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        async def batch() -> list[tuple[bytes, bytes]]:
            found = []
            size = 0
            async for pair in pairs:
                found.append(pair)
                size += len(pair[1])
                if len(found) == _BATCH_PAIRS or size >= _BATCH_BYTES:
                    break
            return found

        try:
            while True:
                found = self._call(batch())
                if not found:
                    return
                yield from found
        finally:
            # Not waited for: the garbage collector may run this on the portal's own thread.
            if not self._server.is_of_another_process:
                portal.post(pairs.aclose())  # type: ignore[attr-defined]

    def realms(self, *, timeout_s: float = TIMEOUT_S) -> list[RealmInfo]:
        """All realms, in order of their paths."""
        return self._call(self._server.realms(timeout_s=timeout_s))

    def drop_realm(self, realm: str, *, timeout_s: float = TIMEOUT_S) -> Lsn:
        """Drops a realm and everything in it; returns the LSN."""
        return self._call(self._server.drop_realm(realm, timeout_s=timeout_s))

    def status(self, *, timeout_s: float = TIMEOUT_S) -> admin_pb2.StatusResponse:
        """The server's own account of itself."""
        return self._call(self._server.status(timeout_s=timeout_s))


def connect(
    addresses: str,
    *,
    ca: str | os.PathLike[str] | None = None,
    cert: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
    token: Token | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Server:
    """Connects to ``"HOST:PORT"``, or to the primary among ``"a:7850,b:7850"``; a context manager.

    Args:
        addresses: one or several.
        ca: a file with the CA that has signed the servers' certificates; TLS is used if it is given.
        cert, key: files with a client certificate and its key.
        token: who calls; ``"@FILE"`` reads it from a file; or a :class:`TokenSource`.
        timeout_s: for the first answer.

    Raises:
        UsageError: a bad address, a file that can't be used, or this process is a fork of one that has used gRPC.
        NotPermitted: the server is not trusted, does not let us in, or would get the token in the clear.
        PeerUnreachable, NotPrimary, Fenced, ProtocolError: nobody suitable answered within ``timeout_s``.
        Diverged: there are two primaries of one epoch.
    """
    return connect_as(
        Credentials.given(ca=ca, cert=cert, key=key, token=token), addresses, timeout_s=timeout_s
    )


def connect_as(credentials: Credentials, addresses: str, *, timeout_s: float = TIMEOUT_S) -> Server:
    """The same with credentials at hand."""
    check_not_forked()

    async def opened() -> AsyncServer:
        server = AsyncServer(parse_addresses(addresses), credentials)
        try:
            await server.ready(timeout_s=timeout_s)
        except BaseException:
            await server.close()
            raise
        return server

    return Server(portal.call(opened()))
