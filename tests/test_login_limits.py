"""How often somebody may try a password, by an injected clock."""

from __future__ import annotations

import pytest

from understudy.common.errors import Overloaded
from understudy.primary import login_limits
from understudy.primary.login_limits import (
    FORGOTTEN_AFTER_S,
    FREE_FAILURES,
    PEER_PAUSE_S_MAX,
    USER_PAUSE_S_MAX,
    LoginLimits,
)


def _is_refused(limits: LoginLimits, user: str, peer: str, now_s: float) -> bool:
    try:
        limits.begin(user, peer, now_s=now_s)
    except Overloaded:
        return True
    return False


def _pause_s(limits: LoginLimits, user: str, peer: str, now_s: float) -> float:
    """How long until the next attempt is taken, which it then is; in halves of a second."""
    halves = 0
    while _is_refused(limits, user, peer, now_s + halves / 2):
        halves += 1
    return halves / 2


def test_pauses_double_up_to_a_limit_that_keeps_nobody_out() -> None:
    """One user's failures cost longer and longer pauses, but never so long that somebody else could lock it out."""
    limits = LoginLimits()
    now_s, pauses = 0.0, []
    for number in range(FREE_FAILURES + 10):
        pauses.append(_pause_s(limits, "ann", f"10.0.0.{number}", now_s))
        now_s += pauses[-1]
    assert pauses[: FREE_FAILURES + 6] == [0.0] * FREE_FAILURES + [1, 2, 4, 8, 16, 30]
    assert max(pauses) == USER_PAUSE_S_MAX


def test_one_password_for_many_users_is_stopped_at_its_source() -> None:
    """A peer that tries one user after the other is stopped for long, and others are not."""
    limits = LoginLimits()
    now_s = 0.0
    for number in range(30):
        now_s += _pause_s(limits, f"user{number}", "10.0.0.1", now_s)
    assert _is_refused(limits, "another", "10.0.0.1", now_s + PEER_PAUSE_S_MAX - 1)
    assert not _is_refused(limits, "another", "10.0.0.2", now_s)


def test_attempts_at_the_same_time_count_before_they_fail() -> None:
    """Many attempts at once are as many as one after the other."""
    limits = LoginLimits()
    taken = [not _is_refused(limits, "ann", "10.0.0.1", 0.0) for _ in range(100)]
    assert taken.count(True) == FREE_FAILURES


def test_success_clears_the_user_and_not_the_peer() -> None:
    """Who knows the password starts anew, but an attacker's own account buys it no more guesses."""
    limits = LoginLimits()
    for number in range(FREE_FAILURES - 1):
        limits.begin(f"user{number}", "10.0.0.1", now_s=0.0)
    limits.begin("mallory", "10.0.0.1", now_s=0.0)
    limits.succeeded("mallory", "10.0.0.1")
    limits.begin("ann", "10.0.0.1", now_s=0.0)
    assert _is_refused(limits, "ben", "10.0.0.1", 0.0)
    for _ in range(3 * FREE_FAILURES):
        limits.begin("carla", "10.0.0.2", now_s=0.0)
        limits.succeeded("carla", "10.0.0.2")


def test_failures_are_forgotten() -> None:
    """Whoever has been silent for long enough starts anew."""
    limits = LoginLimits()
    for number in range(FREE_FAILURES):
        limits.begin("ann", f"10.0.0.{number}", now_s=0.0)
    assert _is_refused(limits, "ann", "10.0.1.1", 0.5)
    limits.begin("ann", "10.0.1.1", now_s=FORGOTTEN_AFTER_S + 1)
    limits.begin("ann", "10.0.1.1", now_s=FORGOTTEN_AFTER_S + 1)


def test_g9_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: names that nobody has do not fill the memory."""
    monkeypatch.setattr(login_limits, "KEPT_MAX", 10)
    limits = LoginLimits()
    for number in range(100):
        limits.begin(f"user{number}", f"10.0.0.{number}", now_s=0.0)
    assert len(limits._failures) == 10
