"""How many replicas a primary knows, and how many snapshots it pins for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from nodes import ask_to_follow
from state_helpers import CLUSTER
from store_helpers import open_both

from understudy.common.engine import Engine
from understudy.common.errors import RESTORE, CorruptionError, Overloaded, ProtocolError, Unavailable
from understudy.common.follow_table import PROTOCOL_VERSION, Decision
from understudy.common.pinned_snapshot import PinnedSnapshot
from understudy.common.rpc import open_channel, peer_errors
from understudy.common.settings import PrimarySettings
from understudy.common.store import Store
from understudy.common.store_layout import CHECKPOINT_KEY
from understudy.common.types import START
from understudy.primary import slots, snapshots
from understudy.primary.server import PrimaryServer, serving_primary
from understudy.v1 import replication_pb2, replication_pb2_grpc
from understudy.v1.store_pb2 import CheckpointRow


@asynccontextmanager
async def _asked(
    path: Path,
) -> AsyncIterator[tuple[PrimaryServer, replication_pb2_grpc.ReplicationAsyncStub]]:
    """A primary, and what asks it as a replica would."""
    async with (
        serving_primary(PrimarySettings(data_dir=path, listen="127.0.0.1:0")) as primary,
        open_channel(primary.address) as channel,
    ):
        yield primary, replication_pb2_grpc.ReplicationStub(channel)


async def _pin(
    stub: replication_pb2_grpc.ReplicationAsyncStub, replica_id: str
) -> replication_pb2.SnapshotInfo:
    request = replication_pb2.PinSnapshotRequest(replica_id=replica_id, node=bytes(16))
    with peer_errors("the primary"):
        return await stub.PinSnapshot(request)


async def _read(stub: replication_pb2_grpc.ReplicationAsyncStub, snapshot: bytes) -> int:
    with peer_errors("the primary"):
        request = replication_pb2.ReadSnapshotRequest(snapshot=snapshot, ranges=[0])
        return len([part async for part in stub.ReadSnapshot(request)])


def test_g9_so_many_replicas_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: who invents replica ids is refused from a number on, be it for a copy or to follow; who is known is not."""
    monkeypatch.setattr(slots, "SLOTS_MAX", 2)

    async def story() -> None:
        async with _asked(tmp_path / "a") as (primary, stub):
            for name in ("one", "two", "one"):
                await _pin(stub, name)
            with pytest.raises(ProtocolError, match="2 replicas are known already"):
                await _pin(stub, "three")
            hello = replication_pb2.Hello(
                protocol_version=PROTOCOL_VERSION,
                cluster=primary.node.engine.directory.cluster,
                node=bytes(16),
                run=bytes(16),
                replica_id="three",
                locator=[replication_pb2.Position(lsn=START.lsn, digest=START.digest)],
            )
            refused = pytest.raises(ProtocolError, match="2 replicas are known already")
            with refused, peer_errors(primary.address):
                await asyncio.to_thread(ask_to_follow, primary.address, hello)
            hello.replica_id = "two"
            answer = await asyncio.to_thread(ask_to_follow, primary.address, hello)
            assert answer.decision == Decision.STREAM
            assert {slot.id for slot in primary.node.slots} == {"one", "two"}

    asyncio.run(story())


def test_g9_so_many_snapshots_are_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: one more than may be pinned is refused, a replica has but one, and one that is released makes room."""
    monkeypatch.setattr(snapshots, "PINS_MAX", 2)

    async def story() -> None:
        async with _asked(tmp_path / "a") as (_, stub):
            first = await _pin(stub, "one")
            second = await _pin(stub, "two")
            with pytest.raises(Overloaded, match="2 snapshots are pinned already"):
                await _pin(stub, "three")
            anew = await _pin(stub, "one")
            with pytest.raises(Unavailable, match="not pinned any more"):
                await _read(stub, first.snapshot)
            assert await _read(stub, anew.snapshot) == 1
            await stub.ReleaseSnapshot(replication_pb2.ReleaseSnapshotRequest(snapshot=second.snapshot))
            await _pin(stub, "three")

    asyncio.run(story())


def test_g9_a_snapshot_that_nobody_asks_for_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: what is pinned makes the store grow, so a snapshot whose replica went away is not pinned for ever."""

    async def story() -> None:
        async with serving_primary(PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")) as primary:
            board = snapshots.PinBoard(primary.node.engine)
            pin = board.pin("one", bytes(16), b"")
            board.expire()
            assert board.get(pin.id) is pin
            monkeypatch.setattr(snapshots, "IDLE_S_MAX", -1.0)
            board.expire()
            with pytest.raises(Unavailable, match="not pinned any more"):
                board.get(pin.id)

    asyncio.run(story())


@pytest.mark.parametrize(("row", "said"), [(b"\xff\xff", "can't be read"), (None, "has no checkpoint")])
def test_g11_a_snapshot_of_a_damaged_store_is_not_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: bytes | None, said: str
) -> None:
    """G11: a checkpoint's row that can't be read is named, with the remedy, and nothing stays pinned."""
    Store.create(tmp_path / "store", CLUSTER, CheckpointRow(digest=START.digest))
    _, store = open_both(tmp_path / "store")
    with store:
        with store.env.begin(store.environment.meta, write=True) as txn:
            txn.put(CHECKPOINT_KEY, row) if row is not None else txn.delete(CHECKPOINT_KEY)
        closed: list[PinnedSnapshot] = []
        close = PinnedSnapshot.close

        def note(snapshot: PinnedSnapshot) -> None:
            closed.append(snapshot)
            close(snapshot)

        monkeypatch.setattr(PinnedSnapshot, "close", note)
        state, directory = SimpleNamespace(store=store), SimpleNamespace(store=store.path)
        board = snapshots.PinBoard(cast("Engine", SimpleNamespace(state=state, directory=directory)))
        with pytest.raises(CorruptionError, match=said) as refused:
            board.pin("one", bytes(16), b"")
        assert str(store.path) in refused.value.message
        assert refused.value.remedy == RESTORE
        assert len(closed) == 1
