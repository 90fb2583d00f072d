"""What ``backup`` and ``restore`` have in common where not all realms are wanted, or to be had."""

from __future__ import annotations

from typing import Protocol

import click

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


class _Made(Protocol):
    """A backup, or what was made of one."""

    @property
    def problems(self) -> list[str]: ...


def print_problems(made: _Made) -> bool:
    """Says on standard error what is missing that should be there; whether anything is."""
    from understudy.cli.output import plain

    for problem in made.problems:
        click.echo(f"problem: {plain(problem)}", err=True)
    return bool(made.problems)
