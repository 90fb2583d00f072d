"""``understudy backups``: what repositories hold, and the runs of servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from understudy.cli.backup_runs import cancel, start, watch
from understudy.cli.options import EPILOG, absolute_repository, json_option
from understudy.common.errors import ExitCode

if TYPE_CHECKING:
    from understudy.backup.catalog import Catalog
    from understudy.backup.manifest import Manifest
    from understudy.backup.repository import Repository

_repository = click.argument("url", metavar="REPOSITORY", callback=absolute_repository)
_backup = click.argument("backup_id", metavar="BACKUP")


@click.group(epilog=EPILOG)
def backups() -> None:
    """List, check, copy and remove backups; have a server make one.

    REPOSITORY is a folder, or s3://bucket/prefix, gs://bucket/prefix, az://container/prefix; credentials come from the
    environment, as AWS_ACCESS_KEY_ID and the like.

    \b
    Example:
      understudy backups list /backup
      understudy backups verify s3://bucket/backups --all
      understudy backups start nightly --server 127.0.0.1:7850
    """


for _command in (start, cancel, watch):
    backups.add_command(_command)


def _open(url: str) -> Repository:
    from understudy.backup.repository import check_claimed, open_repository
    from understudy.common.logs import QUIET, configure_logs

    configure_logs(level=QUIET)
    repository = open_repository(url)
    check_claimed(repository)
    return repository


def _read(repository: Repository) -> Catalog:
    from understudy.backup.catalog import read_catalog
    from understudy.cli.output import plain

    catalog = read_catalog(repository)
    for problem in catalog.problems:
        click.echo(f"problem: {plain(problem)}", err=True)
    return catalog


@backups.command("list", epilog=EPILOG)
@_repository
@json_option
def list_(url: str, as_json: bool) -> None:
    """Show all backups, the newest last.

    \b
    Example:
      understudy backups list /backup
    """
    from understudy.cli.backup_tables import backup_facts, print_backups
    from understudy.cli.output import print_json

    catalog = _read(_open(url))
    if as_json:
        print_json(
            {
                "backups": [backup_facts(backup) for backup in catalog.backups],
                "unfinished": catalog.orphans,
                "problems": catalog.problems,
            }
        )
        return
    if not catalog.backups:
        click.echo(f"no backup in {url}")
        return
    print_backups(catalog.backups)


@backups.command(epilog=EPILOG)
@_repository
@_backup
@json_option
def show(url: str, backup_id: str, as_json: bool) -> None:
    """Show what is known of a backup.

    With --json that is all of it, each of its files included. BACKUP is an id that `understudy backups list` shows.

    \b
    Example:
      understudy backups show /backup 20261121T023000Z-...
    """
    from understudy.cli.backup_tables import backup_facts, print_backup
    from understudy.cli.output import print_json

    backup = _read(_open(url)).find(backup_id)
    if not as_json:
        print_backup(backup)
        return
    facts = backup_facts(backup)
    facts["problems"] = backup.manifest.problems
    facts["archive"] = backup.archive_name
    facts["sha256"] = backup.sha256
    facts["checks"] = [
        {"finding": check.finding.value, "at": check.at, "detail": check.detail} for check in backup.checks
    ]
    facts["files"] = [{"path": file.path, "bytes": file.bytes} for file in backup.manifest.files]
    print_json(facts)


@backups.command(epilog=EPILOG)
@_repository
@click.argument("backup_id", metavar="[BACKUP]", required=False)
@click.option("--all", "checks_all", is_flag=True, help="Check every backup.")
@json_option
@click.pass_context
def verify(context: click.Context, url: str, backup_id: str | None, checks_all: bool, as_json: bool) -> None:
    """Read archives and compare them with their digests.

    BACKUP, or with --all every one; else the one whose last check is the longest ago. No key is needed. What was found
    is remembered in the repository: restores pass over what is damaged.

    \b
    Example:
      understudy backups verify s3://bucket/backups --all
    """
    from understudy.backup.upkeep import by_need, nearest_intact, verify_stored
    from understudy.cli.output import Progress, plain, print_json

    if backup_id and checks_all:
        raise click.UsageError("Give BACKUP or --all, not both.")
    repository = _open(url)
    catalog = _read(repository)
    chosen = [catalog.find(backup_id)] if backup_id else by_need(catalog.backups)
    if not checks_all:
        chosen = chosen[:1]
    found = {}
    for backup in chosen:
        with Progress(f"checking {backup.id}", unit="bytes") as progress:
            found[backup.id] = verify_stored(repository, backup, progress=progress.update)
    if as_json:
        print_json(
            [{"backup": name, "ok": not problem, "problem": problem} for name, problem in found.items()]
        )
    elif not chosen:
        click.echo(f"no backup in {url}")
    for backup in chosen if not as_json else []:
        problem = found[backup.id]
        nearest = nearest_intact(catalog.backups, backup) if problem else None
        advice = f"; the nearest that is not known to be damaged is {nearest.id}" if nearest else ""
        click.echo(f"{backup.id}: {plain(problem) + advice if problem else 'intact'}")
    damaged = any(found.values()) or bool(catalog.problems)
    context.exit(ExitCode.CORRUPT if damaged else ExitCode.DONE)


@backups.command(epilog=EPILOG)
@_repository
@_backup
@click.option("--force", is_flag=True, help="Though it is the last one that can be restored.")
@json_option
def delete(url: str, backup_id: str, force: bool, as_json: bool) -> None:
    """Remove a backup.

    The log that was shipped stays; `understudy backups prune` removes what no backup needs any more.

    \b
    Example:
      understudy backups delete /backup 20261121T023000Z-...
    """
    from understudy.backup.repository_lock import locked
    from understudy.backup.upkeep import delete_chosen
    from understudy.cli.output import print_json

    repository = _open(url)
    with locked(repository, f"delete {backup_id}") as lock:
        delete_chosen(repository, lock, backup_id, force=force)
    if as_json:
        print_json({"removed": backup_id})
    else:
        click.echo(f"removed {backup_id}")


@backups.command(epilog=EPILOG)
@_repository
@_backup
@click.option(
    "--to",
    "target_url",
    required=True,
    metavar="REPOSITORY",
    callback=absolute_repository,
    help="Where it is copied to.",
)
@json_option
def copy(url: str, backup_id: str, target_url: str, as_json: bool) -> None:
    """Copy a backup to another repository, checked on the way.

    Without the log behind it: the copy alone restores to its own end, and to no moment after that.

    \b
    Example:
      understudy backups copy /backup 20261121T023000Z-... --to s3://bucket/backups
    """
    from understudy.backup.repository import claim, open_repository
    from understudy.backup.repository_lock import locked
    from understudy.backup.upkeep import copy_backup, has_manifest
    from understudy.cli.output import Progress, print_json

    source, target = _open(url), open_repository(target_url)
    backup = _read(source).find(backup_id)
    claim(target, backup.manifest.cluster_id)
    was_there = has_manifest(target, backup.folder)
    with locked(target, f"copy {backup_id}") as lock, Progress("copying", unit="bytes") as progress:
        copy_backup(source, target, lock, backup, progress=progress.update)
    if as_json:
        print_json({"backup": backup_id, "to": target_url, "was_there": was_there})
    else:
        click.echo(
            f"{backup_id} is in {target_url} already, intact"
            if was_there
            else f"copied {backup_id} to {target_url}"
        )


@backups.command(epilog=EPILOG)
@_repository
@click.option("--last", type=click.IntRange(min=0), default=0, help="Keep so many of the newest.")
@click.option("--hourly", type=click.IntRange(min=0), default=0, help="Keep one for each of so many hours.")
@click.option("--daily", type=click.IntRange(min=0), default=0, help="Keep one for each of so many days.")
@click.option("--weekly", type=click.IntRange(min=0), default=0, help="Keep one for each of so many weeks.")
@click.option("--monthly", type=click.IntRange(min=0), default=0, help="Keep one for each of so many months.")
@click.option(
    "--minimum", type=click.IntRange(min=1), default=1, show_default=True, help="Keep at least so many."
)
@click.option(
    "--zone",
    default="UTC",
    show_default=True,
    help="In whose time these hours and days are, such as Europe/Berlin.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@json_option
def prune(
    url: str,
    last: int,
    hourly: int,
    daily: int,
    weekly: int,
    monthly: int,
    minimum: int,
    zone: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove the backups that are too old, and the log before the oldest that stays.

    The newest backup that can be restored always stays, and so does log that was stored within the last day. Without
    any number, all backups do. The numbers count for the backups of each policy by themselves.

    \b
    Example:
      understudy backups prune /backup --daily 7 --weekly 4 --dry-run
    """
    from understudy.backup.repository_lock import locked
    from understudy.backup.retention import Retention
    from understudy.backup.upkeep import prune as prune_repository
    from understudy.cli.backup_tables import removed_text
    from understudy.cli.output import print_json

    retention = Retention(
        last=last, hourly=hourly, daily=daily, weekly=weekly, monthly=monthly, minimum=minimum, zone=zone
    )
    repository = _open(url)
    if dry_run:
        report = prune_repository(repository, None, retention)
    else:
        with locked(repository, "prune") as lock:
            report = prune_repository(repository, lock, retention)
    if as_json:
        print_json(
            {
                "kept": [{"backup": name, "reasons": list(reasons)} for name, reasons in report.kept],
                "removed": report.removed,
                "unfinished": report.orphans,
                "log": report.stretches,
                "restorable_from": {
                    "before": _moment(report.oldest_before),
                    "after": _moment(report.oldest),
                },
                "dry_run": dry_run,
            }
        )
        return
    for name, reasons in report.kept:
        click.echo(f"keep    {name}  {', '.join(reasons)}")
    for name in (*report.removed, *report.orphans):
        click.echo(f"{'would remove' if dry_run else 'removed'} {name}")
    removed = removed_text(len(report.removed), len(report.stretches))
    click.echo(f"{removed} {'would be' if dry_run else 'were'} removed")
    if report.oldest != report.oldest_before:
        click.echo(
            f"restores to {_lost(report.oldest)} {'would not be' if dry_run else 'are not'} possible any more"
        )


def _lost(oldest: Manifest | None) -> str:
    """The moments that nothing leads to where restores can begin with ``oldest`` at the earliest."""
    return f"moments before {oldest.time} (LSN {oldest.lsn})" if oldest else "any moment of all realms"


def _moment(oldest: Manifest | None) -> dict[str, Any] | None:
    return {"time": oldest.time, "lsn": oldest.lsn} if oldest else None
