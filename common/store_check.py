"""Recomputes what the store says about itself, by reading all of it.

The state digests are computed anew from every pair; each realm's history is followed link by link. What no
digest covers are the rows of ``clients``, the epochs, marks and times in ``meta``, and in ``history`` what stands
before the change; of those only the form is checked.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import chain, groupby

import lmdb
from google.protobuf.message import DecodeError

from understudy.common.errors import CorruptionError
from understudy.common.state_digest import REALM_PREFIX_BYTES, encode, realm_hash, sum_stored_pairs
from understudy.common.store import Store
from understudy.common.store_layout import (
    CHECKPOINT_KEY,
    Environment,
    decode_history_row,
    dropping_key,
    history_key,
    prefix_end,
    realm_prefix,
    row_errors,
)
from understudy.common.store_rows import rows_between
from understudy.common.types import ID_BYTES, KEY_BYTES_MAX, Digest, Lsn
from understudy.v1.log_pb2 import Change
from understudy.v1.store_pb2 import CheckpointRow, ClientRow, RealmRow

PROBLEMS_MAX = 100  # of one store; where there are so many, more say nothing new
_PROGRESS_ROWS = 10_000
_TOLD_BYTES = 1 << 20
# Their rows are in another order than their pairs, and are sorted so many at a time: some 400 bytes each.
_REALMS_SORTED_AT_ONCE = 200_000
_BEHIND_ALL = b"\xff" * (REALM_PREFIX_BYTES + 1)

_Rows = Iterator[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RealmState:
    """What one realm's pairs came to."""

    path: str
    version: int
    state_digest: bytes
    entries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StateCheck:
    """What a check found."""

    lsn: Lsn
    digest: Digest  # the log's digest at `lsn`
    state_digest: bytes  # recomputed, over all realms
    entries_checked: int
    realms_checked: int
    problems: list[str] = field(default_factory=list)  # empty: all is as it was written


def check_state(
    store: Store,
    *,
    progress: Callable[[int], None] | None = None,
    on_realm: Callable[[RealmState], None] | None = None,
) -> StateCheck:
    """Reads the whole store, as it is now, and compares it with its own counts and digests.

    The server may go on meanwhile; the pages of this state stay in use as long. On a store that may be damaged,
    :func:`understudy.common.lmdb_check.check_structure` comes first: LMDB may crash on a bad page.

    Args:
        progress: called with the number of pairs read so far, every 10,000.
        on_realm: given each realm's state, in the order of their ids; none is kept, for there may be millions.

    Raises:
        CorruptionError: there is no telling what it should hold: the checkpoint's row can't be read.
    """
    with row_errors(store.path), store.env.begin() as txn:
        check = _Check(store.environment, txn, progress or (lambda _: None), on_realm or (lambda _: None))
        return check.run()


def check_realm(
    store: Environment,
    txn: lmdb.Transaction[bytes],
    path: str,
    row: RealmRow,
    *,
    on_read: Callable[[int], None],
) -> list[str]:
    """What is wrong with the rows of one realm, as :func:`check_state` finds it for all; empty if nothing is.

    Args:
        txn: a snapshot of ``store``.
        row: the realm's, in that snapshot.
        on_read: told of bytes that were read, every mebibyte or so.
    """
    with row_errors(store.path):
        return _Check(store, txn, lambda _: None, lambda _: None).run_for(path, row, on_read)


class _Check:
    def __init__(
        self,
        store: Environment,
        txn: lmdb.Transaction[bytes],
        progress: Callable[[int], None],
        on_realm: Callable[[RealmState], None],
    ) -> None:
        self._store = store
        self._txn = txn
        self._progress = progress
        self._on_realm = on_realm
        self._problems: list[str] = []
        self._state_digest = 0  # the sum so far
        self._realms = 0
        self._entries = 0
        self._checkpoint = CheckpointRow.FromString(txn.get(CHECKPOINT_KEY, b"", store.meta))

    def run(self) -> StateCheck:
        for part in (self._check_realm_rows, self._check_realms):
            try:
                part()
            except lmdb.Error as error:
                self._report(f"the store {self._store.path} can't be read to its end: {error}")
        state_digest = encode(self._state_digest)
        said = self._checkpoint
        if (state_digest, self._realms) != (said.state_digest, said.realms):
            self._report(
                f"the checkpoint at LSN {said.lsn} names {said.realms} realms with state digest "
                f"{said.state_digest.hex()}, there are {self._realms} with {state_digest.hex()}"
            )
        return StateCheck(
            lsn=Lsn(said.lsn),
            digest=Digest(said.digest),
            state_digest=state_digest,
            entries_checked=self._entries,
            realms_checked=self._realms,
            problems=self._problems,
        )

    def run_for(self, path: str, row: RealmRow, on_read: Callable[[int], None]) -> list[str]:
        """The problems of one realm."""
        store = self._store
        try:
            data, history, clients = (
                _told(self._rows_of(one, row), on_read) for one in (store.data, store.history, store.clients)
            )
            self._check_realm(path, row, data, history)
            self._check_clients_of(path, clients)
        except lmdb.Error as error:
            self._report(f"realm {path} can't be read to its end: {error}")
        return self._problems

    def _rows_of(self, database: lmdb._Database, row: RealmRow) -> _Rows:
        return rows_between(self._txn.cursor(database), realm_prefix(row.id), prefix_end(row.id))

    def _report(self, problem: str) -> None:
        if len(self._problems) < PROBLEMS_MAX:
            self._problems.append(problem)

    # -- realms --------------------------------------------------------------------------------------------

    def _check_realm_rows(self) -> None:
        """Each realm's own row, and that ``meta`` can be read."""
        for key, raw in self._all(self._store.realms):
            try:
                _named(key, raw)
            except (DecodeError, UnicodeDecodeError) as error:
                self._report(f"the row of realm {key!r} can't be read: {error}")
        for _ in self._all(self._store.meta):
            pass

    def _check_realms(self) -> None:
        """What there is of each realm, one after the other in the order in which their pairs lie."""
        store = self._store
        data, history, clients = (
            _ByRealm(self._all(database), partial(self._check_unknown, name))
            for name, database in (
                ("data", store.data), ("history", store.history), ("clients", store.clients)
            )
        )  # fmt: skip
        before = b"", ""
        for path, row in self._realms_by_id():
            prefix = realm_prefix(row.id)
            if prefix == before[0]:
                self._report(f"realms {path} and {before[1]} have the same id {row.id}")
            before = prefix, path
            self._check_realm(path, row, data.of(prefix), history.of(prefix))
            self._check_clients_of(path, clients.of(prefix))
        for rows in (data, history, clients):
            rows.of(_BEHIND_ALL)

    def _realms_by_id(self) -> Iterator[tuple[str, RealmRow]]:
        """All realms whose row can be read, in the order of their ids, in memory for some of them."""
        last = (-1, b"", b"")
        while True:
            found = (one for one in self._realm_rows() if one > last)
            sorted_rows = heapq.nsmallest(_REALMS_SORTED_AT_ONCE, found)
            for _, key, raw in sorted_rows:
                yield _named(key, raw)
            if len(sorted_rows) < _REALMS_SORTED_AT_ONCE:
                return
            last = sorted_rows[-1]
            del sorted_rows  # before the next are there

    def _realm_rows(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Each realm's id, key and row."""
        for key, raw in self._txn.cursor(self._store.realms):
            with contextlib.suppress(DecodeError, UnicodeDecodeError):  # was reported
                yield _named(key, raw)[1].id, key, raw

    def _check_realm(self, path: str, row: RealmRow, data: _Rows, history: _Rows) -> None:
        self._sum_realm(path, row, data)
        first = next(history, None)
        if first is None:
            self._check_no_history(path, row)
            return
        try:
            problem = self._history_problem(path, row, chain([first], history))
        except OverflowError as error:
            problem = f"has a version beyond all others: {error}"
        if problem:
            self._report(f"the history of realm {path} {problem}")

    # -- pairs ---------------------------------------------------------------------------------------------

    def _sum_realm(self, path: str, row: RealmRow, rows: _Rows) -> None:
        digest = entries = size = 0
        for pair in rows:
            if len(pair[0]) > REALM_PREFIX_BYTES + KEY_BYTES_MAX:
                self._report(f"realm {path} holds a key of {len(pair[0]) - REALM_PREFIX_BYTES} bytes")
                continue
            digest += sum_stored_pairs((pair,))
            size += len(pair[0]) + len(pair[1]) - REALM_PREFIX_BYTES
            entries += 1
            if not (self._entries + entries) % _PROGRESS_ROWS:
                self._progress(self._entries + entries)
        found = RealmState(path=path, version=row.version, state_digest=encode(digest), entries=entries)
        self._entries += entries
        self._realms += 1
        self._state_digest += realm_hash(path, found.version, found.entries, found.state_digest)
        self._compare_realm(row, found, size)
        self._on_realm(found)

    def _compare_realm(self, row: RealmRow, found: RealmState, size: int) -> None:
        if (found.entries, size) != (row.entries, row.bytes):
            self._report(
                f"realm {found.path} holds {found.entries} entries of {size} bytes, its row says {row.entries} of "
                f"{row.bytes}"
            )
        elif found.state_digest != row.state_digest:
            self._report(
                f"realm {found.path} has state digest {found.state_digest.hex()}, its row says "
                f"{row.state_digest.hex()}: a key or a value is not what was written"
            )

    # -- history -------------------------------------------------------------------------------------------

    def _check_no_history(self, path: str, row: RealmRow) -> None:
        # All of it may have become too old; then the realm's row alone knows where the head is.
        if (row.history_first, row.history_bytes) != (row.version + 1, 0) or not row.head_lsn:
            self._report(f"the history of realm {path} is gone")
        elif row.head_lsn > self._checkpoint.lsn:
            self._report(f"realm {path} has its head at LSN {row.head_lsn}, behind the checkpoint")

    def _history_problem(self, path: str, row: RealmRow, rows: _Rows) -> str:
        """The first thing that is wrong, empty if nothing is."""
        version, size, head, lsn = row.history_first, 0, b"", 0
        for key, raw in rows:
            if key != history_key(row.id, version):
                return f"has no version {version}"
            try:
                past = decode_history_row(version, raw)
                change = Change.FromString(past.change)
            except (CorruptionError, DecodeError) as error:
                return f"can't be read at version {version}: {error}"
            if (change.realm, change.version) != (path, version):
                return (
                    f"has version {change.version} of realm {change.realm} in the place of version {version}"
                )
            if (version == 1 or head) and change.previous != head:
                return f"is no chain: version {version} does not follow from the one before"
            if not lsn < past.lsn <= self._checkpoint.lsn:
                return f"has version {version} at LSN {past.lsn}, after one at {lsn}"
            version, size, head, lsn = version + 1, size + len(raw), sha256(past.change).digest(), past.lsn
        if version != row.version + 1 or head != row.head:
            return (
                f"ends at version {version - 1}, head {head.hex()[:12]}; the realm's row says {row.version}, "
                f"{row.head.hex()[:12]}"
            )
        if row.head_lsn not in (lsn, 0):  # 0: an earlier version wrote it
            return f"ends at LSN {lsn}; the realm's row says {row.head_lsn}"
        if size != row.history_bytes:
            return f"has {size} bytes, the realm's row says {row.history_bytes}"
        return ""

    # -- the rest ------------------------------------------------------------------------------------------

    def _check_clients_of(self, realm: str, rows: _Rows) -> None:
        for key, raw in rows:
            if len(key) != REALM_PREFIX_BYTES + ID_BYTES:
                self._report(f"a client's row of {realm} has a key of {len(key)} bytes")
            try:
                ClientRow.FromString(raw)
            except DecodeError as error:
                self._report(f"a client's row of {realm} can't be read: {error}")

    def _check_unknown(self, database: str, prefix: bytes, rows: _Rows) -> None:
        """Rows of no realm: of one that is being dropped, or they should not be there."""
        if database == "clients":
            self._check_clients_of("a dropped realm", rows)
        realm_id = int.from_bytes(prefix, "big")
        if self._txn.get(dropping_key(realm_id), None, self._store.meta) is None:
            self._report(f"there are rows in {database} of a realm with id {realm_id}, and no such realm")

    def _all(self, database: lmdb._Database) -> _Rows:
        """All rows in order, each looked up as well: a bad key in a branch page hides rows from searches alone."""
        get = self._txn.get
        for row in self._txn.cursor(database):
            if get(row[0], None, database) is None:
                self._report(f"the row {row[0]!r} is there, but a search does not find it")
            yield row


class _ByRealm:
    """The rows of one database, given out realm by realm in the order of their ids, which is theirs."""

    def __init__(self, rows: _Rows, on_unknown: Callable[[bytes, _Rows], None]) -> None:
        self._groups = groupby(rows, key=lambda row: row[0][:REALM_PREFIX_BYTES])
        self._on_unknown = on_unknown
        self._prefix = b""
        self._rows: _Rows | None = None  # None: they were asked for

    def of(self, prefix: bytes) -> _Rows:
        """A realm's rows, to be read before the next realm is asked for; realms passed over are unknown ones."""
        while self._prefix < prefix:
            if self._rows is not None:
                self._on_unknown(self._prefix, self._rows)
            self._prefix, self._rows = next(self._groups, (_BEHIND_ALL, None))
        if self._prefix != prefix or self._rows is None:
            return iter(())
        rows, self._rows = self._rows, None
        return rows


def _named(key: bytes, raw: bytes) -> tuple[str, RealmRow]:
    """A realm's path and row.

    Raises:
        DecodeError, UnicodeDecodeError.
    """
    return key.decode(), RealmRow.FromString(raw)


def _told(rows: _Rows, on_read: Callable[[int], None]) -> _Rows:
    size = 0
    for row in rows:
        size += len(row[0]) + len(row[1])
        if size >= _TOLD_BYTES:
            on_read(size)
            size = 0
        yield row
    on_read(size)
