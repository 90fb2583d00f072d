"""Promotion: a replica's directory becomes a primary's. The data is not touched, so its size does not matter.

Steps, each durable before the next::

    role "promoting"  ->  the new epoch's first entry in the log  ->  role "primary"

Cut off after the first or second, ``promote`` run again goes on; nothing else opens such a directory.
"""

from __future__ import annotations

import time

from understudy.common import entries
from understudy.common.directory import DataDirectory, Role
from understudy.common.engine import Engine
from understudy.common.errors import NotADataDirectory, WrongRole
from understudy.common.events import log
from understudy.common.records import Record, encode_record
from understudy.common.types import Epoch, Lsn, Position
from understudy.replica.promote import NOTHING_YET, Promotion

_SLOTS_FILE = "slots.json"


async def promote_stopped(directory: DataDirectory, *, started_s: float) -> Promotion:
    """Promotes the replica in a directory that this process has opened.

    Raises:
        NotADataDirectory, WrongRole: there is no replica's copy there.
        CorruptionError: the log is damaged behind the checkpoint.
    """
    if directory.role is not Role.PRIMARY:
        _check_promotable(directory)
    engine = Engine.open(directory)
    try:
        if directory.role is Role.PRIMARY:
            return _promoted_before(engine, started_s=started_s)
        return begin_reign(engine, started_s=started_s)
    finally:
        await engine.close()


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
        raise NotADataDirectory(f"{directory.path} has no entry of its primary yet", remedy=NOTHING_YET)
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
    return engine.was_promoted and engine.state.epochs[-1].info.first_lsn == engine.durable.lsn


def _promoted_before(engine: Engine, *, started_s: float) -> Promotion:
    """What a promotion has made of this directory already: whoever did not hear of it asks again.

    Raises:
        WrongRole: it was never promoted; its cluster began here.
    """
    head = engine.durable
    if not engine.was_promoted:
        raise _not_promotable(engine.directory)
    return Promotion(
        epoch=engine.epoch,
        lsn=head.lsn,
        digest=head.digest,
        seconds=time.monotonic() - started_s,
        warnings=[f"{engine.directory.path} had been promoted before"],
    )


def _check_promotable(directory: DataDirectory) -> None:
    if directory.role not in (Role.REPLICA, Role.PROMOTING):
        raise _not_promotable(directory)
    if not directory.has_copy:
        raise NotADataDirectory(
            f"{directory.path} has no copy yet: it has never finished its bootstrap",
            remedy=NOTHING_YET,
        )


def _not_promotable(directory: DataDirectory) -> WrongRole:
    remedy = {
        Role.PRIMARY: f"start it: understudy primary --data-dir {directory.path}",
        Role.FENCED: f"another primary reigns; join it: understudy rewind {directory.path} --to HOST:PORT",
    }.get(directory.role, "")
    return WrongRole(f"{directory.path} can't be promoted, its role is {directory.role.value}", remedy=remedy)
