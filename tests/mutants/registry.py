"""All mutants, and the few that are tried in every run of the automatic checks."""

from __future__ import annotations

from mutants import backups, clients, durability, reign
from mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (*durability.MUTANTS, *reign.MUTANTS, *clients.MUTANTS, *backups.MUTANTS)

# One of each kind, of those that are noticed soon.
QUICK = (
    "a batch without fdatasync",
    "the memtable is not recovered",
    "publish without fsync",
    "a client's unproven epoch fences",
    "the last number is taken for a new one",
    "a tail's HMAC is not checked",
    "prune does not look at what stays",
)
