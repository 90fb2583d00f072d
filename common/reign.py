"""A new reign: a copy becomes a primary's by starting a new epoch. The data is not touched: its size does not matter.

Steps, each durable before the next::

    role "promoting"  ->  the new epoch's first entry in the log  ->  role "primary"

Cut off after the first or second, ``promote`` run again goes on; nothing else opens such a directory.
"""

from __future__ import annotations

import time

from understudy.common import entries
from understudy.common.directory import Role
from understudy.common.engine import Engine
from understudy.common.records import Record, encode_record
from understudy.common.types import Epoch, Lsn, Position

_SLOTS_FILE = "slots.json"


def begin_epoch(engine: Engine) -> None:
    """Starts a new epoch behind the log's end, unless that was done before, and makes the directory a primary's.

    Everything that the log holds must be applied, and nobody else may write.

    Raises:
        DiskFull, StorageFailed: it can be tried again.
    """
    directory = engine.directory
    if directory.role is not Role.PROMOTING:
        directory.set_role(Role.PROMOTING)
    if not _has_begun(engine):
        _write_start(engine)
    # Slots of an earlier reign would keep log for replicas that are long elsewhere.
    (directory.path / _SLOTS_FILE).unlink(missing_ok=True)
    directory.set_role(Role.PRIMARY)


def _write_start(engine: Engine) -> None:
    directory, last = engine.directory, engine.durable
    # After a restore to before a promotion, the number that follows was another reign's: whoever has seen that one
    # would take it for this one's successor.
    epoch = Epoch(max(engine.epoch, directory.epoch_floor) + 1)
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


def _has_begun(engine: Engine) -> bool:
    """Whether an earlier, interrupted attempt has written its entry."""
    return engine.was_promoted and engine.state.epochs[-1].info.first_lsn == engine.durable.lsn
