"""Locators: finding out, in one message, how two histories relate and where they parted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.common.follow_table import Relation
from understudy.common.locator import (
    LOCATOR_POSITIONS_MAX,
    EpochSpan,
    History,
    fork_position,
    last_common,
    make_locator,
    relate,
)
from understudy.common.records import chain_digest
from understudy.common.types import START, Digest, Epoch, Lsn, Position

FIRST = Lsn(1)


@dataclass(frozen=True)
class Past:
    """A node's whole history, and what it still knows of it."""

    digests: tuple[Digest, ...]  # at each LSN from 0 on
    epochs: tuple[EpochSpan, ...]
    first_held: Lsn = FIRST
    marks: tuple[Lsn, ...] = ()  # below first_held

    @property
    def head(self) -> Position:
        return self.at(len(self.digests) - 1)

    def at(self, lsn: int) -> Position:
        return Position(Lsn(lsn), self.digests[lsn])

    def holds(self, position: Position) -> bool:
        return position.lsn < len(self.digests) and self.digests[position.lsn] == position.digest

    def lookup_log(self, lsn: Lsn) -> Digest | None:
        return self.digests[lsn] if self.first_held - 1 <= lsn < len(self.digests) else None

    @property
    def locator(self) -> list[Position]:
        return make_locator(self.head, self.lookup_log, [self.at(mark) for mark in self.marks])

    @property
    def history(self) -> History:
        """As a primary puts it together: from the log, the marks, and the places where epochs begin."""
        known = {mark: self.digests[mark] for mark in self.marks}
        known |= {span.fork.lsn: span.fork.digest for span in self.epochs}
        return History(
            head=self.head,
            epochs=self.epochs,
            first_held=self.first_held,
            lookup=lambda lsn: self.lookup_log(lsn) or known.get(lsn),
        )

    def longer(self, entries: int, what: bytes, *, new_epochs: tuple[int, ...] = ()) -> Past:
        """Goes on for so many entries; ``new_epochs`` begin at those of them, counted from 0."""
        digests, epochs = list(self.digests), list(self.epochs)
        for index in range(entries):
            lsn = Lsn(len(digests))
            if index in new_epochs:
                number = Epoch(epochs[-1].epoch + 1 if epochs else 1)
                epochs.append(EpochSpan(epoch=number, first_lsn=lsn, previous=digests[-1]))
            digests.append(chain_digest(digests[-1], lsn, what))
        return Past(tuple(digests), tuple(epochs))

    def pruned(self, first_held: int, marks: tuple[int, ...] = ()) -> Past:
        """Has forgotten the log before ``first_held``, but for the digests at ``marks``."""
        kept = tuple(Lsn(mark) for mark in sorted(set(marks)) if 0 < mark < first_held)
        return Past(self.digests, self.epochs, Lsn(first_held), kept)


NOTHING = Past((START.digest,), ())


def begun(entries: int, *, new_epochs: tuple[int, ...] = ()) -> Past:
    """A history whose first entry begins epoch 1, as all do."""
    return NOTHING.longer(entries, b"shared", new_epochs=(0, *new_epochs))


@dataclass(frozen=True)
class Pair:
    """Our history and a peer's, with the last LSN that both share."""

    ours: Past
    theirs: Past
    common: int

    @property
    def forked(self) -> bool:
        return self.common < min(self.ours.head.lsn, self.theirs.head.lsn)

    @property
    def relation(self) -> Relation:
        return relate(self.theirs.locator, self.theirs.history.epoch, self.ours.history)


def _some(entries: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, max(entries - 1, 0)), max_size=3).map(lambda found: tuple(set(found)))


@st.composite
def pairs(draw: st.DrawFn, *, pruned: bool = True, forks_begin_epochs: bool = False) -> Pair:
    """Two histories with a common beginning, each perhaps pruned to a few marks.

    ``forks_begin_epochs``: as it should be, at least one of them began an epoch where they parted.
    """
    common = draw(st.integers(1, 150))
    shared = begun(common, new_epochs=draw(_some(common)))
    extra = [draw(st.integers(0, 80)), draw(st.integers(0, 80))]
    epochs = [draw(_some(entries)) for entries in extra]
    if forks_begin_epochs and min(extra):
        side = draw(st.sampled_from([(0,), (1,), (0, 1)]))
        epochs = [(0, *new) if index in side else new for index, new in enumerate(epochs)]
    ours, theirs = (
        shared.longer(entries, what, new_epochs=new)
        for entries, what, new in zip(extra, (b"ours", b"theirs"), epochs, strict=True)
    )
    if pruned:
        ours, theirs = draw(_pruned(ours)), draw(_pruned(theirs))
    return Pair(ours, theirs, common if min(extra) else common + min(extra))


@st.composite
def _pruned(draw: st.DrawFn, past: Past) -> Past:
    first_held = draw(st.integers(1, past.head.lsn + 1))
    return past.pruned(first_held, tuple(draw(st.lists(st.integers(1, past.head.lsn), max_size=8))))


# -- making one ---------------------------------------------------------------------------------------------


@given(pairs())
def test_a_locator_goes_from_the_head_to_the_start_and_says_only_what_is_true(pair: Pair) -> None:
    """A locator's positions are on the history, each earlier than the one before, from the head to LSN 0."""
    locator = pair.ours.locator
    assert locator[0] == pair.ours.head
    assert locator[-1] == START
    assert all(pair.ours.holds(position) for position in locator)
    lsns = [position.lsn for position in locator]
    assert lsns == sorted(set(lsns), reverse=True)


@pytest.mark.parametrize("held", [1, 10**6, 10**18])
@pytest.mark.parametrize("marks", [0, 1, 5_000])
def test_a_locator_is_short_however_long_the_history(held: int, marks: int) -> None:
    """With a log of any length and all the marks that a store keeps, a locator stays within its limit."""
    head = Position(Lsn(10**19), Digest(b"h" * 32))
    first = head.lsn - held
    positions = [Position(Lsn(1 + index), Digest(b"m" * 32)) for index in range(marks)]
    lookup: Callable[[Lsn], Digest | None] = lambda lsn: Digest(b"l" * 32) if lsn >= first else None  # noqa: E731
    locator = make_locator(head, lookup, positions)
    assert len(locator) <= LOCATOR_POSITIONS_MAX
    assert locator[-1] == START


def test_a_locator_of_nothing_is_the_start() -> None:
    """A copy without entries says just that."""
    assert make_locator(START, lambda _: None, []) == [START]


# -- how a peer relates to us ------------------------------------------------------------------------------


@given(pairs())
def test_a_peer_on_our_history_is_known_as_that(pair: Pair) -> None:
    """A peer whose history is a beginning of ours is on our log, or was pruned from it; one of which ours is a
    beginning is beyond it.
    """
    if pair.forked:
        return
    ours, theirs = pair.ours, pair.theirs
    if theirs.head.lsn > ours.head.lsn:
        assert pair.relation is Relation.BEYOND
    elif theirs.head.lsn + 1 >= ours.first_held:
        assert pair.relation is Relation.ON_LOG
    else:
        assert pair.relation is Relation.PRUNED


@given(pairs())
def test_g3_a_peer_that_forked_is_never_taken_for_one_on_our_log(pair: Pair) -> None:
    """G3: whatever both have forgotten, and whatever epochs they are in, a forked peer is not streamed to; it is
    known as forked wherever any position that it shows is known here to be another.
    """
    if not pair.forked:
        return
    assert pair.relation is not Relation.ON_LOG
    lookup = pair.ours.history.lookup
    if any(lookup(position.lsn) not in (None, position.digest) for position in pair.theirs.locator[:-1]):
        assert pair.relation is Relation.FORKED


@given(pairs(forks_begin_epochs=True))
def test_g3_a_peer_of_an_earlier_epoch_that_went_on_is_forked_whatever_was_pruned(pair: Pair) -> None:
    """G3: where ours is the later epoch, the epoch table alone tells who went on after it had begun."""
    if pair.forked and pair.theirs.history.epoch < pair.ours.history.epoch:
        later = [span for span in pair.ours.epochs if span.epoch > pair.theirs.history.epoch]
        went_on = pair.theirs.head.lsn >= later[0].first_lsn
        assert (pair.relation is Relation.FORKED) or not went_on


@pytest.mark.parametrize("common", [1, 2, 99, 100])
def test_g3_counting_up_to_the_same_lsn_again_is_no_identity(common: int) -> None:
    """G3: a server restored to an earlier state that has counted up to the same LSN again, with other content and
    in the same epoch, is told from the old one by its digest.
    """
    shared = begun(common)
    old, restored = shared.longer(10, b"before"), shared.longer(10, b"after the restore")
    assert old.head.lsn == restored.head.lsn
    assert Pair(restored, old, common).relation is Relation.FORKED
    assert Pair(old, restored, common).relation is Relation.FORKED
    # Also once it has counted further than the copy that comes back.
    assert Pair(restored.longer(500, b"and on"), old, common).relation is Relation.FORKED


def test_g3_a_mark_kept_of_pruned_history_tells_a_fork() -> None:
    """G3: where the log no longer reaches back to a peer's head, one mark that it contradicts makes it forked, and
    its copy is not replaced.
    """
    shared = begun(100)
    theirs = shared.longer(60, b"theirs")
    ours = shared.longer(900, b"ours")
    marked = theirs.locator[3].lsn
    assert Pair(ours.pruned(800, (50, marked)), theirs, 100).relation is Relation.FORKED
    assert Pair(ours.pruned(800, (50,)), theirs, 100).relation is Relation.PRUNED  # nothing left that tells


def test_a_peer_at_the_very_edge_of_our_log_is_streamed_to() -> None:
    """The log need not hold a peer's last entry, only the ones behind it."""
    past = begun(100)
    assert Pair(past.pruned(51), begun(50), 50).relation is Relation.ON_LOG
    assert Pair(past.pruned(52), begun(50), 50).relation is Relation.PRUNED
    assert Pair(past.pruned(101), past, 100).relation is Relation.ON_LOG


# -- where they parted ---------------------------------------------------------------------------------------


@given(pairs())
def test_the_common_position_found_is_common(pair: Pair) -> None:
    """What a locator's positions are looked up to is on both histories, and there always is one."""
    found = last_common(pair.theirs.locator, pair.ours.history.lookup)
    assert found is not None
    assert found.lsn <= pair.common
    assert pair.ours.holds(found)
    assert pair.theirs.holds(found)


@given(pairs(pruned=False))
def test_the_common_position_found_is_within_twice_the_distance(pair: Pair) -> None:
    """With both logs whole, one message finds the fork to within a factor of two of how far back it lies."""
    found = last_common(pair.theirs.locator, pair.ours.history.lookup)
    assert found is not None
    distance = pair.theirs.head.lsn - pair.common
    assert pair.theirs.head.lsn - found.lsn <= max(2 * distance - 1, 0)


def test_a_locator_without_any_common_position_gives_none() -> None:
    """A peer that does not even show the start has nothing in common with us that we know of."""
    assert last_common([Position(Lsn(5), Digest(b"x" * 32))], begun(9).history.lookup) is None


@given(pairs())
def test_the_fork_found_is_common(pair: Pair) -> None:
    """However pruned, and however the epochs came about, the fork is never said to be later than it is."""
    if not pair.forked:
        return
    bound = last_common(pair.ours.locator, pair.theirs.history.lookup)
    assert bound is not None
    found = fork_position(pair.ours.history, pair.theirs.epochs, bound)
    # Forks that begin no epoch (a restored copy that just went on) can't be told by epochs.
    by_epochs = any(
        span.first_lsn == pair.common + 1 for past in (pair.ours, pair.theirs) for span in past.epochs
    )
    if by_epochs:
        assert pair.ours.holds(found)
        assert pair.theirs.holds(found)
        assert found.lsn >= bound.lsn


@given(pairs(pruned=False, forks_begin_epochs=True))
def test_the_fork_found_is_exact_where_it_begins_an_epoch(pair: Pair) -> None:
    """Given the peer's epochs the fork is found exactly where it begins one of them, and where it begins one of
    ours, provided that the locator has shown the epoch before to be common.
    """
    ours, theirs = pair.ours.epochs, pair.theirs.epochs
    equal = [span for span in ours if span in theirs]
    if not pair.forked or equal[-1].first_lsn > pair.common:  # see the next test for these equal rows
        return
    bound = last_common(pair.ours.locator, pair.theirs.history.lookup)
    assert bound is not None
    theirs_begins = any(span.first_lsn == pair.common + 1 for span in theirs)
    if theirs_begins or bound.lsn >= equal[-1].first_lsn:
        assert fork_position(pair.ours.history, theirs, bound) == pair.ours.at(pair.common)


def test_two_servers_promoted_at_one_position_are_not_taken_for_one() -> None:
    """Equal rows in both epoch tables, written by two servers that were promoted at the same position, don't
    make what came after common.
    """
    shared = begun(100)
    one = shared.longer(40, b"one", new_epochs=(0, 10))
    other = shared.longer(40, b"other", new_epochs=(0, 20))
    assert one.epochs[1] == other.epochs[1]
    for ours, theirs in ((one, other), (other, one)):
        bound = last_common(ours.locator, theirs.history.lookup)
        assert bound is not None
        assert fork_position(ours.history, theirs.epochs, bound).lsn <= 100


def test_the_usual_fork_is_found_exactly_from_any_bound() -> None:
    """An old primary that wrote on for a while learns the exact entry behind which it is alone."""
    shared = begun(1_000)
    old = shared.longer(300, b"alone")
    new = shared.longer(5, b"promoted", new_epochs=(0,))
    for bound in (START, shared.at(1), shared.at(700), shared.at(1_000)):
        assert fork_position(old.history, new.epochs, bound) == shared.head


def test_an_epoch_that_is_none_of_ours_shows_a_fork_that_was_pruned() -> None:
    """G4: a peer whose entries we have pruned has gone another way if its epoch is not in our history."""
    shared = begun(10)
    theirs = shared.longer(5, b"theirs", new_epochs=(0,))
    ours = shared.longer(30, b"ours", new_epochs=(20,)).pruned(40)
    third = replace(ours, epochs=(*ours.epochs[:-1], replace(ours.epochs[-1], epoch=Epoch(3))))
    assert relate([theirs.head], Epoch(2), third.history) is Relation.FORKED
    assert relate([shared.head], Epoch(1), third.history) is Relation.PRUNED
