"""A replica's process that goes on as the primary: ``understudy promote --serve``."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from harness import DEADLINE_S, Process, Processes, complaint, wait_until
from nodes import (
    DIRECTORY,
    Load,
    Pair,
    assert_equal,
    assert_sound,
    checkpoint,
    offline_status,
    pairs,
    put,
    status,
    wait_until_caught_up,
)

from understudy.client import AsyncServer, Put, aconnect, connect
from understudy.common import portal
from understudy.common.errors import NotPrimary, UnderstudyError
from understudy.common.rpc import open_channel, short_socket_path
from understudy.common.settings import ReplicaSettings
from understudy.replica.server import serving_replica
from understudy.v1 import admin_pb2, admin_pb2_grpc

UNREACHABLE = 5


def _succeed(pair: Pair) -> Process:
    """Kills the primary and has the replica's process take its place."""
    pair.primary.kill()
    pair.processes.run("promote", pair.b, "--serve")
    return pair.replica


def test_a_replica_that_goes_on_as_primary_under_load_loses_and_doubles_nothing(
    processes: Processes, tmp_path: Path
) -> None:
    """G1, G6, G11: kill -9 under load, promote --serve: all acknowledged is there once, and the old one can follow."""
    pair = Pair(processes, tmp_path, "--durability", "replica")
    with Load(pair.addresses) as load:
        load.wait_for(200)
        new = _succeed(pair)
        load.wait_for(200)
        load.stop()
    assert load.errors == []
    assert status(new.address).role == "primary"
    processes.run("rewind", pair.a, "--to", new.address, "--id", "a")
    old = processes.replica(pair.a, new.address, "--id", "a")
    assert_equal(new.address, old.address)
    load.check(old.address)


def test_it_takes_checkpoints_and_ends_as_a_primary_does(processes: Processes, tmp_path: Path) -> None:
    """G2: checkpoints are taken, SIGTERM ends it, and `understudy primary` starts from what it leaves behind."""
    pair = Pair(processes, tmp_path, "--durability", "replica")
    put(pair.primary.address, "/realm", (b"before", b"1"))
    new = _succeed(pair)
    put(new.address, "/realm", (b"after", b"2"))
    checkpoint(new.address)
    assert new.terminate() == 0
    assert_sound(pair.b)
    refused = complaint(
        processes.run("replica", "--data-dir", pair.b, "--primary", "127.0.0.1:1", code=DIRECTORY)
    )
    assert f"understudy primary --data-dir {pair.b}" in refused
    again = processes.primary(pair.b)
    assert pairs(again.address, "/realm") == {b"before": b"1", b"after": b"2"}


def test_it_recovers_after_a_kill(processes: Processes, tmp_path: Path) -> None:
    """G1: what it has acknowledged in its new role survives kill -9."""
    pair = Pair(processes, tmp_path)
    new = _succeed(pair)
    put(new.address, "/realm", (b"key", b"value"))
    new.kill()
    assert pairs(processes.primary(pair.b).address, "/realm") == {b"key": b"value"}


def test_it_serves_as_the_primarys_settings_say(processes: Processes, tmp_path: Path) -> None:
    """A durability from the environment holds from the first transaction on."""
    processes.environment["UNDERSTUDY_DURABILITY"] = "replica"
    processes.environment["UNDERSTUDY_DEGRADE_AFTER_S"] = "3600"
    pair = Pair(processes, tmp_path)
    found = status(_succeed(pair).address)
    assert (found.role, found.durability) == ("primary", "replica")


def test_settings_that_could_not_serve_are_refused_when_the_replica_starts(
    processes: Processes, tmp_path: Path
) -> None:
    """A primary's setting that can't be is found now, and not when everybody waits for the new primary."""
    processes.environment["UNDERSTUDY_SYNC_REPLICAS"] = "0"
    done = processes.run("replica", "--data-dir", tmp_path / "b", "--primary", "127.0.0.1:1", code=2)
    assert "sync_replicas is 0" in complaint(done)
    assert not (tmp_path / "b").exists()


def test_a_replica_that_does_not_run_can_not_go_on(processes: Processes, tmp_path: Path) -> None:
    """Asked to have nobody's process serve, promote does nothing, and says what would do."""
    pair = Pair(processes, tmp_path)
    pair.stop()
    done = processes.run("promote", pair.b, "--serve", code=UNREACHABLE)
    assert f"understudy primary --data-dir {pair.b}" in complaint(done)
    assert offline_status(pair.b).role == "replica"


def test_it_is_not_promoted_again(processes: Processes, tmp_path: Path) -> None:
    """Asked once more, because the answer was lost, it says what was done, and no further epoch begins."""
    pair = Pair(processes, tmp_path)
    new = _succeed(pair)
    put(new.address, "/realm", (b"key", b"value"))
    before = status(new.address)
    done = processes.run("promote", pair.b, "--serve")
    assert b"had been promoted before" in done.stderr
    assert f"epoch {before.epoch}, at LSN {before.lsn}" in done.stdout.decode()
    assert "in use" in complaint(processes.run("promote", pair.b, code=DIRECTORY))
    after = status(new.address)
    assert (after.epoch, after.lsn, after.role) == (before.epoch, before.lsn, "primary")


def test_a_primary_that_never_was_a_replica_is_not_promoted(processes: Processes, tmp_path: Path) -> None:
    """G7: the cluster's first primary is told that there is nothing to promote."""
    primary = processes.primary(tmp_path / "a")
    assert "not a replica" in complaint(processes.run("promote", tmp_path / "a", "--serve", code=DIRECTORY))
    assert status(primary.address).epoch == 1


def test_two_who_promote_at_a_time_promote_once(processes: Processes, tmp_path: Path) -> None:
    """G7: both hear of the same epoch, and the log has one beginning of it."""
    pair = Pair(processes, tmp_path)
    pair.primary.kill()

    async def both() -> list[admin_pb2.PromoteResponse]:
        with short_socket_path(pair.b / "control.sock") as socket:
            async with open_channel(f"unix:{socket}") as channel:
                admin = admin_pb2_grpc.AdminStub(channel)
                calls = [admin.Promote(admin_pb2.PromoteRequest(serve=True)) for _ in range(2)]
                return list(await asyncio.gather(*calls))

    first, second = portal.call(both())
    assert first.epoch == second.epoch == status(pair.replica.address).epoch == 2


def test_who_wants_something_else_at_the_same_time_is_refused(processes: Processes, tmp_path: Path) -> None:
    """A plain promote beside a promote --serve doesn't end the process that serves: one of both is told no."""
    pair = Pair(processes, tmp_path)
    pair.primary.kill()

    async def both() -> list[admin_pb2.PromoteResponse | BaseException]:
        with short_socket_path(pair.b / "control.sock") as socket:
            async with open_channel(f"unix:{socket}") as channel:
                admin = admin_pb2_grpc.AdminStub(channel)
                calls = [admin.Promote(admin_pb2.PromoteRequest(serve=serve)) for serve in (True, False)]
                return await asyncio.gather(*calls, return_exceptions=True)

    serving, plain = portal.call(both())
    assert isinstance(serving, grpc.aio.AioRpcError) != isinstance(plain, grpc.aio.AioRpcError)
    if isinstance(serving, grpc.aio.AioRpcError):
        assert pair.replica.wait() == 0
    else:
        assert status(pair.replica.address).role == "primary"


def test_settings_that_the_replica_has_itself_are_not_read_for_the_primary(
    processes: Processes, tmp_path: Path
) -> None:
    """What the file says of a primary's address, where only TLS may be served, does not stop a replica on loopback."""
    config = tmp_path / "understudy.toml"
    config.write_text('[primary]\nlisten = "0.0.0.0:7850"\nmetrics = "0.0.0.0:9100"\n')
    primary = processes.primary(tmp_path / "a")
    replica = processes.replica(tmp_path / "b", primary.address, "--config", config)
    assert status(replica.address).role == "replica"


def test_a_succession_that_fails_ends_the_process(processes: Processes, tmp_path: Path) -> None:
    """What was promoted and can't be served, be it by a mistake of ours, does not look as if it were."""
    primary = processes.primary(tmp_path / "a")
    settings = ReplicaSettings(data_dir=tmp_path / "b", primary=primary.address, listen="127.0.0.1:0", id="b")

    def fails(*_: object) -> Any:
        raise RuntimeError("no")

    async def promoted() -> UnderstudyError | None:
        async with serving_replica(settings, fails) as replica:
            await asyncio.to_thread(wait_until_caught_up, primary.address, replica.address)
            with pytest.raises(RuntimeError):
                await replica.promote(serve=True)
            return await replica.node.ended

    assert "internal error" in str(portal.call(promoted()))


def test_connections_to_the_replica_stay(processes: Processes, tmp_path: Path) -> None:
    """A client that reads from the replica writes to the primary that it becomes, without connecting again."""
    pair = Pair(processes, tmp_path)
    put(pair.primary.address, "/realm", *((b"%04d" % number, b"v") for number in range(3_000)))
    wait_until(lambda: status(pair.replica.address).lsn == status(pair.primary.address).lsn)

    async def read_and_write() -> int:
        async with aconnect(pair.replica.address) as client:
            scan = client.scan("/realm")
            seen = [await anext(scan)]
            await asyncio.to_thread(_succeed, pair)
            seen += [one async for one in scan]
            async with asyncio.timeout(DEADLINE_S):
                while not await _took(client, Put(b"new", b"v")):
                    pass  # it waits itself, for its next attempt
            return len(seen)

    assert portal.call(read_and_write()) == 3_000
    with connect(pair.replica.address) as client:
        assert client.get("/realm", b"new") == b"v"


async def _took(client: AsyncServer, put: Put) -> bool:
    """Whether it was committed; not, where the client was still asking the replica that it had known."""
    try:
        await client.commit("/realm", [put])
    except NotPrimary:
        return False
    return True


def test_promote_tells_the_facts(processes: Processes, tmp_path: Path) -> None:
    """`promote --serve --json` has the keys that `promote --json` has."""
    pair = Pair(processes, tmp_path)
    pair.primary.kill()
    facts = json.loads(processes.run("promote", pair.b, "--serve", "--json").stdout)
    assert facts["durability"] == status(pair.replica.address).durability
    assert set(facts) == {"epoch", "lsn", "digest", "seconds", "durability"}
    assert facts["epoch"] == 2
