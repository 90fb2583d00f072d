"""The operators' service: what primary and replica answer alike, and refusals for the rest."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from understudy.common.access import Kind, caller
from understudy.common.authority import Authority
from understudy.common.backup_worker import BackupWorker
from understudy.common.directory import DataDirectory
from understudy.common.engine import Engine
from understudy.common.errors import CorruptionError, Unavailable, UsageError, WrongRole
from understudy.common.read_service import Context
from understudy.common.rpc import answering_errors
from understudy.common.types import Lsn
from understudy.v1 import admin_pb2, admin_pb2_grpc

CHECK_S_MAX = 3600.0


class AdminService(admin_pb2_grpc.AdminServicer):
    """``Status``, ``StateDigests``, and the runs of backups; roles add what is theirs."""

    def __init__(
        self,
        status: Callable[[], admin_pb2.StatusResponse],
        engine: Callable[[], Engine],
        directory: DataDirectory,
        authority: Authority,
    ) -> None:
        self._status = status
        self._engine = engine
        self._directory = directory
        self._authority = authority
        self._checking = asyncio.Lock()  # a full scan is costly: one at a time

    async def Status(self, request: admin_pb2.StatusRequest, context: Context) -> admin_pb2.StatusResponse:
        """All that is known of this node, to operators and replicas; to others what a client needs."""
        async with answering_errors(context):
            status = self._status()
            status.access = self._authority.access
            principal = caller()
            sees_all = principal.is_operator or principal.kind is Kind.REPLICA
            return status if sees_all else _for_clients(status)
        raise AssertionError("aborted")

    async def StateDigests(
        self, request: admin_pb2.StateDigestsRequest, context: Context
    ) -> admin_pb2.StateDigestsResponse:
        """Recomputes the state digests of the present checkpoint, or of a later one if asked for."""
        async with answering_errors(context):
            engine = self._engine()
            if request.checkpoint:
                await self._checkpoint()
            if request.at_least_lsn > engine.state.applied.lsn:
                raise Unavailable(
                    f"this node is at LSN {engine.state.applied.lsn}, before {request.at_least_lsn}"
                )
            try:
                async with asyncio.timeout(CHECK_S_MAX):
                    await engine.wait_for_checkpoint(Lsn(request.at_least_lsn))
                    async with self._checking:
                        return await recompute_digests(engine)
            except TimeoutError:
                raise Unavailable(f"the check took longer than {CHECK_S_MAX:.0f} s") from None
        raise AssertionError("aborted")

    async def _checkpoint(self) -> None:
        raise WrongRole("only a primary takes checkpoints when asked; a replica follows its marks")

    # -- backups -------------------------------------------------------------------------------------------

    async def StartBackup(
        self, request: admin_pb2.StartBackupRequest, context: Context
    ) -> admin_pb2.StartBackupResponse:
        """Runs a policy now."""
        async with answering_errors(context):
            return await self._backups().start(request.policy)
        raise AssertionError("aborted")

    async def CancelBackup(
        self, request: admin_pb2.CancelBackupRequest, context: Context
    ) -> admin_pb2.CancelBackupResponse:
        """Has a run end."""
        async with answering_errors(context):
            return admin_pb2.CancelBackupResponse(run=self._backups().cancel(request.id))
        raise AssertionError("aborted")

    async def WatchBackup(
        self, request: admin_pb2.WatchBackupRequest, context: Context
    ) -> AsyncIterator[admin_pb2.BackupRun]:
        """Tells how a run stands, up to its end."""
        async with answering_errors(context):
            async for run in self._backups().watch(request.id):
                yield run

    def _backups(self) -> BackupWorker:
        worker = self._directory.backup_worker
        if worker is None:
            raise UsageError(
                "this server has no backup policies",
                remedy="start it with --config FILE.toml that has tables [[backup]]",
            )
        return worker

    # -- what only one role answers ------------------------------------------------------------------------

    async def Promote(self, request: admin_pb2.PromoteRequest, context: Context) -> admin_pb2.PromoteResponse:
        """Replicas only."""
        async with answering_errors(context):
            raise WrongRole("this node is not a replica")
        raise AssertionError("aborted")

    async def Fence(self, request: admin_pb2.FenceRequest, context: Context) -> admin_pb2.FenceResponse:
        """Primaries only."""
        async with answering_errors(context):
            raise WrongRole("this node is not a primary")
        raise AssertionError("aborted")

    async def Freeze(self, request: admin_pb2.FreezeRequest, context: Context) -> admin_pb2.FreezeResponse:
        """Primaries only."""
        async with answering_errors(context):
            raise WrongRole("this node is not a primary", remedy="give the address of the primary")
        raise AssertionError("aborted")

    async def Thaw(self, request: admin_pb2.ThawRequest, context: Context) -> admin_pb2.ThawResponse:
        """Primaries only."""
        async with answering_errors(context):
            raise WrongRole("this node is not a primary", remedy="give the address of the primary")
        raise AssertionError("aborted")

    async def Forget(self, request: admin_pb2.ForgetRequest, context: Context) -> admin_pb2.ForgetResponse:
        """Primaries only."""
        async with answering_errors(context):
            raise WrongRole("this node is not a primary", remedy="give the address of the primary")
        raise AssertionError("aborted")


def _for_clients(status: admin_pb2.StatusResponse) -> admin_pb2.StatusResponse:
    """Who reigns, and in which health; nothing of how much there is, of other machines, or of what others did."""
    return admin_pb2.StatusResponse(
        role=status.role,
        cluster=status.cluster,
        epoch=status.epoch,
        proof=status.proof,
        durability=status.durability,
        version=status.version,
        access=status.access,
    )


async def recompute_digests(engine: Engine) -> admin_pb2.StateDigestsResponse:
    """A full scan of the store in a process of its own, so that commits here go on undisturbed.

    Raises:
        CorruptionError: the scan could not be finished.
    """
    process = _start_check(engine.directory.store)
    try:
        out, complaint = await asyncio.to_thread(process.communicate)
    except BaseException:
        process.kill()
        raise
    if process.returncode != 0:
        raise CorruptionError(
            f"the store in {engine.directory.store} can't be scanned: {complaint.decode(errors='replace')[-500:]}",
            remedy=f"stop this node and run `understudy verify {engine.directory.path}`",
        )
    return admin_pb2.StateDigestsResponse.FromString(out)


def _start_check(store: Path) -> subprocess.Popen[bytes]:
    # The child must find the modules that this process found, and none that only lies where the server runs.
    command = [sys.executable, "-P", "-m", "understudy.common.check_process", str(store)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Not asyncio's way to start a process: uvloop forks, and gRPC's fork handlers do not survive that.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
