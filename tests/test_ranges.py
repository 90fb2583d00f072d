"""Sets of key ranges, against a plain set of keys."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from understudy.common.ranges import RangeSet

ALPHABET = b"\x00a\xff"
# Every key of up to three letters: bounds lie among them, before the first and behind the last.
KEYS = [bytes(letters) for length in (1, 2, 3) for letters in itertools.product(ALPHABET, repeat=length)]

bounds = st.one_of(st.just(b""), st.sampled_from(KEYS))
ranges = st.tuples(bounds, bounds)


def covered(start: bytes, end: bytes) -> set[bytes]:
    return {key for key in KEYS if key >= start and (not end or key < end)}


@given(st.lists(ranges, max_size=12))
@example([(b"a", b"aa"), (b"aa", b"\xff")])
@example([(b"", b""), (b"a", b"a")])
def test_a_range_set_holds_what_its_ranges_hold(added: list[tuple[bytes, bytes]]) -> None:
    """Whatever ranges are added, in whatever order, a key is in the set exactly if one of them holds it."""
    found, model = RangeSet(), set[bytes]()
    for start, end in added:
        found.add(start, end)
        model |= covered(start, end)
        assert {key for key in KEYS if key in found} == model
    assert bool(found) == bool(list(found))


@given(st.lists(ranges, max_size=12))
def test_ranges_are_disjoint_sorted_and_joined(added: list[tuple[bytes, bytes]]) -> None:
    """Ranges that overlap or touch become one: what is kept never grows beyond what it says."""
    found = RangeSet()
    for start, end in added:
        found.add(start, end)
    listed = list(found)
    for (_, end), (start, _) in itertools.pairwise(listed):
        assert end
        assert end < start
    again = RangeSet()
    for start, end in listed:
        again.add(start, end)
    assert list(again) == listed


@given(st.lists(ranges, max_size=8))
def test_the_order_of_adding_does_not_matter(added: list[tuple[bytes, bytes]]) -> None:
    """The same ranges in another order give the same set."""
    one, other = RangeSet(), RangeSet()
    for start, end in added:
        one.add(start, end)
    for start, end in sorted(added):
        other.add(start, end)
    assert list(one) == list(other)


@pytest.mark.parametrize(("start", "end"), [(b"b", b"a"), (b"a", b"a")])
def test_an_empty_range_adds_nothing(start: bytes, end: bytes) -> None:
    """A range that ends where it begins, or before, leaves the set empty."""
    found = RangeSet()
    found.add(start, end)
    assert not found
    assert b"a" not in found


def test_a_range_without_end_holds_the_longest_of_keys() -> None:
    """No key lies behind a range without end."""
    found = RangeSet()
    found.add(b"a", b"")
    assert b"\xff" * 480 in found
    assert list(found) == [(b"a", b"")]
