"""What ``docs/metrics.md`` describes is what is exported, no more and no less."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from understudy.client import Put, aconnect
from understudy.common import metrics
from understudy.common.errors import Unavailable
from understudy.common.metrics import StatusCollector
from understudy.common.metrics_server import serve_metrics
from understudy.common.settings import PrimarySettings, ReplicaSettings
from understudy.primary.server import serving_primary
from understudy.replica.server import serving_replica
from understudy.v1 import admin_pb2

DOCUMENT = Path(__file__).parent.parent / "docs" / "metrics.md"


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _documented() -> dict[str, str]:
    rows = re.findall(r"^\| `(understudy_\w+)` \| (\w+) \|", DOCUMENT.read_text(), re.MULTILINE)
    return dict(rows)


async def _scrape(address: str) -> str:
    def fetch() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
            return str(response.read().decode())

    return await asyncio.to_thread(fetch)


def _exported(text: str) -> dict[str, str]:
    return dict(re.findall(r"^# TYPE (understudy_\w+) (\w+)$", text, re.MULTILINE))


def _with_created(documented: dict[str, str]) -> dict[str, str]:
    assert "`_created`" in DOCUMENT.read_text()
    # With labels, only once there is something to count.
    rows = re.findall(
        r"^\| `(understudy_\w+)` \| (?:counter|histogram) \| \|", DOCUMENT.read_text(), re.MULTILINE
    )
    return documented | {name.removesuffix("_total") + "_created": "gauge" for name in rows}


async def _both(tmp_path: Path) -> tuple[str, str]:
    metrics = [_free_address(), _free_address()]
    settings = PrimarySettings(data_dir=tmp_path / "p", listen="127.0.0.1:0", metrics=metrics[0])
    async with serving_primary(settings) as primary:
        following = ReplicaSettings(
            data_dir=tmp_path / "r",
            primary=primary.address,
            listen="127.0.0.1:0",
            id="r1",
            metrics=metrics[1],
        )
        async with serving_replica(following), aconnect(primary.address) as server:
            await server.commit("/metrics", [Put(b"key", b"value")], durability="applied")
            return await _scrape(metrics[0]), await _scrape(metrics[1])


def test_every_metric_is_documented_with_its_type_and_every_documented_one_is_exported(
    tmp_path: Path,
) -> None:
    """Primary and replica together export exactly the names and types of the document's table."""
    primary, replica = asyncio.run(_both(tmp_path))
    assert _exported(primary) | _exported(replica) == _with_created(_documented())


def test_a_replica_is_shown_with_its_lag_and_commits_are_counted(tmp_path: Path) -> None:
    """The primary exports the replica by its id as connected, and the transaction that was acknowledged."""
    primary, replica = asyncio.run(_both(tmp_path))
    assert 'understudy_replica_connected{replica="r1"} 1.0' in primary
    assert 'understudy_replica_lag_entries{replica="r1"} 0.0' in primary
    assert "understudy_commits_total 1.0" in primary
    assert "understudy_upstream_connected 1.0" in replica


async def _threads_that_read_the_status() -> list[int]:
    threads = []

    def status() -> admin_pb2.StatusResponse:
        threads.append(threading.get_ident())
        return admin_pb2.StatusResponse(cluster=bytes(16), node=bytes(16))

    address, registry = _free_address(), CollectorRegistry()
    registry.register(StatusCollector(status))
    with serve_metrics(address, registry):
        assert "understudy_lsn 0.0" in await _scrape(address)
    return threads


def test_a_scrape_reads_the_node_on_the_event_loop() -> None:
    """Slots, log and store belong to the event loop, so a scrape's thread has the loop read them."""
    assert asyncio.run(_threads_that_read_the_status()) == [threading.get_ident()]


def test_a_scrape_does_not_wait_for_ever_for_a_loop_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: where the loop does not come round, the scrape fails after a while."""
    monkeypatch.setattr(metrics, "STATUS_S_MAX", 0.05)

    async def stuck() -> None:
        collector = StatusCollector(admin_pb2.StatusResponse)
        with ThreadPoolExecutor(1) as threads, pytest.raises(Unavailable, match="has not come round"):
            threads.submit(lambda: list(collector.collect())).result(60)  # blocks this loop meanwhile

    asyncio.run(stuck())
