"""``understudy restore``."""

from __future__ import annotations

from pathlib import Path

import click

from understudy.cli.options import EPILOG, json_option
from understudy.cli.secrets import unlocking_options


@click.command(epilog=EPILOG)
@click.argument("backup", metavar="BACKUP", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "target",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The new data directory: absent or empty.",
)
@click.option("--lsn", type=click.IntRange(min=1), metavar="N", help="Go no further than entry N.")
@click.option(
    "--at", "at", metavar="TIME", help="Go no further than this moment, such as 2026-05-01T14:30:00."
)
@unlocking_options
@json_option
def restore(
    backup: Path, target: Path, lsn: int | None, at: str | None, unlocking: object, as_json: bool
) -> None:
    """Make a data directory of a backup, checked as it is written.

    BACKUP is a backup's directory or an archive. `understudy primary --data-dir DIR` then starts a server, with a new
    epoch of the same cluster: clients who saw later things are told apart, and heal or reset.

    \b
    Example:
      understudy restore /backup/monday --to /var/lib/understudy/restored
      understudy restore monday.tar.zst.age --identity key.txt --to restored --at 2026-05-01T14:30:00
    """
    if lsn is not None and at is not None:
        raise click.UsageError("Give --lsn or --at, not both.")
    from understudy.backup.encryption import Unlocking
    from understudy.backup.point import Point, parse_time
    from understudy.backup.restore import restore_backup
    from understudy.cli.logs import QUIET, configure_logs
    from understudy.cli.output import Progress, counted, print_json, seconds_text, size_text
    from understudy.common.types import Lsn

    assert isinstance(unlocking, Unlocking)
    configure_logs(level=QUIET)
    point = None
    if lsn is not None:
        point = Point(lsn=Lsn(lsn))
    elif at is not None:
        point = Point(time_us=parse_time(at))
    with Progress("restoring", unit="bytes") as progress:
        report = restore_backup(backup, target, point=point, unlocking=unlocking, progress=progress.update)
    manifest = report.manifest
    if as_json:
        print_json(
            {
                "realms": manifest.realms,
                "bytes": manifest.total_bytes,
                "epoch": manifest.epoch,
                "lsn": manifest.lsn,
                "digest": manifest.digest,
                "time": manifest.time,
                "seconds": round(report.seconds, 3),
            }
        )
        return
    click.echo(
        f"{counted(manifest.realms, 'realm')}, {size_text(manifest.total_bytes)}, at LSN {manifest.lsn} of "
        f"{manifest.time}, in {seconds_text(report.seconds)}"
    )
    click.echo(f"start it with: understudy primary --data-dir {target}")
