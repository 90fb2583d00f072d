"""``understudy backup drill``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from understudy.cli.interruption import interrupted_once
from understudy.cli.options import EPILOG, INTERRUPTED, json_option
from understudy.cli.policies import policy_arguments
from understudy.common.errors import ExitCode

if TYPE_CHECKING:
    from understudy.backup.drill import Drill


@click.command(epilog=EPILOG)
@policy_arguments
@click.option(
    "--data-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Whose backups these are: the drill is written into its journal, and takes place beside it.",
)
@click.option(
    "--scratch",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="The folder to restore in. Beside the data directory if not given; a policy's staging goes first.",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help="Serve what was proven here until Ctrl-C, on this machine only.",
)
@json_option
@click.pass_context
def drill(
    context: click.Context,
    name: str,
    config: Path,
    data_dir: Path | None,
    scratch: Path | None,
    listen: str | None,
    as_json: bool,
) -> None:
    """Prove the newest backups of a policy by restoring them.

    In each repository of the policy, the newest backup is restored, verified and compared with its manifest; the log
    behind it is followed; a server is started on it, and every realm is read. What was found is remembered in the
    repository: restores pass over what is damaged. What opens encrypted backups stands in the policy: passphrase_file
    or identity_file.

    Where the policy names a staging, the proven directory stays there: `understudy primary --data-dir STAGING` starts
    a server at once. Otherwise it is removed.

    With --listen, the first that is proven is served for people to look at, and no other is tried. It has begun an
    epoch of its own: point no client and no replica of the real server at it. A staging that was written to is not
    replaced.

    \b
    Example:
      understudy backup drill nightly --config understudy.toml --data-dir /var/lib/understudy/data
      understudy backup drill nightly --config understudy.toml --scratch /tmp --listen 127.0.0.1:7999
    """
    from understudy.backup.books import Books
    from understudy.backup.drill import drill_newest, scratch_parent
    from understudy.backup.drill_server import read_all
    from understudy.backup.policy import find_policy
    from understudy.cli.output import Progress
    from understudy.common.addresses import check_free, check_listen
    from understudy.common.directory import check_data_directory
    from understudy.common.logs import QUIET, configure_logs

    configure_logs(level=QUIET)
    policy = find_policy(config, name, data_dir)
    if data_dir is not None:
        check_data_directory(data_dir)
    if listen is not None:
        check_listen(listen, has_tls=False)
        check_free(listen)
    parent = scratch_parent(policy, data_dir, scratch)
    journal = Books.of(data_dir).journal if data_dir is not None else None
    drills: list[Drill] = []
    try:
        with interrupted_once():
            for url in policy.repositories:
                with Progress("restoring", unit="bytes") as progress:
                    drills.append(
                        drill_newest(
                            policy,
                            url,
                            parent,
                            read_all=read_all,
                            journal=journal,
                            on_proven=None if listen is None else lambda path: _serve(path, listen),
                            progress=progress.update,
                        )
                    )
                if listen is not None and drills[-1].is_proven:
                    break
    except KeyboardInterrupt:
        click.echo("understudy: the drill was cut off; what it had restored was removed again", err=True)
        context.exit(INTERRUPTED)
    _tell(drills, as_json=as_json)
    context.exit(_exit_code(drills))


def _serve(directory: Path, listen: str) -> None:
    """Serves until Ctrl-C."""
    from understudy.backup.drill_server import proven_server
    from understudy.common.errors import UnderstudyError

    with proven_server(directory, listen) as (report, wait):
        click.echo(
            f"proven, and served on {report.address} until Ctrl-C. It has an epoch of its own: point no client and no "
            "replica of the real server at it",
            err=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            wait()
            raise UnderstudyError(f"the server on {directory} has ended by itself")


def _tell(drills: list[Drill], *, as_json: bool) -> None:
    from understudy.backup.drill import drill_line
    from understudy.cli.output import plain, print_json

    if as_json:
        print_json([_facts(drill) for drill in drills])
        return
    for drill in drills:
        click.echo(plain(drill_line(drill)))


def _facts(drill: Drill) -> dict[str, Any]:
    return {
        "repository": drill.url,
        "backup": drill.backup.id if drill.backup else None,
        "proven": drill.is_proven,
        "finding": drill.finding.value if drill.finding else None,
        "seconds": round(drill.seconds, 3),
        "lsn": drill.lsn,
        "realms": drill.realms,
        "pairs": drill.pairs,
        "problem": drill.problem,
    }


def _exit_code(drills: list[Drill]) -> ExitCode:
    if any(drill.finding is not None and not drill.is_proven for drill in drills):
        return ExitCode.CORRUPT
    return ExitCode.FAILED if any(drill.problem for drill in drills) else ExitCode.DONE
