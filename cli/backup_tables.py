"""How backups in repositories are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from understudy.backup.catalog import StoredBackup
    from understudy.backup.run import RunReport


def backup_facts(backup: StoredBackup) -> dict[str, Any]:
    """A backup in a repository, for JSON."""
    manifest = backup.manifest
    return {
        "id": backup.id,
        "run": backup.run,
        "policy": backup.policy,
        "made": manifest.made,
        "time": manifest.time,
        "epoch": manifest.epoch,
        "lsn": manifest.lsn,
        "realms": manifest.realms,
        "bytes": manifest.total_bytes,
        "archive_bytes": backup.size,
        "encrypted": backup.archive.endswith(".age"),
        "state": backup.state,
        "checked": backup.last_check.at if backup.last_check else None,
    }


def print_backups(backups: list[StoredBackup]) -> None:
    """A table of backups, the newest last."""
    from understudy.cli.output import print_table, size_text

    print_table(
        ("backup", "policy", "reaches", "LSN", "realms", "archive", "state"),
        [
            (
                backup.id,
                backup.policy or "-",
                backup.manifest.time,
                str(backup.manifest.lsn),
                str(backup.manifest.realms),
                size_text(backup.size) + (" encrypted" if backup.archive.endswith(".age") else ""),
                backup.state,
            )
            for backup in backups
        ],
        right=("LSN", "realms"),
    )


def print_run(report: RunReport) -> None:
    """What came of a run, for people."""
    import click

    from understudy.cli.output import plain, seconds_text, size_text

    for outcome in report.outcomes:
        if outcome.backup is not None:
            made = (
                f"{outcome.backup.id}, {size_text(outcome.backup.size)}, at LSN {outcome.backup.manifest.lsn}"
            )
            pruned = f", {outcome.pruned} older removed" if outcome.pruned else ""
            click.echo(f"{plain(outcome.url)}: {made}{pruned}")
    for error in report.all_errors:
        click.echo(f"problem: {plain(error)}", err=True)
    click.echo(f"run {report.number} of {report.policy}: {report.result}, in {seconds_text(report.seconds)}")
