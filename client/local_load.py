"""A state that is loaded beside the copy that reads see, in pages, until it takes that copy's place.

Everything happens in the caller's LMDB transaction, and to the realm's row that the caller writes.
"""

from __future__ import annotations

from itertools import pairwise

import lmdb

from understudy.client.local_changes import Checked, leading_to
from understudy.client.local_layout import LAST_KEY, Transaction, prefix
from understudy.client.local_types import Received
from understudy.common.entries import with_hmacs
from understudy.common.errors import ProtocolError
from understudy.common.types import KEY_BYTES_MAX
from understudy.v1 import local_pb2, sync_pb2


def begun(number: int, bound: sync_pb2.RealmBound, cluster: bytes) -> local_pb2.LocalCopy:
    """An incoming copy of that id before its first page."""
    return local_pb2.LocalCopy(
        id=number,
        cluster=cluster,
        realm_id=bound.realm_id,
        epoch=bound.epoch,
        loading=True,
        expected_entries=bound.entries,
        expected_bytes=bound.bytes,
        path=bound.path,
    )


def is_complete(copy: local_pb2.LocalCopy) -> bool:
    """Whether the last page has come."""
    return copy.frontier == LAST_KEY


def add_page(
    txn: Transaction, data: lmdb._Database, copy: local_pb2.LocalCopy, page: sync_pb2.StatePage, epoch: int
) -> None:
    """Adds a page's keys, which are behind all others, and moves the frontier.

    Behind the last page the frontier is the last key that there can be: whoever goes on there gets another last
    page, an empty one.

    Raises:
        ProtocolError: it does not go on where the copy ends, or is of another version.
    """
    if not copy.frontier:
        copy.version, copy.head = page.position.version, page.position.digest
    _check_page(copy, page)
    # The digest says which realm it is. Another server may have the same one under another id: one that came home.
    copy.realm_id = page.realm_id or copy.realm_id
    start = prefix(copy.id)
    keys, values = page.keys, page.values
    if keys:
        txn.cursor(data).putmulti([(start + key, value) for key, value in zip(keys, values, strict=True)])
        copy.frontier = keys[-1]
    copy.entries += len(keys)
    copy.bytes += sum(map(len, keys)) + sum(map(len, values))
    copy.lsn, copy.epoch = page.lsn, epoch
    if page.last:
        copy.frontier = LAST_KEY


def last_changes(copy: local_pb2.LocalCopy, page: sync_pb2.StatePage) -> list[Checked]:
    """The signed changes that came with a page that was added, up to its version.

    Raises:
        ProtocolError: they don't lead there.
    """
    received = [Received(raw, hmac) for raw, hmac in with_hmacs(page.changes, page.hmacs)]
    return leading_to(copy, received)


def _check_page(copy: local_pb2.LocalCopy, page: sync_pb2.StatePage) -> None:
    if not copy.id:
        raise ProtocolError("a page of a state came that was not being loaded")
    position = page.position
    if (position.version, position.digest) != (copy.version, copy.head):
        raise ProtocolError(
            f"a page of version {position.version} came, and version {copy.version} is being loaded"
        )
    if len(page.keys) != len(page.values):
        raise ProtocolError(f"a page of {len(page.keys)} keys has {len(page.values)} values")
    if any(not 0 < len(key) <= KEY_BYTES_MAX for key in page.keys):
        raise ProtocolError("a page has a key that is empty or too long")
    if any(one >= other for one, other in pairwise((copy.frontier, *page.keys))):
        raise ProtocolError("the keys of a page are not in order")
