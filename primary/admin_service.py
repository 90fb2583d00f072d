"""What operators can ask of a primary beside its status."""

from __future__ import annotations

import asyncio

from understudy.common.admin_service import AdminService
from understudy.common.errors import Unavailable
from understudy.common.read_service import Context
from understudy.common.rpc import answering_errors
from understudy.common.types import Lsn
from understudy.primary.node import PrimaryNode
from understudy.v1 import admin_pb2

_FREEZE_S_MAX = 60.0


class PrimaryAdminService(AdminService):
    """Adds ``Fence`` and checkpoints on demand."""

    def __init__(self, node: PrimaryNode) -> None:
        super().__init__(node.status, lambda: node.engine)
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

    async def Fence(self, request: admin_pb2.FenceRequest, context: Context) -> admin_pb2.FenceResponse:
        """Accepts no more writes, for good: an operator says that another primary reigns."""
        async with answering_errors(context):
            self._node.fence(self._node.engine.epoch)
            return admin_pb2.FenceResponse(epoch=self._node.engine.epoch)
        raise AssertionError("aborted")
