"""The first admin token: made with the cluster, for whoever may read its data directory."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable

from understudy.common.accounts import Accounts, token_key
from understudy.common.directory import DataDirectory
from understudy.common.errors import UnderstudyError
from understudy.common.events import log
from understudy.common.files import publish
from understudy.common.memtable import Receipt
from understudy.common.operations import Operation, Put
from understudy.common.tokens import Lasting, LastingToken
from understudy.common.types import SYSTEM_REALM
from understudy.v1 import accounts_pb2

ADMIN_TOKEN_FILE = "admin-token"

CommitSystem = Callable[[str, Iterable[Operation]], Awaitable[Receipt]]


def new_admin_token(directory: DataDirectory) -> Put:
    """Writes a new admin token to a file in the directory, readable by its owner alone; its row, to be committed.

    Raises:
        DiskFull, StorageFailed.
    """
    token = LastingToken.new(Lasting.ADMIN)
    publish(directory.path / ADMIN_TOKEN_FILE, f"{token}\n".encode())
    row = accounts_pb2.TokenRow(
        kind=accounts_pb2.TOKEN_ADMIN,
        hash=token.hash,
        note=f"the file {ADMIN_TOKEN_FILE}",
        created_us=time.time_ns() // 1_000,
    )
    return Put(token_key(token.id), row.SerializeToString())


async def ensure_admin_token(directory: DataDirectory, accounts: Accounts, commit: CommitSystem) -> None:
    """Makes an admin token where a cluster has none: one of an earlier version, or whose operator has revoked all.

    A file without its row, as a crash leaves it, is replaced.
    """
    if accounts.has_admin_token():
        return
    try:
        await commit(SYSTEM_REALM, [new_admin_token(directory)])
    except UnderstudyError as error:
        # It will be made at the next start, and the server does without it until then.
        log.warning("admin_token_not_made", error=str(error))
