"""Snapshots of a running primary's directory by other means: at rest while it is frozen, and as after a power loss."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness import Process, Processes, wait_until
from nodes import (
    Load,
    assert_sound,
    checkpoint,
    children,
    offline_status,
    pairs,
    put,
    status,
    try_checkpoint,
    warnings,
)

from understudy.common import portal
from understudy.common.directory import DataDirectory
from understudy.common.errors import Unavailable
from understudy.common.metrics import EngineMetrics
from understudy.common.rpc import open_channel
from understudy.common.settings import PrimarySettings
from understudy.common.types import Durability
from understudy.primary.node import PrimaryNode
from understudy.v1 import admin_pb2, admin_pb2_grpc

FAILED, USAGE, DIRECTORY = 1, 2, 6


def freeze(processes: Processes, primary: Process, seconds: float = 300) -> dict[str, Any]:
    done = processes.run("freeze", "--server", primary.address, "--for", str(seconds), "--json")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def thaw(processes: Processes, primary: Process, code: int = 0) -> dict[str, Any]:
    done = processes.run("thaw", "--server", primary.address, "--json", code=code)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def copy_files(path: Path, to: Path) -> Path:
    """As a file system would, knowing nothing of what is in it."""
    subprocess.run(["cp", "-a", str(path), str(to)], check=True)
    (to / "control.sock").unlink(missing_ok=True)
    return to


def assert_frozen_copy(copy: Path, told: dict[str, Any]) -> None:
    found = offline_status(copy)
    assert (found.lsn, found.digest.hex()) == (told["lsn"], told["digest"])
    assert_sound(copy)


def test_a_copy_of_a_frozen_directory_reaches_what_freeze_said(processes: Processes, tmp_path: Path) -> None:
    """G1, G2: under load, a copy of a frozen directory ends at the LSN that was told; transactions wait, then go on."""
    primary = processes.primary(tmp_path / "a")
    with Load(primary.address) as load:
        load.wait_for(200)
        checkpoints = threading.Thread(target=try_checkpoint, args=(primary.address,))
        checkpoints.start()
        told = freeze(processes, primary)
        copy = copy_files(tmp_path / "a", tmp_path / "b")
        assert "frozen until" in warnings(primary.address)
        assert status(primary.address).durable_lsn == told["lsn"]
        assert_frozen_copy(copy, told)
        before = dict(load.acknowledged)
        assert thaw(processes, primary) == {"was_frozen": True, "ran_out": None}
        load.wait_for(200)
        checkpoints.join()
        assert "frozen" not in warnings(primary.address)
        load.stop()
    assert load.errors == []
    load.check(primary.address)
    assert max(receipt.lsn for receipt in before.values()) <= told["lsn"]
    server = processes.primary(copy)
    assert before.keys() <= pairs(server.address, "/load").keys()


def test_a_freeze_ends_by_itself(processes: Processes, tmp_path: Path) -> None:
    """G9: whoever froze it and has gone holds nobody up for longer than was asked for; who thaws it then is told."""
    primary = processes.primary(tmp_path / "a")
    started = datetime.datetime.now(datetime.UTC).replace(microsecond=0)  # what is told has whole seconds
    with Load(primary.address) as load:
        load.wait_for(50)
        told = freeze(processes, primary, 0.5)
        load.wait_for(50)
        load.stop()
    assert status(primary.address).durable_lsn > told["lsn"]
    checkpoint(primary.address)
    found = thaw(processes, primary, code=FAILED)
    assert not found["was_frozen"]
    assert started <= datetime.datetime.fromisoformat(found["ran_out"]) <= datetime.datetime.now(datetime.UTC)
    said = processes.run("thaw", "--server", primary.address, code=FAILED)
    assert f"the freeze ended by itself at {found['ran_out']}" in said.stderr.decode()
    assert not said.stdout
    freeze(processes, primary)
    assert thaw(processes, primary)["was_frozen"]
    assert thaw(processes, primary, code=FAILED)["ran_out"] is None  # of the last one


def test_a_freeze_can_be_asked_for_again(processes: Processes, tmp_path: Path) -> None:
    """A second freeze makes it longer, never shorter, at the same LSN; thawing what is not frozen is told as such."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"1"))
    never = processes.run("thaw", "--server", primary.address, code=FAILED)
    assert "was not frozen" in never.stderr.decode()
    first = freeze(processes, primary, 60)
    longer = freeze(processes, primary, 200)
    assert (first["was_frozen"], longer["was_frozen"]) == (False, True)
    assert (longer["lsn"], longer["digest"]) == (first["lsn"], first["digest"])
    assert longer["seconds_left"] > 60
    assert freeze(processes, primary, 1)["seconds_left"] > 60
    assert "frozen until" in processes.run("status", "--server", primary.address).stdout.decode()
    assert thaw(processes, primary)["was_frozen"]
    assert thaw(processes, primary, code=FAILED) == {"was_frozen": False, "ran_out": None}
    put(primary.address, "/realm", (b"key", b"2"))


def test_who_freezes_too_late_is_told(processes: Processes, tmp_path: Path) -> None:
    """G1: a freeze that ended by itself is not taken for one that another has made longer."""
    primary = processes.primary(tmp_path / "a")
    first = freeze(processes, primary, 0.1)
    put(primary.address, "/realm", (b"key", b"1"))  # once it has ended
    again = freeze(processes, primary)
    assert not again["was_frozen"]
    assert again["lsn"] > first["lsn"]
    still = processes.run("freeze", "--server", primary.address)
    assert still.stdout.decode().startswith(f"still frozen at LSN {again['lsn']} ")
    assert thaw(processes, primary)["was_frozen"]
    begun = processes.run("freeze", "--server", primary.address)
    assert begun.stdout.decode().startswith(f"frozen at LSN {again['lsn']} ")


def test_a_primary_that_is_told_to_stop_while_it_is_frozen_keeps_what_it_took_in(
    processes: Processes, tmp_path: Path
) -> None:
    """G1: SIGTERM ends a frozen primary cleanly; what was taken in meanwhile is in its log."""
    primary = processes.primary(tmp_path / "a")
    told = freeze(processes, primary)
    with Load(primary.address, writers=1) as load:
        wait_until(lambda: status(primary.address).lsn > told["lsn"])
        assert primary.terminate() == 0
        assert offline_status(tmp_path / "a").lsn > told["lsn"]
        assert_sound(tmp_path / "a")
        primary = processes.primary(tmp_path / "a", "--listen", primary.address)
        load.wait_for(1)
        load.stop()
    load.check(primary.address)


def test_only_a_primary_can_be_frozen_and_not_for_long(processes: Processes, tmp_path: Path) -> None:
    """G9: more than 300 s, or nothing, is refused; so is a replica."""
    primary = processes.primary(tmp_path / "a")
    replica = processes.replica(tmp_path / "b", primary.address)
    for seconds in ("301", "0", "nan"):
        processes.run("freeze", "--server", primary.address, "--for", seconds, code=USAGE)
    for command in ("freeze", "thaw"):
        processes.run(command, "--server", replica.address, code=DIRECTORY)


def test_what_can_not_be_committed_is_not_frozen(processes: Processes, tmp_path: Path) -> None:
    """G9: while what was taken in waits for replicas, a freeze fails after its time, and leaves nothing frozen."""
    primary = processes.primary(tmp_path / "a", "--durability", "replica")
    with Load(primary.address, writers=1) as load:
        wait_until(lambda: status(primary.address).lsn > status(primary.address).committed_lsn)
        done = processes.run("freeze", "--server", primary.address, "--for", "0.5", code=FAILED)
        assert b"not committed within 0.5 s" in done.stderr
        with pytest.raises(grpc.RpcError):
            _freeze_and_leave(primary.address)
        wait_until(lambda: "frozen" not in warnings(primary.address))
        processes.replica(tmp_path / "b", primary.address)
        load.wait_for(10)
        told = freeze(processes, primary)
        assert_frozen_copy(copy_files(tmp_path / "a", tmp_path / "c"), told)
        assert thaw(processes, primary)["was_frozen"]
        load.stop()


def _freeze_and_leave(address: str) -> None:
    """Asks for a long freeze, and goes away before it is answered."""

    async def ask() -> None:
        async with open_channel(address) as channel:
            await admin_pb2_grpc.AdminStub(channel).Freeze(admin_pb2.FreezeRequest(seconds=300), timeout=0.5)

    portal.call(ask())


@pytest.mark.parametrize("ended", ["thawed", "cancelled"])
def test_a_freeze_that_is_ended_while_it_begins_holds_nothing(tmp_path: Path, ended: str) -> None:
    """G9: neither the log nor checkpoints stay held up by one that never came about."""

    async def run() -> None:
        settings = PrimarySettings(data_dir=tmp_path / "a", durability=Durability.LOCAL)
        with DataDirectory.open(settings.data_dir) as directory:
            node = PrimaryNode.open(directory, settings, EngineMetrics())
            await node.start()
            try:
                await node.engine.checkpointing.acquire()  # as one that runs would
                freezing = asyncio.create_task(node.freezer.freeze(100))
                await asyncio.sleep(0)
                assert node.freezer.is_on
                if ended == "thawed":
                    node.freezer.thaw()
                    node.engine.checkpointing.release()
                    with pytest.raises(Unavailable):
                        await freezing
                else:
                    freezing.cancel()
                    await asyncio.wait([freezing])
                    node.engine.checkpointing.release()
                assert not node.freezer.is_on
                assert not node.engine.checkpointing.locked()
                await node.freezer.freeze(100)
                assert node.engine.checkpointing.locked()
            finally:
                await node.close()

    asyncio.run(run())


def test_a_snapshot_without_a_freeze_recovers_as_after_a_power_loss(
    processes: Processes, tmp_path: Path
) -> None:
    """G1, G2, G6: a picture of all files at one moment under load holds all that was acknowledged, each once."""
    for number in range(3):
        path = tmp_path / f"a{number}"
        primary = processes.primary(path)
        with Load(primary.address) as load:
            load.wait_for(200)
            checkpoints = threading.Thread(target=try_checkpoint, args=(primary.address,))
            checkpoints.start()
            load.wait_for(number * 20 + 1)
            pids = [*children(primary), primary.pid]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            before = dict(load.acknowledged)
            copy = copy_files(path, tmp_path / f"b{number}")
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            load.stop()
            checkpoints.join()
        assert primary.terminate() == 0
        assert_sound(copy)
        server = processes.primary(copy)
        load.acknowledged = before
        load.check(server.address)
        assert server.terminate() == 0
