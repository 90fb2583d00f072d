"""Users, permissions, tokens and keys as they stand in the system's realms: rows and where they are.

Read from the applied state, so that a replica knows what its primary knew. What was read is kept until the realm
changes; logins are apart in a realm of their own, because they change all the time, and are looked up one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

from google.protobuf.message import DecodeError, Message

from understudy.common.access import Level
from understudy.common.errors import RESTORE, CorruptionError
from understudy.common.state import RealmHead, State
from understudy.common.types import SESSIONS_REALM, SYSTEM_REALM
from understudy.v1 import accounts_pb2

# Kept rows and answers; beyond it, all are forgotten at once and read again as they are needed (G9).
KEPT_MAX = 20_000
PAGE_BYTES = 256 << 10
PAGE_PAIRS = 500

USERS, GRANTS, KEYS, TOKENS, POLICIES = b"user/", b"grant/", b"key/", b"token/", b"policy/"
# Set with the first user, permission, or token for a replica or an application, and never removed: to remove the
# last user must not open the server to everybody again.
REQUIRED = b"tokens-required"

ANYONE = ("anyone", "")  # the subject that every user is
Subject = tuple[str, str]  # "user" or "group" and its name, or ANYONE

_M = TypeVar("_M", bound=Message)


def user_key(name: str) -> bytes:
    """Where a user's row is."""
    return USERS + name.encode()


def grants_key(subject: Subject) -> bytes:
    """What the keys of a subject's permissions begin with."""
    return GRANTS + "{}/{}/".format(*subject).encode()


def signing_key_key(key_id: str) -> bytes:
    """Where a signing key's row is."""
    return KEYS + key_id.encode()


def token_key(token_id: str) -> bytes:
    """Where a lasting token's row is."""
    return TOKENS + token_id.encode()


def policy_key(path: str) -> bytes:
    """Where a realm's policy is."""
    return POLICIES + path.encode()


def session_key(user_id: str, session: str) -> bytes:
    """Where a login's row is, in its own realm."""
    return f"{user_id}/{session}".encode()


def after_prefix(prefix: bytes) -> bytes:
    """The first key behind all that begin with ``prefix``, which ends in ``/``."""
    return prefix[:-1] + b"0"


@contextlib.contextmanager
def _damage(realm: str) -> Iterator[None]:
    """Turns what comes of reading a damaged row into our error."""
    try:
        yield
    except (DecodeError, ValueError) as error:
        raise CorruptionError(f"a row of realm {realm} can't be read: {error}", remedy=RESTORE) from error


class Accounts:
    """The rows. Everything raises Unavailable where there is no state to read from, CorruptionError for a bad row."""

    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state
        self._head: RealmHead | None = None
        self._rows: dict[bytes, Message | None] = {}
        self._grants: dict[Subject, list[tuple[str, Level]]] = {}
        self._signing: tuple[str, accounts_pb2.KeyRow] | None = None
        self._required: bool | None = None  # None: not looked at yet

    def fresh(self) -> RealmHead | None:
        """Forgets what was kept of an earlier version; what is returned changes with every change of a row."""
        head = self._state().realm(SYSTEM_REALM)
        if head != self._head or len(self._rows) + len(self._grants) > KEPT_MAX:
            self._rows.clear()
            self._grants.clear()
            self._signing = self._required = None
            self._head = head
        return head

    def _row(self, key: bytes, kind: type[_M]) -> _M | None:
        if self.fresh() is None:
            return None
        if key not in self._rows:
            value = self._state().get(SYSTEM_REALM, key)
            with _damage(SYSTEM_REALM):
                self._rows[key] = None if value is None else kind.FromString(value)
        return cast("_M | None", self._rows[key])

    def rows(self, prefix: bytes, kind: type[_M], *, realm: str = SYSTEM_REALM) -> Iterator[tuple[str, _M]]:
        """All rows whose keys begin with ``prefix``, with the rest of their keys; to be taken at once."""
        state = self._state()
        if state.realm(realm) is None:
            return
        with state.scan(realm, prefix, after_prefix(prefix) if prefix else b"") as scan:
            at_end = False
            while not at_end:
                keys, values, at_end = scan.page(bytes_max=PAGE_BYTES, pairs_max=PAGE_PAIRS)
                for key, value in zip(keys, values, strict=True):
                    with _damage(realm):
                        row = key[len(prefix) :].decode(), kind.FromString(value)
                    yield row

    # -- rows ----------------------------------------------------------------------------------------------

    @property
    def is_required(self) -> bool:
        """Whether callers must prove who they are."""
        if self.fresh() is not None and self._required is None:
            self._required = self._state().get(SYSTEM_REALM, REQUIRED) is not None
        return bool(self._required)

    def user(self, name: str) -> accounts_pb2.UserRow | None:
        """A user, by name."""
        return self._row(user_key(name), accounts_pb2.UserRow)

    def token(self, token_id: str) -> accounts_pb2.TokenRow | None:
        """A lasting token that is no refresh token."""
        return self._row(token_key(token_id), accounts_pb2.TokenRow)

    def has_admin_token(self) -> bool:
        """Whether there is a token for operators."""
        return any(
            row.kind == accounts_pb2.TOKEN_ADMIN for _, row in self.rows(TOKENS, accounts_pb2.TokenRow)
        )

    def key(self, key_id: str) -> accounts_pb2.KeyRow | None:
        """A signing key; a retired one, too."""
        return self._row(signing_key_key(key_id), accounts_pb2.KeyRow)

    def signing_key(self) -> tuple[str, accounts_pb2.KeyRow] | None:
        """The key that signs, with its id; None before one was made."""
        self.fresh()
        if self._signing is None:
            signing = [(at, row) for at, row in self.rows(KEYS, accounts_pb2.KeyRow) if not row.retired_us]
            self._signing = max(signing, key=lambda one: (one[1].created_us, one[0]), default=None)
        return self._signing

    def session(self, user_id: str, session: str) -> accounts_pb2.SessionRow | None:
        """A login."""
        state = self._state()
        if state.realm(SESSIONS_REALM) is None:
            return None
        value = state.get(SESSIONS_REALM, session_key(user_id, session))
        with _damage(SESSIONS_REALM):
            return None if value is None else accounts_pb2.SessionRow.FromString(value)

    def grants(self, subject: Subject) -> list[tuple[str, Level]]:
        """A subject's patterns, with the level of each."""
        self.fresh()
        if subject not in self._grants:
            rows = self.rows(grants_key(subject), accounts_pb2.GrantRow)
            with _damage(SYSTEM_REALM):
                self._grants[subject] = [(row.pattern, Level(row.level)) for _, row in rows]
        return self._grants[subject]

    def is_recovery_forbidden(self, path: str) -> bool:
        """Whether a client must not replay its changes over this realm's fresh state after a reset."""
        row = self._row(policy_key(path), accounts_pb2.PolicyRow)
        return row is not None and row.recovery_forbidden
