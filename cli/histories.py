"""Whether two running nodes can be of one history at all, from what each says of itself; no scan is needed for it.

A node's status has the start of its present epoch, with the digest of the entry before: where that epoch forked.
Only a node whose log has that start is of this epoch or a later one, so of two nodes the one of the lower epoch may
not have anything beyond the fork.
"""

from __future__ import annotations

from dataclasses import dataclass

from understudy.common.directory import Role
from understudy.common.entries import parse_epoch_start
from understudy.common.errors import Diverged, ForeignCluster, ResetNeeded, Unavailable, UsageError
from understudy.common.types import format_id
from understudy.v1 import admin_pb2, log_pb2


@dataclass(frozen=True, slots=True)
class Standing:
    """A node's address, and what it says of itself."""

    address: str
    status: admin_pb2.StatusResponse

    @property
    def epoch_start(self) -> log_pb2.EpochStart | None:
        """The start of its present epoch, once it has one."""
        parsed = parse_epoch_start(self.status.proof.entry)
        return parsed[0] if parsed else None

    def __str__(self) -> str:
        status = self.status
        return f"{self.address} ({status.role}, epoch {status.epoch}, LSN {status.durable_lsn})"


def check_related(one: Standing, other: Standing) -> None:
    """Refuses nodes that are certainly not of one history. Others may not be either: their digests tell.

    Raises:
        ForeignCluster: they have nothing to do with each other.
        Diverged: each has entries that the other lacks.
        UsageError: one primary was given by two addresses.
        ResetNeeded: both are primaries.
        Unavailable: one holds nothing yet.
    """
    for standing in (one, other):
        if not standing.status.cluster:
            raise Unavailable(
                f"{standing.address} has no copy yet", remedy="try again when it has finished its bootstrap"
            )
    ours, theirs = one.status, other.status
    if ours.cluster != theirs.cluster:
        raise ForeignCluster(
            f"{one.address} is of cluster {format_id(ours.cluster)}, {other.address} of {format_id(theirs.cluster)}: "
            "they never had anything in common",
            remedy="give two nodes of one cluster",
        )
    if _have_forked(one, other):
        raise diverged(one, other)
    # Each writes marks of its own, so the two would never come to a checkpoint at the same entry.
    if ours.role == theirs.role == Role.PRIMARY and one.address != other.address:
        if ours.node == theirs.node:
            raise UsageError(
                f"{one.address} and {other.address} are the same node, {format_id(ours.node)}",
                remedy="give two nodes; if they are two processes, one has a copy of the other's directory: stop it",
            )
        raise ResetNeeded(
            f"{one} and {other} are both primaries: {_last_common(*_by_epoch(one, other))}",
            remedy=_remedy(one, other),
        )


def _have_forked(one: Standing, other: Standing) -> bool:
    lower, higher = _by_epoch(one, other)
    start, there = higher.epoch_start, lower.status
    if there.durable_lsn == higher.status.durable_lsn and there.digest != higher.status.digest:
        return True
    if start is None:
        return False
    if there.epoch == higher.status.epoch:
        return lower.epoch_start not in (None, start)
    if there.durable_lsn == start.lsn - 1:
        return there.digest != start.previous
    # A replica learns of an epoch when it applies its start, and may have more than that durable.
    reach = there.committed_lsn if there.role == Role.REPLICA else there.durable_lsn
    return reach >= start.lsn


def _by_epoch(one: Standing, other: Standing) -> tuple[Standing, Standing]:
    return (one, other) if one.status.epoch <= other.status.epoch else (other, one)


def diverged(one: Standing, other: Standing) -> Diverged:
    """The error for two nodes of different histories: which is which, what they can share at most, what to do."""
    return Diverged(
        f"{one} and {other} have diverged: {_last_common(*_by_epoch(one, other))}",
        remedy=_remedy(one, other),
    )


def _remedy(one: Standing, other: Standing) -> str:
    lower, higher = _by_epoch(one, other)
    if lower.status.epoch == higher.status.epoch:
        stop, to = "decide which one stays, stop the other", "HOST:PORT"
    else:
        stop = f"stop {lower.address}"
        to = higher.address if higher.status.role == Role.PRIMARY else "HOST:PORT"
    return f"{stop}, and make it a replica of the new primary: understudy rewind DIR --to {to}"


def _last_common(lower: Standing, higher: Standing) -> str:
    starts = [start for start in (lower.epoch_start, higher.epoch_start) if start is not None]
    if not starts:
        return "neither says where its epoch began"
    if len(starts) == 2 and starts[0] == starts[1]:
        start = starts[0]
        return f"the last position known to be common is LSN {start.lsn}, where epoch {start.epoch} began"
    # The higher epoch's start decides; of two starts of one epoch, what lies before the earlier one.
    same = [start for start in starts if start.epoch == higher.status.epoch]
    start = min(same or starts, key=lambda start: start.lsn)
    return (
        f"they can share nothing beyond LSN {start.lsn - 1}, digest {start.previous.hex()[:16]}, where epoch "
        f"{start.epoch} forked off"
    )
