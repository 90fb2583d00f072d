"""The demo's ledger: what its writers sent, what was acknowledged, and whether a server's state agrees.

Pure. Transaction ``n`` of a writer sets a value that follows from writer and ``n``, and adds one to two counters: one
of its own, which shows for each single transaction that it was applied exactly once, and one that all transactions
of the writer share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from understudy.client import Add, Operation, Put

TOTAL = b"total"


def operations(writer: int, number: int) -> list[Operation]:
    """What transaction ``number`` of ``writer`` does."""
    return [Put(_value_key(number), _value(writer, number)), Add(_times_key(number), 1), Add(TOTAL, 1)]


def _value_key(number: int) -> bytes:
    return b"value/%08d" % number


def _times_key(number: int) -> bytes:
    return b"times/%08d" % number


def _value(writer: int, number: int) -> bytes:
    return hashlib.sha256(b"%d/%d" % (writer, number)).hexdigest().encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What a comparison of ledger and state came to; counts of transactions."""

    acknowledged: int = 0
    unknown: int = 0  # sent and never answered: they may be there or not, but whole and once
    lost: int = 0  # acknowledged, and not there as written
    duplicated: int = 0  # applied more than once
    strange: int = 0  # there in part, or never sent

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            acknowledged=self.acknowledged + other.acknowledged,
            unknown=self.unknown + other.unknown,
            lost=self.lost + other.lost,
            duplicated=self.duplicated + other.duplicated,
            strange=self.strange + other.strange,
        )

    @property
    def is_clean(self) -> bool:
        """Whether every acknowledged transaction is there once, and nothing else."""
        return not (self.lost or self.duplicated or self.strange)


@dataclass(slots=True)
class Ledger:
    """One writer's transactions, numbered from 0 in the order of sending."""

    writer: int
    sent: int = 0
    acknowledged: set[int] = field(default_factory=set)

    def next_number(self) -> int:
        """The number of a transaction that is about to be sent."""
        self.sent += 1
        return self.sent - 1

    def check(self, pairs: Iterable[tuple[bytes, bytes]]) -> Tally:
        """Compares with all that the writer's realm holds."""
        found = dict(pairs)
        total = _count(found.pop(TOTAL, None))
        numbers = self.acknowledged | set(range(self.sent))
        tally = Tally(acknowledged=len(self.acknowledged), unknown=len(numbers) - len(self.acknowledged))
        applied = 0
        for number in numbers:
            value, times = found.pop(_value_key(number), None), _count(found.pop(_times_key(number), None))
            tally += self._check_one(number, value, times)
            applied += times
        return tally + Tally(
            lost=max(applied - total, 0), duplicated=max(total - applied, 0), strange=len(found)
        )

    def _check_one(self, number: int, value: bytes | None, times: int) -> Tally:
        is_there = value == _value(self.writer, number) and times >= 1
        is_absent = value is None and times == 0
        if number in self.acknowledged:
            return Tally(lost=int(not is_there), duplicated=max(times - 1, 0))
        return Tally(strange=int(not is_there and not is_absent), duplicated=max(times - 1, 0))


def _count(value: bytes | None) -> int:
    """What a counter has come to. The demo's own begin missing and only go up."""
    return int(value) if value is not None and value.isdigit() else 0
