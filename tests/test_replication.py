"""Following, end to end: bootstrap, catching up, slots, refusals, durability levels."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from faulty_proxy import FaultyProxy
from harness import Launch, Process, Processes, wait_until
from killing import KILLED, Nursery
from nodes import (
    RESET_NEEDED,
    GarbageServer,
    Load,
    Pair,
    ask_to_follow,
    assert_equal,
    assert_sound,
    checkpoint,
    children,
    copy_node,
    offline_status,
    pairs,
    put,
    settle,
    slot,
    status,
    wait_until_caught_up,
    warnings,
)

from understudy.client import Put, connect
from understudy.common.directory import DataDirectory
from understudy.common.errors import ExitCode, OutcomeUnknown
from understudy.common.follow_table import PROTOCOL_VERSION, Decision
from understudy.common.log_reader import read_records
from understudy.common.metrics import EngineMetrics
from understudy.common.settings import PrimarySettings
from understudy.common.types import START, ClusterId, Lsn
from understudy.primary.node import PrimaryNode
from understudy.primary.replication_service import ReplicationService
from understudy.primary.snapshots import PinBoard
from understudy.v1 import admin_pb2, replication_pb2, replication_pb2_grpc

# -- bootstrap and catching up ---------------------------------------------------------------------------------


def test_several_replicas_bootstrap_while_the_primary_takes_writes(
    processes: Processes, tmp_path: Path
) -> None:
    """G2, G11: three replicas that start at once under load end equal to their primary."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/old", *((b"%04d" % number, bytes(5_000)) for number in range(1_000)))
    checkpoint(primary.address)
    with Load(primary.address) as load:
        names = ("b", "c", "d")
        replicas = [
            processes.start(
                *("replica", "--data-dir", tmp_path / name, "--id", name),
                *("--primary", primary.address, "--listen", "127.0.0.1:0"),
            )
            for name in names
        ]
        addresses = [replica.address for replica in replicas]
        load.wait_for(200)
    assert load.errors == []
    assert_equal(primary.address, *addresses)
    load.check(addresses[0])
    assert {one.id for one in status(primary.address).replicas if one.connected} == set(names)


@pytest.mark.timeout(300)
def test_a_bootstrap_killed_at_any_step_is_made_good_by_the_next_start(
    processes: Processes, tmp_path: Path, nursery: Nursery
) -> None:
    """G2, G4: whatever step kill -9 comes before, a replica that is started again ends equal to its primary."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/kept", *((b"%d" % number, bytes([number]) * 500_000) for number in range(2)))
    checkpoint(primary.address)
    put(primary.address, "/kept", (b"after", b"the checkpoint"))
    head = status(primary.address)  # at least: in the end there may be a second checkpoint's marks
    for step in itertools.count(1):
        copy = tmp_path / f"b{step}"
        killed = _replica_launched(processes, nursery.dying_at(step), copy, primary)
        wait_until(lambda: not killed.is_running or _applied(killed) >= head.lsn, what=killed.describe)  # noqa: B023
        survived = killed.is_running
        if survived:
            killed.kill()
        else:
            assert killed.wait() == KILLED, killed.describe()
            again = _replica_launched(processes, nursery.dying_at(0), copy, primary)
            wait_until(lambda: _applied(again) >= head.lsn, what=again.describe)  # noqa: B023
            again.kill()
        found = offline_status(copy)
        assert found.role == "replica"
        assert found.lsn >= head.lsn
        assert found.digest == _digest_at(tmp_path / "a", found)
        assert_sound(copy)
        if survived:
            break
        shutil.rmtree(copy)
    assert step > 20
    replica = processes.replica(copy, primary.address, "--id", "b")
    assert_equal(primary.address, replica.address)


@pytest.mark.timeout(300)
def test_a_bootstrap_that_finds_no_space_and_is_killed_soon_after_is_made_good_by_the_next_start(
    processes: Processes, tmp_path: Path, nursery: Nursery
) -> None:
    """G2, G9: whatever step finds the disk full, a replica that goes on and is killed then leaves nothing half done."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/kept", *((b"%d" % number, bytes([number]) * 500_000) for number in range(2)))
    head = settle(primary.address)
    for step in itertools.count(1):
        copy = tmp_path / f"b{step}"
        replica = _replica_launched(processes, nursery.out_of_space_at(step), copy, primary)
        wait_until(lambda: not replica.is_running or _applied(replica) >= head.lsn, what=replica.describe)  # noqa: B023
        met = "no space left" in replica.stderr.lower()
        if not replica.is_running:
            assert replica.wait() in (ExitCode.FAILED, ExitCode.DIRECTORY, KILLED), replica.describe()
            assert "Traceback" not in replica.stderr
            replica = _replica_launched(processes, nursery.dying_at(0), copy, primary)
            wait_until(lambda: _applied(replica) >= head.lsn, what=replica.describe)  # noqa: B023
        replica.kill()
        found = offline_status(copy)
        assert (found.role, found.lsn, found.digest) == ("replica", head.lsn, head.digest)
        assert_sound(copy)
        if not met:
            break
        shutil.rmtree(copy)
    assert step > 10


def _replica_launched(processes: Processes, launch: Launch, copy: Path, primary: Process) -> Process:
    return processes.start(
        *("replica", "--data-dir", copy, "--id", "b"),
        *("--primary", primary.address, "--listen", "127.0.0.1:0"),
        launch=launch,
    )


def _digest_at(path: Path, where: admin_pb2.StatusResponse) -> bytes:
    """The digest that the log in ``path``, of a primary that runs, has where another node stands."""
    return next(read_records(path / "log", ClusterId(where.cluster), Lsn(where.lsn - 1))).digest


def _applied(replica: Process) -> int:
    """How far a replica is that may not even be ready, or be gone."""
    address = replica.stdout.partition(" ready on ")[2].strip()
    if address:
        with contextlib.suppress(Exception):
            return status(address).committed_lsn
    return 0


def test_a_bootstrap_that_broke_off_goes_on_where_it_was(processes: Processes, tmp_path: Path) -> None:
    """A bootstrap killed on its way fetches only the rest when it is started again, while the primary writes."""
    primary = processes.primary(tmp_path / "a")
    values = [(b"%02d" % number, bytes([number]) * 1_000_000) for number in range(12)]
    put(primary.address, "/large", *values)
    checkpoint(primary.address)
    arguments = ("--id", "b", "--bootstrap-rate")
    replica = processes.replica(tmp_path / "b", primary.address, *arguments, "2MiB")
    total = wait_until(lambda: _total_once_fetched(replica, 6_000_000), what=replica.describe)
    replica.kill()
    put(primary.address, "/large", (b"new", b"value"))
    checkpoint(primary.address)
    with FaultyProxy(primary.address) as proxy:
        replica = processes.replica(tmp_path / "b", proxy.address, *arguments, "1GiB")
        assert_equal(primary.address, replica.address)
        assert proxy.bytes_sent < total - 5_000_000
        replica.kill()


def _total_once_fetched(replica: Process, enough: int) -> int:
    """How many bytes the bootstrap is about, once so many are there; 0 before."""
    found = re.search(r"bootstrapping: ([\d,]+) of ([\d,]+) bytes", warnings(replica.address))
    done, total = (int(number.replace(",", "")) for number in found.groups()) if found else (0, 0)
    return total if done > enough else 0


def test_a_slot_outlives_its_primary_and_shows_how_far_behind_its_replica_is(
    processes: Processes, tmp_path: Path
) -> None:
    """A replica that is away is listed with its lag, also by a restarted primary, and is streamed to when it comes."""
    pair = Pair(processes, tmp_path)
    address = pair.primary.address
    wait_until(lambda: _replica_facts(processes, address)["lag_entries"] == 0)  # as far as the primary knows
    pair.replica.kill()
    for number in range(5):
        put(address, "/away", (b"key", b"%d" % number))
    wait_until(lambda: not _replica_facts(processes, address)["connected"])
    facts = _replica_facts(processes, address)
    assert (facts["id"], facts["state"], facts["lag_entries"]) == ("b", "disconnected", 5)
    assert facts["lag_bytes"] > 500
    assert facts["lag_seconds"] > 0
    assert pair.primary.terminate() == 0
    processes.primary(pair.a, "--listen", address)
    again = _replica_facts(processes, address)
    assert again["lag_seconds"] > facts["lag_seconds"]
    assert again | {"lag_seconds": 0} == facts | {"lag_seconds": 0}
    replica = processes.replica(pair.b, address, "--id", "b")
    assert_equal(address, replica.address)
    assert "bootstrap_begins" not in replica.stderr
    wait_until(lambda: _replica_facts(processes, address)["lag_entries"] == 0)
    facts = _replica_facts(processes, address)
    assert (facts["connected"], facts["state"], facts["lag_bytes"]) == (True, "streaming", 0)


def _replica_facts(processes: Processes, address: str) -> dict[str, Any]:
    shown = json.loads(processes.run("status", "--server", address, "--json").stdout)
    (facts,) = shown["replicas"]
    return dict(facts)


def test_a_replica_that_is_away_for_too_long_bootstraps_again(processes: Processes, tmp_path: Path) -> None:
    """G9: beyond the ceiling a slot is lost and its log goes; the replica starts anew from a copy and ends equal."""
    limits = ("--log-floor", "0", "--log-ceiling", "128MiB")
    pair = Pair(processes, tmp_path, *limits)
    address = pair.primary.address
    pair.replica.kill()
    with connect(address) as server:
        for number in range(28):
            server.commit("/large", [Put(b"%d" % (number % 3), bytes([number]) * (8 << 20))])
    wait_until(lambda: _slot_state(address) == "lost")
    checkpoint(address)
    assert _slot_state(address) == "lost"
    assert "replica b was lost and must bootstrap again" in warnings(address)
    put(address, "/large", (b"last", b"one"))
    checkpoint(address)  # each prunes behind it
    segments = sorted((pair.a / "log").glob("*.seg"))
    assert segments[0].name != "00000000000000000001.seg"
    assert sum(segment.stat().st_size for segment in segments) < 200 << 20
    replica = processes.replica(pair.b, address, "--id", "b")
    assert_equal(address, replica.address)
    assert "bootstrap_begins" in replica.stderr
    wait_until(lambda: _slot_state(address) == "streaming")


def _slot_state(address: str) -> str:
    found = slot(address, "b")
    assert found is not None
    return found.state


# -- identity --------------------------------------------------------------------------------------------------


def test_of_two_replicas_with_one_id_the_second_waits(processes: Processes, tmp_path: Path) -> None:
    """A second replica with the id of a connected one is refused, disturbs nothing, and takes over when it is free."""
    pair = Pair(processes, tmp_path)
    address = pair.primary.address
    second = processes.replica(tmp_path / "c", address, "--id", "b")
    wait_until(lambda: "another replica with this id" in warnings(second.address))
    assert "bootstrap_begins" not in second.stderr
    put(address, "/shared", (b"key", b"value"))
    wait_until_caught_up(address, pair.replica.address)
    assert pair.replica.stderr.count("event=following") == 1  # the one that still runs
    assert "give each replica its own --id" in second.stderr
    assert pair.replica.terminate() == 0
    assert_equal(address, second.address)


def test_an_id_is_free_again_however_its_replica_went_away(tmp_path: Path) -> None:
    """The end of a stream and the cancellation that follows it may come in any order: the id is free afterwards."""
    asyncio.run(_go_away_at_each_moment(tmp_path / "a"))


async def _go_away_at_each_moment(path: Path) -> None:
    with DataDirectory.open(path) as directory:
        node = PrimaryNode.open(directory, PrimarySettings(data_dir=path), EngineMetrics())
        await node.start()
        service = ReplicationService(node, PinBoard(node.engine))
        hello = _hello_at_head(node, directory)
        for moment in range(12):
            hello.node = moment.to_bytes(16, "big")
            context = _Context(hello)
            call = asyncio.create_task(service.Follow(None, context))  # type: ignore[arg-type]
            await asyncio.wait(
                (call, asyncio.ensure_future(context.streams.wait())), return_when="FIRST_COMPLETED"
            )
            assert node.slots.is_connected("b"), call
            context.gone.set()
            for _ in range(moment):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            assert not node.slots.is_connected("b"), moment
        await node.close()


def test_of_two_that_ask_in_the_same_moment_one_gets_the_id(tmp_path: Path) -> None:
    """Two replicas that say hello with one id before either was answered do not both stream."""
    asyncio.run(_ask_together(tmp_path / "a"))


async def _ask_together(path: Path) -> None:
    with DataDirectory.open(path) as directory:
        node = PrimaryNode.open(directory, PrimarySettings(data_dir=path), EngineMetrics())
        await node.start()
        service = ReplicationService(node, PinBoard(node.engine))
        calls, contexts = [], []
        for run in range(5):
            hello = _hello_at_head(node, directory)
            hello.node = hello.run = run.to_bytes(16, "big")
            contexts.append(_Context(hello))
            calls.append(asyncio.create_task(service.Follow(None, contexts[-1])))  # type: ignore[arg-type]
        await contexts[0].streams.wait()
        await asyncio.gather(*calls[1:])
        decisions = [context.said[0].answer.decision for context in contexts]
        assert decisions == [Decision.STREAM, *[Decision.DUPLICATE_ID] * 4]
        calls[0].cancel()
        await asyncio.gather(calls[0], return_exceptions=True)
        await node.close()


def _hello_at_head(node: PrimaryNode, directory: DataDirectory) -> replication_pb2.Hello:
    hello = replication_pb2.Hello(
        protocol_version=PROTOCOL_VERSION,
        cluster=directory.cluster,
        run=bytes(16),
        replica_id="b",
        epoch=1,
    )
    for position in (node.engine.durable, START):
        hello.locator.add(lsn=position.lsn, digest=position.digest)
    return hello


class _Context:
    """gRPC's side of a stream whose peer says hello, then nothing, and then is gone."""

    def __init__(self, hello: replication_pb2.Hello) -> None:
        self.streams = asyncio.Event()
        self.gone = asyncio.Event()
        self.said: list[replication_pb2.FollowResponse] = []
        self._hello: replication_pb2.Hello | None = hello

    async def read(self) -> object:
        hello, self._hello = self._hello, None
        if hello is not None:
            return replication_pb2.FollowRequest(hello=hello)
        self.streams.set()
        await self.gone.wait()
        return grpc.aio.EOF

    async def write(self, message: replication_pb2.FollowResponse) -> None:
        """Notes what would go out."""
        self.said.append(message)

    def peer(self) -> str:
        return "nobody"


def test_a_copied_replica_harms_nobody(processes: Processes, tmp_path: Path) -> None:
    """G2: a replica's directory copied and started as well, as the same node, waits until the first one is gone."""
    pair = Pair(processes, tmp_path, "--durability", "replica")
    address = pair.primary.address
    put(address, "/shared", (b"key", b"value"))
    assert pair.replica.terminate() == 0
    copy_node(pair.b, tmp_path / "c")
    with Load(address) as load:
        one = processes.replica(pair.b, address, "--id", "b")
        wait_until(lambda: status(one.address).upstream.connected)
        other = processes.replica(tmp_path / "c", address, "--id", "b")
        wait_until(lambda: "another replica with this id" in warnings(other.address))
        load.wait_for(200)
    assert load.errors == []
    load.check(address)
    assert one.is_running
    assert one.stderr.count("event=following") == 1  # not driven out
    assert "event=following" not in other.stderr
    one.kill()
    assert_equal(address, other.address)
    other.kill()
    one = processes.replica(pair.b, address, "--id", "b")
    assert_equal(address, one.address)


def test_a_replica_of_another_cluster_is_refused(processes: Processes, tmp_path: Path) -> None:
    """G3, G4: a replica that is pointed at a foreign primary ends with exit code 3, and its copy stays as it is."""
    pair = Pair(processes, tmp_path)
    put(pair.primary.address, "/ours", (b"key", b"value"))
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    pair.stop()
    before = offline_status(pair.b)
    foreign = processes.primary(tmp_path / "foreign")
    replica = processes.start(
        *("replica", "--data-dir", pair.b, "--primary", foreign.address, "--listen", "127.0.0.1:0")
    )
    assert replica.wait() == RESET_NEEDED
    assert "belongs to another cluster" in replica.stderr
    assert offline_status(pair.b) == before
    assert slot(foreign.address, "b") is None


def test_a_primary_that_lost_entries_never_takes_them_from_its_replica(
    processes: Processes, tmp_path: Path
) -> None:
    """G3, G4: ahead of a restored primary, or diverged from it at the same LSN, a replica stops and keeps its copy."""
    pair = Pair(processes, tmp_path)
    address = pair.primary.address
    put(address, "/realm", (b"shared", b"by both"))
    assert pair.primary.terminate() == 0
    old = copy_node(pair.a, tmp_path / "old")
    primary = processes.primary(pair.a, "--listen", address)
    last = [put(address, "/realm", (b"only", b"here %d" % number)) for number in range(5)][-1]
    wait_until_caught_up(address, pair.replica.address)
    primary.kill()

    restored = processes.primary(old, "--listen", address)
    assert pair.replica.wait() == RESET_NEEDED
    assert f"promote it: understudy promote {pair.b}" in pair.replica.stderr
    assert f"understudy rewind {pair.b} --to {address}" in pair.replica.stderr
    assert offline_status(pair.b).digest == last.digest

    same = [put(address, "/realm", (b"other", b"history %d" % number)) for number in range(5)][-1]
    assert same.lsn == last.lsn
    arguments = (
        "replica",
        "--data-dir",
        pair.b,
        "--primary",
        address,
        "--listen",
        "127.0.0.1:0",
        "--id",
        "b",
    )
    replica = processes.start(*arguments)
    assert replica.wait() == RESET_NEEDED
    assert "hold different histories" in replica.stderr
    assert offline_status(pair.b).digest == last.digest

    rewound = json.loads(processes.run("rewind", pair.b, "--to", address, "--id", "b", "--json").stdout)
    exported = Path(rewound["exported"]).read_text().splitlines()
    assert [json.loads(line)["lsn"] for line in exported[-5:]] == list(range(last.lsn - 4, last.lsn + 1))
    replica = processes.start(*arguments)
    assert_equal(restored.address, replica.address)
    assert pairs(replica.address, "/realm") == {b"shared": b"by both", b"other": b"history 4"}


def test_a_claim_without_proof_fences_nobody(processes: Processes, tmp_path: Path) -> None:
    """G7: whoever claims a higher epoch without its signed mark is refused, and the primary goes on."""
    primary = processes.primary(tmp_path / "a")
    receipt = put(primary.address, "/realm", (b"key", b"value"))
    known = status(primary.address)
    hello = replication_pb2.Hello(
        protocol_version=PROTOCOL_VERSION,
        cluster=known.cluster,
        node=bytes(16),
        run=bytes(16),
        replica_id="liar",
        epoch=99,
        proof=known.proof,
    )
    hello.locator.add(lsn=receipt.lsn, digest=receipt.digest)
    hello.locator.add(lsn=START.lsn, digest=START.digest)
    assert ask_to_follow(primary.address, hello).decision == Decision.UNPROVEN_EPOCH
    assert status(primary.address).role == "primary"
    put(primary.address, "/realm", (b"key", b"other"))
    hello.protocol_version += 1
    assert ask_to_follow(primary.address, hello).decision == Decision.PROTOCOL_MISMATCH


# -- a primary that is none ------------------------------------------------------------------------------------


def test_a_replica_waits_for_a_primary_and_says_so_once(processes: Processes, tmp_path: Path) -> None:
    """Where nobody listens, or only something else, a replica says so once, tries on, and follows when it can."""
    with GarbageServer() as garbage:
        replica = processes.replica(tmp_path / "b", garbage.address)
        wait_until(lambda: garbage.address in warnings(replica.address), what=replica.describe)
        more = garbage.connections + 4
        wait_until(lambda: garbage.connections >= more, what=replica.describe)
        _check_said_once(replica.stderr)
    primary = processes.primary(tmp_path / "a", "--listen", garbage.address)
    assert_equal(primary.address, replica.address)
    before = len(replica.stderr)
    primary.kill()
    wait_until(lambda: "not reachable" in warnings(replica.address))
    primary = processes.primary(tmp_path / "a", "--listen", garbage.address)
    put(primary.address, "/realm", (b"key", b"value"))
    assert_equal(primary.address, replica.address)
    _check_said_once(replica.stderr[before:])


def test_what_keeps_each_of_several_addresses_from_being_followed_is_told(
    processes: Processes, tmp_path: Path
) -> None:
    """Of addresses that are asked in turn, each one's trouble stands in the status, not only the latest."""
    with GarbageServer() as garbage, GarbageServer() as other:
        replica = processes.replica(tmp_path / "b", f"{garbage.address},{other.address}")

        def told() -> set[str]:
            said = warnings(replica.address)
            return {one.address for one in (garbage, other) if one.address in said}

        wait_until(lambda: len(told()) == 2, what=replica.describe)
        more = garbage.connections + 2
        wait_until(lambda: garbage.connections >= more, what=replica.describe)
        assert len(told()) == 2  # whoever was asked last


def _check_said_once(logged: str) -> None:
    complaints = re.findall(r"event=not_following .*", logged)
    assert complaints
    assert len(set(complaints)) == len(complaints)


def test_a_replica_of_a_replica_follows_it_once_it_is_promoted(processes: Processes, tmp_path: Path) -> None:
    """A replica that is pointed at another replica is told so and tries again, until that one is the primary."""
    pair = Pair(processes, tmp_path)
    put(pair.primary.address, "/realm", (b"key", b"value"))
    third = processes.replica(tmp_path / "c", pair.replica.address, "--id", "c")
    wait_until(lambda: "is not a primary" in warnings(third.address))
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    new = pair.fail_over()
    assert_equal(new.address, third.address)
    assert pairs(third.address, "/realm") == {b"key": b"value"}


def test_another_protocol_version_ends_a_replica(processes: Processes, tmp_path: Path) -> None:
    """A primary of another protocol version is named, and following it is given up."""

    class Other(replication_pb2_grpc.ReplicationServicer):
        def Follow(self, *_: object) -> Iterator[replication_pb2.FollowResponse]:
            yield replication_pb2.FollowResponse(
                answer=replication_pb2.Answer(decision=Decision.PROTOCOL_MISMATCH)
            )

    server = grpc.server(futures.ThreadPoolExecutor(2))
    replication_pb2_grpc.add_ReplicationServicer_to_server(Other(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        replica = processes.replica(tmp_path / "b", f"127.0.0.1:{port}")
        assert replica.wait() == 1
    finally:
        server.stop(None)
    assert "speaks another protocol version (use the same version on both sides)" in replica.stderr


# -- durability ------------------------------------------------------------------------------------------------


def test_a_transaction_may_ask_for_more_than_its_server(processes: Processes, tmp_path: Path) -> None:
    """G1: at level `replica` a receipt comes only once a replica has it, at `applied` once it can be read there."""
    primary = processes.primary(tmp_path / "a")
    with connect(primary.address) as server:
        local = server.commit("/realm", [Put(b"local", b"1")])
        with pytest.raises(OutcomeUnknown) as unknown:
            server.commit("/realm", [Put(b"replica", b"1")], durability="replica", timeout_s=0.3)
        # Committed at the server's level, in its own time.
        wait_until(lambda: server.get("/realm", b"replica") == b"1")
        replica = processes.replica(tmp_path / "b", primary.address)
        receipt = server.wait(unknown.value.number)
        assert receipt.lsn == local.lsn + 1
        assert status(replica.address).durable_lsn >= receipt.lsn


def test_level_applied_waits_until_a_replica_shows_it(processes: Processes, tmp_path: Path) -> None:
    """What a replica has on disk but can't show, its checkpoints being stuck, is not answered at level `applied`."""
    pair = Pair(processes, tmp_path)
    address = pair.primary.address
    (checkpointer,) = children(pair.replica)
    os.kill(checkpointer, signal.SIGSTOP)
    try:
        for number in range(2):  # as many memtables as may wait
            put(address, "/realm", (b"key", b"%d" % number))
            checkpoint(address)
        with connect(address) as server:
            receipt = server.commit("/realm", [Put(b"key", b"durable")], durability="replica")
            with pytest.raises(OutcomeUnknown) as unknown:
                server.commit("/realm", [Put(b"key", b"applied")], durability="applied", timeout_s=0.3)
            assert status(pair.replica.address).committed_lsn < receipt.lsn
            os.kill(checkpointer, signal.SIGCONT)
            server.wait(unknown.value.number)
            assert pairs(pair.replica.address, "/realm") == {b"key": b"applied"}
    finally:
        os.kill(checkpointer, signal.SIGCONT)


def test_a_server_at_level_replica_waits_for_one(processes: Processes, tmp_path: Path) -> None:
    """G1, G5: without a replica nothing is acknowledged or shown, and all of it is when one comes."""
    primary = processes.primary(tmp_path / "a", "--durability", "replica")
    assert "0 of 1 needed replicas are connected" in warnings(primary.address)
    with connect(primary.address) as server:
        with pytest.raises(OutcomeUnknown) as unknown:
            server.commit("/realm", [Put(b"key", b"value")], durability="local", timeout_s=0.3)
        assert "/realm" not in [realm.path for realm in server.realms()]
        replica = processes.replica(tmp_path / "b", primary.address)
        receipt = server.wait(unknown.value.number)
        assert status(replica.address).durable_lsn >= receipt.lsn
        assert server.get("/realm", b"key") == b"value"


def test_a_server_degrades_and_returns(processes: Processes, tmp_path: Path) -> None:
    """With `--degrade-after` a server alone acknowledges at `local`, says so, and returns when a replica caught up."""
    pair = Pair(processes, tmp_path, "--durability", "replica", "--degrade-after", "0.5")
    address = pair.primary.address
    wait_until(lambda: status(address).durability == "replica")  # it was alone while the replica started
    put(address, "/realm", (b"with", b"replica"))
    assert status(address).durability == "replica"
    pair.replica.kill()
    with connect(address) as server:
        receipt = server.commit("/realm", [Put(b"without", b"replica")])
        assert status(address).durability == "replica (degraded)"
        assert "durability is degraded to local" in warnings(address)
        with pytest.raises(OutcomeUnknown):
            server.commit("/realm", [Put(b"more", b"asked")], durability="applied", timeout_s=0.3)
    replica = processes.replica(pair.b, address, "--id", "b")
    wait_until(lambda: status(address).durability == "replica")
    assert status(replica.address).durable_lsn >= receipt.lsn
    assert not re.search("degraded|transactions wait", warnings(address))
