"""Own changes on top of a copy, against plain dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from state_helpers import after_operation

from understudy.client.overlay import Overlay
from understudy.common.operations import Add, Delete, DeleteRange, Operation, Put, Update, to_protos

Pairs = dict[bytes, bytes]

_KEYS = st.sampled_from([b"a", b"aa", b"b", b"ba", b"c"])
_BOUNDS = st.sampled_from([b"", b"a", b"aa", b"b", b"bb", b"c"])
_VALUES = st.sampled_from([b"", b"0", b"7", b"-3", b"text", b"9223372036854775807"])
_RANGES = st.tuples(_BOUNDS, _BOUNDS).filter(lambda pair: not pair[1] or pair[0] < pair[1])
_OPERATIONS: st.SearchStrategy[Operation] = st.one_of(
    st.builds(Put, _KEYS, _VALUES),
    st.builds(Update, _KEYS, _VALUES),
    st.builds(Delete, _KEYS),
    _RANGES.map(lambda pair: DeleteRange(*pair)),
    st.builds(Add, _KEYS, st.sampled_from([1, -8, 2**62])),
)
_CHANGES = st.lists(st.lists(_OPERATIONS, min_size=1, max_size=4), max_size=8)
_PAIRS = st.dictionaries(_KEYS, _VALUES)


def _replayed(base: Pairs, changes: Sequence[Sequence[Operation]]) -> Pairs:
    pairs = dict(base)
    for change in changes:
        for operation in change:
            pairs = after_operation(pairs, operation)
    return pairs


def _scanned(
    overlay: Overlay, base: Pairs, start: bytes, end: bytes, *, reverse: bool
) -> list[tuple[bytes, bytes]]:
    rows = _between(base, start, end, reverse=reverse)
    return list(overlay.scan(iter(rows), start, end, reverse=reverse))


def _between(pairs: Pairs, start: bytes, end: bytes, *, reverse: bool) -> list[tuple[bytes, bytes]]:
    found = [pair for pair in pairs.items() if pair[0] >= start and (not end or pair[0] < end)]
    return sorted(found, reverse=reverse)


def _check(overlay: Overlay, base: Pairs, expected: Pairs, bounds: tuple[bytes, bytes]) -> None:
    for key in (b"a", b"aa", b"b", b"ba", b"c"):
        assert overlay.value(key, base.get(key)) == expected.get(key)
    for reverse in (False, True):
        assert _scanned(overlay, base, *bounds, reverse=reverse) == _between(
            expected, *bounds, reverse=reverse
        )


@given(_PAIRS, _CHANGES, _RANGES)
def test_reads_see_the_copy_with_all_changes_replayed(
    base: Pairs, changes: list[list[Operation]], bounds: tuple[bytes, bytes]
) -> None:
    """Values and scans are those of a copy that every queued operation was applied to, in order."""
    overlay = Overlay()
    for number, change in enumerate(changes, 1):
        overlay.add(number, to_protos(change))
        _check(overlay, base, _replayed(base, changes[:number]), bounds)


@given(_PAIRS, _CHANGES, _RANGES, st.randoms(use_true_random=False))
def test_a_removed_change_leaves_no_trace(
    base: Pairs, changes: list[list[Operation]], bounds: tuple[bytes, bytes], random: Random
) -> None:
    """Changes may be removed in any order; what stays reads as if the others had never been there."""
    overlay = Overlay()
    left = dict(enumerate(changes, 1))
    for number, change in left.items():
        overlay.add(number, to_protos(change))
    numbers = list(left)
    random.shuffle(numbers)
    for number in numbers:
        _check(overlay, base, _replayed(base, list(left.values())), bounds)
        overlay.remove(number)
        del left[number]
    assert not overlay
    _check(overlay, base, base, bounds)


@given(_PAIRS, _CHANGES, _CHANGES, st.integers(0, 8), _RANGES)
def test_a_clone_is_changed_alone(
    base: Pairs,
    changes: list[list[Operation]],
    later: list[list[Operation]],
    removed: int,
    bounds: tuple[bytes, bytes],
) -> None:
    """What an overlay shows stays as it was while a clone of it goes on, and the clone is right as well."""
    overlay = Overlay()
    for number, change in enumerate(changes, 1):
        overlay.add(number, to_protos(change))
    before = _replayed(base, changes)
    _check(overlay, base, before, bounds)
    clone = overlay.clone()
    for number, change in enumerate(later, 100):
        clone.add(number, to_protos(change))
    for number in range(1, removed + 1):
        clone.remove(number)
    _check(overlay, base, before, bounds)
    _check(clone, base, _replayed(base, [*changes[removed:], *later]), bounds)


def test_the_base_may_change_below() -> None:
    """Nothing of the copy is remembered: a counter adds to whatever it stands at now."""
    overlay = Overlay()
    overlay.add(1, to_protos([Add(b"n", 2), Update(b"u", b"new")]))
    assert overlay.value(b"n", b"1") == b"3"
    assert overlay.value(b"n", b"40") == b"42"
    assert overlay.value(b"u", None) is None
    assert overlay.value(b"u", b"old") == b"new"
