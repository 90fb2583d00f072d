"""Recomputes what the store says about itself, by reading all of it.

The state digests are computed anew from every pair; each realm's history is followed link by link. What no
digest covers are the rows of ``clients``, the epochs, marks and times in ``meta``, and in ``history`` what stands
before the change; of those only the form is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain, groupby

import lmdb
from google.protobuf.message import DecodeError

from understudy.common.errors import CorruptionError
from understudy.common.state_digest import (
    EMPTY_STATE,
    REALM_PREFIX_BYTES,
    encode,
    realm_hash,
    sum_stored_pairs,
)
from understudy.common.store import Store
from understudy.common.store_layout import (
    CHECKPOINT_KEY,
    DROPPING_PREFIX,
    Environment,
    decode_history_row,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RealmState:
    """What one realm's pairs came to."""

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
    realms: dict[str, RealmState]
    problems: list[str] = field(default_factory=list)  # empty: all is as it was written

    @property
    def realms_checked(self) -> int:
        """How many realms there are."""
        return len(self.realms)


def check_state(store: Store, *, progress: Callable[[int], None] | None = None) -> StateCheck:
    """Reads the whole store, as it is now, and compares it with its own counts and digests.

    The server may go on meanwhile; the pages of this state stay in use as long. On a store that may be damaged,
    :func:`understudy.common.lmdb_check.check_structure` comes first: LMDB may crash on a bad page.

    Args:
        progress: called with the number of pairs read so far, every 10,000.

    Raises:
        CorruptionError: there is no telling what it should hold: the checkpoint's row can't be read.
    """
    with row_errors(store.path), store.env.begin() as txn:
        return _Check(store.environment, txn, progress or (lambda _: None)).run()


def check_realm(store: Environment, txn: lmdb.Transaction[bytes], path: str, row: RealmRow) -> list[str]:
    """What is wrong with the rows of one realm, as :func:`check_state` finds it for all; empty if nothing is.

    Args:
        txn: a snapshot of ``store``.
        row: the realm's, in that snapshot.
    """
    with row_errors(store.path):
        return _Check(store, txn, lambda _: None).run_for(path, row)


class _Check:
    def __init__(
        self,
        store: Environment,
        txn: lmdb.Transaction[bytes],
        progress: Callable[[int], None],
    ) -> None:
        self._store = store
        self._txn = txn
        self._progress = progress
        self._problems: list[str] = []
        self._rows: dict[bytes, tuple[str, RealmRow]] = {}  # by realm prefix
        self._states: dict[str, RealmState] = {}
        self._dropping: set[bytes] = set()
        self._entries = 0
        self._checkpoint = CheckpointRow.FromString(txn.get(CHECKPOINT_KEY, b"", store.meta))

    def run(self) -> StateCheck:
        for part in (self._read_realms, self._check_data, self._check_history, self._check_clients):
            try:
                part()
            except (lmdb.Error, OverflowError) as error:  # or a version beyond all others
                self._report(f"the store {self._store.path} can't be read to its end: {error}")
        state_digest = encode(
            sum(
                realm_hash(path, state.version, state.entries, state.state_digest)
                for path, state in self._states.items()
            )
        )
        said = self._checkpoint
        if (state_digest, len(self._states)) != (said.state_digest, said.realms):
            self._report(
                f"the checkpoint at LSN {said.lsn} names {said.realms} realms with state digest "
                f"{said.state_digest.hex()}, there are {len(self._states)} with {state_digest.hex()}"
            )
        return StateCheck(
            lsn=Lsn(said.lsn),
            digest=Digest(said.digest),
            state_digest=state_digest,
            entries_checked=self._entries,
            realms=self._states,
            problems=self._problems,
        )

    def run_for(self, path: str, row: RealmRow) -> list[str]:
        """The problems of one realm."""
        try:
            self._sum_realm(path, row, self._rows_of(self._store.data, row))
            history = self._rows_of(self._store.history, row)
            first = next(history, None)
            if first is None:
                self._check_no_history(path, row)
            elif problem := self._history_problem(path, row, chain([first], history)):
                self._report(f"the history of realm {path} {problem}")
            self._check_clients_of(path, self._rows_of(self._store.clients, row))
        except (lmdb.Error, OverflowError) as error:
            self._report(f"realm {path} can't be read to its end: {error}")
        return self._problems

    def _rows_of(self, database: lmdb._Database, row: RealmRow) -> Iterator[tuple[bytes, bytes]]:
        return rows_between(self._txn.cursor(database), realm_prefix(row.id), prefix_end(row.id))

    def _report(self, problem: str) -> None:
        if len(self._problems) < PROBLEMS_MAX:
            self._problems.append(problem)

    # -- realms --------------------------------------------------------------------------------------------

    def _read_realms(self) -> None:
        for key, raw in self._all(self._store.realms):
            try:
                path, row = key.decode(), RealmRow.FromString(raw)
            except (DecodeError, UnicodeDecodeError) as error:
                self._report(f"the row of realm {key!r} can't be read: {error}")
                continue
            prefix = row.id.to_bytes(REALM_PREFIX_BYTES, "big")
            if prefix in self._rows:
                self._report(f"realms {path} and {self._rows[prefix][0]} have the same id {row.id}")
            self._rows[prefix] = (path, row)
            self._states[path] = RealmState(version=row.version, state_digest=EMPTY_STATE, entries=0)
        for key, _ in self._all(self._store.meta):
            if key.startswith(DROPPING_PREFIX):
                self._dropping.add(key.removeprefix(DROPPING_PREFIX))

    # -- pairs ---------------------------------------------------------------------------------------------

    def _check_data(self) -> None:
        for prefix, rows in self._by_realm(self._store.data):
            known = self._known("data", prefix)
            if known is not None:
                self._sum_realm(*known, rows)
        for path, row in self._rows.values():
            if not self._states[path].entries:
                self._compare_realm(path, row, 0)

    def _sum_realm(self, path: str, row: RealmRow, rows: Iterator[tuple[bytes, bytes]]) -> None:
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
        self._entries += entries
        self._states[path] = RealmState(version=row.version, state_digest=encode(digest), entries=entries)
        self._compare_realm(path, row, size)

    def _compare_realm(self, path: str, row: RealmRow, size: int) -> None:
        found = self._states[path]
        if (found.entries, size) != (row.entries, row.bytes):
            self._report(
                f"realm {path} holds {found.entries} entries of {size} bytes, its row says {row.entries} of "
                f"{row.bytes}"
            )
        elif found.state_digest != row.state_digest:
            self._report(
                f"realm {path} has state digest {found.state_digest.hex()}, its row says "
                f"{row.state_digest.hex()}: a key or a value is not what was written"
            )

    # -- history -------------------------------------------------------------------------------------------

    def _check_history(self) -> None:
        without = dict(self._rows)
        for prefix, rows in self._by_realm(self._store.history):
            without.pop(prefix, None)
            known = self._known("history", prefix)
            if known is not None:
                problem = self._history_problem(*known, rows)
                if problem:
                    self._report(f"the history of realm {known[0]} {problem}")
        for path, row in without.values():
            self._check_no_history(path, row)

    def _check_no_history(self, path: str, row: RealmRow) -> None:
        # All of it may have become too old; then the realm's row alone knows where the head is.
        if (row.history_first, row.history_bytes) != (row.version + 1, 0) or not row.head_lsn:
            self._report(f"the history of realm {path} is gone")
        elif row.head_lsn > self._checkpoint.lsn:
            self._report(f"realm {path} has its head at LSN {row.head_lsn}, behind the checkpoint")

    def _history_problem(self, path: str, row: RealmRow, rows: Iterator[tuple[bytes, bytes]]) -> str:
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

    def _check_clients(self) -> None:
        for prefix, rows in self._by_realm(self._store.clients):
            known = self._known("clients", prefix)
            self._check_clients_of(known[0] if known else "a dropped realm", rows)

    def _check_clients_of(self, realm: str, rows: Iterator[tuple[bytes, bytes]]) -> None:
        for key, raw in rows:
            if len(key) != REALM_PREFIX_BYTES + ID_BYTES:
                self._report(f"a client's row of {realm} has a key of {len(key)} bytes")
            try:
                ClientRow.FromString(raw)
            except DecodeError as error:
                self._report(f"a client's row of {realm} can't be read: {error}")

    def _by_realm(self, database: lmdb._Database) -> Iterator[tuple[bytes, Iterator[tuple[bytes, bytes]]]]:
        return groupby(self._all(database), key=lambda row: row[0][:REALM_PREFIX_BYTES])

    def _all(self, database: lmdb._Database) -> Iterator[tuple[bytes, bytes]]:
        """All rows in order, each looked up as well: a bad key in a branch page hides rows from searches alone."""
        get = self._txn.get
        for row in self._txn.cursor(database):
            if get(row[0], None, database) is None:
                self._report(f"the row {row[0]!r} is there, but a search does not find it")
            yield row

    def _known(self, database: str, prefix: bytes) -> tuple[str, RealmRow] | None:
        known = self._rows.get(prefix)
        if known is None and prefix not in self._dropping:
            self._report(
                f"there are rows in {database} of a realm with id {int.from_bytes(prefix, 'big')}, "
                "and no such realm"
            )
        return known


# -- in a process of its own -----------------------------------------------------------------------------------
