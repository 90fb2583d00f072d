"""What a server answers a client that binds a realm: one row for every combination of facts, and the right one."""

from __future__ import annotations

import enum
import itertools
from dataclasses import fields, replace

import pytest

from understudy.common.sync_table import (
    HEAL,
    LOAD,
    RESET,
    STREAM,
    TABLE,
    Cluster,
    Decision,
    Identity,
    Realm,
    Reason,
    Relation,
    SyncFacts,
    Tail,
    decide,
)

KINDS: dict[str, type[enum.Enum]] = {
    "cluster": Cluster,
    "realm": Realm,
    "relation": Relation,
    "tail": Tail,
    "identity": Identity,
}
ALL_FACTS = [
    SyncFacts(**dict(zip(KINDS, values, strict=True)))  # type: ignore[arg-type]
    for values in itertools.product(*KINDS.values())
]
# A client of ours that was away for a moment.
USUAL = SyncFacts(
    cluster=Cluster.SAME,
    realm=Realm.HERE,
    relation=Relation.ON_HISTORY,
    tail=Tail.SHORT,
    identity=Identity.KNOWN,
)
EMPTY = replace(USUAL, cluster=Cluster.NONE, relation=Relation.PRUNED)
PRUNED = replace(USUAL, relation=Relation.PRUNED)
BEYOND = replace(USUAL, relation=Relation.BEYOND, identity=Identity.BEYOND)
FORKED = replace(USUAL, relation=Relation.FORKED)
LOST = replace(USUAL, realm=Realm.LOST, relation=Relation.BEYOND, identity=Identity.UNKNOWN)

NONE = Reason.RESET_UNSPECIFIED
Answer = tuple[Decision.ValueType, Reason.ValueType]

# (facts, answer, why): at least one for each row of the table.
REPRESENTATIVES: list[tuple[SyncFacts, Answer, str]] = [
    (
        replace(USUAL, cluster=Cluster.FOREIGN),
        (RESET, Reason.FOREIGN_CLUSTER_COPY),
        "another cluster's copy says nothing of ours, even where it looks alike",
    ),
    (
        replace(USUAL, cluster=Cluster.FOREIGN, realm=Realm.GONE),
        (RESET, Reason.FOREIGN_CLUSTER_COPY),
        "a copy of another cluster is not overwritten by nothing",
    ),
    # No copy.
    (replace(EMPTY, realm=Realm.GONE, identity=Identity.NEW), (STREAM, NONE), "it may begin this realm"),
    (replace(EMPTY, realm=Realm.LOST), (STREAM, NONE), "who has no copy has lost nothing with us"),
    (replace(EMPTY, identity=Identity.NEW), (LOAD, NONE), "it wants all that there is"),
    (EMPTY, (LOAD, NONE), "what it has sent is among all that there is"),
    (
        replace(EMPTY, identity=Identity.BEYOND),
        (RESET, Reason.NUMBERS_BEYOND),
        "changes of its own are gone, and it should hear of it",
    ),
    (
        replace(EMPTY, identity=Identity.UNKNOWN),
        (RESET, Reason.CLIENT_UNKNOWN),
        "what stands in its queue may have been applied before",
    ),
    (
        replace(EMPTY, identity=Identity.EXPIRED),
        (RESET, Reason.CLIENT_EXPIRED),
        "what stands in its queue may have been applied before",
    ),
    (
        replace(EMPTY, realm=Realm.RECREATED),
        (RESET, Reason.REALM_RECREATED),
        "its queue is for another realm",
    ),
    # The realm is not there, or not the same.
    (replace(USUAL, realm=Realm.GONE), (RESET, Reason.REALM_GONE), "somebody has dropped it"),
    (
        replace(BEYOND, realm=Realm.GONE, tail=Tail.REACHES),
        (RESET, Reason.REALM_GONE),
        "what was dropped must not come back from a tail",
    ),
    (
        replace(FORKED, realm=Realm.RECREATED),
        (RESET, Reason.REALM_RECREATED),
        "another realm has the name now",
    ),
    (
        replace(BEYOND, realm=Realm.RECREATED, tail=Tail.REACHES),
        (RESET, Reason.REALM_RECREATED),
        "changes of one realm do not belong into another",
    ),
    (replace(LOST, tail=Tail.REACHES), (HEAL, NONE), "the tail has all of it"),
    (LOST, (RESET, Reason.SERVER_BEHIND), "the server has lost it, and the tail has not all of it"),
    # It is.
    (FORKED, (RESET, Reason.OTHER_HISTORY), "two histories can't be streamed as one"),
    (
        replace(FORKED, tail=Tail.REACHES, identity=Identity.UNKNOWN),
        (RESET, Reason.OTHER_HISTORY),
        "the history comes before the client's numbers",
    ),
    (replace(BEYOND, tail=Tail.REACHES), (HEAL, NONE), "the tail has what the server lacks"),
    (BEYOND, (RESET, Reason.SERVER_BEHIND), "nobody else may have what lies between"),
    (USUAL, (STREAM, NONE), "all is well"),
    (replace(USUAL, identity=Identity.NEW), (STREAM, NONE), "it only reads"),
    (
        replace(USUAL, identity=Identity.EXPIRED),
        (STREAM, NONE),
        "history since its head is all here, so that what it sends twice is found",
    ),
    (
        replace(USUAL, identity=Identity.BEYOND),
        (RESET, Reason.NUMBERS_BEYOND),
        "on this history and yet ahead of it: one of the two is not what it seems",
    ),
    (
        replace(USUAL, identity=Identity.UNKNOWN),
        (RESET, Reason.CLIENT_UNKNOWN),
        "on this history and yet unknown: one of the two is not what it seems",
    ),
    (PRUNED, (LOAD, NONE), "history no longer goes back that far"),
    (replace(PRUNED, identity=Identity.NEW), (LOAD, NONE), "history no longer goes back that far"),
    (
        replace(PRUNED, identity=Identity.BEYOND),
        (RESET, Reason.NUMBERS_BEYOND),
        "its own changes are missing, and no history tells how it came",
    ),
    (
        replace(PRUNED, identity=Identity.UNKNOWN),
        (RESET, Reason.CLIENT_UNKNOWN),
        "its own changes are missing, and no history tells how it came",
    ),
    (
        replace(PRUNED, identity=Identity.EXPIRED),
        (RESET, Reason.CLIENT_EXPIRED),
        "neither history nor memory tells what of its queue was applied",
    ),
]


def test_the_facts_are_all_that_the_table_asks() -> None:
    """The combinations below are of every fact that there is."""
    assert list(KINDS) == [field.name for field in fields(SyncFacts)]
    assert len(ALL_FACTS) == 3 * 4 * 4 * 2 * 5


def test_every_combination_meets_exactly_one_row() -> None:
    """No combination of facts is left without an answer, and none has two."""
    for facts in ALL_FACTS:
        assert len([row for row in TABLE if row.matches(facts)]) == 1, facts


@pytest.mark.parametrize(("facts", "answer", "why"), REPRESENTATIVES)
def test_each_answer_has_its_reason(facts: SyncFacts, answer: Answer, why: str) -> None:
    """Each kind of client is answered so that nothing of its or of ours is lost unseen."""
    row = decide(facts)
    assert (Decision.Name(row.decision), Reason.Name(row.reason)) == (
        Decision.Name(answer[0]),
        Reason.Name(answer[1]),
    ), why


def test_every_row_has_a_representative() -> None:
    """No row was added without saying what it is for."""
    for row in TABLE:
        assert any(row.matches(facts) for facts, _, _ in REPRESENTATIVES), row


def test_every_reason_is_given_and_only_with_a_reset() -> None:
    """A reset always says why, with each of the reasons that there are; nothing else has one."""
    assert {row.reason for row in TABLE if row.decision == RESET} == set(Reason.values()) - {NONE}
    assert {row.reason for row in TABLE if row.decision != RESET} == {NONE}


def test_g3_only_a_copy_on_our_history_is_streamed_to() -> None:
    """G3: changes are sent behind a copy only if it is of our cluster, of this realm, and on its history."""
    for facts in ALL_FACTS:
        if decide(facts).decision == STREAM and facts.cluster is not Cluster.NONE:
            assert facts.cluster is Cluster.SAME
            assert facts.realm is Realm.HERE
            assert facts.relation is Relation.ON_HISTORY


def test_g4_a_copy_is_replaced_without_a_word_only_if_all_in_it_is_ours() -> None:
    """G4: the state is sent anew only to who has no copy, or one that is on our history as far as can be told."""
    for facts in ALL_FACTS:
        if decide(facts).decision == LOAD and facts.cluster is not Cluster.NONE:
            assert facts.cluster is Cluster.SAME
            assert facts.realm is Realm.HERE
            assert facts.relation is Relation.PRUNED
            assert facts.identity in (Identity.NEW, Identity.KNOWN)


def test_a_tail_is_asked_for_only_where_it_closes_the_gap() -> None:
    """A server that knows less heals with a tail that reaches back to what it has, and with no other."""
    for facts in ALL_FACTS:
        if decide(facts).decision == HEAL:
            assert facts.tail is Tail.REACHES
            assert facts.realm is Realm.LOST or facts.relation is Relation.BEYOND
