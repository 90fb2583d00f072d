"""``understudy verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.backup.archive_options import is_archive_name
from understudy.cli.options import EPILOG, json_option, server_option
from understudy.cli.secrets import unlocking_options
from understudy.common.errors import ExitCode

if TYPE_CHECKING:
    from understudy.backup.encryption import Unlocking
    from understudy.backup.verify_archive import ArchiveReport
    from understudy.cli.compare import Comparison
    from understudy.common.credentials import Credentials
    from understudy.common.verify import VerifyReport


@click.command(epilog=EPILOG)
@click.argument("path", metavar="[DIR|ARCHIVE]", required=False, type=click.Path(path_type=Path))
@server_option(required=False, help_text="A running node, instead of DIR.")
@click.option("--against", metavar="HOST:PORT", help="The running node to compare it with.")
@unlocking_options
@json_option
@click.pass_context
def verify(
    context: click.Context,
    path: Path | None,
    server: str | None,
    against: str | None,
    credentials: Credentials,
    unlocking: Unlocking,
    as_json: bool,
) -> None:
    """Recompute what a copy says about itself.

    Of a data directory that no process has open: the chain of the whole log, every change's signature, the
    structure of the store, and its state digests. Or compare two running nodes, by digests that both recompute; exit
    code 3 if they are not of one history.

    Of a backup's archive, .tar.zst or .tar.zst.age: every file's digest, which shows that it is as it was written.
    `understudy backup drill`, or `understudy restore` and then this command, recompute the state in it.

    \b
    Example:
      understudy verify /var/lib/understudy/data
      understudy verify monday.tar.zst.age --identity key.txt
      understudy verify --server 127.0.0.1:7850 --against 127.0.0.1:7851
    """
    if path is not None and server is None and against is None:
        is_archive = is_archive_name(path) and not path.is_dir()
        is_ok = (
            _verify_archive(path, unlocking, as_json=as_json)
            if is_archive
            else _verify_directory(path, as_json=as_json)
        )
    elif path is None and server is not None and against is not None:
        is_ok = _compare(server, against, credentials, as_json=as_json)
    else:
        raise click.UsageError("Give a directory or an archive, or both --server and --against.")
    context.exit(ExitCode.DONE if is_ok else ExitCode.CORRUPT)


def _verify_directory(directory: Path, *, as_json: bool) -> bool:
    from understudy.cli.output import Progress, print_json
    from understudy.common.logs import QUIET, configure_logs
    from understudy.common.verify import verify_directory

    configure_logs(level=QUIET)
    with Progress("verifying", unit="entries") as progress:
        report = verify_directory(directory, progress.update)
    if as_json:
        print_json(
            {
                "ok": report.ok,
                "lsn": report.lsn,
                "digest": report.digest.hex(),
                "entries_checked": report.entries_checked,
                "realms_checked": report.realms_checked,
                "realms_in_log_only": report.realms_in_log_only,
                "problems": report.problems,
            }
        )
    else:
        _tell_report(report, directory)
    return report.ok


def _verify_archive(archive: Path, unlocking: Unlocking, *, as_json: bool) -> bool:
    from understudy.backup.verify_archive import verify_archive
    from understudy.cli.output import Progress, print_json
    from understudy.common.logs import QUIET, configure_logs

    configure_logs(level=QUIET)
    with Progress("verifying", unit="bytes") as progress:
        report = verify_archive(archive, unlocking, progress.update)
    manifest = report.manifest
    if as_json:
        print_json(
            {
                "ok": report.ok,
                "lsn": manifest and manifest.lsn,
                "digest": manifest and manifest.digest,
                "realms": manifest and manifest.realms,
                "bytes": manifest and manifest.total_bytes,
                "problems": report.problems,
            }
        )
    else:
        _tell_archive(archive, report)
    return report.ok


def _tell_archive(archive: Path, report: ArchiveReport) -> None:
    from understudy.cli.output import counted, size_text

    _tell_problems(report.problems)
    if (manifest := report.manifest) is None:
        click.echo(f"{archive}: {counted(len(report.problems), 'problem')}")
        return
    click.echo(
        f"{archive}: as it was written; LSN {manifest.lsn}, digest {manifest.digest}, "
        f"{counted(manifest.realms, 'realm')}, {size_text(manifest.total_bytes)}"
    )


def _tell_report(report: VerifyReport, directory: Path) -> None:
    from understudy.cli.output import counted

    _tell_problems(report.problems)
    verdict = counted(len(report.problems), "problem") if report.problems else "sound"
    entries = counted(report.entries_checked, "log entry", "log entries")
    unwritten = counted(report.realms_in_log_only, "realm")
    click.echo(
        f"{directory}: {verdict}; LSN {report.lsn}, digest {report.digest.hex()}, "
        f"{entries} and {counted(report.realms_checked, 'realm')} of the store checked"
        + (f"; {unwritten} more in the log only, until the next checkpoint" * bool(report.realms_in_log_only))
    )


def _tell_problems(problems: list[str]) -> None:
    from understudy.cli.output import plain

    for problem in problems:
        click.echo(f"problem: {plain(problem)}")


def _compare(server: str, against: str, credentials: Credentials, *, as_json: bool) -> bool:
    import asyncio

    from understudy.cli.compare import compare_servers
    from understudy.cli.output import print_json
    from understudy.common.logs import QUIET, configure_logs
    from understudy.common.portal import new_event_loop

    configure_logs(level=QUIET)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        comparison = runner.run(compare_servers(server, against, credentials))
    if as_json:
        print_json(
            {
                "ok": not comparison.problems,
                "lsn": comparison.lsn,
                "digest": comparison.digest.hex(),
                "entries_checked": comparison.entries,
                "realms_checked": comparison.realms,
                "problems": comparison.problems,
            }
        )
    else:
        _tell_comparison(comparison, server, against)
    return not comparison.problems


def _tell_comparison(comparison: Comparison, server: str, against: str) -> None:
    from understudy.cli.output import counted

    _tell_problems(comparison.problems)
    verdict = counted(len(comparison.problems), "problem") if comparison.problems else "equal"
    entries = counted(comparison.entries, "entry", "entries")
    click.echo(
        f"{server} and {against}: {verdict}; at LSN {comparison.lsn}, {counted(comparison.realms, 'realm')} with "
        f"{entries} compared"
    )
