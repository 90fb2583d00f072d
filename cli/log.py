"""``understudy log``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.options import EPILOG, data_dir_argument, json_option

if TYPE_CHECKING:
    from understudy.cli.log_entries import LogEntry

_LSN = click.IntRange(min=1)


@click.command(epilog=EPILOG)
@data_dir_argument
@click.option(
    "--from", "from_lsn", type=_LSN, metavar="LSN", help="First entry. The oldest that is held if not given."
)
@click.option("--to", "to_lsn", type=_LSN, metavar="LSN", help="Last entry.")
@click.option(
    "--at",
    metavar="TIME",
    help="Entries around this moment, such as 2026-05-01T14:30:00; local time if it has no zone, such as Z.",
)
@click.option(
    "--around",
    "around_s",
    type=click.IntRange(min=0),
    metavar="SECONDS",
    help="How far around --at, before and behind. 60 if not given.",
)
@click.option("--realm", metavar="PATH", help="Only entries of this realm.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many entries.")
@json_option
def log(
    directory: Path,
    from_lsn: int | None,
    to_lsn: int | None,
    at: str | None,
    around_s: int | None,
    realm: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Print entries of the change-log.

    Also while a process writes to it. JSON: one object a line.

    --at finds the moment before a mistake: it shows each entry with the client that made it, and the LSN before the
    wrong one is what `understudy restore --lsn` takes. Log that was removed from DIR is not shown, though a repository
    may still hold it.

    \b
    Example:
      understudy log /var/lib/understudy/data --from 1000 --realm /inventory
      understudy log /var/lib/understudy/data --at 2026-05-01T14:30:00 --around 300
    """
    from itertools import islice

    from understudy.cli.log_entries import LogEntry, directory_records
    from understudy.cli.log_moment import Moment, entries_around
    from understudy.cli.output import print_json
    from understudy.common.types import check_realm_path

    if realm is not None:
        check_realm_path(realm)
    if at is None and around_s is not None:
        raise click.UsageError("--around goes with --at.")
    entries: Iterator[LogEntry]
    if at is None:
        entries = map(LogEntry.of, directory_records(directory, from_lsn, to_lsn))
    else:
        from understudy.backup.point import parse_time

        moment = Moment(at_us=parse_time(at), around_s=60 if around_s is None else around_s)
        entries = entries_around(
            directory, moment, from_lsn, to_lsn, lambda words: click.echo(words, err=True)
        )
    wanted = (entry for entry in entries if realm is None or entry.realm == realm)
    for entry in islice(wanted, limit):
        if as_json:
            print_json(entry.facts())
        elif at is not None:
            click.echo(f"{entry.line()}  by {entry.origin}")
        else:
            click.echo(entry.line())
