"""What operators see of users, permissions and tokens: no hash and no secret among it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from understudy.common.accounts import GRANTS, TOKENS, USERS, Accounts
from understudy.common.types import SESSIONS_REALM
from understudy.v1 import accounts_pb2

_PAGE_ROWS = 500

_T = TypeVar("_T")


def all_users(accounts: Accounts) -> Iterator[accounts_pb2.User]:
    """By name."""
    for name, row in accounts.rows(USERS, accounts_pb2.UserRow):
        yield accounts_pb2.User(
            name=name,
            id=row.id,
            groups=row.groups,
            disabled=row.disabled,
            has_password=row.HasField("password"),
            created_us=row.created_us,
        )


def all_grants(accounts: Accounts) -> Iterator[accounts_pb2.GrantInfo]:
    """By subject."""
    for at, row in accounts.rows(GRANTS, accounts_pb2.GrantRow):
        kind, name, grant = at.split("/")
        subject = {
            "user": accounts_pb2.Subject(user=name),
            "group": accounts_pb2.Subject(group=name),
            "anyone": accounts_pb2.Subject(anyone=True),
        }[kind]
        yield accounts_pb2.GrantInfo(
            id=grant, subject=subject, pattern=row.pattern, level=row.level, created_us=row.created_us
        )


def all_tokens(accounts: Accounts, *, now_us: int) -> Iterator[accounts_pb2.TokenInfo]:
    """Tokens that last, then logins that have not expired."""
    for at, row in accounts.rows(TOKENS, accounts_pb2.TokenRow):
        yield accounts_pb2.TokenInfo(
            id=at,
            kind=row.kind,
            user=row.user,
            note=row.note,
            created_us=row.created_us,
            expires_us=row.expires_us,
        )
    for at, login in accounts.rows(b"", accounts_pb2.SessionRow, realm=SESSIONS_REALM):
        if login.expires_us > now_us:
            yield accounts_pb2.TokenInfo(
                id=at.replace("/", "."),
                kind=accounts_pb2.TOKEN_SESSION,
                user=login.user,
                created_us=login.created_us,
                expires_us=login.expires_us,
            )


def pages(rows: Iterable[_T]) -> Iterator[list[_T]]:
    """``rows`` in lists, at least one."""
    page: list[_T] = []
    for row in rows:
        page.append(row)
        if len(page) == _PAGE_ROWS:
            yield page
            page = []
    yield page
