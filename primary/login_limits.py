"""How often somebody may try a password: after some failures, longer and longer pauses.

Pure: the clock is passed in. Failures are counted three times: of a user from one network, which is what a guesser
looks like; and, with much higher bounds, of a user from anywhere and of a network for anybody, so that neither many
networks for one user nor one password for many users gets far. Pauses of all but a network stay short, or anybody
could keep a user out. Who has logged in from a network before is not held up by what others do there, or elsewhere:
one guesser does not lock out all who share an address with him.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass

from understudy.common.errors import Overloaded

FREE_FAILURES = 5  # of a user from one network
USER_FREE_FAILURES = 50  # of a user from anywhere
NETWORK_FREE_FAILURES = 100  # of a network, whoever was tried
FIRST_PAUSE_S = 1.0  # doubled with each failure behind the free ones
PAUSE_S_MAX = 30.0
NETWORK_PAUSE_S_MAX = 900.0
FORGOTTEN_AFTER_S = 900.0  # without an attempt
KEPT_MAX = 10_000  # of each kind; beyond it the ones that have been silent for longest are forgotten
_IPV6_PREFIX = 64  # what one customer gets at the least


@dataclass(frozen=True, slots=True)
class _Limit:
    """Of failures counted under ``key``."""

    key: tuple[str, str, str]
    free: int
    pause_s_max: float


@dataclass(slots=True)
class _Failures:
    count: int = 0
    last_s: float = 0.0


class LoginLimits:
    """Failures of late. An attempt counts as failed until it is known to have succeeded: many at once count, too."""

    def __init__(self) -> None:
        self._failures: OrderedDict[tuple[str, str, str], _Failures] = OrderedDict()
        self._known: OrderedDict[tuple[str, str], None] = (
            OrderedDict()
        )  # users, and where they have logged in

    def begin(self, user: str, peer: str, *, now_s: float) -> None:
        """An attempt begins.

        Args:
            user: who is tried.
            peer: the address that it comes from.
            now_s: by a clock that does not jump.

        Raises:
            Overloaded: it must wait; it did not count.
        """
        network = network_of(peer)
        limits = _limits(user, network)
        asked = limits[:1] if (user, network) in self._known else limits
        wait_s = max(self._wait_s(limit, now_s) for limit in asked)
        if wait_s > 0:
            raise Overloaded("too many failed logins", remedy=f"try again in {max(wait_s, 1):.0f} s")
        for limit in limits:
            failures = self._failures.setdefault(limit.key, _Failures())
            failures.count += 1
            failures.last_s = now_s
            self._failures.move_to_end(limit.key)
        while len(self._failures) > len(limits) * KEPT_MAX:
            self._failures.popitem(last=False)

    def succeeded(self, user: str, peer: str) -> None:
        """The attempt was no failure. Others' stay: one account of its own must not buy a guesser more guesses."""
        network = network_of(peer)
        own, *shared = _limits(user, network)
        self._failures.pop(own.key, None)
        for limit in shared:
            failures = self._failures.get(limit.key)
            if failures is not None:
                failures.count -= 1
        self._known[user, network] = None
        self._known.move_to_end((user, network))
        while len(self._known) > KEPT_MAX:
            self._known.popitem(last=False)

    def _wait_s(self, limit: _Limit, now_s: float) -> float:
        failures = self._failures.get(limit.key)
        if failures is not None and now_s - failures.last_s > FORGOTTEN_AFTER_S:
            del self._failures[limit.key]
            failures = None
        if failures is None or failures.count < limit.free:
            return 0.0
        doubled = min(failures.count - limit.free, 20)  # 2 ** 20 s is beyond any limit
        return failures.last_s + min(FIRST_PAUSE_S * 2.0**doubled, limit.pause_s_max) - now_s


def _limits(user: str, network: str) -> list[_Limit]:
    """The one of this user from this network first."""
    return [
        _Limit(("both", user, network), FREE_FAILURES, PAUSE_S_MAX),
        _Limit(("user", user, ""), USER_FREE_FAILURES, PAUSE_S_MAX),
        _Limit(("network", "", network), NETWORK_FREE_FAILURES, NETWORK_PAUSE_S_MAX),
    ]


def network_of(peer: str) -> str:
    """What counts as one source: an IPv4 address, a /64 of IPv6, or anything else as it is."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    network = ipaddress.IPv6Network((int(address), _IPV6_PREFIX), strict=False)
    return str(network)
