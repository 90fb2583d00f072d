"""What ``backup`` and ``restore`` have in common where not all realms are wanted, or to be had."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from understudy.backup.manifest import Manifest

realm_option = click.option(
    "--realm",
    "realms",
    multiple=True,
    metavar="PATTERN",
    help="Only realms of this pattern: * stands for one segment, ** at the end for any rest. May be given again.",
)
exclude_option = click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="No realms of this pattern. May be given again."
)


def print_problems(manifest: Manifest) -> bool:
    """Says on standard error what is missing that should be in a backup; whether anything is."""
    from understudy.cli.output import plain

    for problem in manifest.problems:
        click.echo(f"problem: {plain(problem)}", err=True)
    return bool(manifest.problems)
