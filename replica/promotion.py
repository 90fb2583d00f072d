"""Promotion: a replica's directory becomes a primary's. The data is not touched, so its size does not matter.

Steps, each durable before the next::

    role "promoting"  ->  the new epoch's first entry in the log  ->  role "primary"

Cut off after the first or second, ``promote`` run again goes on; nothing else opens such a directory.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

from understudy.common import entries
from understudy.common.directory import NODE_FILE, DataDirectory, NodeFile, Role
from understudy.common.engine import Engine
from understudy.common.errors import DirectoryInUse, NotADataDirectory, PeerUnreachable, WrongRole
from understudy.common.events import log
from understudy.common.records import Record, encode_record
from understudy.common.rpc import open_channel, peer_errors, short_socket_path
from understudy.common.types import Digest, Epoch, Lsn, Position
from understudy.v1 import admin_pb2, admin_pb2_grpc

PROMOTE_S_MAX = 120.0
RELEASE_S_MAX = 30.0
_SLOTS_FILE = "slots.json"
_POLL_S = 0.02
_NOTHING_YET = "promote another replica, or restore a backup"


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What came of it."""

    epoch: Epoch
    lsn: Lsn
    digest: Digest
    seconds: float
    warnings: list[str] = field(default_factory=list)


def begin_reign(engine: Engine, *, started_s: float) -> Promotion:
    """Starts a new epoch behind the log's end and makes the directory a primary's.

    Everything received must be durable and applied, and nobody else may write.

    Args:
        engine: of the replica.
        started_s: monotonic time at which the promotion began.

    Raises:
        NotADataDirectory: not even the cluster's first entry has come yet.
    """
    directory, last = engine.directory, engine.durable
    if not engine.epoch:
        raise NotADataDirectory(f"{directory.path} has no entry of its primary yet", remedy=_NOTHING_YET)
    if directory.role is not Role.PROMOTING:
        directory.set_role(Role.PROMOTING)
    if not _has_begun(engine):
        epoch = Epoch(engine.epoch + 1)
        payload = entries.epoch_entry(
            time_us=max(engine.state.time_us, time.time_ns() // 1_000),
            cluster=directory.cluster,
            epoch=epoch,
            after=last,
            node=directory.node,
            key=engine.history_key,
        )
        lsn = Lsn(last.lsn + 1)
        data, digest = encode_record(last.digest, lsn, payload)
        engine.log.write_batch(data, Position(lsn, digest), epoch=epoch)
        engine.state.apply(Record(lsn, digest, payload))
    # Slots of an earlier reign would keep log for replicas that are long elsewhere.
    (directory.path / _SLOTS_FILE).unlink(missing_ok=True)
    directory.set_role(Role.PRIMARY)
    head = engine.durable
    log.info("promoted", epoch=engine.epoch, lsn=head.lsn)
    return Promotion(
        epoch=engine.epoch,
        lsn=head.lsn,
        digest=head.digest,
        seconds=time.monotonic() - started_s,
        warnings=list(engine.mismatches),
    )


def _has_begun(engine: Engine) -> bool:
    """Whether an earlier, interrupted promotion has written its entry."""
    row = engine.state.epochs[-1]
    parsed = entries.parse_epoch_start(row.proof.entry)
    return (
        parsed is not None
        and row.info.first_lsn == engine.durable.lsn
        and parsed[0].node == engine.directory.node
    )


async def promote_directory(path: Path) -> Promotion:
    """Promotes the replica in ``path``, whether its process runs or not.

    A running replica is asked to do it, and is gone when this returns.

    Raises:
        NotADataDirectory, WrongRole: there is no replica's copy there.
        DirectoryInUse: the process that has it does not answer.
        CorruptionError: the log is damaged behind the checkpoint.
    """
    started_s = time.monotonic()
    try:
        directory = DataDirectory.open_existing(path)
    except DirectoryInUse:
        return await _ask_owner(path)
    with directory:
        if directory.role is not Role.PRIMARY:
            _check_promotable(directory)
        engine = Engine.open(directory)
        try:
            if directory.role is Role.PRIMARY:
                return _promoted_before(engine, started_s=started_s)
            return begin_reign(engine, started_s=started_s)
        finally:
            await engine.close()


def _promoted_before(engine: Engine, *, started_s: float) -> Promotion:
    """What a promotion has made of this directory already: whoever did not hear of it asks again.

    Raises:
        WrongRole: it was never promoted; its cluster began here.
    """
    row, head = engine.state.epochs[-1], engine.durable
    parsed = entries.parse_epoch_start(row.proof.entry)
    if row.info.epoch == 1 or parsed is None or parsed[0].node != engine.directory.node:
        _check_promotable(engine.directory)  # it never is
    return Promotion(
        epoch=engine.epoch,
        lsn=head.lsn,
        digest=head.digest,
        seconds=time.monotonic() - started_s,
        warnings=[f"{engine.directory.path} had been promoted before"],
    )


def _check_promotable(directory: DataDirectory) -> None:
    if directory.role not in (Role.REPLICA, Role.PROMOTING):
        remedy = {
            Role.PRIMARY: f"start it: understudy primary --data-dir {directory.path}",
            Role.FENCED: f"another primary reigns; join it: understudy rewind {directory.path} --to HOST:PORT",
        }.get(directory.role, "")
        raise WrongRole(
            f"{directory.path} can't be promoted, its role is {directory.role.value}", remedy=remedy
        )
    if not directory.has_copy:
        raise NotADataDirectory(
            f"{directory.path} has no copy yet: it has never finished its bootstrap",
            remedy=_NOTHING_YET,
        )


async def _ask_owner(path: Path) -> Promotion:
    role = NodeFile.read(path / NODE_FILE).role
    if role not in (Role.REPLICA, Role.PROMOTING):
        raise WrongRole(f"{path} is in use, and its role is {role.value}: it can't be promoted")
    try:
        with short_socket_path(path / "control.sock") as socket:
            async with open_channel(f"unix:{socket}") as channel:
                with peer_errors(str(path / "control.sock")):
                    response = await admin_pb2_grpc.AdminStub(channel).Promote(
                        admin_pb2.PromoteRequest(), timeout=PROMOTE_S_MAX
                    )
    except PeerUnreachable as error:
        raise DirectoryInUse(
            f"the process that has {path} open does not answer: {error.message}",
            remedy="end that process, then run promote again",
        ) from error
    await _wait_until_free(path)
    return Promotion(
        epoch=Epoch(response.epoch),
        lsn=Lsn(response.lsn),
        digest=Digest(response.digest),
        seconds=response.seconds,
        warnings=list(response.warnings),
    )


async def _wait_until_free(path: Path) -> None:
    """Returns when the former replica's process has given the directory up."""
    deadline = time.monotonic() + RELEASE_S_MAX
    while True:
        try:
            DataDirectory.open_existing(path).close()
        except DirectoryInUse:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(_POLL_S)
        else:
            return
