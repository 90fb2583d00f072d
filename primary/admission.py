"""What a client's first words may do to this server: show it that its reign is over."""

from __future__ import annotations

from understudy.common import entries
from understudy.common.types import Epoch
from understudy.primary.node import PrimaryNode
from understudy.v1 import replication_pb2


def admit(node: PrimaryNode, epoch: int, proof: replication_pb2.EpochProof) -> None:
    """Fences this server if the client, of the same cluster, proves a later epoch (G7).

    Raises:
        Fenced: this server reigns no more.
    """
    engine = node.engine
    if epoch > engine.epoch and entries.proves_epoch(
        proof.entry, epoch=Epoch(epoch), cluster=engine.directory.cluster, keys=[engine.history_key]
    ):
        node.fence(Epoch(epoch))
    node.refuse_if_fenced()
