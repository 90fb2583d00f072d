"""Policies of scheduled backups, before a server is started with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def policy_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """``NAME`` and ``--config``, as ``name`` and ``config``: which policy, and the file that it stands in."""
    return click.argument("name")(
        click.option(
            "--config",
            required=True,
            metavar="FILE.toml",
            type=click.Path(path_type=Path),
            help="Where the policy stands, in a table [[backup]].",
        )(function)
    )


def check_policies(path: Path | None, data_dir: Path) -> None:
    """Refuses a file of policies that can't be: in the server's own words, not in those of the process beside it.

    Raises:
        UsageError: with policy and key.
    """
    if path is not None:
        from understudy.backup.policy import read_policies

        read_policies(path, data_dir)
