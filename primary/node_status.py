"""What a primary says of itself: position, replicas and how far they are behind, what came home, warnings."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from understudy.common import entries
from understudy.common.directory import Role
from understudy.common.errors import UnderstudyError
from understudy.common.types import Durability, Lsn
from understudy.common.version import VERSION
from understudy.primary.slots import Slot
from understudy.v1 import admin_pb2

if TYPE_CHECKING:
    from understudy.primary.node import PrimaryNode

_STREAMING_ENTRIES = 10_000  # a replica that is no further behind than this is not called catching up


def tell_status(node: PrimaryNode) -> admin_pb2.StatusResponse:
    """What ``understudy status`` shows, but for how peers get in."""
    engine, committer = node.engine, node.committer
    worker = engine.directory.backup_worker
    return admin_pb2.StatusResponse(
        role=(Role.FENCED if node.is_fenced else engine.directory.role).value,
        cluster=engine.directory.cluster,
        node=engine.directory.node,
        epoch=engine.epoch,
        lsn=committer.position.lsn,
        durable_lsn=engine.durable.lsn,
        committed_lsn=committer.committed_lsn,
        checkpoint_lsn=engine.checkpoint.lsn,
        digest=engine.durable.digest,
        realms=engine.state.user_realm_count,
        durability=node.settings.durability.name.lower() + (" (degraded)" if committer.degraded else ""),
        replicas=[_replica_status(node, slot) for slot in node.slots],
        warnings=_warnings(node),
        version=VERSION,
        proof=node.epoch_proof,
        healing=node.heal_window.status(time.monotonic()),
        backups=worker.statuses() if worker is not None else (),
    )


def _replica_status(node: PrimaryNode, slot: Slot) -> admin_pb2.ReplicaStatus:
    head, end_offset = node.engine.durable.lsn, node.engine.log.end_offset
    connected = node.slots.is_connected(slot.id)
    behind = max(head - slot.applied_lsn, 0) if slot.applied_lsn else head - slot.durable_lsn
    if slot.lost:
        state = "lost"
    elif not connected:
        state = "disconnected"
    else:
        state = "streaming" if head - slot.durable_lsn < _STREAMING_ENTRIES else "catching up"
    return admin_pb2.ReplicaStatus(
        id=slot.id,
        connected=connected,
        state=state,
        durable_lsn=slot.durable_lsn,
        applied_lsn=slot.applied_lsn,
        lag_entries=max(head - slot.durable_lsn, 0),
        lag_bytes=max(end_offset - slot.durable_offset, 0),
        lag_seconds=_lag_seconds(node, slot) if behind else 0.0,
    )


def _lag_seconds(node: PrimaryNode, slot: Slot) -> float:
    """The age of the first entry that the replica has not applied (or not made durable, while it is away)."""
    upto = Lsn(slot.applied_lsn or slot.durable_lsn)
    if upto >= node.engine.durable.lsn:
        return 0.0
    if upto + 1 < node.engine.log.first_lsn:
        return (_now_us() - slot.seen_us) / 1e6
    try:
        [record] = node.engine.log.records(upto, Lsn(upto + 1))
        return max(_now_us() - entries.parse_entry(record.payload, record.lsn).time_us, 0) / 1e6
    except (UnderstudyError, ValueError):
        # Pruned just now, or storage has failed: status must still tell.
        return max(_now_us() - slot.seen_us, 0) / 1e6


def _warnings(node: PrimaryNode) -> list[str]:
    found = list(node.engine.warnings)
    if node.tls is not None:
        found += node.tls.warnings()
    if node.is_fenced:
        found.append(f"fenced: {node.committer.refusal}")
    if node.freezer.is_on:
        until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + node.freezer.seconds_left))
        found.append(f"frozen until {until}: transactions wait; `understudy thaw` ends it")
    if node.log_damage:
        found.append(node.log_damage)
    if node.engine.disk_full:
        found.append(f"no space left in {node.engine.directory.path}: writes are refused")
    if node.committer.degraded:
        found.append("durability is degraded to local: too few replicas are connected")
    elif (
        node.settings.durability > Durability.LOCAL
        and node.slots.connected_count < node.settings.sync_replicas
    ):
        found.append(
            f"{node.slots.connected_count} of {node.settings.sync_replicas} needed replicas are connected: "
            "transactions wait"
        )
    found += [
        f"replica {slot.id} was lost and must bootstrap again; if it will not come back: "
        f"understudy forget {slot.id} --server HOST:PORT"
        for slot in node.slots
        if slot.lost
    ]
    worker = node.engine.directory.backup_worker
    return found + (worker.warnings() if worker is not None else [])


def _now_us() -> int:
    return time.time_ns() // 1_000
