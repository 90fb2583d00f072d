"""The first admin token: made with the cluster, for whoever may read its data directory.

The file is there only when its token is good, and a good one does not get lost: it is written under another name, then
its row is committed, then it gets its name. What is cut off in between is finished, or thrown away, at the next start.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from understudy.common.accounts import Accounts, token_key
from understudy.common.directory import ADMIN_TOKEN_FILE, DataDirectory
from understudy.common.errors import UnderstudyError
from understudy.common.events import log
from understudy.common.files import publish, storage_errors, sync_directory
from understudy.common.memtable import Receipt
from understudy.common.operations import Operation, Put
from understudy.common.tokens import Lasting, LastingToken
from understudy.common.types import SYSTEM_REALM
from understudy.v1 import accounts_pb2

CommitSystem = Callable[[str, Iterable[Operation]], Awaitable[Receipt]]


def prepare_admin_token(directory: DataDirectory) -> Put:
    """A new admin token, in a file that is not the one to look for yet; its row, to be committed.

    Once that is durable, :func:`publish_admin_token` is to be called.

    Raises:
        DiskFull, StorageFailed.
    """
    token = LastingToken.new(Lasting.ADMIN)
    publish(_coming(directory), f"{token}\n".encode())
    row = accounts_pb2.TokenRow(
        kind=accounts_pb2.TOKEN_ADMIN,
        hash=token.hash,
        note=f"the file {ADMIN_TOKEN_FILE}",
        created_us=time.time_ns() // 1_000,
    )
    return Put(token_key(token.id), row.SerializeToString())


def publish_admin_token(directory: DataDirectory) -> None:
    """The token that was prepared is good: its file takes the place of the one that is there, readable by its owner.

    Raises:
        StorageFailed.
    """
    with storage_errors("rename", _coming(directory)):
        os.rename(_coming(directory), directory.path / ADMIN_TOKEN_FILE)
    sync_directory(directory.path)


async def ensure_admin_token(directory: DataDirectory, accounts: Accounts, commit: CommitSystem) -> None:
    """Makes an admin token where a cluster has none: one of an earlier version, or whose operator has revoked all.

    One that was cut off while it was made is published if its row is there.
    """
    try:
        if _has_prepared(directory, accounts):
            publish_admin_token(directory)
        if not accounts.has_admin_token():
            await renew_here(directory, commit)
        with storage_errors("remove", _coming(directory)):
            _coming(directory).unlink(missing_ok=True)
    except UnderstudyError as error:
        # It will be made at the next start, and the server does without it until then.
        log.warning("admin_token_not_made", error=str(error))


async def renew_here(directory: DataDirectory, commit: CommitSystem) -> None:
    """Makes a new admin token, whose file takes the place of the one that is there.

    Raises:
        DiskFull, StorageFailed: the file can't be written.
        UnderstudyError: the row can't be committed.
    """
    await commit(SYSTEM_REALM, [prepare_admin_token(directory)])
    publish_admin_token(directory)


def _coming(directory: DataDirectory) -> Path:
    return directory.path / f"{ADMIN_TOKEN_FILE}.coming"


def _has_prepared(directory: DataDirectory, accounts: Accounts) -> bool:
    """Whether a token was prepared whose row is committed."""
    with storage_errors("read", _coming(directory)):
        found = _coming(directory).read_text() if _coming(directory).exists() else ""
    token = LastingToken.read(found.strip())
    row = accounts.token(token.id) if token is not None else None
    return token is not None and row is not None and token.is_of(row.hash)
