"""``promote``: has whoever owns a replica's directory make it a primary's, or does that itself.

When a primary has died, everybody waits for this: a running replica is asked without loading what only a stopped one
needs, which takes longer than the promotion.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

from understudy.common.directory import CONTROL_SOCKET, NODE_FILE, DataDirectory, NodeFile, Role
from understudy.common.errors import DirectoryInUse, PeerUnreachable, WrongRole
from understudy.common.rpc import open_channel, peer_errors, short_socket_path
from understudy.common.types import Digest, Epoch, Lsn
from understudy.v1 import admin_pb2, admin_pb2_grpc

PROMOTE_S_MAX = 120.0
RELEASE_S_MAX = 30.0
NOTHING_YET = "promote another replica, or restore a backup"
_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What came of it."""

    epoch: Epoch
    lsn: Lsn
    digest: Digest
    seconds: float
    durability: str = ""  # at which the new primary serves, if it does
    warnings: list[str] = field(default_factory=list)


async def promote_directory(path: Path, *, serve: bool = False) -> Promotion:
    """Promotes the replica in ``path``, whether its process runs or not.

    A running replica is asked to do it. When this returns, it is gone, or serves.

    Args:
        path: the replica's directory.
        serve: have the replica's process, which has to run, go on as the primary.

    Raises:
        NotADataDirectory, WrongRole: there is no replica's copy there.
        DirectoryInUse: the process that has it does not answer.
        PeerUnreachable: no process runs that could serve it; nothing was done.
        CorruptionError: the log is damaged behind the checkpoint.
    """
    started_s = time.monotonic()
    try:
        directory = DataDirectory.open_existing(path)
    except DirectoryInUse:
        return await _ask_owner(path, serve=serve)
    with directory:
        if serve:
            raise PeerUnreachable(
                f"no replica runs in {path} that could go on as the primary",
                remedy=f"run `understudy promote {path}`, then `understudy primary --data-dir {path}`",
            )
        from understudy.replica.takeover import promote_stopped

        return await promote_stopped(directory, started_s=started_s)


async def _ask_owner(path: Path, *, serve: bool) -> Promotion:
    role = NodeFile.read(path / NODE_FILE).role
    if role not in (Role.REPLICA, Role.PROMOTING) and not (serve and role is Role.PRIMARY):
        raise WrongRole(f"{path} is in use, and its role is {role.value}: it can't be promoted")
    durability = ""
    try:
        with short_socket_path(path / CONTROL_SOCKET) as socket:
            async with open_channel(f"unix:{socket}") as channel:
                with peer_errors(str(path / CONTROL_SOCKET)):
                    owner = admin_pb2_grpc.AdminStub(channel)
                    response = await owner.Promote(
                        admin_pb2.PromoteRequest(serve=serve), timeout=PROMOTE_S_MAX
                    )
                    if serve:
                        status = await owner.Status(admin_pb2.StatusRequest(), timeout=PROMOTE_S_MAX)
                        durability = status.durability
    except PeerUnreachable as error:
        raise DirectoryInUse(
            f"the process that has {path} open does not answer: {error.message}",
            remedy="end that process, then run promote again",
        ) from error
    if not serve:
        await _wait_until_free(path)
    return Promotion(
        epoch=Epoch(response.epoch),
        lsn=Lsn(response.lsn),
        digest=Digest(response.digest),
        seconds=response.seconds,
        durability=durability,
        warnings=list(response.warnings),
    )


async def _wait_until_free(path: Path) -> None:
    """Returns when the former replica's process has given the directory up."""
    deadline = time.monotonic() + RELEASE_S_MAX
    while True:
        try:
            DataDirectory.open_existing(path).close()
        except DirectoryInUse:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(_POLL_S)
        else:
            return
