"""A replica's shell around its session: backlogs, connections in a row, and what ends it halfway."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from harness import Processes, wait_until
from nodes import put

from understudy.client import Put, aconnect
from understudy.common.directory import DataDirectory
from understudy.common.engine import Engine
from understudy.common.errors import DiskFull
from understudy.common.settings import PrimarySettings, ReplicaSettings
from understudy.common.types import Lsn, Position
from understudy.primary.server import serving_primary
from understudy.replica import bootstrap, follow_session
from understudy.replica import node as replica_node
from understudy.replica.copy import Copy
from understudy.replica.follow_session import FollowSession, SendProgress
from understudy.replica.follower import Follower
from understudy.replica.node import ReplicaNode
from understudy.replica.promote import Promotion
from understudy.replica.server import serving_replica
from understudy.replica.takeover import begin_reign


def _settings(folder: Path, primary: str) -> ReplicaSettings:
    return ReplicaSettings(data_dir=folder / "b", primary=primary, listen="127.0.0.1:0", id="b")


async def _until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition)


def _run(folder: Path, story: Callable[[str, ReplicaNode], Awaitable[None]]) -> None:
    """Runs ``story`` with a primary's address and a replica that follows it."""

    async def run() -> None:
        async with (
            serving_primary(PrimarySettings(data_dir=folder / "a", listen="127.0.0.1:0")) as primary,
            serving_replica(_settings(folder, primary.address)) as replica,
        ):
            await _until(lambda: replica.node.status().upstream.connected)
            await story(primary.address, replica.node)

    asyncio.run(run())


def test_a_replica_that_does_not_read_for_a_while_blames_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: with its backlog full, it is not the primary that is silent: the connection stays, and ends when asked to."""
    may_apply = asyncio.Event()
    ticks = []
    on_tick = FollowSession.on_tick

    async def wait_for_room(_: Engine) -> None:
        await may_apply.wait()

    def counted(session: FollowSession, *, now_s: float) -> list[follow_session.Action]:
        if not session.has_room:
            ticks.append(now_s)
        return on_tick(session, now_s=now_s)

    async def story(address: str, node: ReplicaNode) -> None:
        monkeypatch.setattr(Engine, "wait_for_room", wait_for_room)
        monkeypatch.setattr(FollowSession, "on_tick", counted)
        monkeypatch.setattr(follow_session, "BACKLOG_BYTES_MAX", 1)
        monkeypatch.setattr(follow_session, "APPLIED_AT_ONCE", 0)
        async with aconnect(address) as client:
            await client.commit("/realm", [Put(b"key", b"value")])
            await _until(lambda: len(ticks) >= 1)  # it has come
            monkeypatch.setattr(follow_session, "SILENCE_S_MAX", 0.0)
            await _until(lambda: len(ticks) >= 4)
            assert node.status().upstream.connected
        # And now it is closed in the same state.

    _run(tmp_path, story)


def test_a_connection_does_not_begin_with_what_the_last_one_had_to_tell(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress that was left over when a connection was lost is older than what the next one begins with."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"value"))
    problems: list[str] = []
    monkeypatch.setattr(
        Follower, "_note_problem", lambda _, address, error: problems.append(f"{address}: {error}")
    )

    async def story() -> None:
        async with serving_replica(_settings(tmp_path, primary.address)) as replica:
            await _until(lambda: replica.node.status().committed_lsn == 3)
            primary.kill()
            await _until(lambda: not replica.node.status().upstream.connected)
            away = replica.node.status().upstream
            assert (away.lag_entries, away.lag_bytes) == (0, 0)
            await _until(lambda: replica.node.status().upstream.lag_seconds > away.lag_seconds)
            follower = replica.node._follower
            follower._progress = SendProgress(
                received_offset=0, durable_lsn=Lsn(0), durable_offset=0, applied_lsn=Lsn(0)
            )
            follower._wake_sender.set()
            again = await asyncio.to_thread(processes.primary, tmp_path / "a", "--listen", primary.address)
            await _until(lambda: replica.node.status().upstream.connected)
            async with aconnect(again.address) as client:
                await client.commit("/realm", [Put(b"key", b"other")], durability="applied")
            assert "impossible progress" not in "".join(problems)

    asyncio.run(story())


def test_a_replica_that_finds_no_primary_says_how_old_its_copy_is(
    processes: Processes, tmp_path: Path
) -> None:
    """Lag is told from the first moment on, also when the primary was gone before the replica was started."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"value"))

    async def story(*, connected: bool) -> None:
        async with serving_replica(_settings(tmp_path, primary.address)) as replica:
            await _until(lambda: replica.node.status().upstream.connected is connected)
            if connected:
                await _until(lambda: replica.node.status().committed_lsn == 3)
            else:
                assert replica.node.status().upstream.lag_seconds > 0

    asyncio.run(story(connected=True))
    primary.kill()
    asyncio.run(story(connected=False))


def test_a_promotion_given_up_at_its_first_step_leaves_a_replica_that_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked for the promotion goes away while following is being stopped: it begins again."""
    stop = Follower.stop

    async def stops_slowly(follower: Follower) -> None:
        await stop(follower)
        await asyncio.Event().wait()

    async def story(address: str, node: ReplicaNode) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Follower, "stop", stops_slowly)
            promotion = asyncio.create_task(node.promote())
            await _until(lambda: not node.status().upstream.connected)
            promotion.cancel()
            await asyncio.gather(promotion, return_exceptions=True)
        async with aconnect(address) as client:
            await client.commit("/realm", [Put(b"key", b"value")], durability="applied")
        assert node.status().role == "replica"

    _run(tmp_path, story)


def test_g1_a_promotion_waits_until_all_that_was_received_is_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1, G7: a reign begins behind the last entry that has come, and knows what that entry says."""
    apply_slice, stop, may_apply = Copy._apply_slice, Follower.stop, threading.Event()
    begun: list[tuple[Position, Position]] = []

    def apply_if_it_may(copy: Copy, engine: Engine) -> None:
        if may_apply.is_set():
            apply_slice(copy, engine)

    async def stop_and_let_apply(follower: Follower) -> None:
        await stop(follower)
        may_apply.set()

    def begin_and_note(engine: Engine, *, started_s: float) -> Promotion:
        begun.append((engine.state.applied, engine.durable))
        return begin_reign(engine, started_s=started_s)

    async def story(address: str, node: ReplicaNode) -> None:
        await _until(lambda: node.status().epoch == 1)
        monkeypatch.setattr(Copy, "_apply_slice", apply_if_it_may)
        monkeypatch.setattr(Follower, "stop", stop_and_let_apply)
        monkeypatch.setattr(replica_node, "begin_reign", begin_and_note)
        async with aconnect(address) as client:
            receipt = await client.commit("/realm", [Put(b"key", b"value")], durability="replica")
        await node.promote()
        [(applied, durable)] = begun
        assert applied == durable == Position(receipt.lsn, receipt.digest)

    _run(tmp_path, story)


def test_g4_a_copy_that_could_not_be_installed_is_not_fetched_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4: the process ends with what went wrong, and the next start finishes the installation."""
    fetched = []
    fetch = bootstrap.fetch

    async def counted(*arguments: object, **named: object) -> bootstrap.Fetched:
        fetched.append(1)
        return await fetch(*arguments, **named)  # type: ignore[arg-type]

    def install(*_: object, **__: object) -> None:
        raise DiskFull("no space left")

    async def story() -> None:
        async with serving_primary(PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")) as primary:
            settings = _settings(tmp_path, primary.address)
            with monkeypatch.context() as patch:
                patch.setattr(bootstrap, "fetch", counted)
                patch.setattr(DataDirectory, "install", install)
                async with serving_replica(settings) as replica:
                    assert isinstance(await replica.node.ended, DiskFull)
                    for _ in range(100):
                        await asyncio.sleep(0)
            assert len(fetched) == 1
            async with serving_replica(settings) as replica:
                await _until(lambda: replica.node.status().upstream.connected)

    asyncio.run(story())


def test_g4_closing_waits_for_an_installation_that_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4: the directory is not given up while a thread still moves files in it."""
    begun, may_end = threading.Event(), threading.Event()
    install = DataDirectory.install

    def slow(directory: DataDirectory, *arguments: object, **named: object) -> object:
        begun.set()
        may_end.wait(30)
        return install(directory, *arguments, **named)  # type: ignore[arg-type]

    async def story() -> None:
        monkeypatch.setattr(DataDirectory, "install", slow)
        async with (
            serving_primary(PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")) as primary,
            serving_replica(_settings(tmp_path, primary.address)) as replica,
        ):
            await asyncio.to_thread(begun.wait, 30)
            closing = asyncio.create_task(replica.node.close())
            for _ in range(100):
                await asyncio.sleep(0)
            assert not closing.done()
            may_end.set()
            await closing
            assert replica.node.engine.durable.lsn == 0

    asyncio.run(story())
