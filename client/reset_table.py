"""What is tried when a copy must be given up: one table over the application's mode and what was tried before. Pure."""

from __future__ import annotations

import enum
from typing import Final

from understudy.v1.sync_pb2 import ResetReason

MODES: Final = ("recover_or_discard", "recover", "discard", "manual")


class Attempt(enum.StrEnum):
    """What is done with the queue."""

    RECOVER = "recover"
    DISCARD = "discard"


class Refusal(enum.Enum):
    """Why nothing is tried."""

    MANUAL = "that is left to the application"
    FORBIDDEN = "the server forbids that changes are recovered"
    DISCARDED = "a reset that discarded the queue has just led to this one"
    RECOVERED = "a reset that recovered the queue has just led to this one"


# (mode, what the last reset tried, if it has not come to its end) -> what is tried, and what instead where the server
# forbids recovery.
TABLE: Final[dict[tuple[str, str], tuple[Attempt | Refusal, Attempt | Refusal]]] = {
    ("manual", ""): (Refusal.MANUAL, Refusal.MANUAL),
    ("manual", "recover"): (Refusal.MANUAL, Refusal.MANUAL),
    ("manual", "discard"): (Refusal.MANUAL, Refusal.MANUAL),
    ("discard", ""): (Attempt.DISCARD, Attempt.DISCARD),
    ("discard", "recover"): (Attempt.DISCARD, Attempt.DISCARD),
    ("discard", "discard"): (Refusal.DISCARDED, Refusal.DISCARDED),
    ("recover", ""): (Attempt.RECOVER, Refusal.FORBIDDEN),
    ("recover", "recover"): (Refusal.RECOVERED, Refusal.RECOVERED),
    ("recover", "discard"): (Refusal.DISCARDED, Refusal.DISCARDED),
    ("recover_or_discard", ""): (Attempt.RECOVER, Attempt.DISCARD),
    ("recover_or_discard", "recover"): (Attempt.DISCARD, Attempt.DISCARD),
    ("recover_or_discard", "discard"): (Refusal.DISCARDED, Refusal.DISCARDED),
}


def choose(mode: str, attempted: str, *, recovery_forbidden: bool) -> Attempt | Refusal:
    """What to try in ``mode`` when ``attempted`` (empty: nothing) has led here."""
    return TABLE[mode, attempted][recovery_forbidden]


def is_wanted(mode: str, attempted: str) -> bool:
    """Whether an attempt that was cut off is one that ``mode`` would make."""
    return mode in (attempted, "recover_or_discard")


def reason_name(reason: ResetReason.ValueType) -> str:
    """A ``ResetReason``'s name; one that only newer servers know has a number."""
    return ResetReason.Name(reason) if reason in ResetReason.values() else f"RESET_REASON_{reason}"
