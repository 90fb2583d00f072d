"""``understudy restore``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.options import EPILOG, absolute_repository, json_option
from understudy.cli.realm_choice import print_problems, realm_option
from understudy.cli.secrets import unlocking_options
from understudy.common.errors import ExitCode
from understudy.common.types import Lsn

if TYPE_CHECKING:
    from understudy.backup.encryption import Unlocking
    from understudy.backup.point import Point
    from understudy.backup.restore import RestoreReport
    from understudy.backup.selection import Selection


@click.command(epilog=EPILOG)
@click.argument("backup", metavar="BACKUP|REPOSITORY", callback=absolute_repository)
@click.argument("backup_id", metavar="[BACKUP]", required=False)
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
@realm_option
@click.option("--dry-run", is_flag=True, help="Only say what would be restored from a repository.")
@unlocking_options
@json_option
@click.pass_context
def restore(
    context: click.Context,
    backup: str,
    backup_id: str | None,
    target: Path,
    lsn: int | None,
    at: str | None,
    realms: tuple[str, ...],
    dry_run: bool,
    unlocking: Unlocking,
    as_json: bool,
) -> None:
    """Make a data directory of a backup, checked as it is written.

    From a backup's directory or archive; or from a REPOSITORY: the newest suitable backup and the log that was shipped
    after it, up to the end or to --lsn or --at; a BACKUP that is named comes without log if neither is given.

    With --realm, all is restored into DIR/incoming first. Where a backup lacks a realm that was damaged, the exit code
    is 1.

    `understudy primary --data-dir DIR` then starts a server, with a new epoch of the same cluster: clients who saw
    later things are told apart, and heal or reset. Cut off, the same command goes on.

    \b
    Example:
      understudy restore /backup/monday --to restored
      understudy restore monday.tar.zst.age --identity key.txt --to restored
      understudy restore s3://bucket/backups --to restored --at 2026-05-01T14:30:00
    """
    from understudy.backup.point import Point, parse_time
    from understudy.backup.repository import is_repository
    from understudy.backup.restore import restore_backup
    from understudy.backup.selection import Selection
    from understudy.cli.logs import QUIET, configure_logs
    from understudy.cli.output import Progress

    configure_logs(level=QUIET)
    if lsn is not None and at is not None:
        raise click.UsageError("Give --lsn or --at, not both.")
    selection = Selection(realms=realms)
    selection.check()
    point = None
    if lsn is not None or at is not None:
        point = Point(
            lsn=Lsn(lsn) if lsn is not None else None, time_us=parse_time(at) if at is not None else None
        )
    if is_repository(backup):
        report = _restore_stored(backup, backup_id, target, point, selection, unlocking, dry_run=dry_run)
    elif backup_id is not None or dry_run:
        raise click.UsageError(f"{backup} is no repository: give neither a second BACKUP nor --dry-run.")
    else:
        with Progress("restoring", unit="bytes") as progress:
            report = restore_backup(
                Path(backup),
                target,
                point=point,
                selection=selection,
                unlocking=unlocking,
                progress=progress.update,
            )
    if report is not None:
        _tell(report, target, as_json=as_json)
        if print_problems(report.manifest):
            context.exit(ExitCode.FAILED)


def _restore_stored(
    url: str,
    backup_id: str | None,
    target: Path,
    point: Point | None,
    selection: Selection,
    unlocking: Unlocking,
    *,
    dry_run: bool,
) -> RestoreReport | None:
    from understudy.backup.catalog import read_catalog
    from understudy.backup.choice import choose_backup
    from understudy.backup.repository import open_repository
    from understudy.backup.restore import restore_stored
    from understudy.cli.output import Progress, plain

    repository = open_repository(url)
    catalog = read_catalog(repository)
    for problem in catalog.problems:
        click.echo(f"problem: {plain(problem)}", err=True)
    backup = catalog.find(backup_id) if backup_id is not None else choose_backup(catalog, point, url)
    with_log = point is not None or backup_id is None
    click.echo(
        f"from {backup.id}, which reaches LSN {backup.manifest.lsn} of {backup.manifest.time}"
        + (f"; then the log, up to {point or 'its end'}" if with_log else ""),
        err=True,
    )
    if dry_run:
        return None
    with Progress("restoring", unit="bytes") as progress:
        return restore_stored(
            repository,
            backup,
            target,
            with_log=with_log,
            point=point,
            catalog=catalog,
            selection=selection,
            unlocking=unlocking,
            progress=progress.update,
        )


def _tell(report: RestoreReport, target: Path, *, as_json: bool) -> None:
    from understudy.cli.output import counted, print_json, seconds_text, size_text

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
                "problems": manifest.problems,
                "seconds": round(report.seconds, 3),
            }
        )
        return
    click.echo(
        f"{counted(manifest.realms, 'realm')}, {size_text(manifest.total_bytes)}, at LSN {manifest.lsn} of "
        f"{manifest.time}, in {seconds_text(report.seconds)}"
    )
    click.echo(f"start it with: understudy primary --data-dir {target}")
    click.echo(
        "it begins a new epoch, and fences the server that it was copied from if they meet, as through a client that "
        "is given both addresses"
    )
