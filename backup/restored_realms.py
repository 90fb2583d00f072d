"""Single realms of a restored directory: what they hold, and how they came to hold it, to be written elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain

from understudy.backup.realm_bases import Bases
from understudy.backup.selection import Selection
from understudy.common.batches import in_batches
from understudy.common.entries import parse_change
from understudy.common.operations import Delete, DeleteRange, Operation, Put, from_proto, operation_bytes
from understudy.common.state import State
from understudy.common.types import is_system_realm

Pair = tuple[bytes, bytes]

_TRANSACTION_OPERATIONS = 1_000
# Read at a time, so that neither a page nor a realm's past fills the memory.
_PAGE_PAIRS = 10_000
_PAGE_BYTES = 1 << 20
# Of a past that nothing is known of, in a realm that holds nothing: it makes the realm, and changes nothing in it.
_NOTHING: list[Operation] = [DeleteRange(b"", b"")]


@dataclass(frozen=True, slots=True)
class Difference:
    """A key at which two realms differ."""

    key: bytes
    present: bytes | None
    wanted: bytes | None

    def operation(self) -> Operation:
        """What makes the one like the other."""
        return Delete(self.key) if self.wanted is None else Put(self.key, self.wanted)


def differences(present: Iterable[Pair], wanted: Iterable[Pair]) -> Iterator[Difference]:
    """Where two realms differ, by key; the pairs of both come in the order of their keys."""
    ours, theirs = iter(present), iter(wanted)
    here, there = next(ours, None), next(theirs, None)
    while here is not None or there is not None:
        if there is None or (here is not None and here[0] < there[0]):
            assert here is not None, "one of them is left"
            yield Difference(here[0], here[1], None)
            here = next(ours, None)
        elif here is None or there[0] < here[0]:
            yield Difference(there[0], None, there[1])
            there = next(theirs, None)
        else:
            if here[1] != there[1]:
                yield Difference(here[0], here[1], there[1])
            here, there = next(ours, None), next(theirs, None)


def in_transactions(operations: Iterable[Operation]) -> Iterator[list[Operation]]:
    """The operations in order, in transactions of bounded size."""
    return in_batches(operations, operation_bytes, count_max=_TRANSACTION_OPERATIONS)


class RestoredRealms:
    """The realms in a state that does not change.

    Args:
        state: of a restored directory, at the end of its log.
        bases: what was kept before the log was folded into the store.
    """

    def __init__(self, state: State, bases: Bases) -> None:
        self._state = state
        self._bases = bases

    def paths(self, selection: Selection) -> list[str]:
        """Those that are chosen, without the system's own."""
        return [path for path in self._state.realms() if selection.takes(path) and not is_system_realm(path)]

    def pairs(self, path: str) -> Iterator[Pair]:
        """All that a realm holds, in the order of the keys."""
        with self._state.scan(path) as scan:
            is_end = False
            while not is_end:
                keys, values, is_end = scan.page(bytes_max=_PAGE_BYTES, pairs_max=_PAGE_PAIRS)
                yield from zip(keys, values, strict=True)

    # -- how it came to be ---------------------------------------------------------------------------------

    def past(self, path: str) -> tuple[int, bool]:
        """How many of a realm's latest changes can be told one by one, and whether there were others before them.

        All can, where its history reaches back to its beginning; else those behind the checkpoint that the backup was
        made of, or behind the store's where even that is too old.
        """
        version, _ = self._base(path)
        return self._state.known_layers_of(path).version - version, version > 0

    def transactions(self, path: str) -> Iterator[list[Operation]]:
        """What makes the realm anew: the state before its past, if it had any, and each change of its past."""
        version, pairs = self._base(path)
        made = chain(in_transactions(Put(*pair) for pair in pairs), self._changes(path, version))
        first = next(made, _NOTHING)
        yield first
        yield from made

    def _base(self, path: str) -> tuple[int, Iterator[Pair]]:
        """The version from which on all changes are known, and what the realm held then."""
        layers = self._state.known_layers_of(path)
        first, stored = layers.history_first, layers.stored
        if first <= 1 or stored is None:
            return 0, iter(())
        kept = self._bases.find(path)
        # One that was dropped and made again meanwhile has another id, and another past.
        if kept is not None and kept.id == stored.id and kept.version >= first - 1:
            return kept.version, kept.pairs()
        return stored.version, self._stored_pairs(stored.id)

    def _stored_pairs(self, realm_id: int) -> Iterator[Pair]:
        with closing(self._state.store.current.scan(realm_id)) as pairs:
            yield from pairs

    def _changes(self, path: str, version: int) -> Iterator[list[Operation]]:
        """The operations of each change behind a version."""
        while True:
            rows = self._state.history(
                path, version + 1, count_max=_TRANSACTION_OPERATIONS, bytes_max=_PAGE_BYTES
            )
            assert rows is not None, "known from there on"
            for row in rows:
                yield [from_proto(one) for one in parse_change(row.change, row.lsn).operations]
                version = row.version
            if not rows:
                return
