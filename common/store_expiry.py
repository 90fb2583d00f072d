"""What a checkpoint lets go because of its age: changes in ``history``, and rows of silent clients.

The clock is the log's: a checkpoint's time is that of its freeze mark, and a change is as old as the first checkpoint
behind it whose time is noted. Each checkpoint does a bounded part of the work and notes in ``meta`` where the next
one goes on.
"""

from __future__ import annotations

from itertools import islice

import lmdb

from understudy.common.errors import RESTORE, CorruptionError
from understudy.common.store_layout import (
    CLIENTS_CURSOR_KEY,
    HISTORY_CURSOR_KEY,
    TIME_PREFIX,
    Environment,
    decode_time_row,
    encode_time_row,
    history_key,
    history_row_lsn,
    time_key,
)
from understudy.common.store_rows import delete_rows, rows_between, rows_under
from understudy.common.types import NO_LSN, Lsn, parse_lsn
from understudy.v1.store_pb2 import CheckpointRow, ClientRow, RealmRow

_HOUR_US = 3600 * 1_000_000
_DAY_US = 24 * _HOUR_US

# A client that was away for longer loads its realms anew.
HISTORY_AGE_US = 30 * _DAY_US
# How exactly that is kept. Of three times noted the first and the last are so far apart: 1,440 rows in 30 days.
TIMES_APART_US = _HOUR_US
# Longer than any history: a client that comes back after months loads the state anew, but what it still has to send
# may have been applied before its connection broke, and only its row tells. It costs some 60 bytes, a change of the
# past many times as much.
CLIENT_KEPT_US = 180 * _DAY_US
# Rows looked at by one checkpoint, a few milliseconds' work each. Each is looked at again and again.
CLIENTS_CHECKED = 1_000
REALMS_CHECKED = 1_000
# Changes of the past that one checkpoint deletes: a fraction of a second, and more than a memtable brings.
EXPIRED_ROWS_MAX = 70_000
# A larger change counts as several: each of its pages goes into the list of free ones.
_EXPIRED_ROW_BYTES = 16 << 10


class Expiry:
    """One checkpoint's part of the work, once all else is written but the checkpoint's own row."""

    def __init__(
        self,
        store: Environment,
        before: lmdb.Transaction[memoryview],
        txn: lmdb.Transaction[bytes],
        checkpoint: CheckpointRow,
    ) -> None:
        self._store = store
        self._before = before
        self._txn = txn
        self._checkpoint = checkpoint

    def run(self) -> None:
        """Notes the time, and deletes what is too old by now."""
        self._expire_clients()
        self._note_time()
        expired = self._expired_lsn()
        if expired != NO_LSN:
            self._expire_history(expired)

    # -- clients -------------------------------------------------------------------------------------------

    def _expire_clients(self) -> None:
        """Looks at the next rows in turn and deletes those of clients that were silent for too long."""
        clients = self._store.clients
        start = self._txn.get(CLIENTS_CURSOR_KEY, b"", self._store.meta)
        rows = list(islice(rows_between(self._txn.cursor(clients), start, b""), CLIENTS_CHECKED))
        oldest_us = self._checkpoint.time_us - CLIENT_KEPT_US
        silent = [key for key, raw in rows if ClientRow.FromString(raw).time_us < oldest_us]
        delete_rows(self._txn, clients, silent)
        following = rows[-1][0] + b"\0" if len(rows) == CLIENTS_CHECKED else b""
        self._move_cursor(CLIENTS_CURSOR_KEY, start, following)

    def _move_cursor(self, key: bytes, start: bytes, following: bytes) -> None:
        if following != start:
            self._txn.put(key, following, db=self._store.meta)

    # -- history -------------------------------------------------------------------------------------------

    def _note_time(self) -> None:
        """Notes the checkpoint's time, in place of the last one noted where that leaves no more than an hour open."""
        now_us = self._checkpoint.time_us
        if len(times := self._times()) > 1 and now_us - times[-2][1] < TIMES_APART_US:
            delete_rows(self._txn, self._store.meta, [times[-1][0]])
        self._txn.put(time_key(self._checkpoint.lsn), encode_time_row(now_us), db=self._store.meta)

    def _expired_lsn(self) -> Lsn:
        """Up to which LSN all is too old. Of the times noted up to there only the last is needed on."""
        oldest_us = self._checkpoint.time_us - HISTORY_AGE_US
        expired = [key for key, time_us in self._times() if time_us < oldest_us]
        delete_rows(self._txn, self._store.meta, expired[:-1])
        return _lsn_of(expired[-1]) if expired else NO_LSN

    def _times(self) -> list[tuple[bytes, int]]:
        rows = rows_under(self._txn.cursor(self._store.meta), TIME_PREFIX)
        return [(key, decode_time_row(raw)) for key, raw in rows]

    def _expire_history(self, upto: Lsn) -> None:
        """Looks at the next realms in turn and deletes their changes up to an LSN, as many as may go at one time."""
        realms = self._store.realms
        start = self._txn.get(HISTORY_CURSOR_KEY, b"", self._store.meta)
        rows = list(islice(rows_between(self._txn.cursor(realms), start, b""), REALMS_CHECKED + 1))
        left = EXPIRED_ROWS_MAX
        following = b""
        for at, (path, raw) in enumerate(rows):
            if at == REALMS_CHECKED or left <= 0:
                following = path
                break
            left -= self._expire_realm(path, RealmRow.FromString(raw), upto, left)
        self._move_cursor(HISTORY_CURSOR_KEY, start, following)

    def _expire_realm(self, path: bytes, row: RealmRow, upto: Lsn, left: int) -> int:
        """Deletes a realm's changes up to an LSN while less than ``left`` has been done; returns how much was."""
        history = self._store.history
        first, stop = (history_key(row.id, version) for version in (row.history_first, row.version + 1))
        keys, size, done = [], 0, 0
        # They are older than the last checkpoint, so all are in the store as it was; and it need not be copied.
        for key, change in rows_between(self._before.cursor(history), first, stop):
            if done >= left or history_row_lsn(change) > upto:
                break
            keys.append(bytes(key))
            size += len(change)
            done += 1 + len(change) // _EXPIRED_ROW_BYTES
        if not keys:
            return 0
        if keys[-1] != history_key(row.id, row.history_first + len(keys) - 1):
            raise CorruptionError(f"the history of realm {path.decode()} has gaps", remedy=RESTORE)
        row.head_lsn = row.head_lsn or self._newest_lsn(row)
        delete_rows(self._txn, history, keys)
        row.history_first += len(keys)
        row.history_bytes -= size
        self._txn.put(path, row.SerializeToString(), db=self._store.realms)
        return done

    def _newest_lsn(self, row: RealmRow) -> int:
        newest = self._before.get(history_key(row.id, row.version), db=self._store.history)
        return history_row_lsn(newest) if newest is not None else NO_LSN


def _lsn_of(key: bytes) -> Lsn:
    try:
        return parse_lsn(key.removeprefix(TIME_PREFIX).decode())
    except ValueError as error:
        raise CorruptionError(f"the time of a checkpoint can't be read: {error}", remedy=RESTORE) from error
