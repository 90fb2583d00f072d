"""``understudy verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.options import EPILOG, json_option, server_option
from understudy.common.errors import ExitCode

if TYPE_CHECKING:
    from understudy.cli.compare import Comparison
    from understudy.common.credentials import Credentials
    from understudy.common.verify import VerifyReport


@click.command(epilog=EPILOG)
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@server_option(required=False, help_text="A running node, instead of DIR.")
@click.option("--against", metavar="HOST:PORT", help="The running node to compare it with.")
@json_option
@click.pass_context
def verify(
    context: click.Context,
    directory: Path | None,
    server: str | None,
    against: str | None,
    credentials: Credentials,
    as_json: bool,
) -> None:
    """Recompute what a copy says about itself.

    Of a data directory that no process has open: the chain of the whole log, every change's signature, the
    structure of the store, and its state digests. Or compare two running nodes, by digests that both recompute; exit
    code 3 if they are not of one history.

    \b
    Example:
      understudy verify /var/lib/understudy/data
      understudy verify --server 127.0.0.1:7850 --against 127.0.0.1:7851
    """
    if directory is not None and server is None and against is None:
        is_ok = _verify_directory(directory, as_json=as_json)
    elif directory is None and server is not None and against is not None:
        is_ok = _compare(server, against, credentials, as_json=as_json)
    else:
        raise click.UsageError("Give a directory, or both --server and --against.")
    context.exit(ExitCode.DONE if is_ok else ExitCode.CORRUPT)


def _verify_directory(directory: Path, *, as_json: bool) -> bool:
    from understudy.cli.logs import QUIET, configure_logs
    from understudy.cli.output import Progress, print_json
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
    from understudy.cli.logs import QUIET, configure_logs
    from understudy.cli.output import print_json
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
