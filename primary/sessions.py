"""Logins: their refresh tokens, each good for one use, and the access tokens that rest on them; and the keys that sign.

A refresh token that was used twice was copied by somebody, or its answer was lost on the way. The latter can only
happen to the one before the newest, as long as the newest was not used: then it is taken once more. Any other that was
used before ends its login, for whoever has the newest.
"""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary

from understudy.common.accounts import KEYS, after_prefix, session_key, signing_key_key
from understudy.common.authority import Authority
from understudy.common.errors import NotAuthenticated
from understudy.common.events import log
from understudy.common.operations import Delete, DeleteRange, Operation, Put
from understudy.common.tokens import (
    ACCESS_S,
    LOGIN_AGAIN,
    REFRESH_S,
    RETIRED_KEY_S,
    Claims,
    Lasting,
    LastingToken,
    new_signing_key,
    new_token_id,
    sign_token,
)
from understudy.common.types import SESSIONS_REALM, SYSTEM_REALM
from understudy.primary.admin_token import CommitSystem
from understudy.v1 import accounts_pb2

SESSIONS_PER_USER_MAX = 100  # with one more login, the oldest ends
_EARLIER_MAX = 8  # used refresh tokens that are recognized


class Sessions:
    """The logins of a primary. For one event loop."""

    def __init__(self, commit: CommitSystem, authority: Authority) -> None:
        self._commit = commit
        self._authority = authority
        self._accounts = authority.accounts
        self._keys = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by user id

    def _now_us(self) -> int:
        return int(self._authority.now_s() * 1e6)

    # -- logins --------------------------------------------------------------------------------------------

    def _turn(self, user_id: str) -> asyncio.Lock:
        """Whoever changes a user's logins does so alone: a login that is being ended must not be renewed meanwhile."""
        return self._turns.setdefault(user_id, asyncio.Lock())

    async def begin(self, user: str, user_id: str) -> accounts_pb2.Tokens:
        """A new login of somebody who has proved to be that user."""
        refresh = LastingToken.new(Lasting.REFRESH, f"{user_id}.{new_token_id()}")
        row = accounts_pb2.SessionRow(user=user, hash=refresh.hash, created_us=self._now_us())
        async with self._turn(user_id):
            gone: list[Operation] = [Delete(key) for key in self._superfluous(user_id)]
            return await self._keep(refresh, row, gone)

    def _superfluous(self, user_id: str) -> list[bytes]:
        """The keys of a user's logins that have expired, or make room for one more."""
        prefix = session_key(user_id, "")
        rows = list(self._accounts.rows(prefix, accounts_pb2.SessionRow, realm=SESSIONS_REALM))
        good = [(row.created_us, at) for at, row in rows if row.expires_us > self._now_us()]
        kept = {at for _, at in sorted(good)[-(SESSIONS_PER_USER_MAX - 1) :]}
        return [session_key(user_id, at) for at, _ in rows if at not in kept]

    async def renew(self, text: str) -> accounts_pb2.Tokens:
        """New tokens for a refresh token.

        Raises:
            NotAuthenticated: it is worth nothing, or was used before.
        """
        token = _refresh_token(text)
        async with self._turn(token.id.partition(".")[0]):
            row = self._good_row(token)
            row.earlier[:] = (await self._used(token, row))[:_EARLIER_MAX]
            renewed = LastingToken.new(Lasting.REFRESH, token.id)
            row.hash = renewed.hash
            return await self._keep(renewed, row)

    def _good_row(self, token: LastingToken) -> accounts_pb2.SessionRow:
        user_id, _, session = token.id.partition(".")
        row = self._accounts.session(user_id, session)
        if row is None or row.expires_us <= self._now_us():
            raise _ended()
        user = self._accounts.user(row.user)
        if user is None or user.disabled or user.id != user_id:
            raise _ended()
        return row

    async def _used(self, token: LastingToken, row: accounts_pb2.SessionRow) -> list[bytes]:
        """The hashes of this login's used tokens once this one is, the last that its owner is known to have first."""
        if token.is_of(row.hash):
            return [row.hash, *row.earlier]
        used = [token.is_of(one) for one in row.earlier]
        if not any(used):
            raise _ended()
        if not used[0]:
            log.warning("refresh_token_reused", user=row.user, session=token.id)
            await self._commit(SESSIONS_REALM, [Delete(_key_of(token))])
            raise NotAuthenticated(
                "the refresh token was used before, so somebody may have copied it: this login has ended",
                remedy=LOGIN_AGAIN,
            )
        return [row.earlier[0], row.hash, *row.earlier[1:]]  # the answer with the newest was lost

    async def _keep(
        self, refresh: LastingToken, row: accounts_pb2.SessionRow, gone: list[Operation] | None = None
    ) -> accounts_pb2.Tokens:
        row.expires_us = self._now_us() + int(REFRESH_S * 1e6)
        put = Put(_key_of(refresh), row.SerializeToString())
        await self._commit(SESSIONS_REALM, [*(gone or ()), put])
        user_id, _, session = refresh.id.partition(".")
        return accounts_pb2.Tokens(
            access=await self._access_token(row.user, user_id, session),
            refresh=str(refresh),
            access_s=ACCESS_S,
            refresh_s=REFRESH_S,
            user=row.user,
            user_id=user_id,
        )

    async def end(self, text: str) -> None:
        """Ends the login of a refresh token; one that has ended already is no mistake.

        Raises:
            NotAuthenticated: it is none.
        """
        token = _refresh_token(text)
        user_id, _, session = token.id.partition(".")
        async with self._turn(user_id):
            row = self._accounts.session(user_id, session)
            if row is not None and any(token.is_of(one) for one in (row.hash, *row.earlier)):
                await self._commit(SESSIONS_REALM, [Delete(_key_of(token))])

    async def end_one(self, user_id: str, session: str) -> bool:
        """Ends a login; whether there was one."""
        async with self._turn(user_id):
            if self._accounts.session(user_id, session) is None:
                return False
            await self._commit(SESSIONS_REALM, [Delete(session_key(user_id, session))])
            return True

    async def end_all(self, user_id: str) -> None:
        """Ends all logins of a user."""
        logins = session_key(user_id, "")
        async with self._turn(user_id):
            await self._commit(SESSIONS_REALM, [DeleteRange(logins, after_prefix(logins))])

    # -- keys ----------------------------------------------------------------------------------------------

    async def _access_token(self, user: str, user_id: str, session: str) -> str:
        key_id, key = self._accounts.signing_key() or await self._first_key()
        now_s = int(self._authority.now_s())
        claims = Claims(
            user=user,
            user_id=user_id,
            session=session,
            issuer=self._authority.issuer,
            issued_s=now_s,
            expires_s=now_s + int(ACCESS_S),
            id=new_token_id(),
        )
        return sign_token(claims, key_id=key_id, private=key.private)

    async def _first_key(self) -> tuple[str, accounts_pb2.KeyRow]:
        async with self._keys:
            if self._accounts.signing_key() is None:
                await self._rotate()
        found = self._accounts.signing_key()
        assert found is not None  # it was committed
        return found

    async def rotate(self) -> str:
        """Has a new key sign, whose id is returned; what the old one has signed is good until it expires."""
        async with self._keys:
            return await self._rotate()

    async def _rotate(self) -> str:
        now_us = self._now_us()
        key_id = new_token_id()
        private, public = new_signing_key()
        row = accounts_pb2.KeyRow(private=private, public=public, created_us=now_us)
        operations: list[Operation] = [Put(signing_key_key(key_id), row.SerializeToString())]
        for at, old in self._accounts.rows(KEYS, accounts_pb2.KeyRow):
            if not old.retired_us:
                old.retired_us = now_us
                old.private = b""
                operations.append(Put(signing_key_key(at), old.SerializeToString()))
            elif old.retired_us + RETIRED_KEY_S * 1e6 < now_us:
                operations.append(Delete(signing_key_key(at)))
        await self._commit(SYSTEM_REALM, operations)
        return key_id


def _refresh_token(text: str) -> LastingToken:
    token = LastingToken.read(text)
    if token is None or token.kind is not Lasting.REFRESH:
        raise NotAuthenticated("this is no refresh token", remedy=LOGIN_AGAIN)
    return token


def _key_of(token: LastingToken) -> bytes:
    user_id, _, session = token.id.partition(".")
    return session_key(user_id, session)


def _ended() -> NotAuthenticated:
    return NotAuthenticated("this login has ended", remedy=LOGIN_AGAIN)
