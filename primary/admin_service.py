"""What operators can ask of a primary beside its status."""

from __future__ import annotations

import asyncio

from understudy.common.admin_service import AdminService
from understudy.common.authority import Authority
from understudy.common.directory import Role
from understudy.common.errors import DiskFull, Unavailable, WrongRole
from understudy.common.read_service import Context
from understudy.common.rpc import answering_errors
from understudy.common.types import Lsn
from understudy.primary.node import PrimaryNode
from understudy.v1 import admin_pb2

_FREEZE_S_MAX = 60.0


class PrimaryAdminService(AdminService):
    """Adds ``Fence``, ``Freeze``, ``Thaw``, ``Forget``, checkpoints on demand, and an answer to repeated promotions."""

    def __init__(self, node: PrimaryNode, authority: Authority) -> None:
        super().__init__(node.status, lambda: node.engine, node.engine.directory, authority)
        self._node = node

    async def _checkpoint(self) -> None:
        engine = self._node.engine
        upto = engine.state.frozen[0].position.lsn if engine.state.frozen else Lsn(0)
        if engine.state.active.first_change_lsn:
            upto = engine.state.applied.lsn
            self._node.committer.freeze()
            self._node.flush_soon()
        try:
            async with asyncio.timeout(_FREEZE_S_MAX):
                await engine.wait_for_checkpoint(upto)
        except TimeoutError:
            raise Unavailable(
                f"no checkpoint within {_FREEZE_S_MAX:.0f} s", remedy="are enough replicas connected?"
            ) from None

    async def Promote(self, request: admin_pb2.PromoteRequest, context: Context) -> admin_pb2.PromoteResponse:
        """What a promotion has made of this node already: whoever did not hear of it asks again."""
        async with answering_errors(context):
            engine = self._node.engine
            if not request.serve or not engine.was_promoted or engine.directory.role is not Role.PRIMARY:
                raise WrongRole("this node is not a replica")
            return admin_pb2.PromoteResponse(
                epoch=engine.epoch,
                lsn=engine.durable.lsn,
                digest=engine.durable.digest,
                warnings=[f"{engine.directory.path} had been promoted before"],
            )
        raise AssertionError("aborted")

    async def Fence(self, request: admin_pb2.FenceRequest, context: Context) -> admin_pb2.FenceResponse:
        """Accepts no more writes, for good: an operator says that another primary reigns or will.

        Raises:
            DiskFull: it does not, but that could not be recorded yet.
        """
        async with answering_errors(context):
            self._node.fence(None)
            directory = self._node.engine.directory
            if directory.role is not Role.FENCED:
                raise DiskFull(
                    f"no space left in {directory.path}: fenced, but a restart would not remember it",
                    remedy="free some space; it is recorded by itself then",
                )
            return admin_pb2.FenceResponse(epoch=self._node.engine.epoch)
        raise AssertionError("aborted")

    async def Freeze(self, request: admin_pb2.FreezeRequest, context: Context) -> admin_pb2.FreezeResponse:
        """Writes nothing for some time: an operator takes a snapshot of the directory."""
        async with answering_errors(context):
            self._node.refuse_if_fenced()
            frozen = await self._node.freezer.freeze(request.seconds)
            return admin_pb2.FreezeResponse(
                lsn=frozen.position.lsn,
                digest=frozen.position.digest,
                seconds_left=self._node.freezer.seconds_left,
                was_frozen=frozen.was_frozen,
            )
        raise AssertionError("aborted")

    async def Thaw(self, request: admin_pb2.ThawRequest, context: Context) -> admin_pb2.ThawResponse:
        """Goes on before the time is over."""
        async with answering_errors(context):
            freezer = self._node.freezer
            was_frozen = freezer.is_on
            freezer.thaw()
            return admin_pb2.ThawResponse(was_frozen=was_frozen, ran_out_s=freezer.ran_out_s)
        raise AssertionError("aborted")

    async def Forget(self, request: admin_pb2.ForgetRequest, context: Context) -> admin_pb2.ForgetResponse:
        """Removes a slot: an operator says that this replica will never come back."""
        async with answering_errors(context):
            node = self._node
            removable = self._removable_bytes()
            slot = node.slots.remove(request.replica_id)
            node.forget_progress(slot.id)
            return admin_pb2.ForgetResponse(
                durable_lsn=slot.durable_lsn, released_bytes=self._removable_bytes() - removable
            )
        raise AssertionError("aborted")

    def _removable_bytes(self) -> int:
        """Bytes of the log's segments that neither slots nor floor nor checkpoint hold."""
        engine = self._node.engine
        keep_from = min(self._node.retain_from(), Lsn(engine.checkpoint.lsn + 1))
        kept = [one.first_offset for one in engine.log.segments() if one.first_lsn <= keep_from]
        return max(kept[-1] - engine.log.first_offset, 0) if kept else 0
