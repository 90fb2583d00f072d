"""Two servers that both call themselves primary: whom a client believes, and what becomes of the other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from harness import wait_until
from nodes import ask_to_follow

from understudy.client import Put, aconnect
from understudy.common.directory import DataDirectory, Role
from understudy.common.engine import Engine
from understudy.common.errors import DiskFull, WrongRole
from understudy.common.follow_table import PROTOCOL_VERSION, Decision
from understudy.common.settings import PrimarySettings, ReplicaSettings
from understudy.common.types import START, Position
from understudy.primary.server import PrimaryServer, serving_primary
from understudy.replica import node as replica_node
from understudy.replica.node import ReplicaNode
from understudy.replica.server import serving_replica
from understudy.v1 import replication_pb2, replication_pb2_grpc


async def _until_connected(node: ReplicaNode) -> None:
    """Connected, and with an entry at least: before, it can't be promoted."""
    await asyncio.to_thread(wait_until, lambda: node.status().upstream.connected and node.status().epoch)


async def _split(tmp_path: Path, old_first: bool) -> None:
    old_settings = PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")
    async with serving_primary(old_settings) as old:
        following = ReplicaSettings(
            data_dir=tmp_path / "b", primary=old.address, listen="127.0.0.1:0", id="b"
        )
        async with serving_replica(following) as replica, aconnect(old.address) as client:
            await client.commit("/realm", [Put(b"key", b"before")], durability="applied")
            await replica.node.promote()
        new_settings = PrimarySettings(data_dir=tmp_path / "b", listen="127.0.0.1:0")
        async with serving_primary(new_settings) as new:
            addresses = [old.address, new.address] if old_first else [new.address, old.address]
            async with aconnect(",".join(addresses)) as client:
                receipt = await client.commit("/realm", [Put(b"key", b"after")])
                assert await client.get("/realm", b"key") == b"after"
            assert new.node.engine.durable.lsn >= receipt.lsn
            assert new.node.engine.state.get("/realm", b"key") == b"after"
            assert old.node.engine.state.get("/realm", b"key") == b"before"
            assert old.node.is_fenced
            assert not new.node.is_fenced


@pytest.mark.usefixtures("patient_clients")
@pytest.mark.parametrize("old_first", [True, False])
def test_a_client_given_both_addresses_writes_to_the_later_epoch_and_fences_the_earlier(
    tmp_path: Path, old_first: bool
) -> None:
    """G7: whichever address comes first, the transaction goes to the promoted server and the old one is fenced."""
    asyncio.run(_split(tmp_path, old_first))


class _LetsInAndIsGone(replication_pb2_grpc.ReplicationServicer):
    """A primary that dies between its answer and its first chunk."""

    def __init__(self, answer: replication_pb2.Answer) -> None:
        self._answer = answer

    async def Follow(self, _: object, context: Any) -> None:  # type: ignore[override]
        await context.read()
        await context.write(replication_pb2.FollowResponse(answer=self._answer))


async def _answer_of(primary: PrimaryServer) -> replication_pb2.Answer:
    """What it answers to a replica that has everything."""
    engine = primary.node.engine
    hello = replication_pb2.Hello(
        protocol_version=PROTOCOL_VERSION,
        cluster=engine.directory.cluster,
        node=bytes(16),
        run=bytes(16),
        replica_id="c",
        epoch=engine.epoch,
    )
    for position in (engine.durable, START):
        hello.locator.add(lsn=position.lsn, digest=position.digest)
    return await asyncio.to_thread(ask_to_follow, primary.address, hello)


async def _meet_the_new_and_then_the_old(tmp_path: Path) -> None:
    def settings(name: str, primary: str) -> ReplicaSettings:
        return ReplicaSettings(data_dir=tmp_path / name, primary=primary, listen="127.0.0.1:0", id=name)

    async with serving_primary(PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")) as old:
        async with serving_replica(settings("c", old.address)) as replica:
            await _until_connected(replica.node)
        async with serving_replica(settings("b", old.address)) as replica:
            await _until_connected(replica.node)
            await replica.node.promote()
        async with serving_primary(PrimarySettings(data_dir=tmp_path / "b", listen="127.0.0.1:0")) as new:
            answer = await _answer_of(new)
        assert answer.decision == Decision.STREAM
        short_lived = grpc.aio.server()
        replication_pb2_grpc.add_ReplicationServicer_to_server(_LetsInAndIsGone(answer), short_lived)
        port = short_lived.add_insecure_port("127.0.0.1:0")
        await short_lived.start()
        async with serving_replica(settings("c", f"127.0.0.1:{port},{old.address}")) as replica:
            await asyncio.to_thread(wait_until, lambda: old.node.is_fenced)
            assert replica.node.engine.epoch == 1
        await short_lived.stop(0)


def test_a_replica_that_has_met_the_new_primary_stands_surety_for_the_old_one_no_more(tmp_path: Path) -> None:
    """G7: though no entry of the new epoch has come yet, the old primary is not followed, and is told of its end."""
    asyncio.run(_meet_the_new_and_then_the_old(tmp_path))


async def _fail_to_promote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving_primary(PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")) as primary:
        settings = ReplicaSettings(
            data_dir=tmp_path / "b", primary=primary.address, listen="127.0.0.1:0", id="b"
        )
        async with serving_replica(settings) as replica, aconnect(primary.address) as client:
            await _until_connected(replica.node)

            def begin_reign(*_: object, **__: object) -> None:
                raise DiskFull("no space left")

            with monkeypatch.context() as patched:
                patched.setattr(replica_node, "begin_reign", begin_reign)
                with pytest.raises(DiskFull):
                    await replica.node.promote()
            receipt = await client.commit("/realm", [Put(b"key", b"value")], durability="applied")
            assert replica.node.engine.state.applied.lsn >= receipt.lsn
            assert not replica.node.ended.done()


def test_a_replica_whose_promotion_failed_goes_on_following(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: a promotion that can't begin, the disk being full, leaves a replica that follows."""
    asyncio.run(_fail_to_promote(tmp_path, monkeypatch))


async def _promote(tmp_path: Path) -> None:
    async with serving_primary(PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")) as primary:
        settings = ReplicaSettings(
            data_dir=tmp_path / "b", primary=primary.address, listen="127.0.0.1:0", id="b"
        )
        async with serving_replica(settings) as replica:
            await _until_connected(replica.node)
            promotion = await replica.node.promote()
    with DataDirectory.open_existing(tmp_path / "b") as directory:
        engine = Engine.open(directory)
        assert directory.role is Role.PRIMARY
        assert (engine.epoch, engine.durable) == (2, Position(promotion.lsn, promotion.digest))
        await engine.close()


def test_a_promoted_directory_holds_the_start_of_its_epoch(tmp_path: Path) -> None:
    """G7: what tells the new reign from the old one is in the log when the promotion is answered."""
    asyncio.run(_promote(tmp_path))


async def _cut_a_promotion_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_role = DataDirectory.set_role

    def set_role_unless_primary(directory: DataDirectory, role: Role) -> None:
        if role is Role.PRIMARY:
            raise DiskFull("no space left")
        set_role(directory, role)

    async with serving_primary(PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")) as primary:
        settings = ReplicaSettings(
            data_dir=tmp_path / "b", primary=primary.address, listen="127.0.0.1:0", id="b"
        )
        async with serving_replica(settings) as replica:
            await _until_connected(replica.node)
            monkeypatch.setattr(DataDirectory, "set_role", set_role_unless_primary)
            with pytest.raises(DiskFull):
                await replica.node.promote()
            monkeypatch.undo()
        with pytest.raises(WrongRole, match="understudy promote"):
            async with serving_replica(settings):
                pass
        assert not primary.node.is_fenced


def test_a_replica_that_may_have_begun_to_reign_does_not_go_on_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G7: cut off behind its epoch's first entry, a promotion is finished; with that entry it would fence its primary
    as a replica, and be followed by nobody.
    """
    asyncio.run(_cut_a_promotion_off(tmp_path, monkeypatch))
