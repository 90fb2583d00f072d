"""Locators: positions receding exponentially, and how a peer's locator relates to our own history.

Pure: how a position is looked up is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from understudy.common.follow_table import Relation
from understudy.common.types import NO_LSN, START, Digest, Epoch, Lsn, Position
from understudy.v1 import replication_pb2

LOCATOR_POSITIONS_MAX = 64  # twice the doublings that 2^32 entries take: a longer one is a peer's mistake

Lookup = Callable[[Lsn], Digest | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochSpan:
    """An epoch, where it begins, and the position that it forked from."""

    epoch: Epoch
    first_lsn: Lsn
    previous: Digest  # at first_lsn - 1

    @property
    def fork(self) -> Position:
        """The last position before the epoch."""
        return Position(Lsn(self.first_lsn - 1), self.previous)


def span_of(info: replication_pb2.EpochInfo) -> EpochSpan:
    """The span that a message tells of."""
    return EpochSpan(epoch=Epoch(info.epoch), first_lsn=Lsn(info.first_lsn), previous=Digest(info.previous))


def lookup_in(position_at: Callable[[Lsn], Position | None], marks: Mapping[Lsn, Digest]) -> Lookup:
    """Looks a digest up in the log, by ``position_at``, and below it among ``marks`` that were kept."""

    def lookup(lsn: Lsn) -> Digest | None:
        position = position_at(lsn)
        return position.digest if position is not None else marks.get(lsn)

    return lookup


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a node knows of its own history."""

    head: Position
    epochs: Sequence[EpochSpan]  # oldest first
    first_held: Lsn  # the log goes on from here: a peer at first_held - 1 or later can be streamed to
    lookup: Lookup  # the digest at an LSN, from log, marks or epoch starts; None where it is not known

    @property
    def epoch(self) -> Epoch:
        """The latest epoch."""
        return self.epochs[-1].epoch if self.epochs else Epoch(0)


def make_locator(head: Position, lookup: Lookup, marks: Iterable[Position]) -> list[Position]:
    """The head, then positions at doubling distances below it, from the log and, below that, from ``marks``.

    Args:
        head: the node's last position.
        lookup: the digest at an LSN of the log, None where the log no longer holds it.
        marks: positions kept of pruned history, oldest first.
    """
    locator = [head]
    distance = 1
    while head.lsn - distance > NO_LSN and len(locator) < LOCATOR_POSITIONS_MAX // 2:
        lsn = Lsn(head.lsn - distance)
        digest = lookup(lsn)
        if digest is None:
            break
        locator.append(Position(lsn, digest))
        distance *= 2
    below = [mark for mark in marks if mark.lsn < locator[-1].lsn]
    step = 1
    while step <= len(below) and len(locator) < LOCATOR_POSITIONS_MAX - 1:
        locator.append(below[-step])
        step *= 2
    return locator if locator[-1] == START else [*locator, START]


def last_common(locator: Iterable[Position], lookup: Lookup) -> Position | None:
    """The first position of ``locator`` (head first) that is on our history."""
    for position in locator:
        if position == START or lookup(position.lsn) == position.digest:
            return position
    return None


def relate(locator: Sequence[Position], epoch: Epoch, ours: History) -> Relation:
    """How a peer of ``epoch`` with ``locator`` relates to our history.

    A peer of an epoch higher than ours is another row's matter; here it counts as ours.
    """
    head = locator[0]
    later = [span for span in ours.epochs if span.epoch > epoch]
    if later and head.lsn >= later[0].first_lsn:
        return Relation.FORKED  # it went on in its epoch after ours had forked off
    if later and head.lsn != NO_LSN and epoch not in {span.epoch for span in ours.epochs}:
        return Relation.FORKED  # it has the first entry of an epoch that is none of ours
    if head.lsn > ours.head.lsn:
        return Relation.FORKED if _contradicts(locator, ours) else Relation.BEYOND
    known = START.digest if head.lsn == NO_LSN else ours.lookup(head.lsn)
    if known is None:
        return Relation.FORKED if _contradicts(locator, ours) else Relation.PRUNED
    if known != head.digest:
        return Relation.FORKED
    return Relation.ON_LOG if head.lsn + 1 >= ours.first_held else Relation.PRUNED


def _contradicts(locator: Iterable[Position], ours: History) -> bool:
    """Whether any position says something else than our history does at the same LSN."""
    for position in locator:
        known = ours.lookup(position.lsn) if position.lsn else START.digest
        if known is not None and known != position.digest:
            return True
    return False


def fork_position(own: History, theirs: Sequence[EpochSpan], common: Position) -> Position:
    """The exact last common position of our history and a peer's that has forked from it, given its epochs.

    Histories fork only where an epoch begins, on one side or on both, so it is the earlier of the two places
    where the first epochs begin that are not shared. ``common`` (of a locator) bounds it from below, and is
    returned where the epochs don't tell.
    """
    shared = 0
    while shared < min(len(own.epochs), len(theirs)) and own.epochs[shared] == theirs[shared]:
        shared += 1
    forks = [spans[shared].fork for spans in (own.epochs, theirs) if len(spans) > shared]
    if not forks:
        return common
    fork = min(forks, key=lambda position: position.lsn)
    if fork.lsn > own.head.lsn:
        fork = own.head
    # Two servers promoted at the same position have equal rows for epochs that are not the same: such a row
    # proves nothing until its first entry is known to be common. The cluster's first entry always is.
    proven = shared > 0 and max(common.lsn, 1) >= own.epochs[shared - 1].first_lsn
    if not proven and fork not in [span.fork for span in theirs[shared : shared + 1]]:
        return common
    known = own.lookup(fork.lsn)
    agrees = known == fork.digest or (proven and known is None)
    return fork if agrees and fork.lsn >= common.lsn else common
