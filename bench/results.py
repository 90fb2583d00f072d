"""What rows of the bench bring home: figures with their targets, tables of detail, and how both were measured."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<": operator.lt}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a figure should reach: ``at`` compared by ``is_`` (``>=`` or ``<``)."""

    is_: str
    at: float

    def reached_by(self, value: float) -> bool:
        """Whether ``value`` is good enough."""
        return _COMPARISONS[self.is_](value, self.at)


def at_least(value: float) -> Target:
    """A target for what should be large."""
    return Target(is_=">=", at=value)


def below(value: float) -> Target:
    """A target for what should be small."""
    return Target(is_="<", at=value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured quantity: a value for each round, in order. Its median is what the target is held against."""

    name: str
    unit: str
    values: Sequence[float]
    target: Target | None = None
    reference: str = ""  # what the hardware, or a simpler program, did in the same run

    @property
    def median(self) -> float:
        """The middle one of the values."""
        return statistics.median(self.values)

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        return None if self.target is None else self.target.reached_by(self.median)

    def as_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        target = None if self.target is None else {"is": self.target.is_, "at": self.target.at}
        return {
            "name": self.name,
            "unit": self.unit,
            "values": list(self.values),
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "target": target,
            "reached": self.reached,
            "reference": self.reference,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """A table beside the figures; cells are text or numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What one row measured. ``method`` says in sentences how, so that the figures can be judged."""

    name: str
    title: str
    method: str
    figures: Sequence[Figure]
    details: Sequence[Detail] = field(default=())
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        return {
            "name": self.name,
            "title": self.title,
            "method": " ".join(self.method.split()),
            "seconds": round(self.seconds, 1),
            "figures": [figure.as_json() for figure in self.figures],
            "details": [
                {"title": one.title, "columns": list(one.columns), "rows": [list(row) for row in one.rows]}
                for one in self.details
            ],
        }


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` (0 to 1) of ``values`` do not exceed (nearest rank).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a quantile of nothing")
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
