"""What is known of realms' past: their changes, digests and clients, read through all layers of a state.

A realm's history is that of its row in the store, from ``history_first`` on, and behind it that of the memtables,
without a gap. A realm that was dropped takes its past with it; one made again begins with version 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import closing
from hashlib import sha256
from typing import NamedTuple

from understudy.common.entries import parse_change
from understudy.common.errors import RESTORE, CorruptionError, UnknownRealm
from understudy.common.memtable import MISSING, Missing, RealmDelta, Receipt
from understudy.common.store import Store
from understudy.common.store_layout import HistoryRow, decode_history_row
from understudy.common.types import Lsn
from understudy.v1.store_pb2 import ClientRow, RealmRow

# How far back a retried transaction's receipt is looked for among a realm's changes.
RECEIPT_SEARCH_VERSIONS = 50_000


class LastChange(NamedTuple):
    """A client's latest change to a realm."""

    number: int  # the highest applied
    version: int  # that it made
    time_us: int


class RealmLayers(NamedTuple):
    """Where one realm is to be looked for. Nothing anywhere: there is no such realm."""

    path: str
    deltas: list[RealmDelta]  # newest first
    stored: RealmRow | None  # None: nothing in the store is this realm's

    @property
    def version(self) -> int:
        """The realm's; 0 where there is no realm."""
        if self.deltas:
            return self.deltas[0].version
        return self.stored.version if self.stored is not None else 0

    @property
    def head(self) -> bytes | None:
        """SHA-256 of the realm's latest change; None where there is no realm."""
        if self.deltas:
            return self.deltas[0].head
        return self.stored.head if self.stored is not None else None

    @property
    def history_first(self) -> int:
        """The oldest version kept; one more than the realm's where none is."""
        if self.stored is not None:
            return self.stored.history_first
        oldest = self.deltas[-1]
        return oldest.version + 1 - len(oldest.history)


class RealmHistory(ABC):
    """The part of a state that looks back."""

    store: Store

    def __init__(self) -> None:
        self._searched: tuple[int, int, bytes] | None = None  # whose receipts `_found` has
        self._found: dict[int, Receipt] = {}

    @abstractmethod
    def layers_of(self, path: str) -> RealmLayers:
        """The layers in which a realm is."""

    def known_layers_of(self, path: str) -> RealmLayers:
        """The layers in which a realm is.

        Raises:
            UnknownRealm: no such realm.
        """
        layers = self.layers_of(path)
        if layers.deltas or layers.stored is not None:
            return layers
        raise UnknownRealm(f"no realm {path}", remedy="a realm comes into being with its first transaction")

    # -- changes -------------------------------------------------------------------------------------------

    def history(
        self, path: str, first_version: int, *, count_max: int, bytes_max: int
    ) -> list[HistoryRow] | None:
        """The changes from ``first_version`` on, without gaps, as many as the limits allow; one always fits.

        Args:
            bytes_max: of serialized changes together.

        Returns:
            An empty list where there is none yet, None where ``first_version`` is older than what is kept.

        Raises:
            UnknownRealm: no such realm.
            CorruptionError: one is missing in the store.
        """
        layers = self.known_layers_of(path)
        if first_version < layers.history_first:
            return None
        found: list[HistoryRow] = []
        size = 0
        with closing(self._rows(layers, first_version)) as rows:
            for row in rows:
                size += len(row.change)
                if found and size > bytes_max:
                    break
                found.append(row)
                if len(found) >= count_max:
                    break
        return found

    def _rows(self, layers: RealmLayers, first_version: int) -> Generator[HistoryRow, None, None]:
        """The changes from ``first_version`` on, which is kept."""
        stored = layers.stored
        if stored is not None and first_version <= stored.version:
            with closing(self.store.current.history(stored.id, first_version)) as rows:
                for version, row in enumerate(rows, first_version):
                    if row.version != version:
                        raise CorruptionError(
                            f"the store has no version {version} of realm {layers.path}", remedy=RESTORE
                        )
                    yield row
        for delta in reversed(layers.deltas):
            start = max(first_version, delta.version + 1 - len(delta.history))
            for version in range(start, delta.version + 1):
                yield decode_history_row(version, delta.history_row(version))

    def _row_at(self, layers: RealmLayers, version: int) -> HistoryRow:
        """A change that is kept."""
        with closing(self._rows(layers, version)) as rows:
            row = next(rows, None)
        if row is None:
            raise CorruptionError(
                f"the store has no version {version} of realm {layers.path}", remedy=RESTORE
            )
        return row

    def history_first(self, path: str) -> int:
        """The oldest version whose change is kept; one more than the realm's version where none is.

        Raises:
            UnknownRealm: no such realm.
        """
        return self.known_layers_of(path).history_first

    def head_lsn(self, path: str) -> Lsn:
        """The LSN of a realm's latest change.

        Raises:
            UnknownRealm: no such realm.
        """
        layers = self.known_layers_of(path)
        stored = layers.stored
        if not layers.deltas and stored is not None and stored.head_lsn:
            return Lsn(stored.head_lsn)
        return self._row_at(layers, layers.version).lsn

    def digest_at(self, path: str, version: int) -> bytes | None:
        """SHA-256 of the change that made a version, empty for version 0.

        None where that is not known: there is no such realm or version, or it is older than what is kept. It is
        known one version further back than the changes are: each names the one before.
        """
        if version <= 0:
            return b""
        layers = self.layers_of(path)
        if version >= layers.version:
            return layers.head if version == layers.version else None
        first = layers.history_first
        if version < first - 1:
            return None
        if version == first - 1:
            oldest = self._row_at(layers, first)
            return parse_change(oldest.change, oldest.lsn).previous
        return sha256(self._row_at(layers, version).change).digest()

    # -- clients -------------------------------------------------------------------------------------------

    def client_row(self, path: str, client: bytes) -> LastChange | None:
        """A client's latest change to a realm; None where none is remembered, or there is no such realm."""
        _, deltas, stored = self.layers_of(path)
        for delta in deltas:
            if client in delta.client_rows:
                return LastChange(*delta.client_rows[client])
        row = self.store.current.client(stored.id, client) if stored is not None else None
        return LastChange(row.number, row.version, row.time_us) if row is not None else None

    def last_number(self, path: str, client: bytes) -> int:
        """The highest number of this client applied to the realm; 0 if there is none."""
        row = self.client_row(path, client)
        return row.number if row is not None else 0

    def receipt(self, path: str, client: bytes, number: int) -> Receipt | Missing | None:
        """The receipt of an earlier transaction, ``number`` not above :meth:`last_number`.

        None means that it was never applied, MISSING that this is no longer known.
        """
        _, deltas, stored = self.layers_of(path)
        for delta in deltas:
            version = delta.versions.get(client, {}).get(number)
            if version is not None:
                past = decode_history_row(version, delta.history_row(version))
                return Receipt(path, version, past.lsn, past.digest)
        last = self.store.current.client(stored.id, client) if stored is not None else None
        if stored is None or last is None or number > last.number:
            return None
        return self._search_history(path, stored, last, client, number)

    def _search_history(
        self, path: str, row: RealmRow, last: ClientRow, client: bytes, number: int
    ) -> Receipt | Missing | None:
        """Looks among the realm's past changes; all of this client's are noted, since the next are asked for next."""
        oldest = max(row.history_first, last.version - RECEIPT_SEARCH_VERSIONS)
        key = (self.store.current.checkpoint.lsn, row.id, client)
        if self._searched != key:
            self._searched = key
            self._found = {}
            for past in self.store.current.history(row.id, last.version, reverse=True):
                if past.version < oldest:
                    break
                change = parse_change(past.change, past.lsn)
                if change.client == client:
                    self._found[change.number] = Receipt(path, past.version, past.lsn, past.digest)
        receipt = self._found.get(number)
        if receipt is not None:
            return receipt
        # Between two that are known it was refused; below all of them, nobody knows any more.
        known_from = min(self._found, default=number + 1)
        return None if oldest <= 1 or number > known_from else MISSING
