"""What a row of the comparison brings home."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One quantity of one system: a value for each round, in order."""

    work: str
    system: str
    values: Sequence[float]
    against: str = ""  # ours that it is set against, by ``system``; empty for our own
    reach: float | None = None  # what ``Comparison.ratio`` should be at least
    beside: Sequence[float] = field(default=())  # further columns, of the round in the middle

    @property
    def median(self) -> float:
        """The middle one of the values."""
        return statistics.median(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One row: the same work on several systems."""

    name: str
    title: str
    method: str
    unit: str
    less_is_better: bool
    measured: Sequence[Measured]
    beside: Sequence[str] = field(default=())  # names of the further columns

    def ratio(self, one: Measured) -> float | None:
        """How many times better ours did at the same work, by medians; None where nothing of ours was measured."""
        ours = next((m for m in self.measured if (m.work, m.system) == (one.work, one.against)), None)
        if ours is None:
            return None
        better, worse = (one, ours) if self.less_is_better else (ours, one)
        return better.median / worse.median
