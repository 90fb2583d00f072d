"""How a client's copy of a realm relates to the server's: the facts that a bind shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.common.locator import EpochSpan
from understudy.common.realm_relation import OurRealm, find_facts, last_common
from understudy.common.sync_table import Cluster, Identity, Realm, Relation, Tail, decide
from understudy.common.types import START, Digest, Epoch, Lsn
from understudy.v1 import sync_pb2

OURS, OTHER = b"o" * 16, b"x" * 16
ANN = b"a" * 16
KEPT_US = 1_000
NOW_US = 1_000_000
REALM_ID = 10
# Epoch 1 from the first entry on; epoch 2 has forked off before LSN 100.
EPOCHS = [
    EpochSpan(epoch=Epoch(1), first_lsn=Lsn(1), previous=START.digest),
    EpochSpan(epoch=Epoch(2), first_lsn=Lsn(100), previous=Digest(b"d" * 32)),
]


def digest(version: int, *, forked_at: int | None = None) -> bytes:
    """Of our history, or of one that goes another way from a version on."""
    branch = b"theirs" if forked_at is not None and version >= forked_at else b"ours"
    return sha256(b"%s %d" % (branch, version)).digest()


def our_realm(
    version: int = 8,
    *,
    realm_id: int = REALM_ID,
    history_first: int = 1,
    number: int | None = None,
    time_us: int = NOW_US,
) -> OurRealm:
    def digest_at(at: int) -> bytes | None:
        if at == 0:
            return b""
        return digest(at) if at == version or history_first - 1 <= at <= version else None

    return OurRealm(
        cluster=OURS,
        epochs=EPOCHS,
        realm_id=realm_id,
        version=version,
        history_first=history_first,
        digest_at=digest_at,
        client_number=number,
        time_us=time_us,
        client_kept_us=KEPT_US,
    )


GONE = our_realm(0, realm_id=0)


def bind(
    *versions: int,
    realm_id: int = REALM_ID,
    forked_at: int | None = None,
    epoch: int = 2,
    lsn: int = 150,
    tail_first: int = 0,
    cluster: bytes = OURS,
    own: Mapping[str, int] | None = None,
) -> sync_pb2.BindRealm:
    """A copy with positions at these versions, head first; ``own``: fields about its client."""
    bound = sync_pb2.BindRealm(
        ref=1,
        path="/r",
        cluster=cluster if versions else b"",
        realm_id=realm_id if versions else 0,
        locator=[
            sync_pb2.RealmPosition(version=version, digest=digest(version, forked_at=forked_at))
            for version in versions
        ],
        epoch=epoch,
        lsn=lsn,
        tail_first=tail_first,
        clients=[ANN],
    )
    for name, value in (own or {}).items():
        setattr(bound, name, value)
    return bound


# -- cluster -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "cluster"),
    [
        (bind(), Cluster.NONE),
        (bind(8), Cluster.SAME),
        (bind(8, cluster=OTHER), Cluster.FOREIGN),
        (bind(8, cluster=b""), Cluster.FOREIGN),
        (sync_pb2.BindRealm(cluster=OTHER, realm_id=3, clients=[ANN]), Cluster.NONE),
    ],
)
def test_a_copy_is_of_the_cluster_that_it_names(bound: sync_pb2.BindRealm, cluster: Cluster) -> None:
    """Who has no position has no copy, whatever else it says; any other cluster's id is foreign, none as well."""
    assert find_facts(bound, our_realm()).cluster is cluster


# -- realm ---------------------------------------------------------------------------------------------------


def test_the_realm_of_the_copy_is_here() -> None:
    """The same id is the same realm, and who has no copy takes any."""
    assert find_facts(bind(8), our_realm()).realm is Realm.HERE
    assert find_facts(bind(), our_realm()).realm is Realm.HERE


def test_a_realm_that_was_healed_is_the_same_under_another_id() -> None:
    """What came home has its old digests but begins at another LSN: digests count, not the id."""
    assert find_facts(bind(8, 7, realm_id=99), our_realm()).realm is Realm.HERE
    # The client is behind what has come home, or ahead of it.
    assert find_facts(bind(3, realm_id=99), our_realm()).realm is Realm.HERE
    assert find_facts(bind(12, 11, 10, 8, realm_id=99), our_realm()).realm is Realm.HERE
    forked = find_facts(bind(12, 11, 10, 8, 4, realm_id=99, forked_at=6), our_realm())
    assert (forked.realm, forked.relation) == (Realm.HERE, Relation.FORKED)


def test_a_realm_with_another_id_and_nothing_in_common_was_recreated() -> None:
    """Dropped and begun anew: another id, other digests, and no epoch that would explain it."""
    for versions in ((8,), (3, 2, 1), (12, 11, 10, 8, 4)):
        facts = find_facts(bind(*versions, realm_id=99, forked_at=1), our_realm())
        assert facts.realm is Realm.RECREATED, versions


def test_a_realm_that_is_not_there_was_dropped_or_lost() -> None:
    """It is lost where its first change was made behind the fork of an epoch that the client has not met."""
    assert find_facts(bind(8, realm_id=120, epoch=1), GONE).realm is Realm.LOST
    assert find_facts(bind(8, realm_id=100, epoch=1), GONE).realm is Realm.LOST
    assert find_facts(bind(8, realm_id=99, epoch=1), GONE).realm is Realm.GONE
    assert find_facts(bind(8, realm_id=120, epoch=2), GONE).realm is Realm.GONE
    assert find_facts(bind(), GONE).realm is Realm.GONE


def test_a_lost_realm_that_was_begun_again_has_forked_and_was_not_dropped() -> None:
    """What the client holds of the realm that was lost must be able to come home beside what was written since."""
    ours = our_realm(2, realm_id=130)
    facts = find_facts(bind(8, 7, 6, 4, 2, 1, realm_id=120, epoch=1, lsn=140, forked_at=1), ours)
    assert (facts.realm, facts.relation) == (Realm.HERE, Relation.FORKED)
    # No position of the locator happens to be within ours.
    facts = find_facts(bind(9, 8, 7, 5, realm_id=120, epoch=1, lsn=140, forked_at=1, tail_first=1), ours)
    assert (facts.realm, facts.relation, facts.tail) == (Realm.HERE, Relation.BEYOND, Tail.REACHES)


# -- relation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "ours", "relation"),
    [
        (bind(8), our_realm(), Relation.ON_HISTORY),
        (bind(3, 2, 1), our_realm(), Relation.ON_HISTORY),
        # History goes on from version 4: 3 is the last that can be streamed to.
        (bind(3), our_realm(history_first=4), Relation.ON_HISTORY),
        (bind(2), our_realm(history_first=4), Relation.PRUNED),
        # Nothing is kept, and nothing is needed.
        (bind(8), our_realm(history_first=9), Relation.ON_HISTORY),
        (bind(7), our_realm(history_first=9), Relation.PRUNED),
        (bind(9, 8), our_realm(), Relation.BEYOND),
        (bind(20, 19, 18, 16, 12), our_realm(), Relation.BEYOND),
        (bind(8, forked_at=8), our_realm(), Relation.FORKED),
        (bind(3, forked_at=2), our_realm(), Relation.FORKED),
        (bind(), our_realm(), Relation.PRUNED),
    ],
)
def test_the_head_of_a_copy_relates_to_our_history(
    bound: sync_pb2.BindRealm, ours: OurRealm, relation: Relation
) -> None:
    """Same digest, older than what is kept, past our head, or other than ours."""
    assert find_facts(bound, ours).relation is relation


def test_a_locator_that_contradicts_us_anywhere_has_forked() -> None:
    """A head that is past ours, or too old to be known, counts for nothing where an older position differs."""
    assert find_facts(bind(12, 8, forked_at=8), our_realm()).relation is Relation.FORKED
    assert find_facts(bind(12, 11, 4, 2, forked_at=3), our_realm()).relation is Relation.FORKED
    tampered = bind(8, 7, 6)
    tampered.locator[2].digest = bytes(32)
    assert find_facts(tampered, our_realm()).relation is Relation.FORKED


def test_a_head_that_is_too_old_to_be_known_has_forked_if_its_epoch_had() -> None:
    """Below what is kept, only the epochs tell: an entry made in an old epoch behind its end is not on our history."""
    ours = our_realm(20, history_first=19)
    assert find_facts(bind(8, epoch=1, lsn=100), ours).relation is Relation.FORKED
    assert find_facts(bind(8, epoch=1, lsn=99), ours).relation is Relation.PRUNED
    assert find_facts(bind(8, epoch=2, lsn=100), ours).relation is Relation.PRUNED
    assert find_facts(bind(8, epoch=7, lsn=100), ours).relation is Relation.PRUNED


def test_epochs_do_not_overrule_digests() -> None:
    """A change that came home is at another LSN, in a later epoch, and is the same change."""
    assert find_facts(bind(8, epoch=1, lsn=120), our_realm()).relation is Relation.ON_HISTORY


# -- tail ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tail_first", "tail"),
    [(0, Tail.SHORT), (1, Tail.REACHES), (9, Tail.REACHES), (10, Tail.SHORT), (2**64 - 1, Tail.SHORT)],
)
def test_a_tail_reaches_if_nothing_lies_between_it_and_our_head(tail_first: int, tail: Tail) -> None:
    """The first version of the tail is at most the next after our head."""
    assert find_facts(bind(12, 11, tail_first=tail_first), our_realm()).tail is tail


# -- identity ------------------------------------------------------------------------------------------------

LATELY, LONG_AGO = NOW_US - KEPT_US, NOW_US - KEPT_US - 1


@pytest.mark.parametrize(
    ("number", "own", "identity"),
    [
        (None, {}, Identity.NEW),
        (7, {"confirmed": 7, "sent": 9}, Identity.KNOWN),
        (9, {"confirmed": 7, "sent": 9}, Identity.KNOWN),
        (9, {}, Identity.KNOWN),
        (6, {"confirmed": 7, "sent": 9}, Identity.BEYOND),
        (6, {"confirmed": 7, "sent": 9, "contact_us": 0}, Identity.BEYOND),
        # Nothing is known of it: that is as it should be where nothing was ever applied, or it was long ago.
        (None, {"sent": 9, "contact_us": LATELY}, Identity.NEW),
        (None, {"confirmed": 7, "sent": 9, "contact_us": LATELY, "confirmed_us": LONG_AGO}, Identity.NEW),
        (None, {"confirmed": 7, "sent": 9, "contact_us": LATELY, "confirmed_us": LATELY}, Identity.UNKNOWN),
        (None, {"sent": 9, "contact_us": LONG_AGO}, Identity.EXPIRED),
        (
            None,
            {"confirmed": 7, "sent": 9, "contact_us": LONG_AGO, "confirmed_us": LONG_AGO},
            Identity.EXPIRED,
        ),
        # A clock of the log's that is behind what the client has seen: nothing has expired.
        (
            None,
            {"confirmed": 7, "sent": 9, "contact_us": NOW_US + 9, "confirmed_us": NOW_US + 9},
            Identity.UNKNOWN,
        ),
    ],
)
def test_a_client_is_known_by_its_numbers_and_by_the_logs_clock(
    number: int | None, own: dict[str, int], identity: Identity
) -> None:
    """What it has had confirmed must be known for as long as clients are remembered, by the log's time alone."""
    assert find_facts(bind(8, own=own), our_realm(number=number)).identity is identity


# -- the last common version -----------------------------------------------------------------------------------


def test_the_last_common_version_is_the_first_position_that_agrees() -> None:
    """Head first; neither what is past ours nor what is unknown counts as common."""
    found = last_common(bind(12, 11, 8, 4, 2, forked_at=6).locator, our_realm())
    assert found is not None
    assert found.version == 4
    assert last_common(bind(12, 11, forked_at=1).locator, our_realm()) is None
    assert last_common(bind(3).locator, our_realm(history_first=8)) is None
    assert last_common([], our_realm()) is None


# -- whatever is said ------------------------------------------------------------------------------------------

_NUMBERS = st.one_of(st.integers(0, 12), st.sampled_from([2**32, 2**63, 2**64 - 1]))


@st.composite
def _positions(draw: st.DrawFn) -> Sequence[sync_pb2.RealmPosition]:
    versions = sorted(draw(st.sets(_NUMBERS.filter(bool), max_size=6)), reverse=True)
    return [
        sync_pb2.RealmPosition(
            version=version,
            digest=draw(st.sampled_from([digest(version), digest(version, forked_at=1), bytes(32)])),
        )
        for version in versions
    ]


@given(
    locator=_positions(),
    numbers=st.lists(_NUMBERS, min_size=8, max_size=8),
    cluster=st.sampled_from([OURS, OTHER, b""]),
    ours=st.sampled_from(
        [our_realm(), our_realm(8, history_first=7, number=3), our_realm(1, number=2**63), GONE]
    ),
)
def test_whatever_a_client_says_is_one_of_the_facts(
    locator: Sequence[sync_pb2.RealmPosition], numbers: list[int], cluster: bytes, ours: OurRealm
) -> None:
    """Any bind is answered; and a head of another history is never taken for one of ours."""
    names = ("realm_id", "epoch", "lsn", "confirmed", "sent", "confirmed_us", "contact_us", "tail_first")
    bound = sync_pb2.BindRealm(cluster=cluster, locator=locator, clients=[ANN])
    for name, number in zip(names, numbers, strict=True):
        setattr(bound, name, number)
    facts = find_facts(bound, ours)
    decide(facts)
    if locator and facts.relation is Relation.ON_HISTORY:
        assert locator[0].digest == digest(locator[0].version)
        assert all(one.digest == digest(one.version) for one in locator if ours.digest_at(one.version))
