"""A new cluster: the first files of a primary's directory."""

from __future__ import annotations

import secrets
import time

from understudy.common import entries
from understudy.common.changelog import ChangeLog
from understudy.common.directory import DataDirectory, Role
from understudy.common.engine import HISTORY_KEY
from understudy.common.files import OsFileSystem
from understudy.common.operations import Put, to_protos
from understudy.common.records import encode_record
from understudy.common.store import Store
from understudy.common.types import START, SYSTEM_REALM, ClusterId, Epoch, Lsn, Position, new_id
from understudy.primary.admin_token import prepare_admin_token, publish_admin_token
from understudy.v1 import log_pb2, store_pb2


def create_cluster(directory: DataDirectory) -> None:
    """Makes a new cluster's first log and store: epoch 1, the history key, and an admin token."""
    cluster = ClusterId(new_id())
    directory.begin(Role.CREATING, cluster)
    directory.log.mkdir()
    Store.create(directory.store, cluster, store_pb2.CheckpointRow(digest=START.digest))
    changelog = ChangeLog.create(
        directory.log, cluster=cluster, epoch=Epoch(1), after=START, after_offset=0, files=OsFileSystem()
    )
    try:
        _write_first_entries(changelog, directory)
    finally:
        changelog.close()
    directory.set_role(Role.PRIMARY)
    publish_admin_token(directory)


def _write_first_entries(changelog: ChangeLog, directory: DataDirectory) -> None:
    cluster, node, key = directory.cluster, directory.node, secrets.token_bytes(32)
    change = log_pb2.Change(
        realm=SYSTEM_REALM,
        version=1,
        client=node,
        number=1,
        operations=to_protos([Put(HISTORY_KEY, key), prepare_admin_token(directory)]),
    ).SerializeToString()
    time_us = time.time_ns() // 1_000
    payloads = (
        entries.epoch_entry(
            time_us=time_us, cluster=cluster, epoch=Epoch(1), after=START, node=node, key=key
        ),
        entries.change_entry(time_us, change, entries.sign(key, entries.change_digest(change))),
    )
    position, data = START, b""
    for payload in payloads:
        record, digest = encode_record(position.digest, Lsn(position.lsn + 1), payload)
        position = Position(Lsn(position.lsn + 1), digest)
        data += record
    changelog.write_batch(data, position, epoch=Epoch(1))
