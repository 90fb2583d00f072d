"""Replicas whose positions lie below what the log still holds: what is kept of history tells them apart."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from log_helpers import CLUSTER

from understudy.common.follow_table import PROTOCOL_VERSION, Decision, Slot
from understudy.common.types import START, Digest, Lsn, Position
from understudy.primary.replication_service import ReplicationService
from understudy.v1 import replication_pb2, store_pb2


def _digest(lsn: int) -> Digest:
    return Digest(bytes([lsn]) * 32)


def _pruned_primary() -> ReplicationService:
    """Of epoch 2, which began behind entry 30; its log goes from 50 to 60, and it has a mark at 20."""
    log = {lsn: Position(Lsn(lsn), _digest(lsn)) for lsn in range(49, 61)}
    begun = replication_pb2.EpochInfo(epoch=1, first_lsn=1, previous=START.digest)
    forked = replication_pb2.EpochInfo(epoch=2, first_lsn=31, previous=_digest(30))
    marks = [Position(Lsn(20), _digest(20))]
    engine = SimpleNamespace(
        directory=SimpleNamespace(cluster=CLUSTER),
        durable=log[60],
        epoch=2,
        history_key=b"",
        log=SimpleNamespace(first_lsn=50, position_at=log.get),
        state=SimpleNamespace(
            epochs=[store_pb2.EpochRow(info=info) for info in (begun, forked)],
            store=SimpleNamespace(current=SimpleNamespace(marks=lambda: marks)),
        ),
    )
    return ReplicationService(SimpleNamespace(engine=engine, is_fenced=False), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("epoch", "lsn", "digest", "decision"),
    [
        (1, 20, _digest(20), Decision.BOOTSTRAP),
        (1, 20, _digest(99), Decision.DIVERGED),  # the mark says so
        (1, 30, _digest(30), Decision.BOOTSTRAP),
        (1, 30, _digest(99), Decision.DIVERGED),  # the start of our epoch says so
        (1, 40, _digest(99), Decision.DIVERGED),  # went on in an epoch that was over: the epoch table says so
        (2, 40, _digest(40), Decision.BOOTSTRAP),
        (2, 55, _digest(55), Decision.STREAM),
        (2, 55, _digest(99), Decision.DIVERGED),
    ],
)
def test_g3_what_is_pruned_from_the_log_is_still_told_apart(
    epoch: int, lsn: int, digest: Digest, decision: Decision.ValueType
) -> None:
    """G3, G4: by marks and epoch table a diverged copy is known for one, and not replaced as if it were only old."""
    hello = replication_pb2.Hello(
        protocol_version=PROTOCOL_VERSION,
        cluster=CLUSTER,
        epoch=epoch,
        locator=[
            replication_pb2.Position(lsn=lsn, digest=digest),
            replication_pb2.Position(lsn=START.lsn, digest=START.digest),
        ],
    )
    found, _ = asyncio.run(_pruned_primary()._decide(hello, Slot.FREE))
    assert found == decision
