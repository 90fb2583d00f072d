"""Peers that mean harm, or are broken: a primary answers them in words, and stays within its bounds."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import grpc
import pytest
from harness import ANY_PORT, DEADLINE_S, Processes, complaint, wait_until
from nodes import checkpoint, put, status, wait_until_caught_up, warnings

from understudy.client import Put, connect
from understudy.common import memtable
from understudy.common.errors import RESTORE, ExitCode
from understudy.common.follow_table import PROTOCOL_VERSION, Decision
from understudy.common.operations import to_protos
from understudy.common.segment import RECORDS_START
from understudy.common.types import START
from understudy.primary import Primary, committer, data_service, replication_service
from understudy.v1 import data_pb2, data_pb2_grpc, log_pb2, replication_pb2, replication_pb2_grpc

CLIENT = b"c" * 16
_TO = ("--listen", ANY_PORT, "--primary")


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[Primary]:
    """A primary on any port."""
    with Primary.open(tmp_path / "a", listen="127.0.0.1:0") as opened:
        yield opened


@contextlib.contextmanager
def _channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(
        address, options=[("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        yield channel


class _Commits:
    """A commit stream that is spoken by hand."""

    def __init__(self, channel: grpc.Channel, client: bytes = CLIENT) -> None:
        self._next: list[data_pb2.CommitRequest] = [
            data_pb2.CommitRequest(bind=data_pb2.Bind(protocol_version=PROTOCOL_VERSION, client=client))
        ]
        self._more = threading.Condition()
        self.call = data_pb2_grpc.DataStub(channel).Commit(self._requests(), timeout=60)
        assert next(self.call).HasField("bound")

    def _requests(self) -> Iterator[data_pb2.CommitRequest]:
        while True:
            with self._more:
                while not self._next:
                    self._more.wait()
                message = self._next.pop(0)
            yield message

    def end(self) -> Future[str]:
        """Why the stream ends, once it does; a transaction that was refused fails the test."""
        found: Future[str] = Future()

        def read() -> None:
            try:
                found.set_result(f"{[list(one.results.refusals) for one in self.call]}")
            except grpc.RpcError as error:
                found.set_result(error.details())

        threading.Thread(target=read, daemon=True).start()
        return found

    def send(self, transactions: list[data_pb2.Transaction]) -> None:
        with self._more:
            self._next.append(
                data_pb2.CommitRequest(transactions=data_pb2.Transactions(transactions=transactions))
            )
            self._more.notify()


def _transactions(first: int, count: int, value: bytes = b"v") -> list[data_pb2.Transaction]:
    operations = to_protos([Put(b"key", value)])
    return [
        data_pb2.Transaction(realm="/realm", number=number, operations=operations)
        for number in range(first, first + count)
    ]


def test_g9_a_message_of_too_many_transactions_is_refused_whole(primary: Primary) -> None:
    """G9: taking one message in never holds up others for long; as many as are allowed are taken."""
    most = data_service.MESSAGE_TRANSACTIONS_MAX
    with _channel(primary.address) as channel:
        commits = _Commits(channel)
        commits.send(_transactions(1, most))
        answered = 0
        while answered < most:
            answered += len(next(commits.call).results.numbers)
        commits.send(_transactions(most + 1, most + 1))
        with pytest.raises(grpc.RpcError) as refused:
            next(commits.call)
        assert "at most" in refused.value.details()
    assert primary.status().lsn == 2 + most


def test_g9_messages_that_wait_for_room_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G6, G9: with no replica, what clients send is held up to a limit. Beyond it streams are ended: to refuse what may
    be there from an earlier try would be untrue.
    """
    monkeypatch.setattr(data_service, "HELD_BYTES_MAX", 3 << 20)
    value = bytes(1 << 20)
    with (
        Primary.open(tmp_path / "a", listen="127.0.0.1:0", durability="replica") as primary,
        _channel(primary.address) as channel,
    ):
        streams = [_Commits(channel, b"%016d" % number) for number in range(24)]
        for stream in streams:  # each is being read from: none was told to wait
            stream.send(_transactions(1, 1, value))
        ends = [stream.end() for stream in streams]
        wait_until(lambda: sum(end.done() for end in ends) >= 4)
        told = [end.result() for end in ends if end.done()]
        for stream in streams:
            stream.call.cancel()
    assert all("wait for room already" in one for one in told), told


def _hello(primary: Primary, run: bytes) -> replication_pb2.Hello:
    known = primary.status()
    hello = replication_pb2.Hello(
        protocol_version=PROTOCOL_VERSION,
        cluster=known.cluster,
        node=bytes(16),
        run=run,
        replica_id="r",
        epoch=known.epoch,
        proof=known.proof,
    )
    hello.locator.add(lsn=known.durable_lsn, digest=known.digest)
    hello.locator.add(lsn=START.lsn, digest=START.digest)
    return hello


def test_a_connection_that_gives_way_is_told_so(primary: Primary) -> None:
    """The older of two streams of one process ends with a status: its peer is not left waiting."""
    never = threading.Event()

    def says(hello: replication_pb2.Hello) -> Iterator[replication_pb2.FollowRequest]:
        yield replication_pb2.FollowRequest(hello=hello)
        never.wait(60)

    with _channel(primary.address) as channel:
        stub = replication_pb2_grpc.ReplicationStub(channel)
        older = stub.Follow(says(_hello(primary, b"1" * 16)), timeout=30)
        assert next(older).answer.decision == Decision.STREAM
        newer = stub.Follow(says(_hello(primary, b"1" * 16)), timeout=30)
        assert next(newer).answer.decision == Decision.STREAM
        with pytest.raises(grpc.RpcError) as ended:
            for _ in older:
                pass
        assert "taken over" in ended.value.details()
        never.set()


def _pin(stub: replication_pb2_grpc.ReplicationStub, node: bytes, resume: bytes = b"") -> bytes:
    request = replication_pb2.PinSnapshotRequest(replica_id="r", node=node, resume=resume)
    return stub.PinSnapshot(request, timeout=30).snapshot


def test_a_replica_is_not_driven_out_of_its_bootstrap_by_its_namesake(primary: Primary) -> None:
    """Of two new replicas with one id the second is refused, and the first one's snapshot stays."""
    primary.commit("/realm", [Put(b"key", b"value")])
    with _channel(primary.address) as channel:
        stub = replication_pb2_grpc.ReplicationStub(channel)
        pinned = _pin(stub, b"1" * 16)
        with pytest.raises(grpc.RpcError) as refused:
            _pin(stub, b"2" * 16)
        assert "another replica bootstraps as 'r'" in refused.value.details()
        assert _pin(stub, b"1" * 16, resume=pinned) == pinned


def test_g9_snapshots_are_read_by_few_at_a_time(primary: Primary, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: calls that read a snapshot and take nothing are few, and are ended after a while."""
    monkeypatch.setattr(replication_service, "READINGS_MAX", 3)
    monkeypatch.setattr(replication_service, "UNREAD_S_MAX", 5.0)  # enough to begin all calls
    for number in range(30):
        primary.commit("/realm", [Put(b"%d" % number, bytes([number]) * (1 << 20))])
    asyncio.run(_checkpoint(primary))
    with _channel(primary.address) as channel:
        stub = replication_pb2_grpc.ReplicationStub(channel)
        request = replication_pb2.ReadSnapshotRequest(snapshot=_pin(stub, b"1" * 16), ranges=list(range(25)))
        unread = [stub.ReadSnapshot(request, timeout=2 * DEADLINE_S) for _ in range(3)]
        for call in unread:
            next(call)
        with pytest.raises(grpc.RpcError) as refused:
            next(stub.ReadSnapshot(request, timeout=DEADLINE_S))
        assert "being read already" in refused.value.details()

        def read() -> list[int]:
            with contextlib.suppress(grpc.RpcError):  # still refused
                return [part.range for part in stub.ReadSnapshot(request, timeout=DEADLINE_S)]
            return []

        assert wait_until(read) == list(range(25))
        for call in unread:  # who does not read does not hear of its end either
            call.cancel()


async def _checkpoint(primary: Primary) -> None:
    await asyncio.to_thread(checkpoint, primary.address)


def test_g11_damage_in_the_primarys_log_is_found_when_a_replica_meets_it(
    processes: Processes, tmp_path: Path
) -> None:
    """G11: a replica that can't go on from a damaged segment bootstraps, and the primary names the place."""
    one = processes.primary(tmp_path / "a")
    replica = processes.replica(tmp_path / "b", one.address)
    put(one.address, "/realm", (b"first", b"value"))
    wait_until_caught_up(one.address, replica.address)
    assert replica.terminate() == 0
    for number in range(4):
        put(one.address, "/realm", (b"%d" % number, bytes(3 << 20)))
    checkpoint(one.address)
    assert one.terminate() == 0
    [segment] = (tmp_path / "a" / "log").glob("*.seg")
    with segment.open("r+b") as file:
        file.seek(RECORDS_START + (5 << 20))
        file.write(b"damaged")
    one = processes.primary(tmp_path / "a")
    replica = processes.replica(tmp_path / "b", one.address)
    wait_until_caught_up(one.address, replica.address)
    assert str(segment) in warnings(one.address)
    assert "bootstrap_begins" in replica.stderr
    assert replica.stderr.count("event=following") < 5
    assert status(replica.address).digest == status(one.address).digest


def test_a_replica_refuses_what_its_primary_should_have_refused_and_can_be_made_anew(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G11: a change that is no valid one stops the replica with a remedy, after a restart too, and the remedy helps."""
    monkeypatch.setattr(committer, "check_operations", lambda _: None)
    monkeypatch.setattr(memtable, "KEY_BYTES_MAX", 500)  # this process's idea of one
    with Primary.open(tmp_path / "a", listen=ANY_PORT) as primary, _channel(primary.address) as channel:
        replica = processes.replica(tmp_path / "b", primary.address)
        bad = log_pb2.Operation(kind=log_pb2.Operation.PUT, key=b"k" * 490, value=b"v")
        commits = _Commits(channel)
        commits.send([data_pb2.Transaction(realm="/realm", number=1, operations=[bad])])
        assert replica.wait() == ExitCode.CORRUPT, replica.describe()
        said = complaint(
            processes.run(
                "replica", "--data-dir", tmp_path / "b", *_TO, primary.address, code=ExitCode.CORRUPT
            )
        )
        assert "an operation on /realm has a key of 490 bytes" in said
        assert RESTORE in said
        with connect(primary.address) as client:
            client.drop_realm("/realm")
        checkpoint(primary.address)
        anew = processes.replica(tmp_path / "c", primary.address)
        wait_until_caught_up(primary.address, anew.address)
