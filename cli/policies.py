"""Policies of scheduled backups, before a server is started with them."""

from __future__ import annotations

from pathlib import Path


def check_policies(path: Path | None) -> None:
    """Refuses a file of policies that can't be: in the server's own words, not in those of the process beside it.

    Raises:
        UsageError: with policy and key.
    """
    if path is not None:
        from understudy.backup.policy import read_policies

        read_policies(path)
