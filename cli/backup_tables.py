"""How backups in repositories are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from understudy.backup.catalog import StoredBackup
    from understudy.backup.run_report import RunReport


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


def print_backup(backup: StoredBackup) -> None:
    """All that people ask of one backup."""
    from understudy.cli.output import counted, print_facts, size_text

    manifest = backup.manifest
    chosen = [*manifest.realms_chosen, *(f"not {pattern}" for pattern in manifest.realms_excluded)]
    holds = (
        f"{counted(manifest.realms, 'realm')}, {size_text(manifest.total_bytes)}, as {manifest.form.value}"
    )
    facts = [
        ("backup", backup.id),
        ("policy", f"{backup.policy or '-'}, run {backup.run}"),
        ("made", f"{manifest.made}, by version {manifest.version}"),
        ("reaches", f"LSN {manifest.lsn} of {manifest.time}, epoch {manifest.epoch}"),
        ("holds", holds + (f"; only {', '.join(chosen)}" if chosen else "")),
        ("archive", f"{backup.archive_name}, {size_text(backup.size)}"),
        ("SHA-256", backup.sha256),
        ("state", backup.state),
    ]
    facts += [
        ("checked", f"{check.at}: {check.finding.value} {check.detail}".rstrip()) for check in backup.checks
    ]
    facts += [("problem", problem) for problem in manifest.problems]
    print_facts(facts)


def print_run(report: RunReport) -> None:
    """What came of a run, for people."""
    import click

    from understudy.cli.output import plain, seconds_text, size_text

    for outcome in report.outcomes:
        if outcome.backup is not None:
            made = (
                f"{outcome.backup.id}, {size_text(outcome.backup.size)}, at LSN {outcome.backup.manifest.lsn}"
            )
            click.echo(f"{plain(outcome.url)}: {made}")
        if outcome.pruned or outcome.pruned_stretches:
            click.echo(
                f"{plain(outcome.url)}: {removed_text(outcome.pruned, outcome.pruned_stretches)} removed"
            )
    for error in report.all_errors:
        click.echo(f"problem: {plain(error)}", err=True)
    click.echo(
        f"run {report.number} of {report.policy}: {report.result}, in {seconds_text(report.seconds)}, id {report.id}"
    )


def removed_text(backups: int, stretches: int) -> str:
    """What was pruned, in numbers."""
    from understudy.cli.output import counted

    return f"{counted(backups, 'backup')} and {counted(stretches, 'stretch', 'stretches')} of log"
