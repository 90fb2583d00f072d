"""Entries of the change-log: payload bytes to meaning and back.

What may live here: building and reading ``Entry`` messages. A new kind of entry gets a field in the ``oneof`` of
``log.proto``, a builder here, and a line in ``state.py``, which applies it.
"""

from __future__ import annotations

import hmac as hmac_module
from collections.abc import Sequence
from hashlib import sha256

from google.protobuf.message import DecodeError

from understudy.common.errors import CorruptionError, ProtocolError
from understudy.common.types import DIGEST_BYTES, ClusterId, Digest, Epoch, Lsn, NodeId, Position
from understudy.v1 import log_pb2


def change_digest(change: bytes) -> Digest:
    """The digest of a serialized ``Change`` in its realm's chain."""
    return Digest(sha256(change).digest())


def sign(key: bytes, digest: bytes) -> bytes:
    """HMAC-SHA-256 of a digest with the cluster's history key."""
    return hmac_module.digest(key, digest, "sha256")


def with_hmacs(changes: Sequence[bytes], hmacs: bytes) -> list[tuple[bytes, bytes]]:
    """Serialized changes, each with its HMAC, from the two columns in which they travel.

    Raises:
        ProtocolError: the columns are of different lengths.
    """
    if len(hmacs) != DIGEST_BYTES * len(changes):
        raise ProtocolError("columns of changes and HMACs of different lengths")
    ends = range(DIGEST_BYTES, len(hmacs) + 1, DIGEST_BYTES)
    return [(change, hmacs[end - DIGEST_BYTES : end]) for change, end in zip(changes, ends, strict=True)]


def change_entry(time_us: int, change: bytes, hmac: bytes) -> bytes:
    """The payload that carries a serialized ``Change``."""
    return log_pb2.Entry(time_us=time_us, change=change, hmac=hmac).SerializeToString()


def epoch_entry(
    *, time_us: int, cluster: ClusterId, epoch: Epoch, after: Position, node: NodeId, key: bytes
) -> bytes:
    """The payload that starts an epoch behind the position ``after``."""
    start = log_pb2.EpochStart(
        cluster=cluster, epoch=epoch, lsn=after.lsn + 1, previous=after.digest, node=node
    ).SerializeToString()
    return log_pb2.Entry(
        time_us=time_us, epoch_start=start, hmac=sign(key, sha256(start).digest())
    ).SerializeToString()


def freeze_entry(time_us: int) -> bytes:
    """The payload of a freeze mark."""
    return log_pb2.Entry(time_us=time_us, freeze=log_pb2.Freeze()).SerializeToString()


def digest_entry(time_us: int, mark: log_pb2.DigestMark) -> bytes:
    """The payload of a digest mark."""
    return log_pb2.Entry(time_us=time_us, digest_mark=mark).SerializeToString()


def drop_entry(time_us: int, realm: str) -> bytes:
    """The payload that drops a realm."""
    return log_pb2.Entry(time_us=time_us, realm_dropped=log_pb2.RealmDropped(realm=realm)).SerializeToString()


def parse_entry(payload: bytes, lsn: Lsn) -> log_pb2.Entry:
    """The entry in a record's payload.

    Raises:
        CorruptionError: not an entry, or of a kind that this version does not know.
    """
    try:
        entry = log_pb2.Entry.FromString(payload)
    except DecodeError as error:
        raise CorruptionError(f"entry {lsn} can't be decoded: {error}") from error
    # The first is quicker, and false of most. A change of no bytes is none.
    if not entry.change and entry.WhichOneof("body") in (None, "change"):
        raise CorruptionError(
            f"entry {lsn} is of a kind that this version does not know",
            remedy="upgrade Understudy on this node",
        )
    return entry


def parse_change(change: bytes, lsn: Lsn) -> log_pb2.Change:
    """The change that an entry carries.

    Raises:
        CorruptionError: it can't be decoded.
    """
    try:
        return log_pb2.Change.FromString(change)
    except DecodeError as error:
        raise CorruptionError(f"the change in entry {lsn} can't be decoded: {error}") from error


def parse_start(start: bytes, lsn: Lsn) -> log_pb2.EpochStart:
    """The start of an epoch that an entry carries.

    Raises:
        CorruptionError: it can't be decoded.
    """
    try:
        return log_pb2.EpochStart.FromString(start)
    except DecodeError as error:
        raise CorruptionError(f"the start of an epoch in entry {lsn} can't be decoded: {error}") from error


def check_entry(payload: bytes, lsn: Lsn) -> Epoch | None:
    """Refuses what can't be read, before it is in a log; returns the epoch that it starts, if it does.

    The operations of a change are looked at where they are applied: here, that would cost a third of applying them.

    Raises:
        CorruptionError: it can't be decoded, or is of a kind that this version does not know.
    """
    entry = parse_entry(payload, lsn)
    if entry.change:
        parse_change(entry.change, lsn)
        return None
    if entry.WhichOneof("body") != "epoch_start":
        return None
    return Epoch(parse_start(entry.epoch_start, lsn).epoch)


def parse_epoch_start(payload: bytes) -> tuple[log_pb2.EpochStart, bytes, bytes] | None:
    """(start, its bytes, its HMAC) where ``payload`` is an entry that starts an epoch, else None."""
    try:
        entry = log_pb2.Entry.FromString(payload)
        if entry.WhichOneof("body") != "epoch_start":
            return None
        return log_pb2.EpochStart.FromString(entry.epoch_start), entry.epoch_start, entry.hmac
    except DecodeError:
        return None


def proves_epoch(payload: bytes, *, epoch: Epoch, cluster: ClusterId, keys: Sequence[bytes]) -> bool:
    """Whether ``payload`` is a genuine start of ``epoch`` in ``cluster``, signed with one of the history keys."""
    parsed = parse_epoch_start(payload)
    if parsed is None:
        return False
    start, raw, hmac = parsed
    digest = sha256(raw).digest()
    genuine = any(hmac_module.compare_digest(sign(key, digest), hmac) for key in keys)
    return genuine and start.epoch == epoch and start.cluster == cluster
