"""How the demo's nodes stand: asked of the nodes themselves, and shown."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from understudy.cli.demo_processes import Node
from understudy.cli.demo_screen import NodeView, Screen, View
from understudy.cli.demo_writers import Writers
from understudy.cli.output import seconds_text
from understudy.common.directory import Role
from understudy.common.errors import PeerError
from understudy.common.rpc import open_channel, peer_errors
from understudy.v1 import admin_pb2, admin_pb2_grpc

_SHOW_S = 0.25
_STATUS_S_MAX = 5.0


class Watch:
    """Asks the nodes how they stand, by the operators' own service."""

    def __init__(self, nodes: list[Node]) -> None:
        self._nodes = nodes
        self._channels = {node.name: open_channel(node.address) for node in nodes}

    async def close(self) -> None:
        """Closes the connections."""
        for channel in self._channels.values():
            await channel.close()

    async def status(self, node: Node) -> admin_pb2.StatusResponse | None:
        """The node's own account of itself; None while it does not answer."""
        stub = admin_pb2_grpc.AdminStub(self._channels[node.name])
        try:
            with peer_errors(node.address):
                return await stub.Status(admin_pb2.StatusRequest(), timeout=_STATUS_S_MAX)
        except PeerError:
            return None

    @contextlib.asynccontextmanager
    async def showing(self, screen: Screen, writers: Writers) -> AsyncIterator[None]:
        """Shows how things stand while the block runs."""
        task = asyncio.create_task(self._show_forever(screen, writers))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _show_forever(self, screen: Screen, writers: Writers) -> None:
        while True:
            statuses = {node: await self.status(node) for node in self._nodes}
            lag = next((text for status in statuses.values() if (text := _lag(status))), "no replica")
            screen.show(
                View(
                    nodes=[_node_view(node, status, lag) for node, status in statuses.items()],
                    lag=lag,
                    acknowledged=writers.acknowledged,
                    under_way=writers.under_way,
                )
            )
            await asyncio.sleep(_SHOW_S)


def _node_view(node: Node, status: admin_pb2.StatusResponse | None, lag: str) -> NodeView:
    if status is None:
        return NodeView(name=node.name, role="down", address=node.address, position="", note="")
    if status.role == Role.PRIMARY:
        note = (
            "degraded: acts alone" if "degraded" in status.durability else f"durability {status.durability}"
        )
    else:
        note = lag
    return NodeView(
        name=node.name,
        role=status.role,
        address=node.address,
        position=f"LSN {status.lsn:,}",
        note=note,
    )


def _lag(status: admin_pb2.StatusResponse | None) -> str:
    """How far the replica that follows this node is behind; empty if none does."""
    for replica in status.replicas if status is not None else ():
        if replica.connected:
            return f"lag {replica.lag_entries:,} entries, {seconds_text(replica.lag_seconds)}"
    return ""
