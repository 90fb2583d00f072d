"""``understudy rewind``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.options import EPILOG, credential_options, data_dir_argument, json_option

if TYPE_CHECKING:
    from understudy.common.credentials import Credentials
    from understudy.replica.rewind import Rewind


@click.command(epilog=EPILOG)
@data_dir_argument
@click.option("--to", required=True, metavar="HOST:PORT", help="The new primary.")
@click.option(
    "--id",
    "replica_id",
    metavar="NAME",
    envvar="UNDERSTUDY_ID",
    help="Its name as a replica, for which log is kept there: the same as for `understudy replica`. The host's if not "
    "set. [UNDERSTUDY_ID]",
)
@credential_options
@json_option
def rewind(directory: Path, to: str, replica_id: str | None, credentials: Credentials, as_json: bool) -> None:
    """Make an old primary a replica of the new one.

    Or a replica that diverged. What only this copy has is exported to DIR/set-aside first, then only what differs is
    fetched. Nothing of the old copy is touched until the new one is complete; cut off anywhere, run it again.

    \b
    Example:
      understudy rewind /var/lib/understudy/data --to 192.0.2.2:7850
      understudy replica --data-dir /var/lib/understudy/data --primary 192.0.2.2:7850
    """
    import asyncio
    import socket

    from understudy.cli.output import Progress, print_json
    from understudy.common.addresses import split_address
    from understudy.common.logs import QUIET, configure_logs
    from understudy.common.memory import keep_freed_memory
    from understudy.common.portal import new_event_loop
    from understudy.replica.rewind import rewind as rewind_directory

    split_address(to)  # before anything is touched
    name = replica_id or socket.gethostname()
    configure_logs(level=QUIET)
    keep_freed_memory()
    with (
        Progress("fetching", unit="bytes") as progress,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        outcome = runner.run(
            rewind_directory(
                directory,
                to=to,
                replica_id=name,
                credentials=credentials,
                progress=progress.update,
            )
        )
    if as_json:
        print_json(_facts(outcome) | {"replica_id": name})
    else:
        _tell(outcome, directory, to, name)


def _facts(outcome: Rewind) -> dict[str, object]:
    common = outcome.common
    return {
        "decision": outcome.decision,
        "common_lsn": common.lsn if common else None,
        "common_digest": common.digest.hex() if common else None,
        "exported": str(outcome.exported) if outcome.exported else None,
        "entries_exported": outcome.entries_exported,
        "set_aside": str(outcome.set_aside) if outcome.set_aside else None,
        "bytes_fetched": outcome.bytes_fetched,
        "bytes_total": outcome.bytes_total,
    }


def _tell(outcome: Rewind, directory: Path, to: str, name: str) -> None:
    from understudy.cli.output import counted, size_text

    if outcome.decision == "STREAM":
        click.echo(f"nothing to rewind: all that {directory} holds is part of the history of {to}")
    if outcome.common is not None:
        click.echo(f"common history up to LSN {outcome.common.lsn}")
    if outcome.exported is not None:
        own = counted(outcome.entries_exported, "entry", "entries")
        click.echo(f"{own} that only this copy has: {outcome.exported}")
    if outcome.set_aside is not None:
        click.echo(f"the old copy: {outcome.set_aside}")
    if outcome.bytes_total:
        click.echo(f"fetched {size_text(outcome.bytes_fetched)} of {size_text(outcome.bytes_total)}")
    click.echo(f"start it with: understudy replica --data-dir {directory} --primary {to} --id {name}")
    click.echo(
        f"{to} keeps log for a replica of that name from here on; "
        f"if it gets another one: understudy forget {name} --server {to}"
    )
