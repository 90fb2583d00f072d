"""A new admin token for a data directory, whether its primary runs or not."""

from __future__ import annotations

from pathlib import Path

from understudy.common.directory import ADMIN_TOKEN_FILE, CONTROL_SOCKET, DataDirectory
from understudy.common.errors import DirectoryInUse
from understudy.common.files import publish
from understudy.common.metrics import EngineMetrics
from understudy.common.rpc import open_channel, peer_errors, short_socket_path
from understudy.common.settings import PrimarySettings
from understudy.primary.admin_token import renew_here
from understudy.primary.node import PrimaryNode
from understudy.v1 import accounts_pb2, accounts_pb2_grpc

ANSWER_S_MAX = 30.0


async def renew_admin_token(path: Path) -> None:
    """Makes a new admin token, whose file takes the place of the one that is there.

    Raises:
        NotADataDirectory, WrongRole: this is no primary's directory.
        PeerUnreachable: the process that has it does not answer.
    """
    try:
        directory = DataDirectory.open_existing(path)
    except DirectoryInUse:
        await _ask_owner(path)
        return
    with directory:
        node = PrimaryNode.open(directory, PrimarySettings(data_dir=path), EngineMetrics())
        try:
            await node.start()
            await renew_here(directory, node.commit_system)
        finally:
            await node.close()


async def _ask_owner(path: Path) -> None:
    request = accounts_pb2.IssueTokenRequest(
        kind=accounts_pb2.TOKEN_ADMIN, note=f"the file {ADMIN_TOKEN_FILE}"
    )
    with short_socket_path(path / CONTROL_SOCKET) as socket:
        async with open_channel(f"unix:{socket}") as channel:
            with peer_errors(str(path)):
                answer = await accounts_pb2_grpc.AccountsStub(channel).IssueToken(
                    request, timeout=ANSWER_S_MAX
                )
    publish(path / ADMIN_TOKEN_FILE, f"{answer.token}\n".encode())
