"""``understudy restore``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

from understudy.cli.options import EPILOG, INTERRUPTED, absolute_repository, credential_options, json_option
from understudy.cli.realm_choice import print_problems, realm_option
from understudy.cli.secrets import unlocking_options
from understudy.common.errors import ExitCode, UnderstudyError, UnfinishedBackup
from understudy.common.types import Epoch, Lsn

if TYPE_CHECKING:
    from understudy.backup.encryption import Unlocking
    from understudy.backup.point import Point
    from understudy.backup.restore import RestoreReport
    from understudy.backup.restore_whole import BeforeFolding
    from understudy.backup.selection import Selection
    from understudy.cli.restore_into import Options
    from understudy.cli.restore_plan import Plan
    from understudy.common.credentials import Credentials

    class Make(Protocol):
        """Makes a data directory of chosen realms of the backup that was named."""

        def __call__(
            self, selection: Selection, target: Path, before_folding: BeforeFolding | None = None
        ) -> RestoreReport: ...


@click.command(epilog=EPILOG)
@click.argument("backup", metavar="BACKUP|REPOSITORY", callback=absolute_repository)
@click.argument("backup_id", metavar="[BACKUP]", required=False)
@click.option(
    "--to",
    "target",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The new data directory: absent or empty.",
)
@click.option(
    "--into-server",
    metavar="HOST:PORT",
    help="Write the realms of --realm to this running server instead; several with commas: the primary is found.",
)
@click.option("--lsn", type=click.IntRange(min=1), metavar="N", help="Go no further than entry N.")
@click.option(
    "--at",
    "at",
    metavar="TIME",
    help="Go no further than this moment, such as 2026-05-01T14:30:00; local time unless it says Z or +02:00.",
)
@click.option(
    "--epoch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Follow the history of epoch N, though a later one has taken over from it before its end.",
)
@realm_option
@click.option("--as", "as_path", metavar="PATH", help="The one realm's path on the server, if another one.")
@click.option("--yes", is_flag=True, help="Overwrite and delete on the server without asking.")
@click.option(
    "--scratch",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="The folder to restore in before --into-server. The current directory if not given.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only say what would be restored from a repository, or written to the server.",
)
@unlocking_options
@credential_options
@json_option
@click.pass_context
def restore(
    context: click.Context,
    backup: str,
    backup_id: str | None,
    target: Path | None,
    into_server: str | None,
    lsn: int | None,
    at: str | None,
    epoch: int | None,
    realms: tuple[str, ...],
    as_path: str | None,
    yes: bool,
    scratch: Path | None,
    dry_run: bool,
    unlocking: Unlocking,
    credentials: Credentials,
    as_json: bool,
) -> None:
    """Make a data directory of a backup, or bring realms back.

    All is checked as it is written. From a backup's directory or archive; or from a REPOSITORY: the newest suitable
    backup and the log that was shipped after it, up to the end or to --lsn or --at; a BACKUP that is named comes
    without log if neither is given. Where an old primary has stored what its successor never had, the successor's
    history is restored, and the old one's with --epoch.

    With --to and --realm, all is restored into DIR/incoming first. Where a backup lacks a realm that was damaged, or
    a --realm matches nothing, the exit code is 1; where none of them matches anything, nothing is made. `understudy
    primary --data-dir DIR` then starts a server, with a new epoch of the same cluster: clients who saw later things
    are told apart, and heal or reset. Cut off, the same command goes on with the log where the backup itself was in
    place, and begins anew where it was not.

    With --into-server, all is restored into a scratch folder, and the realms of --realm are written to the server as
    ordinary changes, which its replicas and clients get as any others. One that is not there comes with its history as
    far as the backup has it; in one that is there, only what differs is changed, once you have said yes or --yes, and
    its present content is exported into the current directory first. Where others write to it at the same time, the
    exit code is 1. Cut off, the same command goes on.

    \b
    Example:
      understudy restore /backup/monday --to restored
      understudy restore monday.tar.zst.age --identity key.txt --to restored
      understudy restore s3://bucket/backups --to restored --at 2026-05-01T14:30:00
      understudy restore /backups --into-server 127.0.0.1:7850 --realm /orders --as /orders-before --lsn 48213
    """
    from understudy.backup.repository import is_repository
    from understudy.backup.selection import Selection
    from understudy.common.logs import QUIET, configure_logs

    configure_logs(level=QUIET)
    _check_options(context.params, of_repository=is_repository(backup))
    selection = Selection(realms=realms)
    selection.check()
    point = _point(lsn, at)
    if is_repository(backup):
        epoch_max = Epoch(epoch) if epoch is not None else None
        plan = _plan(backup, backup_id, point, epoch_max, target)
        plan.tell()
        make = _of_repository(plan, unlocking)
        if dry_run and target is not None:
            plan.print_facts(as_json=as_json)
            return
    else:
        make = _of_files(Path(backup), point, unlocking)
    is_whole = True
    if into_server is not None:
        from understudy.cli.restore_into import Options

        options = Options(
            selection=selection, as_path=as_path, scratch=scratch or Path(), dry_run=dry_run, yes=yes
        )
        is_whole = _into_server(make, into_server, credentials, options, as_json=as_json)
    elif target is not None:
        is_whole = _to_directory(make, target, selection, as_json=as_json)
    if not is_whole:
        context.exit(ExitCode.FAILED)


def _check_options(given: Mapping[str, object], *, of_repository: bool) -> None:
    """Refuses what does not go together.

    Args:
        given: each parameter by its name.
    """
    into_server = given["into_server"] is not None
    if (given["target"] is None) != into_server:
        raise click.UsageError("Give --to or --into-server, one of them.")
    if not into_server and any(given[name] for name in ("as_path", "yes", "scratch")):
        raise click.UsageError("--as, --yes and --scratch are for --into-server.")
    if into_server and not given["realms"]:
        raise click.UsageError("--into-server needs --realm: which realms?")
    if given["lsn"] is not None and given["at"] is not None:
        raise click.UsageError("Give --lsn or --at, not both.")
    dry_run = given["dry_run"] and not into_server
    if not of_repository and (given["backup_id"] is not None or given["epoch"] is not None or dry_run):
        raise click.UsageError(
            f"{given['backup']} is no repository: give neither a second BACKUP, nor --epoch, nor --dry-run."
        )


def _into_server(
    make: Make, server: str, credentials: Credentials, options: Options, *, as_json: bool
) -> bool:
    """Writes realms to a running server; returns whether nothing is missing, and nobody has come in between."""
    from understudy.backup.selection import EVERYTHING
    from understudy.cli.restore_into import print_outcome, restore_into

    outcome = restore_into(server, credentials, partial(make, EVERYTHING), options)
    print_outcome(outcome, as_json=as_json)
    return not print_problems(outcome) and not outcome.others


def _to_directory(make: Make, target: Path, selection: Selection, *, as_json: bool) -> bool:
    """Makes a data directory; returns whether nothing is missing in it."""
    from understudy.backup.in_progress import is_in_progress

    try:
        report = make(selection, target)
    except KeyboardInterrupt:
        click.echo(
            f"understudy: interrupted; {target} is not finished: give the same command again, or remove it",
            err=True,
        )
        click.get_current_context().exit(INTERRUPTED)
    except UnderstudyError as error:
        if is_in_progress(target) and not isinstance(error, UnfinishedBackup):  # which is about that
            click.echo(f"note: {target} is not finished: mend this and go on with it, or remove it", err=True)
        raise
    _tell(report, target, as_json=as_json)
    return not print_problems(report)


def _point(lsn: int | None, at: str | None) -> Point | None:
    from understudy.backup.point import Point, parse_time

    if lsn is None and at is None:
        return None
    return Point(
        lsn=Lsn(lsn) if lsn is not None else None, time_us=parse_time(at) if at is not None else None
    )


def _of_files(backup: Path, point: Point | None, unlocking: Unlocking) -> Make:
    from understudy.backup.restore import restore_backup
    from understudy.cli.output import Progress

    def make(
        selection: Selection, target: Path, before_folding: BeforeFolding | None = None
    ) -> RestoreReport:
        with Progress("restoring", unit="bytes") as progress:
            report = restore_backup(
                backup,
                target,
                point=point,
                selection=selection,
                unlocking=unlocking,
                before_folding=before_folding,
                progress=progress.update,
            )
        _print_notes(report.notes)
        return report

    return make


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        click.echo(f"note: {note}", err=True)


def _plan(
    url: str, backup_id: str | None, point: Point | None, epoch_max: Epoch | None, target: Path | None
) -> Plan:
    """Chooses the backup: the one that an attempt before has begun with, where that was cut off."""
    from understudy.backup.catalog import read_catalog
    from understudy.backup.choice import begun_with, choose_backup
    from understudy.backup.repository import open_repository
    from understudy.backup.stretch import list_stretches
    from understudy.cli.output import plain
    from understudy.cli.restore_plan import Plan

    repository = open_repository(url)
    catalog = read_catalog(repository)
    for problem in catalog.problems:
        click.echo(f"problem: {plain(problem)}", err=True)
    stretches = list_stretches(repository)
    if backup_id is not None:
        backup = catalog.find(backup_id)
    else:
        candidates = begun_with(catalog, url, target) if target is not None else catalog
        backup = choose_backup(candidates, point, url, stretches=stretches, epoch_max=epoch_max)
    return Plan(
        repository=repository,
        catalog=catalog,
        stretches=stretches,
        backup=backup,
        with_log=point is not None or epoch_max is not None or backup_id is None,
        point=point,
        epoch_max=epoch_max,
    )


def _of_repository(plan: Plan, unlocking: Unlocking) -> Make:
    from understudy.backup.restore import restore_stored
    from understudy.cli.output import Progress

    def make(
        selection: Selection, target: Path, before_folding: BeforeFolding | None = None
    ) -> RestoreReport:
        with Progress("restoring", unit="bytes") as progress:
            report = restore_stored(
                plan.repository,
                plan.backup,
                target,
                with_log=plan.with_log,
                point=plan.point,
                epoch_max=plan.epoch_max,
                catalog=plan.catalog,
                stretches=plan.stretches,
                selection=selection,
                unlocking=unlocking,
                before_folding=before_folding,
                progress=progress.update,
            )
        _print_notes(report.notes)
        return report

    return make


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
                "ended": report.ended,
                "notes": report.notes,
                "problems": report.problems,
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
