"""Whether two nodes can be of one history, from their status alone."""

from __future__ import annotations

import pytest

from understudy.cli.histories import Standing, check_related
from understudy.common import entries
from understudy.common.errors import (
    Diverged,
    ForeignCluster,
    ResetNeeded,
    Unavailable,
    UnderstudyError,
    UsageError,
)
from understudy.common.types import ClusterId, Digest, Epoch, Lsn, NodeId, Position
from understudy.v1 import admin_pb2, replication_pb2

CLUSTER = b"c" * 16
FORK = b"f" * 32  # the digest of LSN 10, behind which epoch 2 begins


def standing(
    role: str = "primary",
    *,
    epoch: int,
    lsn: int,
    applied: int | None = None,
    digest: bytes = b"",
    fork: bytes = FORK,
    cluster: bytes = CLUSTER,
    node: bytes = b"",
) -> Standing:
    """What a node says of itself; epoch 1 began at LSN 1, epoch 2 at LSN 11."""
    start = entries.epoch_entry(
        time_us=1,
        cluster=ClusterId(CLUSTER),
        epoch=Epoch(epoch),
        after=Position(Lsn(0 if epoch == 1 else 10), Digest(fork)),
        node=NodeId(bytes(16)),
        key=b"key",
    )
    return Standing(
        f"{role} of epoch {epoch}",
        admin_pb2.StatusResponse(
            role=role,
            cluster=cluster,
            node=node or f"{role} of {epoch}".ljust(16).encode(),
            epoch=epoch,
            durable_lsn=lsn,
            committed_lsn=lsn if applied is None else applied,
            digest=digest or b"%d" % lsn,
            proof=replication_pb2.EpochProof(entry=start) if epoch else None,
        ),
    )


NEW = standing(epoch=2, lsn=20)


@pytest.mark.parametrize(
    "other",
    [
        standing("replica", epoch=2, lsn=20),
        standing("replica", epoch=2, lsn=15),
        standing("replica", epoch=1, lsn=15, applied=10),  # has the start of epoch 2, and not applied it yet
        standing("replica", epoch=1, lsn=10, digest=FORK),
        standing("replica", epoch=1, lsn=5),
        standing("fenced", epoch=1, lsn=5),
        standing("fenced", epoch=1, lsn=10, digest=FORK),
        standing("fenced", epoch=2, lsn=15),
    ],
)
def test_what_may_be_of_one_history_is_compared(other: Standing) -> None:
    """A node that is only behind, or that has what the other has, is not refused."""
    check_related(NEW, other)
    check_related(other, NEW)


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (standing("fenced", epoch=1, lsn=11), Diverged),
        (standing("fenced", epoch=1, lsn=30), Diverged),
        (standing("fenced", epoch=1, lsn=10, digest=b"another"), Diverged),
        (standing("replica", epoch=1, lsn=11), Diverged),
        (standing("replica", epoch=2, lsn=20, digest=b"another"), Diverged),
        (standing("fenced", epoch=2, lsn=15, fork=b"another"), Diverged),
        (standing("replica", epoch=2, lsn=15, fork=b"another"), Diverged),
        (standing(epoch=1, lsn=5), ResetNeeded),
        (standing("replica", epoch=2, lsn=20, cluster=b"d" * 16), ForeignCluster),
        (standing("replica", epoch=0, lsn=0, cluster=b""), Unavailable),
    ],
)
def test_what_can_not_be_of_one_history_is_refused(other: Standing, kind: type[UnderstudyError]) -> None:
    """G3: entries beyond a fork, and another digest at one LSN, are another history, whoever is named first."""
    for pair in ((NEW, other), (other, NEW)):
        with pytest.raises(kind) as raised:
            check_related(*pair)
        assert type(raised.value) is kind


def test_one_primary_under_two_names_is_no_second_one() -> None:
    """A primary given by two addresses is told as one node, with no advice to rewind it, though it writes meanwhile."""
    later = standing(epoch=2, lsn=25)
    again = Standing("another name", later.status)
    with pytest.raises(UsageError, match="are the same node") as raised:
        check_related(NEW, again)
    assert "rewind" not in str(raised.value)
    check_related(NEW, later)  # by one address


def test_a_copied_replica_is_compared() -> None:
    """A replica that was seeded with a copy of its primary's directory has its node id, and is another node."""
    check_related(NEW, standing("replica", epoch=2, lsn=15, node=NEW.status.node))
