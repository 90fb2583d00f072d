"""Who a caller is, and what it may do, by what the accounts say at this moment.

Every answer is of the state as it is now: a user that was removed, a token that was revoked, a permission that was
taken back count for nothing from the next call on, and end the streams that rest on them within a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from understudy.common.access import (
    OPEN,
    Door,
    Kind,
    Level,
    Principal,
    door,
    matches,
    resolve_path,
)
from understudy.common.accounts import ANYONE, KEPT_MAX, Accounts
from understudy.common.errors import NotAuthenticated, NotPermitted, Unavailable
from understudy.common.state import RealmHead, State
from understudy.common.tls import REPLICA_NAME, ServerTls, access_name
from understudy.common.tokens import (
    LEEWAY_S,
    LOGIN_AGAIN,
    RETIRED_KEY_S,
    TOKEN_BYTES_MAX,
    Claims,
    Lasting,
    LastingToken,
    check_time,
    read_token,
)
from understudy.common.types import REALM_PATH_BYTES_MAX, RealmPath, format_id, is_system_realm
from understudy.v1 import accounts_pb2

_KINDS = {
    Lasting.ADMIN: (accounts_pb2.TOKEN_ADMIN, Kind.ADMIN),
    Lasting.REPLICA: (accounts_pb2.TOKEN_REPLICA, Kind.REPLICA),
    Lasting.APP: (accounts_pb2.TOKEN_APP, Kind.USER),
}


class Authority:
    """A server's. For one event loop."""

    def __init__(
        self,
        state: Callable[[], State],
        *,
        cluster: Callable[[], bytes],
        tls: ServerTls | None,
        clock_s: Callable[[], float] = time.time,
    ) -> None:
        """``state`` and ``cluster`` give what is so now; ``clock_s`` seconds since 1970."""
        self.accounts = Accounts(state)
        self.now_s = clock_s
        self._cluster = cluster
        self._tls = tls
        self._head: RealmHead | None = None
        self._claims: dict[str, Claims] = {}  # of tokens whose signatures were checked
        self._levels: dict[tuple[str, str, str], Level] = {}

    @property
    def issuer(self) -> str:
        """What this cluster's access tokens are issued by."""
        return format_id(self._cluster())

    def _fresh(self) -> None:
        head = self.accounts.fresh()
        if head != self._head or len(self._claims) + len(self._levels) > KEPT_MAX:
            self._claims.clear()
            self._levels.clear()
            self._head = head

    # -- who it is -----------------------------------------------------------------------------------------

    def door(self, *, unix: bool, loopback: bool) -> Door:
        """What is asked of a peer before anything else."""
        return door(
            unix=unix,
            loopback=loopback,
            tls=self._tls is not None,
            accounts=self._tls is None and self._is_required(),
        )

    def _is_required(self) -> bool:
        try:
            return self.accounts.is_required
        except Unavailable:  # a replica that has no copy yet: nothing to read, nothing to guard
            return False

    def by_token(self, text: str) -> Principal:
        """Who shows this token.

        Raises:
            NotAuthenticated: it is worth nothing.
            Unavailable: there is no copy to look it up in.
        """
        if len(text) > TOKEN_BYTES_MAX:
            raise _worth_nothing()
        lasting = LastingToken.read(text)
        principal = self._by_access(text) if lasting is None else self._by_lasting(lasting)
        self.check_valid(principal)
        return principal

    def by_certificate(self, metadata: Iterable[tuple[str, str | bytes]]) -> Principal:
        """Who proves in a call's metadata to be the owner of a certificate that the CA for clients has signed.

        Raises:
            NotAuthenticated: nobody who is known by a certificate.
        """
        if self._tls is None or REPLICA_NAME not in self._tls.peer_certificate_names(metadata):
            raise _no_token()
        return Principal(kind=Kind.REPLICA)

    def _by_access(self, text: str) -> Principal:
        self._fresh()
        claims = self._claims.get(text)
        if claims is None:
            claims = self._claims[text] = read_token(
                text, public_key=self._public_key, issuer=self.issuer, now_s=self.now_s()
            )
        check_time(claims, now_s=self.now_s())
        return Principal(
            kind=Kind.USER,
            user=claims.user,
            user_id=claims.user_id,
            session=claims.session,
            expires_s=claims.expires_s + LEEWAY_S,
        )

    def _public_key(self, key_id: str) -> bytes | None:
        row = self.accounts.key(key_id)
        if row is None or (row.retired_us and self.now_s() > row.retired_us / 1e6 + RETIRED_KEY_S):
            return None
        return row.public

    def _by_lasting(self, token: LastingToken) -> Principal:
        row = self.accounts.token(token.id)
        kind, principal_kind = _KINDS.get(token.kind, (accounts_pb2.TOKEN_UNSPECIFIED, Kind.ANONYMOUS))
        if row is None or row.kind != kind or not token.is_of(row.hash):
            raise _worth_nothing()
        expires_s = row.expires_us / 1e6 if row.expires_us else float("inf")
        return Principal(
            kind=principal_kind, user=row.user, user_id=row.user_id, token=token.id, expires_s=expires_s
        )

    def check_valid(self, principal: Principal) -> None:
        """Refuses a principal that has become nobody: what it rests on has expired, or is gone.

        Raises:
            NotAuthenticated.
        """
        if principal.kind is Kind.LOCAL:
            return
        if principal == OPEN:
            if self._tls is not None or self._is_required():
                raise _no_token()
            return
        if self.now_s() >= principal.expires_s:
            raise NotAuthenticated("the token has expired", remedy=LOGIN_AGAIN)
        if principal.token and self.accounts.token(principal.token) is None:
            raise _worth_nothing()
        if principal.kind is Kind.USER:
            self._check_user(principal)

    def _check_user(self, principal: Principal) -> None:
        row = self.accounts.user(principal.user)
        if row is None or row.disabled or row.id != principal.user_id:
            raise NotAuthenticated(
                f"there is no user {principal.user} any more, or it is disabled",
                remedy="`understudy user list` shows an operator which, and `understudy user set` enables it",
            )
        if principal.session and self.accounts.session(principal.user_id, principal.session) is None:
            raise NotAuthenticated("this login has ended", remedy=LOGIN_AGAIN)

    # -- what it may do ------------------------------------------------------------------------------------

    def may(self, principal: Principal, path: str, level: Level) -> bool:
        """Whether a principal may do so much with the realm of this path, in which ``~`` is resolved."""
        if is_system_realm(path):
            return False
        return principal.is_operator or self.level(principal, path) >= level

    def level(self, principal: Principal, path: str) -> Level:
        """What a user may do with a realm; nobody else is asked about here."""
        if principal.kind is not Kind.USER:
            return Level.MANAGE if principal.is_operator else Level.NONE
        if len(path) > REALM_PATH_BYTES_MAX:  # what is kept must not grow with what was sent
            return Level.NONE
        self._fresh()
        key = (principal.user, principal.user_id, path)
        if key not in self._levels:
            self._levels[key] = self._find_level(principal, path)
        return self._levels[key]

    def _find_level(self, principal: Principal, path: str) -> Level:
        if path.startswith(f"/{principal.user_id}/"):
            return Level.MANAGE
        row = self.accounts.user(principal.user)
        if row is None or row.id != principal.user_id:
            return Level.NONE
        subjects = [("user", principal.user), *(("group", one) for one in row.groups), ANYONE]
        return max(
            (
                level
                for subject in subjects
                for pattern, level in self.accounts.grants(subject)
                if matches(pattern, path)
            ),
            default=Level.NONE,
        )

    def permitted(self, principal: Principal, path: str, level: Level) -> RealmPath:
        """``path`` with ``~`` resolved, where the principal may do so much with it.

        Raises:
            NotPermitted: it may not.
        """
        resolved = resolve_path(principal, path)
        if not self.may(principal, resolved, level):
            if is_system_realm(resolved):
                raise NotPermitted(f"realm {resolved:.{REALM_PATH_BYTES_MAX}} is the system's own")
            raise NotPermitted(
                f"{principal} may not {level.name.lower()} {path:.{REALM_PATH_BYTES_MAX}}",
                remedy=f"an operator permits it: understudy grant add --user {principal.user or 'NAME'} "
                f"--level {level.name.lower()} {resolved:.{REALM_PATH_BYTES_MAX}}",
            )
        return resolved

    @property
    def access(self) -> str:
        """How peers get in, as status tells it."""
        return "tokens" if self._tls is None and self._is_required() else access_name(self._tls)


def _no_token() -> NotAuthenticated:
    return NotAuthenticated(
        "this server asks for a token", remedy="log in with `understudy token login`, and give --token @FILE"
    )


def _worth_nothing() -> NotAuthenticated:
    return NotAuthenticated(
        "the token is worth nothing: it is not known here, or was revoked",
        remedy=f"{LOGIN_AGAIN}; an operator issues one that lasts: `understudy token issue`",
    )
