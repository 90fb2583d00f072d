"""``understudy log``."""

from __future__ import annotations

from pathlib import Path

import click

from understudy.cli.options import EPILOG, data_dir_argument, json_option

_LSN = click.IntRange(min=1)


@click.command(epilog=EPILOG)
@data_dir_argument
@click.option(
    "--from", "from_lsn", type=_LSN, metavar="LSN", help="First entry. The oldest that is held if not given."
)
@click.option("--to", "to_lsn", type=_LSN, metavar="LSN", help="Last entry.")
@click.option("--realm", metavar="PATH", help="Only entries of this realm.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many entries.")
@json_option
def log(
    directory: Path,
    from_lsn: int | None,
    to_lsn: int | None,
    realm: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Print entries of the change-log.

    Also while a process writes to it. JSON: one object a line.

    \b
    Example:
      understudy log /var/lib/understudy/data --from 1000 --realm /inventory
    """
    from itertools import islice

    from understudy.cli.log_entries import LogEntry, directory_records
    from understudy.cli.output import print_json
    from understudy.common.types import check_realm_path

    if realm is not None:
        check_realm_path(realm)
    entries = (LogEntry.of(record) for record in directory_records(directory, from_lsn, to_lsn))
    wanted = (entry for entry in entries if realm is None or entry.realm == realm)
    for entry in islice(wanted, limit):
        if as_json:
            print_json(entry.facts())
        else:
            click.echo(entry.line())
