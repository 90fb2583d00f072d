"""How often somebody may try a password, by an injected clock."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from understudy.common.errors import Overloaded
from understudy.primary import login_limits
from understudy.primary.login_limits import (
    FORGOTTEN_AFTER_S,
    FREE_FAILURES,
    NETWORK_FREE_FAILURES,
    NETWORK_PAUSE_S_MAX,
    PAUSE_S_MAX,
    USER_FREE_FAILURES,
    LoginLimits,
    network_of,
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


def _pauses(limits: LoginLimits, attempts: Iterable[tuple[str, str]]) -> tuple[list[float], float]:
    """The pauses before some failures, one after the other, and the time then."""
    now_s, pauses = 0.0, []
    for user, peer in attempts:
        pauses.append(_pause_s(limits, user, peer, now_s))
        now_s += pauses[-1]
    return pauses, now_s


def test_pauses_double_up_to_a_limit_that_keeps_nobody_out() -> None:
    """Failures cost longer and longer pauses, but never so long that somebody else could lock a user out."""
    pauses, _ = _pauses(LoginLimits(), [("ann", "10.0.0.1")] * (FREE_FAILURES + 10))
    assert pauses[: FREE_FAILURES + 6] == [0.0] * FREE_FAILURES + [1, 2, 4, 8, 16, 30]
    assert max(pauses) == PAUSE_S_MAX


def test_many_networks_for_one_user_do_not_get_far() -> None:
    """Who has an address for each attempt has more of them, but not many."""
    attempts = [("ann", f"10.0.0.{at}") for at in range(USER_FREE_FAILURES + 10)]
    pauses, _ = _pauses(LoginLimits(), attempts)
    assert pauses[: USER_FREE_FAILURES + 6] == [0.0] * USER_FREE_FAILURES + [1, 2, 4, 8, 16, 30]
    assert max(pauses) == PAUSE_S_MAX


def test_one_password_for_many_users_is_stopped_at_its_source() -> None:
    """A peer that tries one user after the other is stopped for long, and others are not."""
    limits = LoginLimits()
    attempts = [(f"user{at}", "10.0.0.1") for at in range(NETWORK_FREE_FAILURES + 20)]
    pauses, now_s = _pauses(limits, attempts)
    assert pauses[:NETWORK_FREE_FAILURES] == [0.0] * NETWORK_FREE_FAILURES
    assert _is_refused(limits, "another", "10.0.0.1", now_s + NETWORK_PAUSE_S_MAX - 1)
    assert not _is_refused(limits, "another", "10.0.0.2", now_s)


def test_one_guesser_does_not_lock_out_his_site() -> None:
    """Neither who shares his address, whoever it is, nor later those who have logged in from there before."""
    limits = LoginLimits()
    limits.begin("ben", "192.0.2.1", now_s=0.0)
    limits.succeeded("ben", "192.0.2.1")
    for _ in range(FREE_FAILURES):
        limits.begin("ann", "192.0.2.1", now_s=0.0)
    assert _is_refused(limits, "ann", "192.0.2.1", 0.0)
    assert not _is_refused(limits, "ann", "192.0.2.2", 0.0)
    assert not _is_refused(limits, "carla", "192.0.2.1", 0.0)
    attempts = [(f"user{at}", "192.0.2.1") for at in range(NETWORK_FREE_FAILURES + 10)]
    _, now_s = _pauses(limits, attempts)
    assert _is_refused(limits, "dora", "192.0.2.1", now_s)
    assert not _is_refused(limits, "ben", "192.0.2.1", now_s)
    for _ in range(FREE_FAILURES - 1):
        limits.begin("ben", "192.0.2.1", now_s=now_s)
    assert _is_refused(limits, "ben", "192.0.2.1", now_s)  # his own name is guessed at like any other


def test_who_was_guessed_at_from_elsewhere_gets_in_where_he_is_known() -> None:
    """A user whose name is tried from everywhere logs in from where that user has before, without a pause."""
    limits = LoginLimits()
    limits.begin("ann", "192.0.2.1", now_s=0.0)
    limits.succeeded("ann", "192.0.2.1")
    _, now_s = _pauses(limits, [("ann", f"10.0.0.{at}") for at in range(USER_FREE_FAILURES + 10)])
    assert _is_refused(limits, "ann", "10.0.1.1", now_s)
    assert not _is_refused(limits, "ann", "192.0.2.1", now_s)


def test_attempts_at_the_same_time_count_before_they_fail() -> None:
    """Many attempts at once are as many as one after the other."""
    limits = LoginLimits()
    taken = [not _is_refused(limits, "ann", "10.0.0.1", 0.0) for _ in range(100)]
    assert taken.count(True) == FREE_FAILURES


def test_success_clears_the_user_and_not_the_network() -> None:
    """Who knows the password starts anew, but an attacker's own account buys it no more guesses."""
    limits = LoginLimits()
    for number in range(NETWORK_FREE_FAILURES - 1):
        limits.begin(f"user{number}", "10.0.0.1", now_s=0.0)
    limits.begin("mallory", "10.0.0.1", now_s=0.0)
    limits.succeeded("mallory", "10.0.0.1")
    limits.begin("ann", "10.0.0.1", now_s=0.0)
    assert _is_refused(limits, "ben", "10.0.0.1", 0.0)
    for _ in range(3 * NETWORK_FREE_FAILURES):
        limits.begin("carla", "10.0.0.2", now_s=0.0)
        limits.succeeded("carla", "10.0.0.2")
    assert not _is_refused(limits, "ben", "10.0.0.2", 0.0)


def test_failures_are_forgotten() -> None:
    """Whoever has been silent for long enough starts anew."""
    limits = LoginLimits()
    for _ in range(FREE_FAILURES):
        limits.begin("ann", "10.0.0.1", now_s=0.0)
    assert _is_refused(limits, "ann", "10.0.0.1", 0.5)
    limits.begin("ann", "10.0.0.1", now_s=FORGOTTEN_AFTER_S + 1)
    limits.begin("ann", "10.0.0.1", now_s=FORGOTTEN_AFTER_S + 1)


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("unix:/run/socket", "unix:/run/socket"),
    ],
)
def test_a_network_is_what_one_guesser_has(peer: str, network: str) -> None:
    """Of IPv6 everybody has 2**64 addresses, which count as one."""
    assert network_of(peer) == network


def test_many_addresses_of_one_network_count_together() -> None:
    """Another address of the same /64 does not begin anew."""
    limits = LoginLimits()
    taken = [not _is_refused(limits, "ann", f"2001:db8::{at:x}", 0.0) for at in range(100)]
    assert taken.count(True) == FREE_FAILURES


def test_g9_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: names that nobody has do not fill the memory, and neither do those that somebody has."""
    monkeypatch.setattr(login_limits, "KEPT_MAX", 10)
    limits = LoginLimits()
    for number in range(100):
        limits.begin(f"user{number}", f"10.0.0.{number}", now_s=0.0)
    assert len(limits._failures) == 30
    for number in range(100):
        limits.succeeded(f"user{number}", f"10.0.0.{number}")
    assert len(limits._known) == 10
