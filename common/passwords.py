"""Passwords: hashed with scrypt, the parameters kept beside the hash so that they can be raised later.

Each hash takes some 30 MiB and a third of a second, so they run in threads, few at a time (G9).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
from collections.abc import AsyncIterator

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from understudy.common.errors import CorruptionError, Overloaded, UsageError
from understudy.v1 import accounts_pb2

# OWASP's recommendation of 2024 that takes the least memory for its strength: 32 MiB.
N, R, P = 1 << 15, 8, 3
SALT_BYTES = 16
HASH_BYTES = 32
PASSWORD_BYTES_MIN = 8
PASSWORD_BYTES_MAX = 1024
HASHING_MAX = 2  # at a time
WAITING_MAX = 64  # for their turn


def check_password(password: str) -> None:
    """Refuses a new password that is too short to be one, or too long.

    Raises:
        UsageError.
    """
    size = _size(password)
    if not PASSWORD_BYTES_MIN <= size <= PASSWORD_BYTES_MAX:
        raise UsageError(
            f"a password of {size} bytes", remedy=f"give {PASSWORD_BYTES_MIN} to {PASSWORD_BYTES_MAX}"
        )


def _size(password: str) -> int:
    return len(password.encode("utf-8", "surrogatepass"))


def hash_password(password: str) -> accounts_pb2.Password:
    """A row for a new password. Takes a third of a second."""
    row = accounts_pb2.Password(kdf="scrypt", n=N, r=R, p=P, salt=secrets.token_bytes(SALT_BYTES))
    row.hash = _derive(password, row, HASH_BYTES)
    return row


def is_password(password: str, row: accounts_pb2.Password | None) -> bool:
    """Whether ``password`` is the one that ``row`` was made of; takes as long where there is no row.

    One that is too long to have been chosen is none, and none of its beginning is looked at.

    Raises:
        CorruptionError: the row's parameters are none of ours.
    """
    if _size(password) > PASSWORD_BYTES_MAX:
        password, row = "", None
    expected = _nobody() if row is None else row
    derived = _derive(password, expected, len(expected.hash) or HASH_BYTES)
    return hmac.compare_digest(derived, expected.hash) and row is not None


def is_outdated(row: accounts_pb2.Password) -> bool:
    """Whether it was hashed with other parameters than a new one would be."""
    return (row.kdf, row.n, row.r, row.p) != ("scrypt", N, R, P)


def _derive(password: str, row: accounts_pb2.Password, length: int) -> bytes:
    try:
        if row.kdf != "scrypt":
            raise ValueError(f"unknown function {row.kdf!r}")
        function = Scrypt(salt=row.salt, length=length, n=row.n, r=row.r, p=row.p)
    except ValueError as error:
        raise CorruptionError(f"a password's row can't be used: {error}") from error
    return function.derive(password.encode("utf-8", "surrogatepass"))


def _nobody() -> accounts_pb2.Password:
    """What a name that nobody has is compared with."""
    return accounts_pb2.Password(kdf="scrypt", n=N, r=R, p=P, salt=bytes(SALT_BYTES), hash=bytes(HASH_BYTES))


class Hasher:
    """Hashes beside the event loop, few at a time. For one event loop."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(HASHING_MAX)
        self._waiting = 0

    async def hash(self, password: str) -> accounts_pb2.Password:
        """As :func:`hash_password`.

        Raises:
            UsageError: it is too short or too long.
            Overloaded: too many wait already.
        """
        check_password(password)
        async with self._one():
            return await asyncio.to_thread(hash_password, password)

    async def check(self, password: str, row: accounts_pb2.Password | None) -> bool:
        """As :func:`is_password`.

        Raises:
            Overloaded: too many wait already.
        """
        async with self._one():
            return await asyncio.to_thread(is_password, password, row)

    @contextlib.asynccontextmanager
    async def _one(self) -> AsyncIterator[None]:
        if self._waiting >= WAITING_MAX:
            raise Overloaded("too many passwords wait to be checked", remedy="try again later")
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._turn.release()
