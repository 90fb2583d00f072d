"""What a replica held before it began anew counts no more."""

from __future__ import annotations

import asyncio
from pathlib import Path

from harness import wait_until

from understudy.client import Put
from understudy.common.follow_table import PROTOCOL_VERSION, Decision
from understudy.common.operations import to_protos
from understudy.common.rpc import open_channel
from understudy.common.settings import PrimarySettings
from understudy.common.types import Durability
from understudy.primary.server import serving_primary
from understudy.v1 import data_pb2, replication_pb2, replication_pb2_grpc


def test_what_a_replica_held_before_it_began_anew_counts_no_more(tmp_path: Path) -> None:
    """G1: of two replicas that are needed, one that fetches a new copy is not taken to have what its old copy had."""
    settings = PrimarySettings(
        data_dir=tmp_path / "a", listen="127.0.0.1:0", durability=Durability.REPLICA, sync_replicas=2
    )

    async def story() -> None:
        async with serving_primary(settings) as primary, open_channel(primary.address) as channel:
            node, engine = primary.node, primary.node.engine
            transaction = data_pb2.Transaction(
                realm="/realm", number=1, operations=to_protos([Put(b"key", b"value")])
            )
            answers: list[object] = []
            node.submit(bytes(16), transaction, answers.append)
            head = node.committer.position.lsn
            await asyncio.to_thread(wait_until, lambda: engine.durable.lsn == head)

            def has_all(name: str) -> None:
                slot = node.slots.get(name) or node.slots.claim(name, bytes(16), lsn=head, offset=0, now_us=0)
                node.on_replica_progress(slot, head, engine.log.end_offset, head)

            has_all("one")
            await replication_pb2_grpc.ReplicationStub(channel).PinSnapshot(
                replication_pb2.PinSnapshotRequest(replica_id="one", node=bytes(16))
            )
            has_all("two")
            assert not answers
            has_all("one")
            assert len(answers) == 1

    asyncio.run(story())


def test_what_a_replica_had_on_an_earlier_connection_counts_no_more(tmp_path: Path) -> None:
    """G1, G7: a replica that follows again has what its hello says; that it had more before, on this primary or on a
    copy that it has lost since, acknowledges nothing.
    """
    settings = PrimarySettings(
        data_dir=tmp_path / "a", listen="127.0.0.1:0", durability=Durability.REPLICA, sync_replicas=2
    )

    async def story() -> None:
        async with serving_primary(settings) as primary, open_channel(primary.address) as channel:
            node, engine = primary.node, primary.node.engine
            start = engine.durable
            transaction = data_pb2.Transaction(
                realm="/realm", number=1, operations=to_protos([Put(b"key", b"value")])
            )
            answers: list[object] = []
            node.submit(bytes(16), transaction, answers.append)
            head = node.committer.position.lsn
            await asyncio.to_thread(wait_until, lambda: engine.durable.lsn == head)
            hello = replication_pb2.Hello(
                protocol_version=PROTOCOL_VERSION,
                cluster=engine.directory.cluster,
                node=bytes(16),
                run=bytes(16),
                replica_id="one",
                epoch=engine.epoch,
            )
            hello.locator.add(lsn=start.lsn, digest=start.digest)

            def has_all(name: str) -> None:
                slot = node.slots.get(name) or node.slots.claim(name, bytes(16), lsn=head, offset=0, now_us=0)
                node.on_replica_progress(slot, head, engine.log.end_offset, head)

            has_all("one")
            call = replication_pb2_grpc.ReplicationStub(channel).Follow()
            await call.write(replication_pb2.FollowRequest(hello=hello))
            answer = await call.read()
            assert answer.answer.decision == Decision.STREAM
            await asyncio.to_thread(wait_until, lambda: node.slots.is_connected("one"))
            has_all("two")
            assert not answers
            call.cancel()

    asyncio.run(story())
