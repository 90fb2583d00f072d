"""How a client's copy of a realm relates to ours: the facts that :mod:`understudy.common.sync_table` decides on.

Pure: what we hold is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from understudy.common.locator import EpochSpan
from understudy.common.sync_table import Cluster, Identity, Realm, Relation, SyncFacts, Tail
from understudy.v1 import sync_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class OurRealm:
    """What this server holds of a realm, and knows of the client that binds it."""

    cluster: bytes
    epochs: Sequence[EpochSpan]  # oldest first
    realm_id: int  # 0: there is no such realm
    version: int
    history_first: int  # the oldest change kept; version + 1 if none is
    # Of the change that made a version; None where that is not known.
    digest_at: Callable[[int], bytes | None]
    client_number: int | None  # the client's highest number applied; None where nothing is known of it
    time_us: int  # the log's
    client_kept_us: int  # for how long clients are remembered


def find_facts(bind: sync_pb2.BindRealm, ours: OurRealm) -> SyncFacts:
    """The facts about a client's bind."""
    relation = _relate(bind, ours)
    return SyncFacts(
        cluster=_cluster(bind, ours),
        realm=_realm(bind, ours, relation),
        relation=relation,
        tail=Tail.REACHES if 0 < bind.tail_first <= ours.version + 1 else Tail.SHORT,
        identity=_identify(bind, ours),
    )


def last_common(locator: Sequence[sync_pb2.RealmPosition], ours: OurRealm) -> sync_pb2.RealmPosition | None:
    """The first position of ``locator`` (head first) that is on our history."""
    return next((position for position in locator if _is_ours(position, ours)), None)


def _is_ours(position: sync_pb2.RealmPosition, ours: OurRealm) -> bool:
    return 0 < position.version <= ours.version and ours.digest_at(position.version) == position.digest


def _cluster(bind: sync_pb2.BindRealm, ours: OurRealm) -> Cluster:
    if not bind.locator:
        return Cluster.NONE
    return Cluster.SAME if bind.cluster == ours.cluster else Cluster.FOREIGN


def _realm(bind: sync_pb2.BindRealm, ours: OurRealm, relation: Relation) -> Realm:
    if not ours.realm_id:
        return Realm.LOST if bind.realm_id and _was_lost(bind.realm_id, bind.epoch, ours) else Realm.GONE
    # What came home has the digests that it had before, under another id. A realm that was lost, and begun again by
    # somebody else meanwhile, has forked at its very beginning; nobody has dropped it.
    same = (
        not bind.locator
        or bind.realm_id == ours.realm_id
        or relation is Relation.ON_HISTORY
        or last_common(bind.locator, ours) is not None
        or _was_lost(bind.realm_id, bind.epoch, ours)
    )
    return Realm.HERE if same else Realm.RECREATED


def _was_lost(lsn: int, epoch: int, ours: OurRealm) -> bool:
    """Whether the entry of that LSN, written in that epoch, is not on our history: a later epoch forked before it."""
    later = [span for span in ours.epochs if span.epoch > epoch]
    return bool(later) and lsn >= later[0].first_lsn


def _relate(bind: sync_pb2.BindRealm, ours: OurRealm) -> Relation:
    if not bind.locator:
        return Relation.PRUNED
    head = bind.locator[0]
    contradicted = any(_contradicts(position, ours) for position in bind.locator)
    if head.version > ours.version:
        return Relation.FORKED if contradicted else Relation.BEYOND
    if contradicted:
        return Relation.FORKED
    if _is_ours(head, ours):
        return Relation.ON_HISTORY if head.version + 1 >= ours.history_first else Relation.PRUNED
    return Relation.FORKED if _was_lost(bind.lsn, bind.epoch, ours) else Relation.PRUNED


def _contradicts(position: sync_pb2.RealmPosition, ours: OurRealm) -> bool:
    if position.version > ours.version:
        return False
    known = ours.digest_at(position.version)
    return known is not None and known != position.digest


def _identify(bind: sync_pb2.BindRealm, ours: OurRealm) -> Identity:
    known = ours.client_number
    if known is not None:
        return Identity.KNOWN if known >= bind.confirmed else Identity.BEYOND
    if not bind.sent:
        return Identity.NEW
    if ours.time_us - bind.contact_us > ours.client_kept_us:
        return Identity.EXPIRED
    # Heard from lately: had anything that it sent been applied since, we would remember it.
    lately = bind.confirmed > 0 and ours.time_us - bind.confirmed_us <= ours.client_kept_us
    return Identity.UNKNOWN if lately else Identity.NEW
