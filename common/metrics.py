"""Prometheus metrics, every name in one place; ``docs/metrics.md`` describes them and a test compares the two.

Counters and histograms are fed where things happen; everything that is a fact of the moment (LSNs, lag) is read
when somebody scrapes, from the same status message that ``understudy status`` shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from understudy.common.errors import Unavailable
from understudy.common.types import format_id
from understudy.v1 import admin_pb2

_LATENCY_BUCKETS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip


# A loop that does not come round to it for so long is ill; below the ten seconds that Prometheus waits by default.
STATUS_S_MAX = 5.0


class EngineMetrics:
    """What the engine and its owner count."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.commits = Counter("understudy_commits", "Transactions acknowledged.", registry=self.registry)
        self.refusals = Counter(
            "understudy_refusals", "Transactions refused, by reason.", ["code"], registry=self.registry
        )
        self.logins = Counter(
            "understudy_logins", "Passwords that were checked.", ["outcome"], registry=self.registry
        )
        self.commit_seconds = Histogram(
            "understudy_commit_seconds",
            "From a transaction's arrival to its acknowledgement.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._syncs = Counter(
            "understudy_log_syncs", "Calls of fdatasync on the change-log.", registry=self.registry
        )
        self._log_bytes = Counter(
            "understudy_log_written_bytes", "Record bytes written.", registry=self.registry
        )
        self._sync_seconds = Histogram(
            "understudy_log_sync_seconds",
            "Duration of a batch's write and fdatasync.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._checkpoint_seconds = Histogram(
            "understudy_checkpoint_seconds", "Duration of a checkpoint.", registry=self.registry
        )
        self._comparisons = Counter(
            "understudy_digest_comparisons", "State digests compared at digest marks.", registry=self.registry
        )
        self._mismatches = Counter(
            "understudy_digest_mismatches", "State digests that differed.", registry=self.registry
        )

    def observe_sync(self, seconds: float, written: int) -> None:
        """One batch of ``written`` bytes became durable."""
        self._syncs.inc()
        self._log_bytes.inc(written)
        self._sync_seconds.observe(seconds)

    def observe_checkpoint(self, seconds: float) -> None:
        """One checkpoint was written."""
        self._checkpoint_seconds.observe(seconds)

    def count_comparison(self, *, equal: bool) -> None:
        """One digest mark was compared."""
        self._comparisons.inc()
        if not equal:
            self._mismatches.inc()


class StatusCollector(Collector):
    """Gauges made from a status message when scraped, from any thread but the event loop's.

    Args:
        status: is called on the event loop that runs now, to which all that it reads belongs.
    """

    def __init__(self, status: Callable[[], admin_pb2.StatusResponse]) -> None:
        self._status = status
        self._loop = asyncio.get_running_loop()

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known only with a status at hand, which must not be asked for at registration."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All gauges as of now.

        Raises:
            Unavailable: the loop did not answer in time.
        """
        status = self._fetch()
        yield InfoMetricFamily(
            "understudy_node",
            "Who this is.",
            {
                "role": status.role,
                "cluster": format_id(status.cluster),
                "node": format_id(status.node),
                "version": status.version,
            },
        )
        for name, text, value in (
            ("understudy_epoch", "Epoch of the last applied entry.", status.epoch),
            ("understudy_lsn", "Last entry made or received.", status.lsn),
            ("understudy_durable_lsn", "Last entry durable here.", status.durable_lsn),
            ("understudy_committed_lsn", "Last entry visible to reads.", status.committed_lsn),
            ("understudy_checkpoint_lsn", "Last entry in the store.", status.checkpoint_lsn),
            ("understudy_realms", "Number of realms.", status.realms),
            (
                "understudy_degraded",
                "1 while durability is degraded to local.",
                float(status.durability.endswith("(degraded)")),
            ),
            ("understudy_warnings", "Number of warnings in the status.", len(status.warnings)),
        ):
            yield GaugeMetricFamily(name, text, value)
        yield from _replica_gauges(status)
        yield from _backup_gauges(status)
        if status.HasField("upstream"):
            yield from _upstream_gauges(status.upstream)

    def _fetch(self) -> admin_pb2.StatusResponse:
        asked = asyncio.run_coroutine_threadsafe(self._ask(), self._loop)
        try:
            return asked.result(STATUS_S_MAX)
        except TimeoutError:
            raise Unavailable(f"the event loop has not come round for {STATUS_S_MAX:g} s") from None

    async def _ask(self) -> admin_pb2.StatusResponse:
        return self._status()


def _replica_gauges(status: admin_pb2.StatusResponse) -> Iterable[Metric]:
    connected = GaugeMetricFamily("understudy_replica_connected", "1 while connected.", labels=["replica"])
    entries = GaugeMetricFamily(
        "understudy_replica_lag_entries", "Entries not durable there.", labels=["replica"]
    )
    size = GaugeMetricFamily(
        "understudy_replica_lag_bytes", "Log bytes not durable there.", labels=["replica"]
    )
    seconds = GaugeMetricFamily(
        "understudy_replica_lag_seconds", "Age of the oldest entry not applied there.", labels=["replica"]
    )
    for replica in status.replicas:
        connected.add_metric([replica.id], float(replica.connected))
        entries.add_metric([replica.id], replica.lag_entries)
        size.add_metric([replica.id], replica.lag_bytes)
        seconds.add_metric([replica.id], replica.lag_seconds)
    return (connected, entries, size, seconds)


def _backup_gauges(status: admin_pb2.StatusResponse) -> Iterable[Metric]:
    success = GaugeMetricFamily(
        "understudy_backup_last_success_timestamp_seconds",
        "Start of a policy's last run in which all went well, since 1970; 0 for never.",
        labels=["policy"],
    )
    failure = GaugeMetricFamily(
        "understudy_backup_last_failure_timestamp_seconds",
        "Start of a policy's last run in which something did not; 0 for never.",
        labels=["policy"],
    )
    behind = GaugeMetricFamily(
        "understudy_backup_log_behind_entries",
        "Entries not shipped to the repository.",
        labels=["policy", "repository"],
    )
    for policy in status.backups:
        success.add_metric([policy.policy], policy.last_success_s)
        failure.add_metric([policy.policy], policy.last_failure_s)
        for repository in policy.repositories:
            entries = max(status.durable_lsn - repository.shipped_lsn, 0)
            behind.add_metric([policy.policy, repository.url], entries)
    return (success, failure, behind)


def _upstream_gauges(upstream: admin_pb2.UpstreamStatus) -> Iterable[Metric]:
    yield GaugeMetricFamily("understudy_upstream_connected", "1 while following.", float(upstream.connected))
    yield GaugeMetricFamily(
        "understudy_upstream_lag_entries", "Entries not durable here.", upstream.lag_entries
    )
    yield GaugeMetricFamily(
        "understudy_upstream_lag_bytes", "Log bytes not durable here.", upstream.lag_bytes
    )
    yield GaugeMetricFamily(
        "understudy_upstream_lag_seconds", "Age of the oldest entry not applied here.", upstream.lag_seconds
    )
