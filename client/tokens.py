"""Logging in, and an access token that is renewed before it expires."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

from understudy.client.peers import kept
from understudy.common import portal
from understudy.common.arguments import check_timeout, parse_addresses
from understudy.common.credentials import Credentials
from understudy.common.errors import NotAuthenticated, NotPrimary, PeerUnreachable, UnderstudyError
from understudy.common.events import log
from understudy.common.rpc import check_not_forked, open_channel, peer_errors
from understudy.v1 import accounts_pb2, accounts_pb2_grpc

TIMEOUT_S = 30.0
_RENEW_AT = 2 / 3  # of an access token's life
# A device that slept is not told so: how long after it woke the token is looked at, at the latest.
_LOOK_S_MAX = 15.0
_RETRY_S = 5.0

_T = TypeVar("_T")
_File = str | os.PathLike[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a login gives.

    Attributes:
        access: for calls; good for ``access_s`` seconds.
        refresh: for new tokens, once; good for ``refresh_s`` seconds. Whoever has it can stay logged in.
        user_id: what ``~`` stands for in this user's realm paths.
    """

    access: str = field(repr=False)
    refresh: str = field(repr=False)
    access_s: float
    refresh_s: float
    user: str
    user_id: str


def login(
    addresses: str, user: str, password: str, *, ca: _File = None, timeout_s: float = TIMEOUT_S
) -> Tokens:
    """A password for tokens, from the primary among ``"a:7850,b:7850"``.

    Raises:
        NotAuthenticated: no such user, or another password.
        Overloaded: too many failed logins; try again later.
        NotPrimary, PeerUnreachable, UsageError.
    """
    check_not_forked()
    return portal.call(alogin(addresses, user, password, ca=ca, timeout_s=timeout_s))


async def alogin(
    addresses: str, user: str, password: str, *, ca: _File = None, timeout_s: float = TIMEOUT_S
) -> Tokens:
    """The same for code with an event loop."""
    request = accounts_pb2.LoginRequest(user=user, password=password)
    return _tokens(
        await _ask_primary(
            addresses, Credentials.given(ca=ca), lambda stub, s: stub.Login(request, timeout=s), timeout_s
        )
    )


def logout(addresses: str, refresh: str, *, ca: _File = None, timeout_s: float = TIMEOUT_S) -> None:
    """Ends a login; its tokens are worth nothing from now on.

    Raises:
        NotPrimary, PeerUnreachable, UsageError.
    """
    check_not_forked()
    request = accounts_pb2.LogoutRequest(refresh=refresh)
    portal.call(
        _ask_primary(
            addresses, Credentials.given(ca=ca), lambda stub, s: stub.Logout(request, timeout=s), timeout_s
        )
    )


async def _ask_primary(
    addresses: str,
    credentials: Credentials,
    ask: Callable[[accounts_pb2_grpc.AccountsAsyncStub, float], Awaitable[_T]],
    timeout_s: float,
) -> _T:
    """The answer of the first of the addresses that is a primary's."""
    check_timeout(timeout_s)
    failed: UnderstudyError = PeerUnreachable("no address was given")
    for address in parse_addresses(addresses):
        async with open_channel(address, credentials) as channel:
            try:
                with peer_errors(address):
                    return await ask(accounts_pb2_grpc.AccountsStub(channel), timeout_s)
            except (NotPrimary, PeerUnreachable) as error:
                failed = kept(error)
    raise failed


def _tokens(answer: accounts_pb2.Tokens) -> Tokens:
    return Tokens(
        access=answer.access,
        refresh=answer.refresh,
        access_s=answer.access_s,
        refresh_s=answer.refresh_s,
        user=answer.user,
        user_id=answer.user_id,
    )


class TokenSource:
    """An access token that stays good: give it to :func:`connect` and its like as ``token``. A context manager.

    It renews the token in the background, long before it expires, and tells ``on_renewed`` each time: whoever wants to
    stay logged in over a restart keeps the refresh token then. Calls may come from any thread.
    """

    def __init__(
        self,
        addresses: str,
        tokens: Tokens | str,
        *,
        ca: _File = None,
        on_renewed: Callable[[Tokens], None] = lambda tokens: None,
    ) -> None:
        """``tokens`` are of a login, or the refresh token of one, which is used at once.

        Raises:
            NotAuthenticated: the login has ended.
            NotPrimary, PeerUnreachable, UsageError.
        """
        check_not_forked()
        self._addresses = addresses
        self._credentials = Credentials.given(ca=ca)
        self._on_renewed = on_renewed
        self._renewer: asyncio.Task[None] | None = None
        self._renew_at_s = 0.0
        if isinstance(tokens, str):
            self._tokens = portal.call(self._renewed(tokens))
            on_renewed(self._tokens)
        else:
            self._tokens = tokens
        self._note(self._tokens)
        portal.call(self._start())

    def __call__(self) -> str:
        """The access token of this moment."""
        return self._tokens.access

    @property
    def tokens(self) -> Tokens:
        """The tokens of this moment."""
        return self._tokens

    def close(self) -> None:
        """Renews no more; the login does not end by it."""
        portal.call(self._stop())

    def __enter__(self) -> TokenSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _note(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._renew_at_s = time.time() + tokens.access_s * _RENEW_AT

    async def _start(self) -> None:
        self._renewer = asyncio.create_task(self._renew_forever(), name="renew token")

    async def _stop(self) -> None:
        if self._renewer is not None:
            self._renewer.cancel()
            await asyncio.gather(self._renewer, return_exceptions=True)

    async def _renewed(self, refresh: str) -> Tokens:
        request = accounts_pb2.RefreshRequest(refresh=refresh)
        return _tokens(
            await _ask_primary(
                self._addresses,
                self._credentials,
                lambda stub, s: stub.Refresh(request, timeout=s),
                TIMEOUT_S,
            )
        )

    def _tell(self) -> None:
        """Whatever goes wrong with whoever wants to know, the token has to be renewed again."""
        try:
            self._on_renewed(self._tokens)
        except Exception as error:
            log.error("callback_failed", callback="on_renewed", exc_info=error)

    async def _renew_forever(self) -> None:
        while True:
            left_s = self._renew_at_s - time.time()
            if left_s > 0:
                await asyncio.sleep(min(left_s, _LOOK_S_MAX))
                continue
            try:
                self._note(await self._renewed(self._tokens.refresh))
                self._tell()
            except NotAuthenticated as error:  # calls say so, too, once the access token has expired
                log.warning("login_ended", user=self._tokens.user, reason=error.message)
                return
            except UnderstudyError as error:
                log.debug("token_not_renewed", error=str(error))
                await asyncio.sleep(_RETRY_S)


__all__ = ["TokenSource", "Tokens", "alogin", "login", "logout"]
