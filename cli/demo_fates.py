"""The demo's account of its devices: what became of each, and whether that is what was promised. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from understudy.cli.demo_device import COUNTER

Pairs = Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What became of a device; counts of changes.

    Attributes:
        resets: reason and mode of each, such as ``OTHER_HISTORY, recover``.
        lost: own changes that a server had confirmed, and its successor lacked.
        missing: of those, not there in the end.
        appended, renewed: what it brought home, own or not, as it was or as new changes; counted by the server.
        queued: own changes that no server had seen.
        kept: of those, there in the end.
    """

    name: str
    realm: str
    resets: tuple[str, ...] = ()
    lost: int = 0
    missing: int = 0
    appended: int = 0
    renewed: int = 0
    queued: int = 0
    kept: int = 0

    @property
    def dropped(self) -> int:
        """Of the queue, not there in the end."""
        return self.queued - self.kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Reunion:
    """All that came of the devices."""

    fates: list[Fate]
    problems: list[str]

    @property
    def is_good(self) -> bool:
        """Whether everything that was promised was kept."""
        return not self.problems


def present(changes: Mapping[bytes, bytes], pairs: Pairs) -> int:
    """How many changes are there as they were made."""
    return sum(pairs.get(key) == value for key, value in changes.items())


def fate_problems(fates: Iterable[Fate], expected: Iterable[Fate]) -> list[str]:
    """Where it came otherwise than it should have."""
    return [
        f"{fate} where {wanted} was expected"
        for fate, wanted in zip(fates, expected, strict=True)
        if fate != wanted
    ]


def copy_problems(realm: str, server: str, copies: Iterable[tuple[str, str]]) -> list[str]:
    """Names of copies, by their digests, that are not what the server has."""
    return [
        f"{name}'s copy of {realm} has digest {found}, the server {server}"
        for name, found in copies
        if found != server
    ]


def counter_problems(realm: str, pairs: Pairs, makers: Sequence[str]) -> list[str]:
    """A realm in which not every change was applied exactly once; a change's key begins with its maker's name."""
    prefixes = tuple(f"{maker}/".encode() for maker in makers)
    changes = sum(key.startswith(prefixes) for key in pairs)
    counted = int(pairs.get(COUNTER, b"0"))
    return [] if counted == changes else [f"{realm} has {changes} changes, applied {counted} times"]
