"""What is tried when a copy must be given up: the table has an answer for every combination, and the right one."""

from __future__ import annotations

import itertools

import pytest

from understudy.client.reset_table import MODES, TABLE, Attempt, Refusal, choose, is_wanted
from understudy.v1 import local_pb2

ATTEMPTS = ("", "recover", "discard")
RECOVER, DISCARD = Attempt.RECOVER, Attempt.DISCARD
ALL = list(itertools.product(MODES, ATTEMPTS, (False, True)))

# (mode, what was tried before, whether recovery is forbidden, what is tried, why).
ANSWERS = [
    ("manual", "", False, Refusal.MANUAL, "the application decides"),
    ("manual", "", True, Refusal.MANUAL, "the application decides"),
    ("manual", "recover", False, Refusal.MANUAL, "the application decides, whatever was tried"),
    ("manual", "recover", True, Refusal.MANUAL, "the application decides, whatever was tried"),
    ("manual", "discard", False, Refusal.MANUAL, "the application decides, whatever was tried"),
    ("manual", "discard", True, Refusal.MANUAL, "the application decides, whatever was tried"),
    ("recover", "", False, RECOVER, "that is what it means"),
    ("recover", "", True, Refusal.FORBIDDEN, "the server forbids it, and nothing may be discarded"),
    ("recover", "recover", False, Refusal.RECOVERED, "it would go on for ever"),
    ("recover", "recover", True, Refusal.RECOVERED, "it would go on for ever"),
    ("recover", "discard", False, Refusal.DISCARDED, "nothing was recovered, and yet"),
    ("recover", "discard", True, Refusal.DISCARDED, "nothing was recovered, and yet"),
    ("discard", "", False, DISCARD, "that is what it means"),
    ("discard", "", True, DISCARD, "what is forbidden is to recover"),
    ("discard", "recover", False, DISCARD, "something else than what has failed"),
    ("discard", "recover", True, DISCARD, "something else than what has failed"),
    ("discard", "discard", False, Refusal.DISCARDED, "it would go on for ever"),
    ("discard", "discard", True, Refusal.DISCARDED, "it would go on for ever"),
    ("recover_or_discard", "", False, RECOVER, "the gentler one first"),
    ("recover_or_discard", "", True, DISCARD, "the server forbids the gentler one"),
    ("recover_or_discard", "recover", False, DISCARD, "the other one then"),
    ("recover_or_discard", "recover", True, DISCARD, "the other one then"),
    ("recover_or_discard", "discard", False, Refusal.DISCARDED, "there is no third one"),
    ("recover_or_discard", "discard", True, Refusal.DISCARDED, "there is no third one"),
]


def test_every_combination_has_one_answer() -> None:
    """No mode and no attempt is left without an answer, here or in the table."""
    assert sorted(TABLE) == sorted(itertools.product(MODES, ATTEMPTS))
    assert sorted((mode, before, forbidden) for mode, before, forbidden, _, _ in ANSWERS) == sorted(ALL)


@pytest.mark.parametrize(("mode", "before", "forbidden", "answer", "why"), ANSWERS)
def test_each_answer_has_its_reason(
    mode: str, before: str, forbidden: bool, answer: Attempt | Refusal, why: str
) -> None:
    """Each mode does what its description says."""
    assert choose(mode, before, recovery_forbidden=forbidden) is answer, why


@pytest.mark.parametrize(("mode", "forbidden"), list(itertools.product(MODES, (False, True))))
def test_no_sequence_of_resets_is_longer_than_two(mode: str, forbidden: bool) -> None:
    """Resets that lead to one another come to an end, in every mode."""
    before, attempts = "", []
    while isinstance(answer := choose(mode, before, recovery_forbidden=forbidden), Attempt):
        attempts.append(answer)
        before = answer.value
        assert len(attempts) <= 2
    assert len(set(attempts)) == len(attempts)


@pytest.mark.parametrize(("mode", "before", "forbidden"), ALL)
def test_nothing_is_recovered_that_must_not_be_and_nothing_discarded_unasked(
    mode: str, before: str, forbidden: bool
) -> None:
    """A server's word against recovery holds in every mode, and only two of the modes ever discard."""
    answer = choose(mode, before, recovery_forbidden=forbidden)
    assert not (answer is RECOVER and forbidden)
    assert answer is not DISCARD or mode in ("discard", "recover_or_discard")


@pytest.mark.parametrize(("mode", "attempt"), list(itertools.product(MODES, Attempt)))
def test_what_was_cut_off_goes_on_in_the_modes_that_would_begin_it(mode: str, attempt: Attempt) -> None:
    """Any other mode is another decision."""
    begins = {
        choose(mode, before, recovery_forbidden=forbidden)
        for before in ATTEMPTS
        for forbidden in (False, True)
    }
    assert is_wanted(mode, attempt.value) == (attempt in begins)


def test_what_is_recorded_are_the_tables_words() -> None:
    """The record of an attempt can be read back into the table."""
    for attempt in Attempt:
        record = local_pb2.ResetRecord(attempted=attempt.value)
        assert ("manual", local_pb2.ResetRecord.FromString(record.SerializeToString()).attempted) in TABLE
