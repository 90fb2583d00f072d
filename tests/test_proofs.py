"""Claims of a higher epoch, and whose they are: what a primary believes of replicas and of clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from nodes import ask_to_follow
from state_helpers import CLUSTER, KEY, NODE

from understudy.common import entries
from understudy.common.errors import Fenced, ForeignCluster
from understudy.common.follow_table import PROTOCOL_VERSION, Decision
from understudy.common.rpc import open_channel, peer_errors
from understudy.common.settings import PrimarySettings
from understudy.common.types import START, ClusterId, Epoch
from understudy.primary.server import PrimaryServer, serving_primary
from understudy.v1 import data_pb2, data_pb2_grpc, log_pb2, replication_pb2

OTHER_CLUSTER = ClusterId(b"o" * 16)
NEXT = Epoch(2)


def mark(*, cluster: ClusterId = CLUSTER, epoch: Epoch = NEXT, key: bytes = KEY) -> bytes:
    """The entry that starts an epoch."""
    return entries.epoch_entry(time_us=1, cluster=cluster, epoch=epoch, after=START, node=NODE, key=key)


def _signed_anew(payload: bytes) -> bytes:
    entry = log_pb2.Entry.FromString(payload)
    entry.hmac = bytes(len(entry.hmac))
    return entry.SerializeToString()


def test_g3_only_the_signed_mark_of_that_epoch_and_cluster_proves_it() -> None:
    """G3: neither another epoch's mark, nor another cluster's, nor one that is not signed with the key is a proof."""

    def proves(payload: bytes, *keys: bytes) -> bool:
        return entries.proves_epoch(payload, epoch=NEXT, cluster=CLUSTER, keys=keys or (KEY,))

    assert proves(mark())
    assert proves(mark(), b"a later key", KEY)
    assert not proves(mark(epoch=Epoch(3)))
    assert not proves(mark(cluster=OTHER_CLUSTER))
    assert not proves(mark(key=b"another key"))
    assert not proves(_signed_anew(mark()))
    assert not proves(entries.freeze_entry(1))
    assert not proves(b"")


def _forged(primary: PrimaryServer) -> bytes:
    return mark(cluster=primary.node.engine.directory.cluster, key=b"another key")


def _of_another_cluster(primary: PrimaryServer) -> bytes:
    return mark(cluster=OTHER_CLUSTER, key=primary.node.engine.history_key)


def _genuine(primary: PrimaryServer) -> bytes:
    return mark(cluster=primary.node.engine.directory.cluster, key=primary.node.engine.history_key)


async def _follow(primary: PrimaryServer, proof: bytes) -> Decision.ValueType:
    hello = replication_pb2.Hello(
        protocol_version=PROTOCOL_VERSION,
        cluster=primary.node.engine.directory.cluster,
        node=bytes(16),
        run=bytes(16),
        replica_id="b",
        epoch=NEXT,
        proof=replication_pb2.EpochProof(entry=proof),
        locator=[replication_pb2.Position(lsn=START.lsn, digest=START.digest)],
    )
    return (await asyncio.to_thread(ask_to_follow, primary.address, hello)).decision


async def _bind(primary: PrimaryServer, proof: bytes, cluster: ClusterId | None = None) -> None:
    bind = data_pb2.Bind(
        protocol_version=PROTOCOL_VERSION,
        client=bytes(16),
        cluster=cluster or primary.node.engine.directory.cluster,
        epoch=NEXT,
        proof=replication_pb2.EpochProof(entry=proof),
    )
    async with open_channel(primary.address) as channel:
        with peer_errors(primary.address):
            call = data_pb2_grpc.DataStub(channel).Commit()
            await call.write(data_pb2.CommitRequest(bind=bind))
            answer = await call.read()
            assert isinstance(answer, data_pb2.CommitResponse) or await call.code() is None
            call.cancel()


@pytest.mark.parametrize("made", [_forged, _of_another_cluster])
def test_g7_a_mark_that_is_not_this_cluster_s_fences_nobody(
    tmp_path: Path, made: Callable[[PrimaryServer], bytes]
) -> None:
    """G7: whether a replica or a client shows it, a mark with another key or cluster in it changes nothing."""

    async def story() -> None:
        settings = PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")
        async with serving_primary(settings) as primary:
            assert await _follow(primary, made(primary)) == Decision.UNPROVEN_EPOCH
            await _bind(primary, made(primary))
            assert not primary.node.is_fenced

    asyncio.run(story())


@pytest.mark.parametrize("as_client", [True, False])
def test_g7_the_signed_mark_of_a_higher_epoch_fences(tmp_path: Path, as_client: bool) -> None:
    """G7: the genuine mark fences a primary at once, whoever shows it."""

    async def story() -> None:
        settings = PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")
        async with serving_primary(settings) as primary:
            if as_client:
                with pytest.raises(Fenced):
                    await _bind(primary, _genuine(primary))
            else:
                assert await _follow(primary, _genuine(primary)) == Decision.FENCED
            assert primary.node.is_fenced

    asyncio.run(story())


def test_g3_a_client_that_has_met_another_cluster_is_refused(tmp_path: Path) -> None:
    """G3: a client whose address leads to a server of another cluster than before is told so, before it writes."""

    async def story() -> None:
        settings = PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")
        async with serving_primary(settings) as primary:
            with pytest.raises(ForeignCluster):
                await _bind(primary, b"", OTHER_CLUSTER)

    asyncio.run(story())
