"""What a server answers a client that binds a realm: one table, every combination exactly one row.

Pure: facts in, answer out. :mod:`understudy.common.realm_relation` finds the facts.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import Final

from understudy.v1 import sync_pb2

Decision = sync_pb2.SyncDecision
Reason = sync_pb2.ResetReason
STREAM, LOAD, HEAL, RESET = sync_pb2.SYNC_STREAM, sync_pb2.SYNC_LOAD, sync_pb2.SYNC_HEAL, sync_pb2.SYNC_RESET


class Cluster(enum.Enum):
    """Whose copy does the client hold?"""

    NONE = enum.auto()  # it holds none of this realm
    SAME = enum.auto()
    FOREIGN = enum.auto()


class Realm(enum.Enum):
    """What is there under that name?"""

    HERE = enum.auto()  # the realm of the copy, or any realm where the client has no copy
    GONE = enum.auto()  # none: it was dropped, or never was while the client has no copy
    LOST = enum.auto()  # none: it began in the part of the history that this server has lost
    RECREATED = enum.auto()  # another one, which began anew


class Relation(enum.Enum):
    """Where is the head of the client's copy in relation to our realm's history?"""

    ON_HISTORY = enum.auto()  # same digest, and the history goes on from there
    PRUNED = enum.auto()  # on our history as far as can be told, but it no longer goes on from there
    BEYOND = enum.auto()  # past our head, and nothing that it shows contradicts us
    FORKED = enum.auto()  # its digest differs, or it was made after an epoch of ours had forked off


class Tail(enum.Enum):
    """Do the raw changes that the client keeps reach back to our head?"""

    REACHES = enum.auto()
    SHORT = enum.auto()


class Identity(enum.Enum):
    """What do we know of the client's own changes?"""

    NEW = enum.auto()  # it has sent none, or none that we would still have to know
    KNOWN = enum.auto()  # at least all that it has had confirmed
    BEYOND = enum.auto()  # less than it has had confirmed
    UNKNOWN = enum.auto()  # nothing, though it had some confirmed lately
    EXPIRED = enum.auto()  # nothing, and it was away for longer than clients are remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncFacts:
    """All that the answer depends on."""

    cluster: Cluster
    realm: Realm
    relation: Relation
    tail: Tail
    identity: Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row; a field that is None matches anything."""

    decision: Decision.ValueType
    reason: Reason.ValueType = Reason.RESET_UNSPECIFIED
    cluster: Cluster | None = Cluster.SAME
    realm: Realm | None = Realm.HERE
    relation: Relation | None = None
    tail: Tail | None = None
    identity: Identity | None = None

    def matches(self, facts: SyncFacts) -> bool:
        """Whether the row is about these facts."""
        return all(
            wanted is None or wanted is found
            for wanted, found in (
                (self.cluster, facts.cluster),
                (self.realm, facts.realm),
                (self.relation, facts.relation),
                (self.tail, facts.tail),
                (self.identity, facts.identity),
            )
        )


# A client without a copy has nothing that could contradict ours, so only its own changes count. Where history itself
# says that all is well, a client that nobody remembers is no danger either: what it sends twice is found there.
TABLE: Final = (
    Row(decision=RESET, reason=Reason.FOREIGN_CLUSTER_COPY, cluster=Cluster.FOREIGN, realm=None),
    # No copy.
    Row(decision=STREAM, cluster=Cluster.NONE, realm=Realm.GONE),
    Row(decision=STREAM, cluster=Cluster.NONE, realm=Realm.LOST),
    Row(decision=LOAD, cluster=Cluster.NONE, identity=Identity.NEW),
    Row(decision=LOAD, cluster=Cluster.NONE, identity=Identity.KNOWN),
    Row(decision=RESET, reason=Reason.NUMBERS_BEYOND, cluster=Cluster.NONE, identity=Identity.BEYOND),
    Row(decision=RESET, reason=Reason.CLIENT_UNKNOWN, cluster=Cluster.NONE, identity=Identity.UNKNOWN),
    Row(decision=RESET, reason=Reason.CLIENT_EXPIRED, cluster=Cluster.NONE, identity=Identity.EXPIRED),
    Row(decision=RESET, reason=Reason.REALM_RECREATED, cluster=Cluster.NONE, realm=Realm.RECREATED),
    # The realm is not there, or not the same.
    Row(decision=RESET, reason=Reason.REALM_GONE, realm=Realm.GONE),
    Row(decision=RESET, reason=Reason.REALM_RECREATED, realm=Realm.RECREATED),
    Row(decision=HEAL, realm=Realm.LOST, tail=Tail.REACHES),
    Row(decision=RESET, reason=Reason.SERVER_BEHIND, realm=Realm.LOST, tail=Tail.SHORT),
    # It is.
    Row(decision=RESET, reason=Reason.OTHER_HISTORY, relation=Relation.FORKED),
    Row(decision=HEAL, relation=Relation.BEYOND, tail=Tail.REACHES),
    Row(decision=RESET, reason=Reason.SERVER_BEHIND, relation=Relation.BEYOND, tail=Tail.SHORT),
    Row(decision=STREAM, relation=Relation.ON_HISTORY, identity=Identity.NEW),
    Row(decision=STREAM, relation=Relation.ON_HISTORY, identity=Identity.KNOWN),
    Row(decision=STREAM, relation=Relation.ON_HISTORY, identity=Identity.EXPIRED),
    Row(decision=RESET, reason=Reason.NUMBERS_BEYOND, relation=Relation.ON_HISTORY, identity=Identity.BEYOND),
    Row(decision=RESET, reason=Reason.CLIENT_UNKNOWN, relation=Relation.ON_HISTORY, identity=Identity.UNKNOWN),
    Row(decision=LOAD, relation=Relation.PRUNED, identity=Identity.NEW),
    Row(decision=LOAD, relation=Relation.PRUNED, identity=Identity.KNOWN),
    Row(decision=RESET, reason=Reason.NUMBERS_BEYOND, relation=Relation.PRUNED, identity=Identity.BEYOND),
    Row(decision=RESET, reason=Reason.CLIENT_UNKNOWN, relation=Relation.PRUNED, identity=Identity.UNKNOWN),
    Row(decision=RESET, reason=Reason.CLIENT_EXPIRED, relation=Relation.PRUNED, identity=Identity.EXPIRED),
)  # fmt: skip


@functools.cache
def decide(facts: SyncFacts) -> Row:
    """The one row that matches."""
    [row] = [row for row in TABLE if row.matches(facts)]
    return row
