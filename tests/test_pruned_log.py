"""What is removed of the log, and what must stay."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from harness import DEADLINE_S, wait_until
from log_helpers import small_segments

from understudy.common.checkpoint_process import Checkpointer
from understudy.common.directory import DataDirectory, Role
from understudy.common.operations import Put, to_protos
from understudy.common.settings import PrimarySettings
from understudy.primary.server import PrimaryServer, serving_primary
from understudy.replica.promote import promote_directory
from understudy.v1.data_pb2 import Transaction


async def _put(server: PrimaryServer, number: int) -> None:
    """A transaction of a segment's size."""
    answers: list[object] = []
    puts = to_protos([Put(b"%d" % number, bytes(3_000))])
    server.node.submit(bytes(16), Transaction(realm="/realm", number=number, operations=puts), answers.append)
    await asyncio.to_thread(wait_until, lambda: answers)


def test_g1_the_log_behind_the_checkpoint_stays_though_nobody_else_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1: segments that were filled while a checkpoint was written are not in it, and are not removed behind it."""
    settings = PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0", log_floor_bytes=0)
    run, goes_on = Checkpointer.run, threading.Event()

    def wait_and_run(*arguments: object) -> object:
        assert goes_on.wait(DEADLINE_S)
        return run(*arguments)  # type: ignore[arg-type]

    async def story() -> None:
        async with serving_primary(settings) as server:
            engine = server.node.engine
            monkeypatch.setattr(Checkpointer, "run", wait_and_run)
            await _put(server, 1)
            server.node.committer.freeze()
            for number in range(2, 6):
                await _put(server, number)
            first_lsn = engine.log.first_lsn
            goes_on.set()
            await asyncio.to_thread(wait_until, lambda: engine.log.first_lsn > first_lsn)
            assert engine.log.first_lsn <= engine.checkpoint.lsn + 1
        async with serving_primary(settings) as server:
            assert server.node.engine.state.get("/realm", b"5") == bytes(3_000)

    with small_segments():
        asyncio.run(story())


def test_a_primary_starts_when_its_log_no_longer_goes_back_to_its_promotion(tmp_path: Path) -> None:
    """A promoted primary that has removed the log of its promotion starts again, and takes transactions at once."""
    path = tmp_path / "a"
    settings = PrimarySettings(data_dir=path, listen="127.0.0.1:0", log_floor_bytes=0, heal_window_s=600.0)

    async def story() -> None:
        async with serving_primary(settings):
            pass
        with DataDirectory.open_existing(path) as directory:
            directory.set_role(Role.REPLICA)
        promotion = await promote_directory(path)
        async with serving_primary(replace(settings, heal_window_s=0.0)) as server:
            engine = server.node.engine
            for number in range(1, 6):
                await _put(server, number)
            server.node.committer.freeze()
            await asyncio.to_thread(wait_until, lambda: engine.log.first_lsn > promotion.lsn)
        async with serving_primary(settings) as server:
            assert server.node.takes_more

    with small_segments():
        asyncio.run(story())
