"""A client's bind of a realm: what it may say, what it is compared with, and its answer. Pure."""

from __future__ import annotations

from understudy.common.errors import ProtocolError
from understudy.common.locator import LOCATOR_POSITIONS_MAX
from understudy.common.realm_relation import OurRealm
from understudy.common.sync_table import Reason
from understudy.common.types import DIGEST_BYTES, ID_BYTES, KEY_BYTES_MAX
from understudy.primary.sync_host import Host
from understudy.v1 import sync_pb2

CLIENT_IDS_MAX = 16  # whose changes may stand in one queue: a new one comes only with a copied directory


def check_bind(bind: sync_pb2.BindRealm) -> None:
    """Refuses a bind that no client of ours sends.

    Raises:
        ProtocolError.
    """
    if not 1 <= len(bind.clients) <= CLIENT_IDS_MAX or any(len(one) != ID_BYTES for one in bind.clients):
        raise ProtocolError(f"a bind names 1 to {CLIENT_IDS_MAX} client ids of {ID_BYTES} bytes")
    positions = [*bind.locator, *([bind.incoming] if bind.HasField("incoming") else [])]
    if len(positions) > LOCATOR_POSITIONS_MAX + 1 or any(
        len(one.digest) != DIGEST_BYTES for one in positions
    ):
        raise ProtocolError(
            f"a locator has at most {LOCATOR_POSITIONS_MAX} positions, with digests of {DIGEST_BYTES} bytes"
        )
    if len(bind.frontier) > KEY_BYTES_MAX:
        raise ProtocolError(f"a state that ends with a key of {len(bind.frontier)} bytes")
    versions = [one.version for one in bind.locator]
    if versions != sorted(set(versions), reverse=True) or 0 in versions:
        raise ProtocolError("a locator recedes, from the copy's head down to no less than version 1")


def our_realm(host: Host, bind: sync_pb2.BindRealm, path: str) -> OurRealm:
    """What this server holds of the realm at ``path``, and knows of the client that binds it."""
    state = host.state
    head = state.realm(path)
    return OurRealm(
        cluster=host.cluster,
        epochs=host.epochs,
        realm_id=head.id if head else 0,
        version=head.version if head else 0,
        history_first=state.history_first(path) if head else 1,
        digest_at=lambda version: state.digest_at(path, version),
        client_number=(state.last_number(path, bind.clients[0]) or None) if head else None,
        time_us=state.time_us,
        client_kept_us=host.client_kept_us,
    )


def can_resume(bind: sync_pb2.BindRealm, ours: OurRealm) -> bool:
    """Whether a load that was broken off can go on: the changes since are kept."""
    incoming = bind.incoming
    return (
        0 < incoming.version <= ours.version
        and incoming.version + 1 >= ours.history_first
        and ours.digest_at(incoming.version) == incoming.digest
        and bool(bind.frontier)
    )


def undecided(host: Host, bind: sync_pb2.BindRealm, path: str) -> sync_pb2.RealmBound:
    """An answer with all but the decision and what follows from it."""
    state = host.state
    head = state.realm(path)
    return sync_pb2.RealmBound(
        ref=bind.ref,
        path=path,
        realm_id=head.id if head else 0,
        head=sync_pb2.RealmPosition(version=head.version if head else 0, digest=head.head if head else b""),
        last_numbers=[state.last_number(path, client) if head else 0 for client in bind.clients],
        recovery_forbidden=host.forbids_recovery(path),
        may_write=host.may_write(path),
        time_us=state.time_us,
        epoch=host.epochs[-1].epoch,
    )


_EXPLANATIONS = {
    Reason.FOREIGN_CLUSTER_COPY: "the copy of {path} is of another cluster's",
    Reason.REALM_GONE: "{path} was dropped",
    Reason.REALM_RECREATED: "{path} was dropped and begun anew",
    Reason.SERVER_BEHIND: "the server knows less of {path} than this copy, and what it lacks could not come home",
    Reason.OTHER_HISTORY: "the server's history of {path} is another one{common}",
    Reason.NUMBERS_BEYOND: "the server knows nothing of changes to {path} that it had confirmed to this client",
    Reason.CLIENT_UNKNOWN: "the server does not know this client of {path}, and it should",
    Reason.CLIENT_EXPIRED: "this client of {path} was away for longer than clients are remembered",
}


def explain(bound: sync_pb2.RealmBound) -> str:
    """Why a copy must be given up, in words; empty where it need not be."""
    common = f" behind version {bound.common.version}" if bound.common.version else ""
    return _EXPLANATIONS.get(bound.reason, "").format(path=bound.path, common=common)
