"""What a primary answers a replica that wants to follow: one table, every combination exactly one row.

Pure: facts in, decision out. How the facts are found is the shell's business.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from understudy.v1 import replication_pb2

PROTOCOL_VERSION: Final = 1

Decision = replication_pb2.Decision


class Protocol(enum.Enum):
    """Does the peer speak our protocol version?"""

    SAME = enum.auto()
    OTHER = enum.auto()


class Reign(enum.Enum):
    """Are we entitled to be followed?"""

    PRIMARY = enum.auto()
    FENCED = enum.auto()
    OTHER = enum.auto()  # a replica, for example


class Cluster(enum.Enum):
    """Whose copy does the peer hold?"""

    NONE = enum.auto()  # it holds none yet
    SAME = enum.auto()
    FOREIGN = enum.auto()


class Claim(enum.Enum):
    """Which epoch does the peer claim?"""

    NOT_HIGHER = enum.auto()
    HIGHER_PROVEN = enum.auto()
    HIGHER_UNPROVEN = enum.auto()


class Slot(enum.Enum):
    """Is the peer's replica id free for it?"""

    FREE = enum.auto()
    TAKEN = enum.auto()  # connected already, from another copy


class Relation(enum.Enum):
    """Where is the peer's head in relation to our history?"""

    ON_LOG = enum.auto()  # same digest, and our log goes on from there
    PRUNED = enum.auto()  # on our history, but our log no longer goes on from there
    BEYOND = enum.auto()  # past our head, in our epoch, and nothing it shows contradicts us
    FORKED = enum.auto()  # its digest differs, or it was written after an epoch of ours had forked off


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowFacts:
    """All that the decision depends on."""

    protocol: Protocol
    reign: Reign
    cluster: Cluster
    claim: Claim
    slot: Slot
    relation: Relation


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row; a field that is None matches anything."""

    decision: Decision.ValueType
    protocol: Protocol | None = Protocol.SAME
    reign: Reign | None = Reign.PRIMARY
    cluster: Cluster | None = Cluster.SAME
    claim: Claim | None = Claim.NOT_HIGHER
    slot: Slot | None = Slot.FREE
    relation: Relation | None = None

    def matches(self, facts: FollowFacts) -> bool:
        """Whether the row is about these facts."""
        return all(
            wanted is None or wanted is found
            for wanted, found in (
                (self.protocol, facts.protocol),
                (self.reign, facts.reign),
                (self.cluster, facts.cluster),
                (self.claim, facts.claim),
                (self.slot, facts.slot),
                (self.relation, facts.relation),
            )
        )


# A peer that proves a higher epoch is heard whatever else is wrong with it, so that an old primary learns of its
# end as early as can be. Nothing of a foreign cluster can fence us.
TABLE: Final = (
    Row(decision=Decision.PROTOCOL_MISMATCH, protocol=Protocol.OTHER, reign=None, cluster=None, claim=None, slot=None),
    Row(decision=Decision.FOREIGN_CLUSTER, reign=None, cluster=Cluster.FOREIGN, claim=None, slot=None),
    Row(decision=Decision.FENCED, reign=Reign.PRIMARY, claim=Claim.HIGHER_PROVEN, slot=None),
    Row(decision=Decision.FENCED, reign=Reign.FENCED, claim=None, slot=None),
    Row(decision=Decision.FENCED, reign=Reign.FENCED, cluster=Cluster.NONE, claim=None, slot=None),
    Row(decision=Decision.NOT_PRIMARY, reign=Reign.OTHER, claim=None, slot=None),
    Row(decision=Decision.NOT_PRIMARY, reign=Reign.OTHER, cluster=Cluster.NONE, claim=None, slot=None),
    Row(decision=Decision.UNPROVEN_EPOCH, claim=Claim.HIGHER_UNPROVEN, slot=None),
    Row(decision=Decision.DUPLICATE_ID, slot=Slot.TAKEN),
    Row(decision=Decision.DUPLICATE_ID, cluster=Cluster.NONE, claim=None, slot=Slot.TAKEN),
    Row(decision=Decision.BOOTSTRAP, cluster=Cluster.NONE, claim=None),
    Row(decision=Decision.STREAM, relation=Relation.ON_LOG),
    Row(decision=Decision.BOOTSTRAP, relation=Relation.PRUNED),
    Row(decision=Decision.AHEAD_OF_PRIMARY, relation=Relation.BEYOND),
    Row(decision=Decision.DIVERGED, relation=Relation.FORKED),
)  # fmt: skip


def decide(facts: FollowFacts) -> Decision.ValueType:
    """The decision of the one row that matches."""
    [row] = [row for row in TABLE if row.matches(facts)]
    return row.decision
