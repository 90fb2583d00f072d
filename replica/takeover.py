"""The takeover: a replica's directory, open in this process, becomes a primary's."""

from __future__ import annotations

import time

from understudy.common.directory import DataDirectory, Role
from understudy.common.engine import Engine
from understudy.common.errors import NotADataDirectory, WrongRole
from understudy.common.events import log
from understudy.common.reign import begin_epoch
from understudy.replica.promote import NOTHING_YET, Promotion


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
    """Starts a new epoch behind the log's end and makes the directory a primary's; see :func:`begin_epoch`.

    Args:
        engine: of the replica.
        started_s: monotonic time at which the promotion began.

    Raises:
        NotADataDirectory: not even the cluster's first entry has come yet.
    """
    if not engine.epoch:
        raise NotADataDirectory(
            f"{engine.directory.path} has no entry of its primary yet", remedy=NOTHING_YET
        )
    begin_epoch(engine)
    head = engine.durable
    log.info("promoted", epoch=engine.epoch, lsn=head.lsn)
    return Promotion(
        epoch=engine.epoch,
        lsn=head.lsn,
        digest=head.digest,
        seconds=time.monotonic() - started_s,
        warnings=list(engine.warnings),
    )


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
        Role.BACKUP: f"start it: understudy primary --data-dir {directory.path}",
        Role.FENCED: f"another primary reigns; join it: understudy rewind {directory.path} --to HOST:PORT",
    }.get(directory.role, "")
    return WrongRole(f"{directory.path} can't be promoted, its role is {directory.role.value}", remedy=remedy)
