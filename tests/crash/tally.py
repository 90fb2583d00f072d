"""What a test has done, to be shown when all is over: that nothing was found says little without it."""

from __future__ import annotations

from crash.clients import Notes
from crash.history import Outcome


class Tally:
    """Counts by name, in the order in which they first came up."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, what: str, count: int = 1) -> None:
        """So many more."""
        self.counts[what] = self.counts.get(what, 0) + count

    def add_notes(self, notes: Notes) -> None:
        """What clients saw, which was checked."""
        self.add("acknowledged transactions checked", notes.count(Outcome.ACKNOWLEDGED))
        self.add("of unknown outcome", notes.count(Outcome.UNKNOWN))
        self.add("refused", notes.count(Outcome.REFUSED))
        self.add("reads", sum(map(len, notes.reads.values())))
