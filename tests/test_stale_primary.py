"""Two servers that both call themselves primary: whom a client believes, and what becomes of the other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from understudy.client import Put, aconnect
from understudy.common.settings import PrimarySettings, ReplicaSettings
from understudy.primary.server import serving_primary
from understudy.replica.server import serving_replica


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


@pytest.mark.parametrize("old_first", [True, False])
def test_a_client_given_both_addresses_writes_to_the_later_epoch_and_fences_the_earlier(
    tmp_path: Path, old_first: bool
) -> None:
    """G7: whichever address comes first, the transaction goes to the promoted server and the old one is fenced."""
    asyncio.run(_split(tmp_path, old_first))
