"""Which stretches of a repository's log lead to its newest moment, as far as names and content tell."""

from __future__ import annotations

from understudy.backup.log_path import Leg, Seen, find_path
from understudy.backup.stretch import Stretch
from understudy.common.types import Digest, Epoch, Lsn, Position


def digest(history: str, lsn: int) -> str:
    return f"{history}{lsn:x}".encode().hex().ljust(16, "0")[:16]


def stretch(first: int, last: int, *, epoch: int = 1, before: str = "a", history: str = "") -> Stretch:
    """One whose first entry follows history ``before`` and whose last one is of ``history``, or of the same."""
    return Stretch(
        epoch=Epoch(epoch),
        first=Lsn(first),
        last=Lsn(last),
        before=digest(before, first - 1),
        digest=digest(history or before, last),
        is_encrypted=False,
    )


def at(lsn: int, history: str = "a") -> Position:
    return Position(Lsn(lsn), Digest(bytes.fromhex(digest(history, lsn).ljust(64, "0"))))


def path(stretches: list[Stretch], head: Position, seen: Seen | None = None) -> list[Leg]:
    return find_path(stretches, stretches, head, seen or {})


def test_stretches_that_join_are_gone_along_one_after_the_other() -> None:
    """Each is left at its end, and what lies before the copy is not touched."""
    first, second, third = stretch(1, 10), stretch(11, 20), stretch(21, 30)
    assert path([third, first, second], at(10)) == [Leg(second, Lsn(20)), Leg(third, Lsn(30))]
    assert path([third, first, second], at(30)) == []


def test_a_whole_segment_is_preferred_to_its_pieces() -> None:
    """Fewer objects are read where several ways lead to the same place."""
    whole, last = stretch(1, 20), stretch(21, 30)
    pieces = [stretch(1, 5), stretch(6, 12), stretch(13, 20)]
    assert path([*pieces, last, whole], at(0)) == [Leg(whole, Lsn(20)), Leg(last, Lsn(30))]
    assert path([*pieces, last, whole], at(8))[0] in (Leg(whole, Lsn(20)), Leg(pieces[1], Lsn(12)))


def test_the_highest_epoch_is_followed_past_a_longer_history_that_was_given_up() -> None:
    """G3: an old primary's stretch that goes beyond the fork is left where its successor's history begins."""
    old = stretch(1, 120)
    new = stretch(101, 110, epoch=2, history="b")
    assert path([old, new], at(80)) == [Leg(old, Lsn(100)), Leg(new, Lsn(110))]
    ours = stretch(51, 100)
    assert path([old, ours, new], at(60)) == [Leg(ours, Lsn(100)), Leg(new, Lsn(110))]


def test_what_content_has_shown_rules_out_a_way() -> None:
    """G3: the old primary's history had forked before the joint, so another stretch is taken, or none."""
    old, new = stretch(1, 120), stretch(101, 110, epoch=2, history="b")
    seen = {(old.name, Lsn(100)): digest("c", 100)}
    assert path([old, new], at(80), seen) == [Leg(old, Lsn(120))]
    late = stretch(61, 100)
    assert path([old, new, late], at(80), seen) == [Leg(late, Lsn(100)), Leg(new, Lsn(110))]
    assert path([old, new, late], at(80), {**seen, (late.name, Lsn(80)): digest("c", 80)}) == [
        Leg(old, Lsn(120))
    ]


def test_a_gap_ends_the_way() -> None:
    """What is behind a gap can't be reached; the newest that can be is."""
    before, behind = stretch(1, 10), stretch(12, 20)
    assert path([before, behind], at(5)) == [Leg(before, Lsn(10))]
    assert path([behind], at(5)) == []


def test_a_copy_of_another_history_has_no_way() -> None:
    """G3: the same LSN with another digest is no place to go on from."""
    assert path([stretch(11, 20)], at(10, "b")) == []
    assert path([stretch(1, 10), stretch(11, 20)], at(10, "b")) == []


def test_thousands_of_stretches_with_a_gap_are_looked_at_once() -> None:
    """G9: what leads nowhere from one end is not looked at again from the next."""
    one_by_one = [stretch(lsn, lsn) for lsn in range(1, 1000) if lsn != 500]
    legs = path(one_by_one, at(400))
    assert [leg.last for leg in legs] == list(range(401, 500))
