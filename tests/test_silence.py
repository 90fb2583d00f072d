"""What an attack found: silence, oversized entries, answers that come late, scans that are abandoned."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from harness import Processes, wait_until

from understudy.client import OutcomeUnknown, Put, connect
from understudy.common import portal, rpc
from understudy.common.errors import TransactionTooLarge
from understudy.common.operations import PUT, check_operations
from understudy.common.settings import ReplicaSettings
from understudy.primary import Primary
from understudy.replica import follow_session
from understudy.replica.node import ReplicaNode
from understudy.replica.server import serving_replica
from understudy.v1 import log_pb2


async def _until_connected(node: ReplicaNode, *, connected: bool) -> None:
    await asyncio.to_thread(wait_until, lambda: node.status().upstream.connected is connected)


def test_a_replica_comes_again_after_its_primary_was_silent(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A primary that was stopped for longer than silence is borne is followed again once it goes on."""
    monkeypatch.setattr(follow_session, "SILENCE_S_MAX", 1.5)
    primary = processes.primary(tmp_path / "p")

    async def story() -> None:
        settings = ReplicaSettings(
            data_dir=tmp_path / "r", primary=primary.address, listen="127.0.0.1:0", id="r"
        )
        async with serving_replica(settings) as replica:
            await _until_connected(replica.node, connected=True)
            os.kill(primary.pid, signal.SIGSTOP)
            try:
                await _until_connected(replica.node, connected=False)
            finally:
                os.kill(primary.pid, signal.SIGCONT)
            await _until_connected(replica.node, connected=True)

    asyncio.run(story())


@pytest.mark.parametrize("method", ["Data/Commit", "Replication/Follow"])
def test_a_stream_on_which_nobody_speaks_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """G9: whoever opens a stream and says nothing is not waited for without end."""
    monkeypatch.setattr(rpc, "FIRST_MESSAGE_S_MAX", 0.2)
    with (
        Primary.open(tmp_path / "p", listen="127.0.0.1:0") as primary,
        grpc.insecure_channel(primary.address) as channel,
    ):
        silent = threading.Event()

        def says_nothing() -> Iterator[bytes]:
            silent.wait(30)
            yield from ()

        call = channel.stream_stream(f"/understudy.v1.{method}")(says_nothing(), timeout=20)
        with pytest.raises(grpc.RpcError) as ended:
            next(call)
        assert "no first message came" in ended.value.details()
        silent.set()


def test_bytes_that_an_operation_has_no_use_for_count_as_well() -> None:
    """G9: an end on a put can't carry a transaction past its limit, and so past what a reader of the log takes."""
    with pytest.raises(TransactionTooLarge):
        check_operations([log_pb2.Operation(kind=PUT, key=b"k", end=b"e" * (17 << 20))])


def test_wait_tells_the_receipt_of_an_answer_that_came_meanwhile(tmp_path: Path) -> None:
    """G6: after OutcomeUnknown the receipt is there even when the answer came before somebody asked for it."""
    with (
        Primary.open(tmp_path / "p", listen="127.0.0.1:0", durability="replica") as primary,
        connect(primary.address) as client,
    ):
        with pytest.raises(OutcomeUnknown) as unknown:
            client.commit("/realm", [Put(b"key", b"value")], timeout_s=0.1)

        async def follow() -> None:
            settings = ReplicaSettings(
                data_dir=tmp_path / "r", primary=primary.address, listen="127.0.0.1:0", id="r"
            )
            async with serving_replica(settings):
                await asyncio.to_thread(wait_until, lambda: primary.status().committed_lsn >= 3)

        asyncio.run(follow())
        wait_until(lambda: client.get("/realm", b"key") == b"value")
        for _ in range(2):
            assert client.wait(unknown.value.number, timeout_s=10).version == 1


def test_a_scan_that_is_dropped_on_the_portal_s_own_thread_does_not_stop_it(tmp_path: Path) -> None:
    """The garbage collector may close an abandoned scan on any thread, that of the event loop included."""
    with Primary.open(tmp_path / "p", listen="127.0.0.1:0") as primary, connect(primary.address) as client:
        client.commit("/realm", [Put(b"%d" % number, b"value") for number in range(3)])
        for pairs in (client.scan("/realm"), primary.scan("/realm")):
            next(pairs)

            async def close(pairs: object = pairs) -> None:
                pairs.close()  # type: ignore[attr-defined]

            portal.call(close())
            assert client.count("/realm") == 3
