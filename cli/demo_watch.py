"""How the demo's nodes stand: asked of the nodes themselves, and shown."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from understudy.cli.demo_processes import Node
from understudy.cli.demo_screen import NodeView, Screen, View
from understudy.cli.demo_writers import Writers
from understudy.cli.output import seconds_text
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
            statuses = [await self.status(node) for node in self._nodes]
            lags = [text for status in statuses if status is not None and (text := _lag(status))]
            screen.show(
                View(
                    nodes=[
                        _node_view(node, status) for node, status in zip(self._nodes, statuses, strict=True)
                    ],
                    acknowledged=writers.acknowledged,
                    under_way=writers.under_way,
                    lag=lags[0] if lags else "no replica follows",
                )
            )
            await asyncio.sleep(_SHOW_S)


def _node_view(node: Node, status: admin_pb2.StatusResponse | None) -> NodeView:
    if status is None:
        return NodeView(name=node.name, role="down", position="")
    position = f"LSN {status.lsn:,}"
    if status.role == "primary":
        position += f", epoch {status.epoch}, durability {status.durability}"
    else:
        position += ", following" if status.upstream.connected else ", not following"
    return NodeView(name=node.name, role=status.role, position=position)


def _lag(status: admin_pb2.StatusResponse) -> str:
    """How far the replica of a primary is behind; empty if none follows."""
    for replica in status.replicas:
        if replica.connected:
            behind = seconds_text(replica.lag_seconds)
            return f"replica behind by {replica.lag_entries:,} entries, {behind}"
    return ""
