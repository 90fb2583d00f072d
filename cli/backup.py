"""``understudy backup``."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.backup_drill import drill
from understudy.cli.interruption import handling
from understudy.cli.options import EPILOG, INTERRUPTED, byte_rate, json_option
from understudy.cli.policies import policy_arguments
from understudy.cli.realm_choice import exclude_option, print_problems, realm_option
from understudy.cli.secrets import encryption_options
from understudy.common.errors import ExitCode, UsageError
from understudy.common.niceness import let_commits_go_first

if TYPE_CHECKING:
    from understudy.backup.archive_options import ArchiveOptions
    from understudy.backup.encryption import Encryption
    from understudy.backup.make import BackupReport
    from understudy.backup.progress import OnProgress

_STANDARD_OUTPUT = Path("-")
# Of archives that this command doesn't make; nobody means a directory by such a name.
_ARCHIVE_SUFFIXES = frozenset({".tar", ".tgz", ".gz", ".xz", ".zst", ".age", ".zip"})


@click.group(epilog=EPILOG, invoke_without_command=True)
@click.option(
    "-f",
    "--from",
    "source",
    metavar="SOURCE",
    type=click.Path(path_type=Path),
    help="The data directory: a primary's or a replica's, whether it runs or not, or a backup.",
)
@click.option(
    "-t",
    "--to",
    "target",
    metavar="TARGET",
    type=click.Path(path_type=Path),
    help="A directory, absent or empty; FILE.tar.zst or FILE.tar.zst.age, absent; - for standard output.",
)
@click.option("--update", is_flag=True, help="Bring TARGET up to date, or finish what was cut off there.")
@click.option(
    "--finish", is_flag=True, help="Where --update was cut off and SOURCE is lost: keep what TARGET has got."
)
@realm_option
@exclude_option
@click.option(
    "--portable",
    is_flag=True,
    help="For a machine of another kind: all realms, in a form that is restored on any machine.",
)
@click.option(
    "--rate",
    type=byte_rate,
    metavar="SIZE/s",
    help="Read no faster than this, such as 50MB/s. Without it a backup pauses while its source is written to.",
)
@encryption_options
@click.option(
    "--level",
    type=click.IntRange(1, 19),
    default=3,
    show_default=True,
    help="How hard zstd compresses an archive.",
)
@json_option
@click.pass_context
def backup(
    context: click.Context,
    source: Path | None,
    target: Path | None,
    update: bool,
    finish: bool,
    realms: tuple[str, ...],
    exclude: tuple[str, ...],
    portable: bool,
    rate: int | None,
    encryption: Encryption | None,
    level: int,
    as_json: bool,
) -> None:
    """Copy a data directory whose server goes on.

    All realms at one moment, with keys and accounts. The copy is a data directory itself: `understudy primary` starts
    on it, with a new epoch. A replica's directory is the source that costs the primary nothing.

    A TARGET that ends in .tar.zst is one archive, and in .tar.zst.age one that is encrypted, for --recipient or with
    the passphrase in --passphrase-file. age, zstd and tar open it too.

    Of a backup with --portable, and of any archive, `understudy restore` makes a server's directory. With --realm,
    --exclude or --portable a realm that is damaged is left out, and the exit code is 1 then, as where a --realm matches
    nothing; where no realm is chosen at all, nothing is made. Such a backup is not brought up to date, but made anew.

    With a command, it works with the policies of a server's TOML file instead.

    While it is no whole backup a directory holds the file BACKUP_IN_PROGRESS; what was cut off is finished with
    --update, or by the same command again where it is made anew. If the source is lost then, --finish verifies what an
    older backup there has got, and makes it whole as it is.

    \b
    Example:
      understudy backup -f /var/lib/understudy/data -t /backup/monday
      understudy backup -f /var/lib/understudy/data -t /backup/monday --update
      understudy backup -f /var/lib/understudy/data -t monday.tar.zst.age --recipient age1...
      understudy backup -t /backup/monday --finish
    """
    if context.invoked_subcommand is not None:
        return
    if finish:
        _finish(source, target, as_json=as_json)
        return
    if source is None or target is None:
        raise click.UsageError("Give both -f and -t, or a command.")
    from understudy.backup.archive_options import ArchiveOptions
    from understudy.backup.selection import Selection
    from understudy.cli.output import Progress
    from understudy.common.logs import QUIET, configure_logs

    configure_logs(level=QUIET)
    let_commits_go_first()
    selection = Selection(realms=realms, exclude=exclude, portable=portable)
    selection.check()
    options = ArchiveOptions(selection=selection, encryption=encryption, level=level, rate=rate)
    try:
        with Progress("backing up", unit="bytes") as progress:
            report = _make(source, target, update, options, progress.update)
    except KeyboardInterrupt:
        how_on = "give the same command again" if selection.needs_records else "go on with --update"
        click.echo(f"understudy: interrupted{_left_behind(target, how_on)}", err=True)
        context.exit(INTERRUPTED)
    _tell(report, as_json=as_json, to_stderr=target == _STANDARD_OUTPUT)
    if print_problems(report.manifest):
        context.exit(ExitCode.FAILED)


def _left_behind(target: Path, how_on: str) -> str:
    """What to do with a directory that was being written."""
    from understudy.backup.in_progress import is_in_progress

    if not target.is_dir():
        return ""
    if not is_in_progress(target):
        return f"; {target} is as it was"
    return f"; {target} is not finished: {how_on}, or remove it"


@backup.command(epilog=EPILOG)
@policy_arguments
@click.option(
    "--data-dir",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The data directory: a primary's or a replica's, whether it runs or not.",
)
@json_option
@click.pass_context
def run(context: click.Context, name: str, config: Path, data_dir: Path, as_json: bool) -> None:
    """Run a policy once, now: for cron and systemd timers.

    Ends with 0 only if the backup is in all of the policy's repositories and all else went well. Ctrl-C cancels it.

    \b
    Example:
      understudy backup run nightly --config understudy.toml --data-dir /var/lib/understudy/data
    """
    from understudy.backup.history import Result
    from understudy.backup.policy import find_policy
    from understudy.backup.run import Cancelled, run_policy
    from understudy.cli.backup_tables import print_run
    from understudy.cli.output import Progress, print_json
    from understudy.common.directory import check_data_directory
    from understudy.common.logs import configure_logs

    configure_logs(level=logging.WARNING)
    let_commits_go_first()
    policy = find_policy(config, name, data_dir)
    check_data_directory(data_dir)
    report = None
    with contextlib.suppress(Cancelled), Progress("backing up", unit="bytes") as progress, _ctrl_c_cancels():
        report = run_policy(policy, data_dir, progress=progress.update)
    if report is not None and as_json:
        print_json(report.facts())
    elif report is not None:
        print_run(report)
    if report is None or report.is_cancelled:
        click.echo(
            "understudy: the run was cancelled; what it had finished stays, and what it had not is no backup",
            err=True,
        )
        context.exit(INTERRUPTED)
    context.exit(ExitCode.DONE if report.result is Result.DONE else ExitCode.FAILED)


@contextlib.contextmanager
def _ctrl_c_cancels() -> Iterator[None]:
    """Ctrl-C and SIGTERM end a run as an operator's order does: it is written down, the hook for failures is told."""
    from understudy.backup.run import Cancelled

    def cancel(number: int, _: object) -> None:
        raise Cancelled("Ctrl-C has cancelled it" if number == signal.SIGINT else "SIGTERM has cancelled it")

    with handling(cancel):
        yield


backup.add_command(drill)


def _finish(source: Path | None, target: Path | None, *, as_json: bool) -> None:
    from understudy.backup.finish import finish_backup
    from understudy.common.logs import QUIET, configure_logs

    if source is not None or target is None:
        raise click.UsageError("--finish works on -t alone, without -f.")
    configure_logs(level=QUIET)
    _tell(finish_backup(target), as_json=as_json, to_stderr=False)


def _make(
    source: Path, target: Path, update: bool, options: ArchiveOptions, progress: OnProgress
) -> BackupReport:
    from understudy.backup.archive_options import is_archive_name

    is_archive = target == _STANDARD_OUTPUT or is_archive_name(target)
    if not is_archive and target.suffix in _ARCHIVE_SUFFIXES:
        raise click.UsageError(
            f"{target} would be a directory: end an archive's name in .tar.zst or .tar.zst.age."
        )
    if is_archive and update:
        raise click.UsageError("--update is for directories: an archive is made anew.")
    if not is_archive and options.encryption is not None:
        raise click.UsageError("Only an archive can be encrypted: end TARGET in .tar.zst.age.")
    if target == _STANDARD_OUTPUT and sys.stdout.isatty():
        raise UsageError("an archive is not for a terminal", remedy="redirect standard output, or pipe it")
    if not is_archive:
        from understudy.backup.make import make_backup

        return make_backup(
            source,
            target,
            update=update,
            selection=options.selection,
            rate=options.rate,
            progress=progress,
        )
    from understudy.backup.archive import stream_archive, write_archive

    if target == _STANDARD_OUTPUT:
        from understudy.backup.source import open_source

        with open_source(source) as pinned:
            return stream_archive(pinned, sys.stdout.buffer, options, progress=progress)
    return write_archive(source, target, options, progress=progress)


def _tell(report: BackupReport, *, as_json: bool, to_stderr: bool) -> None:
    from understudy.cli.output import counted, json_bytes, seconds_text, size_text

    manifest = report.manifest
    if as_json:
        click.echo(
            json_bytes(
                {
                    "realms": manifest.realms,
                    "bytes": manifest.total_bytes,
                    "bytes_copied": report.bytes_copied,
                    "epoch": manifest.epoch,
                    "lsn": manifest.lsn,
                    "digest": manifest.digest,
                    "time": manifest.time,
                    "form": manifest.form,
                    "problems": manifest.problems,
                    "seconds": round(report.seconds, 3),
                }
            ),
            err=to_stderr,
        )
        return
    click.echo(
        f"{counted(manifest.realms, 'realm')}, {size_text(manifest.total_bytes)}, at LSN {manifest.lsn}, "
        f"in {seconds_text(report.seconds)}",
        err=to_stderr,
    )
