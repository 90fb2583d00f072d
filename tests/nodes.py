"""What end-to-end tests ask of running nodes, and writers that keep count of what they were promised."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest
from harness import DEADLINE_S, Process, Processes, wait_until

from understudy.cli.compare import Comparison, compare_servers
from understudy.cli.node_status import directory_status
from understudy.client import Add, AsyncServer, Operation, Put, Receipt, aconnect, connect
from understudy.common import portal
from understudy.common.errors import OutcomeUnknown, Unavailable, UnderstudyError
from understudy.common.rpc import open_channel, peer_errors
from understudy.common.verify import verify_directory
from understudy.v1 import admin_pb2, admin_pb2_grpc, replication_pb2, replication_pb2_grpc

LOAD_REALM = "/load"
DIRECTORY = 6  # the exit code for a data directory that is in use or of the wrong role
RESET_NEEDED = 3


# -- asking ----------------------------------------------------------------------------------------------------


def status(address: str) -> admin_pb2.StatusResponse:
    """What the node at ``address`` says of itself."""
    with connect(address) as server:
        return server.status()


def warnings(address: str) -> str:
    """All that the node at ``address`` warns of."""
    return "\n".join(status(address).warnings)


def offline_status(path: Path) -> admin_pb2.StatusResponse:
    """Where the node in ``path`` stands, which nobody has open."""
    found, is_running = asyncio.run(directory_status(path, timeout_s=DEADLINE_S))
    assert not is_running
    return found


def slot(primary: str, replica_id: str) -> admin_pb2.ReplicaStatus | None:
    """What the primary remembers of a replica, if anything."""
    return next((one for one in status(primary).replicas if one.id == replica_id), None)


def checkpoint(address: str) -> None:
    """Has the primary at ``address`` take a checkpoint of all that it has committed, and waits for it."""

    async def ask() -> None:
        async with open_channel(address) as channel:
            with peer_errors(address):
                await admin_pb2_grpc.AdminStub(channel).StateDigests(
                    admin_pb2.StateDigestsRequest(checkpoint=True), timeout=DEADLINE_S
                )

    portal.call(ask())


def settle(address: str) -> admin_pb2.StatusResponse:
    """What the primary at ``address`` says once it has a checkpoint of everything, and adds no entries by itself."""

    def is_durable() -> admin_pb2.StatusResponse | None:
        found = status(address)  # with the checkpoint's mark, which may still be on its way to the disk
        return found if found.durable_lsn == found.lsn else None

    checkpoint(address)
    return wait_until(is_durable)


def try_checkpoint(address: str) -> None:
    """The same, whatever becomes of it: the node may be killed meanwhile."""
    with contextlib.suppress(UnderstudyError):
        checkpoint(address)


def put(address: str, realm: str, *pairs: tuple[bytes, bytes], durability: str | None = None) -> Receipt:
    """Puts the pairs, in one transaction."""
    with connect(address) as server:
        return server.commit(realm, [Put(key, value) for key, value in pairs], durability=durability)


async def until_said(client: AsyncServer, number: int, reason: str) -> None:
    """Returns once the client gives that reason for why a transaction is unanswered, which it is all the time."""
    said = ""
    while reason not in said:
        with pytest.raises(OutcomeUnknown) as unknown:
            await client.wait(number, timeout_s=0.02)
        said = unknown.value.message


def pairs(address: str, realm: str) -> dict[bytes, bytes]:
    """All that a realm holds."""
    with connect(address) as server:
        return dict(server.scan(realm))


def wait_until_caught_up(primary: str, *replicas: str) -> None:
    """Returns once each replica has applied what the primary has now."""
    head = status(primary)

    def applied(replica: str) -> bool:
        with contextlib.suppress(UnderstudyError):  # it may be starting
            return status(replica).committed_lsn >= head.durable_lsn
        return False

    for replica in replicas:
        wait_until(lambda at=replica: applied(at), what=lambda at=replica: f"{status(at)}\nof {head}")  # type: ignore[misc]


def assert_equal(primary: str, *replicas: str) -> None:
    """Logs and recomputed state digests of these nodes are equal at one LSN (G11)."""
    wait_until_caught_up(primary, *replicas)
    for replica in replicas:
        problems = wait_until(lambda at=replica: _compared(primary, at)).problems  # type: ignore[misc]
        assert not problems, problems


def _compared(primary: str, replica: str) -> Comparison | None:
    """What came of comparing them; nothing, while the replica is behind the checkpoint that is taken for that."""
    with contextlib.suppress(Unavailable):
        return portal.call(compare_servers(primary, replica))
    return None


def copy_node(path: Path, to: Path) -> Path:
    """Copies the data directory of a stopped node; returns where."""
    shutil.copytree(path, to, ignore=shutil.ignore_patterns("*.sock"))
    return to


def assert_sound(path: Path) -> None:
    """``verify`` finds nothing wrong with a directory that nobody has open."""
    problems = verify_directory(path).problems
    assert not problems, problems


def children(process: Process) -> list[int]:
    """The ids of a process's children."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether a process runs, and is not only waiting to be reaped."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# -- a pair ----------------------------------------------------------------------------------------------------


class Pair:
    """A primary in ``a`` and a replica in ``b``, caught up."""

    def __init__(self, processes: Processes, folder: Path, *flags: str) -> None:
        self.processes = processes
        self.a, self.b = folder / "a", folder / "b"
        self.primary = processes.primary(self.a, *flags)
        self.replica = processes.replica(self.b, self.primary.address, "--id", "b")
        wait_until_caught_up(self.primary.address, self.replica.address)

    @property
    def addresses(self) -> str:
        """Both, for a client that finds the primary."""
        return f"{self.primary.address},{self.replica.address}"

    def fail_over(self, *flags: str) -> Process:
        """Kills the primary, promotes the replica, and starts it in the same place."""
        self.primary.kill()
        self.processes.run("promote", self.b)
        self.replica.wait()
        return self.processes.primary(self.b, "--listen", self.replica.address, *flags)

    def stop(self) -> None:
        """Ends both cleanly."""
        for process in (self.replica, self.primary):
            if process.is_running:
                assert process.terminate() == 0


# -- load ------------------------------------------------------------------------------------------------------


class Load:
    """Writers that each put a new key and count it in the same transaction, one after the other, until stopped.

    So the counters say how often transactions were applied, and the keys say which: G6 is that these agree.
    """

    def __init__(self, addresses: str, *, writers: int = 8, timeout_s: float = DEADLINE_S) -> None:
        self.acknowledged: dict[bytes, Receipt] = {}
        self.sent: Counter[int] = Counter()  # by writer, answered or not
        self.errors: list[UnderstudyError] = []
        self._addresses = addresses
        self._writers = writers
        self._timeout_s = timeout_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Returns when every writer has the answer to its last transaction, or has given up waiting for it."""
        self._stopping.set()
        self._thread.join()

    def wait_for(self, more: int) -> None:
        """Returns once so many more transactions were acknowledged."""
        enough = len(self.acknowledged) + more
        wait_until(
            lambda: len(self.acknowledged) >= enough or not self._thread.is_alive(),
            what=lambda: f"{len(self.acknowledged)} acknowledged, errors: {self.errors}",
        )
        if not self._thread.is_alive():
            pytest.fail(f"the writers have ended: {self.errors}")

    @property
    def highest_lsn(self) -> int:
        """Of all that was acknowledged until now."""
        return max(receipt.lsn for receipt in list(self.acknowledged.values()))

    def check(self, address: str) -> None:
        """All that was acknowledged is at ``address``, all that is there was sent, and each once (G1, G2, G6)."""
        found = pairs(address, LOAD_REALM)
        counters = {key: int(value) for key, value in found.items() if key.startswith(b"count/")}
        keys = found.keys() - counters.keys()
        assert self.acknowledged.keys() <= keys
        for writer in range(self._writers):
            count = counters.get(b"count/%d" % writer, 0)
            # One after the other, so none may be missing before the last.
            assert {key for key in keys if key.startswith(b"%d/" % writer)} == set(self._keys(writer, count))
            assert count <= self.sent[writer]
        assert len({receipt.lsn for receipt in self.acknowledged.values()}) == len(self.acknowledged)

    @staticmethod
    def _keys(writer: int, count: int) -> Iterator[bytes]:
        return (b"%d/%06d" % (writer, number) for number in range(1, count + 1))

    def _run(self) -> None:
        loop = portal.new_event_loop()
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(self._write_all())

    async def _write_all(self) -> None:
        async with aconnect(self._addresses) as server:
            await asyncio.gather(*(self._write(server, writer) for writer in range(self._writers)))

    async def _write(self, server: AsyncServer, writer: int) -> None:
        while not self._stopping.is_set():
            self.sent[writer] += 1
            key = b"%d/%06d" % (writer, self.sent[writer])
            operations: list[Operation] = [Put(key, b"value of " + key), Add(b"count/%d" % writer, 1)]
            try:
                self.acknowledged[key] = await server.commit(
                    LOAD_REALM, operations, timeout_s=self._timeout_s
                )
            except UnderstudyError as error:
                self.errors.append(error)
                return


# -- peers that are not what they should be --------------------------------------------------------------------


def ask_to_follow(address: str, hello: replication_pb2.Hello) -> replication_pb2.Answer:
    """What the primary at ``address`` answers to ``hello``."""

    async def ask() -> replication_pb2.Answer:
        async with open_channel(address) as channel:
            call = replication_pb2_grpc.ReplicationStub(channel).Follow()
            await call.write(replication_pb2.FollowRequest(hello=hello))
            response = await asyncio.wait_for(call.read(), DEADLINE_S)
            assert isinstance(response, replication_pb2.FollowResponse)
            return response.answer

    return portal.call(ask())


class GarbageServer:
    """Accepts connections, says something that is no gRPC, and hangs up."""

    def __init__(self) -> None:
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> GarbageServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                with connection, contextlib.suppress(OSError):
                    connection.sendall(b"SSH-2.0-nothing that you know\r\n" + bytes(range(256)))


def assert_left_alone(server: GarbageServer, clock: GarbageServer) -> None:
    """Nobody connects to ``server`` any more, while gRPC goes on connecting to ``clock``, which is no better."""

    async def begin() -> grpc.aio.Channel:
        channel = open_channel(clock.address)
        channel.get_state(try_to_connect=True)
        return channel

    before = server.connections
    channel = portal.call(begin())
    wait_until(lambda: clock.connections >= 5)
    portal.call(channel.close())
    assert server.connections <= before + 1  # one was perhaps under way
