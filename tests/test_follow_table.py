"""What a primary answers a replica: the table has one row for every combination of facts, and the right one."""

from __future__ import annotations

import enum
import itertools
from dataclasses import fields, replace
from typing import Any

import pytest

from understudy.common.follow_table import (
    TABLE,
    Claim,
    Cluster,
    Decision,
    FollowFacts,
    Protocol,
    Reign,
    Relation,
    Slot,
    decide,
)
from understudy.replica.follow_session import Bootstrap, ComeAgain, Stop, on_answer

KINDS: dict[str, type[enum.Enum]] = {
    "protocol": Protocol,
    "reign": Reign,
    "cluster": Cluster,
    "claim": Claim,
    "slot": Slot,
    "relation": Relation,
}
ALL_FACTS = [
    FollowFacts(**dict(zip(KINDS, values, strict=True)))  # type: ignore[arg-type]
    for values in itertools.product(*KINDS.values())
]
# A replica of ours that was away for a moment.
USUAL = FollowFacts(
    protocol=Protocol.SAME,
    reign=Reign.PRIMARY,
    cluster=Cluster.SAME,
    claim=Claim.NOT_HIGHER,
    slot=Slot.FREE,
    relation=Relation.ON_LOG,
)
FENCED = replace(USUAL, reign=Reign.FENCED)
REPLICA = replace(USUAL, reign=Reign.OTHER)
EMPTY = replace(USUAL, cluster=Cluster.NONE)

# (facts, decision, why): at least one for each row of the table.
REPRESENTATIVES = [
    (USUAL, Decision.STREAM, "its head is on our log, which goes on from there"),
    (replace(USUAL, relation=Relation.PRUNED), Decision.BOOTSTRAP, "our log no longer goes back that far"),
    (replace(USUAL, relation=Relation.BEYOND), Decision.AHEAD_OF_PRIMARY, "it knows more than we do"),
    (replace(USUAL, relation=Relation.FORKED), Decision.DIVERGED, "its history is another"),
    (EMPTY, Decision.BOOTSTRAP, "it has nothing yet"),
    (replace(EMPTY, claim=Claim.HIGHER_PROVEN), Decision.BOOTSTRAP, "who has no copy can claim nothing"),
    (replace(EMPTY, claim=Claim.HIGHER_UNPROVEN), Decision.BOOTSTRAP, "who has no copy can claim nothing"),
    (replace(EMPTY, relation=Relation.FORKED), Decision.BOOTSTRAP, "who has no copy has no history"),
    (replace(USUAL, slot=Slot.TAKEN), Decision.DUPLICATE_ID, "another copy follows under its name"),
    (replace(EMPTY, slot=Slot.TAKEN), Decision.DUPLICATE_ID, "another copy follows under its name"),
    (
        replace(USUAL, slot=Slot.TAKEN, relation=Relation.FORKED),
        Decision.DUPLICATE_ID,
        "the name is to be settled before the history",
    ),
    (replace(USUAL, claim=Claim.HIGHER_PROVEN), Decision.FENCED, "our reign is over"),
    (
        replace(USUAL, claim=Claim.HIGHER_PROVEN, slot=Slot.TAKEN, relation=Relation.FORKED),
        Decision.FENCED,
        "our reign is over, whatever else is wrong with who tells us",
    ),
    (replace(USUAL, claim=Claim.HIGHER_UNPROVEN), Decision.UNPROVEN_EPOCH, "anyone could say so"),
    (
        replace(USUAL, claim=Claim.HIGHER_UNPROVEN, slot=Slot.TAKEN),
        Decision.UNPROVEN_EPOCH,
        "a claim without proof comes before the name",
    ),
    (FENCED, Decision.FENCED, "we are fenced already"),
    (replace(FENCED, claim=Claim.HIGHER_UNPROVEN), Decision.FENCED, "we are fenced already"),
    (replace(FENCED, cluster=Cluster.NONE), Decision.FENCED, "nobody may begin with a copy of ours"),
    (REPLICA, Decision.NOT_PRIMARY, "a replica is not followed"),
    (replace(REPLICA, claim=Claim.HIGHER_PROVEN), Decision.NOT_PRIMARY, "a replica has no reign to end"),
    (replace(REPLICA, cluster=Cluster.NONE), Decision.NOT_PRIMARY, "a replica is not copied from"),
    (replace(USUAL, cluster=Cluster.FOREIGN), Decision.FOREIGN_CLUSTER, "it is of another cluster"),
    (
        replace(USUAL, cluster=Cluster.FOREIGN, claim=Claim.HIGHER_PROVEN),
        Decision.FOREIGN_CLUSTER,
        "nobody of another cluster can fence us",
    ),
    (replace(FENCED, cluster=Cluster.FOREIGN), Decision.FOREIGN_CLUSTER, "it has the wrong address"),
    (replace(USUAL, protocol=Protocol.OTHER), Decision.PROTOCOL_MISMATCH, "nothing else it says can be read"),
    (
        replace(USUAL, protocol=Protocol.OTHER, cluster=Cluster.FOREIGN, claim=Claim.HIGHER_PROVEN),
        Decision.PROTOCOL_MISMATCH,
        "nothing else it says can be read",
    ),
]


def test_the_facts_are_all_that_the_table_asks() -> None:
    """The combinations below are of every fact that there is."""
    assert list(KINDS) == [field.name for field in fields(FollowFacts)]
    assert len(ALL_FACTS) == 2 * 3 * 3 * 3 * 2 * 4


def test_every_combination_meets_exactly_one_row() -> None:
    """No combination of facts is left without an answer, and none has two."""
    for facts in ALL_FACTS:
        assert len([row for row in TABLE if row.matches(facts)]) == 1, facts


@pytest.mark.parametrize(("facts", "decision", "why"), REPRESENTATIVES)
def test_each_answer_has_its_reason(facts: FollowFacts, decision: Decision.ValueType, why: str) -> None:
    """Each kind of peer is answered as section 9 of the design says."""
    assert Decision.Name(decide(facts)) == Decision.Name(decision), why


def test_every_row_has_a_representative() -> None:
    """No row was added without saying what it is for."""
    for row in TABLE:
        assert any(row.matches(facts) for facts, _, _ in REPRESENTATIVES), row


def test_g3_a_copy_is_streamed_to_only_if_it_is_on_our_log() -> None:
    """G3: of all combinations, only a peer of our cluster whose head is on our log is streamed to."""
    for facts in ALL_FACTS:
        if decide(facts) == Decision.STREAM:
            assert facts.relation is Relation.ON_LOG
            assert facts.cluster is Cluster.SAME
            assert facts.claim is Claim.NOT_HIGHER


def test_g4_a_copy_is_replaced_only_if_it_holds_nothing_of_its_own() -> None:
    """G4: a peer is told to begin anew only if it has no copy, or one that is on our history."""
    for facts in ALL_FACTS:
        if decide(facts) == Decision.BOOTSTRAP and facts.cluster is not Cluster.NONE:
            assert facts.cluster is Cluster.SAME
            assert facts.relation is Relation.PRUNED
            assert facts.claim is Claim.NOT_HIGHER


def test_g7_a_primary_that_hears_a_proven_claim_is_fenced_and_no_other() -> None:
    """G7: a primary answers FENCED exactly where its own cluster proves a higher epoch in its own protocol."""
    for facts in ALL_FACTS:
        if facts.reign is Reign.PRIMARY:
            heard = (facts.protocol, facts.cluster, facts.claim)
            proven = heard == (Protocol.SAME, Cluster.SAME, Claim.HIGHER_PROVEN)
            assert (decide(facts) == Decision.FENCED) == proven


# -- what a replica makes of the answer --------------------------------------------------------------------

MEANINGS: dict[int, tuple[type | None, str]] = {
    Decision.STREAM: (None, ""),
    Decision.BOOTSTRAP: (Bootstrap, ""),
    Decision.FOREIGN_CLUSTER: (Stop, "ForeignCluster"),
    Decision.AHEAD_OF_PRIMARY: (Stop, "AheadOfPrimary"),
    Decision.FENCED: (ComeAgain, "Fenced"),
    Decision.DIVERGED: (Stop, "Diverged"),
    Decision.PROTOCOL_MISMATCH: (Stop, "ProtocolError"),
    Decision.DUPLICATE_ID: (ComeAgain, "ProtocolError"),
    Decision.NOT_PRIMARY: (ComeAgain, "NotPrimary"),
    Decision.UNPROVEN_EPOCH: (Stop, "Diverged"),
}


@pytest.mark.parametrize("decision", sorted({row.decision for row in TABLE}), ids=Decision.Name)
def test_a_replica_knows_what_each_answer_means(decision: Decision.ValueType) -> None:
    """What can change by itself is asked again, what an operator must decide stops, with the command for it."""
    kind, error = MEANINGS[decision]
    action: Any = on_answer(decision, directory="/data", address="host:1")
    if kind is None:
        assert action is None
        return
    assert type(action) is kind
    if kind is not Bootstrap:
        reason = getattr(action, "error" if kind is Stop else "reason")
        assert reason.code == error
    if decision in (Decision.DIVERGED, Decision.UNPROVEN_EPOCH, Decision.AHEAD_OF_PRIMARY):
        assert "understudy rewind /data --to host:1" in str(reason)


@pytest.mark.parametrize("decision", [Decision.DECISION_UNSPECIFIED, 99])
def test_an_answer_of_a_later_version_stops(decision: Any) -> None:
    """An answer that this version does not know is not taken for any that it knows."""
    action = on_answer(decision, directory="/data", address="host:1")
    assert isinstance(action, Stop)
    assert action.error.code == "ProtocolError"
