"""How often somebody may try a password: after some failures, longer and longer pauses.

Pure: the clock is passed in. Failures are counted by user and by peer, so that neither many passwords for one user nor
one password for many users gets far. A user's pause stays short, or anybody could keep that user out.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from understudy.common.errors import Overloaded

FREE_FAILURES = 5
FIRST_PAUSE_S = 1.0  # doubled with each failure behind the free ones
USER_PAUSE_S_MAX = 30.0
PEER_PAUSE_S_MAX = 900.0
FORGOTTEN_AFTER_S = 900.0  # without an attempt
KEPT_MAX = 10_000  # users and peers; beyond it the ones that have been silent for longest are forgotten


@dataclass(slots=True)
class _Failures:
    count: int = 0
    last_s: float = 0.0


class LoginLimits:
    """Failures of late. An attempt counts as failed until it is known to have succeeded: many at once count, too."""

    def __init__(self) -> None:
        self._failures: OrderedDict[tuple[str, str], _Failures] = OrderedDict()

    def begin(self, user: str, peer: str, *, now_s: float) -> None:
        """An attempt begins.

        Raises:
            Overloaded: it must wait; it did not count.
        """
        keys = (("user", user), USER_PAUSE_S_MAX), (("peer", peer), PEER_PAUSE_S_MAX)
        wait_s = max(self._wait_s(key, most_s, now_s) for key, most_s in keys)
        if wait_s > 0:
            raise Overloaded("too many failed logins", remedy=f"try again in {max(wait_s, 1):.0f} s")
        for key, _ in keys:
            failures = self._failures.setdefault(key, _Failures())
            failures.count += 1
            failures.last_s = now_s
            self._failures.move_to_end(key)
        while len(self._failures) > KEPT_MAX:
            self._failures.popitem(last=False)

    def succeeded(self, user: str, peer: str) -> None:
        """The attempt was no failure. The peer's others stay: one account of its own must not buy it more guesses."""
        self._failures.pop(("user", user), None)
        failures = self._failures.get(("peer", peer))
        if failures is not None:
            failures.count -= 1

    def _wait_s(self, key: tuple[str, str], most_s: float, now_s: float) -> float:
        failures = self._failures.get(key)
        if failures is not None and now_s - failures.last_s > FORGOTTEN_AFTER_S:
            del self._failures[key]
            failures = None
        if failures is None or failures.count < FREE_FAILURES:
            return 0.0
        doubled = min(failures.count - FREE_FAILURES, 20)  # 2 ** 20 s is beyond any limit
        return failures.last_s + min(FIRST_PAUSE_S * 2.0**doubled, most_s) - now_s
