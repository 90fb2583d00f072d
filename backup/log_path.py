"""The way from a copy to the newest moment of its cluster's history, through stretches of the log.

Histories fork: an old primary may have shipped what its successor never had. So the way is looked for backwards, from
the end of the newest stretch, and a stretch is left where the next one on the way begins. Names tell digests only of a
stretch's ends; what one holds in between is found out by going along it, and then another way is looked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from understudy.backup.stretch import Stretch, short_digest
from understudy.common.types import Lsn, Position

# Digests within stretches that their content has shown, by the stretch's name and the entry.
Seen = Mapping[tuple[str, Lsn], str]


@dataclass(frozen=True, slots=True)
class Leg:
    """A stretch on the way, and up to which of its entries."""

    stretch: Stretch
    last: Lsn


def find_path(
    targets: Sequence[Stretch], stretches: Sequence[Stretch], head: Position, seen: Seen
) -> list[Leg]:
    """The legs from ``head`` to the end of the newest of ``targets`` that can be reached, as far as is known.

    Empty where none can.

    Args:
        targets: some of the stretches.
        seen: what their content has shown.
    """
    onward: dict[Leg, Leg | None] = {}  # the legs from which an end is reached, each with the next
    for target in sorted(targets, key=lambda stretch: stretch.rank, reverse=True):
        end = Leg(target, target.last)
        if end in onward:
            continue
        onward[end] = None
        found = _search(end, stretches, head, seen, onward)
        if found is not None:
            return _legs(found, onward)
    return []


def _search(
    end: Leg, stretches: Sequence[Stretch], head: Position, seen: Seen, onward: dict[Leg, Leg | None]
) -> Leg | None:
    """The first leg of a way to ``end``. What was looked at for another end before leads nowhere."""
    waiting = [end]
    while waiting:
        leg = waiting.pop()
        if _begins(leg, head, seen):
            return leg
        for before in _before(leg.stretch, stretches, seen):
            if before not in onward:
                onward[before] = leg
                waiting.append(before)
    return None


def _begins(leg: Leg, head: Position, seen: Seen) -> bool:
    return leg.stretch.first - 1 <= head.lsn < leg.last and _may_hold(
        leg.stretch, head.lsn, short_digest(head.digest), seen
    )


def _before(stretch: Stretch, stretches: Sequence[Stretch], seen: Seen) -> list[Leg]:
    """The legs that end where ``stretch`` begins; the one to try first comes last."""
    joint = Lsn(stretch.first - 1)
    found = [
        one
        for one in stretches
        if one.first <= joint <= one.last and _may_hold(one, joint, stretch.before, seen)
    ]
    found.sort(key=lambda one: (one.last == joint, -one.first))
    return [Leg(one, joint) for one in found]


def _may_hold(stretch: Stretch, lsn: Lsn, digest: str, seen: Seen) -> bool:
    """Whether the stretch has that digest at ``lsn``, as far as is known."""
    if lsn == stretch.first - 1:
        return stretch.before == digest
    if lsn == stretch.last:
        return stretch.digest == digest
    return seen.get((stretch.name, lsn), digest) == digest


def _legs(first: Leg, onward: Mapping[Leg, Leg | None]) -> list[Leg]:
    legs: list[Leg] = []
    leg: Leg | None = first
    while leg is not None:
        legs.append(leg)
        leg = onward[leg]
    return legs
