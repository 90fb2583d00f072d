"""State digests of this copy beside those that the primary has noted in the log (G11)."""

from __future__ import annotations

import collections
from typing import TypeVar

from understudy.common.events import log
from understudy.common.metrics import EngineMetrics
from understudy.common.store import Store
from understudy.v1 import log_pb2, store_pb2

_KEPT = 64  # results waiting for the other side's, and the other way round

_V = TypeVar("_V")


class DigestComparison:
    """Compares each checkpoint's digest with the mark for the same freeze, whichever comes first."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self.mismatches: list[str] = []
        self._metrics = metrics
        self._own: collections.OrderedDict[int, bytes] = collections.OrderedDict()
        self._marked: collections.OrderedDict[int, log_pb2.DigestMark] = collections.OrderedDict()

    def note_own(self, row: store_pb2.CheckpointRow, store: Store) -> None:
        """A checkpoint is in the store."""
        self._own[row.lsn] = row.state_digest
        _forget_oldest(self._own)
        self._compare(row.lsn, store)

    def note_mark(self, mark: log_pb2.DigestMark, store: Store) -> None:
        """What the primary had at one of its checkpoints."""
        self._marked[mark.freeze_lsn] = mark
        _forget_oldest(self._marked)
        self._compare(mark.freeze_lsn, store)

    def _compare(self, freeze_lsn: int, store: Store) -> None:
        mark, own = self._marked.get(freeze_lsn), self._own.get(freeze_lsn)
        if mark is None or own is None:
            return
        del self._marked[freeze_lsn]
        equal = own == mark.state_digest
        self._metrics.count_comparison(equal=equal)
        if not equal:
            message = _describe(mark, store)
            self.mismatches.append(message)
            del self.mismatches[:-_KEPT]
            log.error("state_digest_mismatch", freeze_lsn=freeze_lsn, detail=message)


def _describe(mark: log_pb2.DigestMark, store: Store) -> str:
    differing = [
        changed.realm
        for changed in mark.changed
        if (row := store.current.realm(changed.realm)) is not None
        and row.version == changed.version
        and row.state_digest != changed.state_digest
    ]
    where = f"realms {', '.join(differing[:10])}" if differing else "a realm not changed since"
    return f"at LSN {mark.freeze_lsn} this copy's state is not the primary's: {where}"


def _forget_oldest(kept: collections.OrderedDict[int, _V]) -> None:
    while len(kept) > _KEPT:
        kept.popitem(last=False)
