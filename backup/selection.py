"""What of a source goes into a backup, and whether as pages or as records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from understudy.common.access import check_pattern, matches
from understudy.common.types import SYSTEM_REALMS


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Realms by patterns, as permissions have them; the system's own are always among them."""

    realms: tuple[str, ...] = ()  # none: all
    exclude: tuple[str, ...] = ()
    portable: bool = False  # for machines of another kind, and for other formats of LMDB

    @property
    def is_filtered(self) -> bool:
        """Whether some realms may be left out."""
        return bool(self.realms or self.exclude)

    @property
    def needs_records(self) -> bool:
        """Whether pages and log as they are won't do."""
        return self.portable or self.is_filtered

    def takes(self, path: str) -> bool:
        """Whether a realm is chosen."""
        if path in SYSTEM_REALMS:
            return True
        chosen = not self.realms or any(matches(pattern, path) for pattern in self.realms)
        return chosen and not any(matches(pattern, path) for pattern in self.exclude)

    def unmatched(self, paths: Sequence[str]) -> list[str]:
        """Those of :attr:`realms` that match none of the paths."""
        return [pattern for pattern in self.realms if not any(matches(pattern, path) for path in paths)]

    def check(self) -> None:
        """Refuses what is no pattern.

        Raises:
            UsageError.
        """
        for pattern in (*self.realms, *self.exclude):
            # Permissions have no `~`; but while there are no users it is a segment of a realm's path like any other.
            check_pattern("/".join("-" if segment == "~" else segment for segment in pattern.split("/")))

    def __str__(self) -> str:
        """As it is said on a command line."""
        words = ["--portable"] if self.portable else []
        words += [f"--realm {pattern}" for pattern in self.realms]
        words += [f"--exclude {pattern}" for pattern in self.exclude]
        return " ".join(words)


EVERYTHING = Selection()


def describe_unmatched(pattern: str) -> str:
    """That a pattern has chosen nothing, in words."""
    return f"the backup has no realm {pattern}"
