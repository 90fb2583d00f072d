"""Rows of accounts that are not what was written: whoever asks is refused, with the place and what mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from state_helpers import CLUSTER, Layers
from store_helpers import open_both

from understudy.common.accounts import (
    KEYS,
    USERS,
    Accounts,
    grants_key,
    policy_key,
    session_key,
    token_key,
    user_key,
)
from understudy.common.errors import RESTORE, CorruptionError
from understudy.common.operations import Put
from understudy.common.store import Store
from understudy.common.types import SESSIONS_REALM, START, SYSTEM_REALM
from understudy.v1 import accounts_pb2
from understudy.v1.store_pb2 import CheckpointRow

ADA = ("user", "ada")
BEYOND = accounts_pb2.GrantRow(pattern="/a", level=9).SerializeToString()  # type: ignore[arg-type]


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[Layers]:
    Store.create(tmp_path / "store", CLUSTER, CheckpointRow(digest=START.digest))
    environment, store = open_both(tmp_path / "store")
    with store:
        yield Layers(environment, store)


@pytest.mark.parametrize(
    ("realm", "key", "row", "asked"),
    [
        (SYSTEM_REALM, user_key("ada"), b"\xff", lambda accounts: accounts.user("ada")),
        (SYSTEM_REALM, token_key("t"), b"\xff", lambda accounts: accounts.token("t")),
        (SYSTEM_REALM, token_key("t"), b"\xff", lambda accounts: accounts.has_admin_token()),
        (SYSTEM_REALM, KEYS + b"k", b"\xff", lambda accounts: accounts.signing_key()),
        (SYSTEM_REALM, policy_key("/a"), b"\xff", lambda accounts: accounts.is_recovery_forbidden("/a")),
        (SYSTEM_REALM, grants_key(ADA) + b"g", b"\xff", lambda accounts: accounts.grants(ADA)),
        (SYSTEM_REALM, grants_key(ADA) + b"g", BEYOND, lambda accounts: accounts.grants(ADA)),
        (
            SYSTEM_REALM,
            USERS + b"\xff",
            b"",
            lambda accounts: list(accounts.rows(USERS, accounts_pb2.UserRow)),
        ),
        (SESSIONS_REALM, session_key("ada", "s"), b"\xff", lambda accounts: accounts.session("ada", "s")),
    ],
)
def test_g10_a_damaged_row_of_an_account_is_corruption(
    layers: Layers, realm: str, key: bytes, row: bytes, asked: Callable[[Accounts], object]
) -> None:
    """G10, G11: nobody is let in, or taken for nobody, on what can't be read; the realm is named, with the remedy."""
    layers.commit(realm, Put(key, row))
    with pytest.raises(CorruptionError, match=f"a row of realm {realm} can't be read") as refused:
        asked(Accounts(lambda: layers.state))
    assert refused.value.remedy == RESTORE
