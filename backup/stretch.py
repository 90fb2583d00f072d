"""The names of the change-log's stretches in a repository, which say where each begins and ends.

::

    log/0000000001-00000000000000000001-00000000000000048213-<digest before>-<digest at its end>.seg.zst.age
        epoch      first LSN            last LSN

The digests, 16 digits of each, tell stretches of histories that have forked from each other. Stretches may overlap: one
takes the place of those that were shipped while it was being written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from understudy.backup.repository import Repository
from understudy.common.types import LSN_DIGITS, Epoch, Lsn, format_lsn

LOG = "log/"
DIGEST_DIGITS = 16
_NAME = re.compile(
    rf"log/(?P<epoch>[0-9]{{10}})-(?P<first>[0-9]{{{LSN_DIGITS}}})-(?P<last>[0-9]{{{LSN_DIGITS}}})"
    rf"-(?P<before>[0-9a-f]{{{DIGEST_DIGITS}}})-(?P<digest>[0-9a-f]{{{DIGEST_DIGITS}}})"
    r"\.seg\.zst(?P<age>\.age)?\Z"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Entries ``first`` to ``last`` of the log, as an object."""

    epoch: Epoch  # of the last entry
    first: Lsn
    last: Lsn
    before: str  # the beginning of the digest at ``first - 1``
    digest: str  # and of that at ``last``
    is_encrypted: bool

    @property
    def name(self) -> str:
        """The object's."""
        suffix = ".seg.zst.age" if self.is_encrypted else ".seg.zst"
        lsns = f"{format_lsn(self.first)}-{format_lsn(self.last)}"
        return f"{LOG}{self.epoch:010d}-{lsns}-{self.before}-{self.digest}{suffix}"

    @classmethod
    def parse(cls, name: str) -> Stretch | None:
        """The inverse of :attr:`name`; None where it is none of such an object."""
        found = _NAME.match(name)
        if found is None:
            return None
        return cls(
            epoch=Epoch(int(found["epoch"])),
            first=Lsn(int(found["first"])),
            last=Lsn(int(found["last"])),
            before=found["before"],
            digest=found["digest"],
            is_encrypted=found["age"] is not None,
        )

    @property
    def rank(self) -> tuple[Epoch, Lsn]:
        """What ends in a higher epoch is newer, though it have lower LSNs; within an epoch, what reaches further."""
        return self.epoch, self.last


def short_digest(digest: bytes) -> str:
    """As much of a digest as names have."""
    return digest.hex()[:DIGEST_DIGITS]


def list_stretches(repository: Repository) -> list[Stretch]:
    """All that a repository holds, by epoch and LSN.

    Raises:
        RepositoryError.
    """
    found = (Stretch.parse(stored.name) for stored in repository.list(LOG))
    return [stretch for stretch in found if stretch is not None]
