"""``understudy backups start``, ``cancel`` and ``watch``: runs that a server makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from understudy.cli.admin_calls import ask_server
from understudy.cli.options import EPILOG, INTERRUPTED, json_option, server_option, timeout_option
from understudy.common.errors import ExitCode

if TYPE_CHECKING:
    from understudy.cli.output import Progress
    from understudy.common.credentials import Credentials
    from understudy.v1 import admin_pb2, admin_pb2_grpc

_server = server_option(help_text="A primary or replica that was started with policies.")


@click.command(epilog=EPILOG)
@click.argument("name")
@_server
@timeout_option
@json_option
def start(name: str, server: str, credentials: Credentials, timeout_s: float, as_json: bool) -> None:
    """Have a running server run a policy now.

    Returns at once with the id of the run, which `understudy backups watch` follows. If the policy waits for its turn
    or is under way already, the id is that run's.

    \b
    Example:
      understudy backups start nightly --server 127.0.0.1:7850
    """
    from understudy.cli.output import plain, print_json
    from understudy.v1 import admin_pb2

    request = admin_pb2.StartBackupRequest(policy=name)
    answer = ask_server(server, credentials, lambda stub: stub.StartBackup(request, timeout=timeout_s))
    if as_json:
        print_json({"id": answer.id, "policy": name, "was_under_way": answer.was_under_way})
        return
    how = "was under way already" if answer.was_under_way else "was started"
    click.echo(
        f"run {answer.id} of {plain(name)} {how}; its end shows: understudy backups watch {answer.id} --server {server}"
    )


@click.command(epilog=EPILOG)
@click.argument("run_id", metavar="RUN")
@_server
@timeout_option
@json_option
def cancel(run_id: str, server: str, credentials: Credentials, timeout_s: float, as_json: bool) -> None:
    """End a run that waits or is under way.

    RUN is the id that `understudy backups start` or `understudy status` shows. What it had not finished is no backup.
    Its schedule goes on with the next time.

    \b
    Example:
      understudy backups cancel 3fa9c1d0 --server 127.0.0.1:7850
    """
    from understudy.cli.output import plain, print_json
    from understudy.common.known_runs import state_name
    from understudy.v1 import admin_pb2

    request = admin_pb2.CancelBackupRequest(id=run_id)
    answer = ask_server(server, credentials, lambda stub: stub.CancelBackup(request, timeout=timeout_s))
    run = answer.run
    if as_json:
        print_json({"id": run.id, "policy": run.policy, "was": state_name(run)})
    else:
        click.echo(f"run {run.id} of {plain(run.policy)}, which was {state_name(run)}, is being cancelled")


@click.command(epilog=EPILOG)
@click.argument("run_id", metavar="RUN")
@_server
@json_option
@click.pass_context
def watch(context: click.Context, run_id: str, server: str, credentials: Credentials, as_json: bool) -> None:
    """Follow a run to its end.

    RUN is the id that `understudy backups start` or `understudy status` shows. Ends with 0 only if the backup is in all
    of the policy's repositories and all else went well. Ctrl-C ends the watching, not the run.

    \b
    Example:
      understudy backups watch 3fa9c1d0 --server 127.0.0.1:7850
    """
    from understudy.cli.output import Progress, print_json
    from understudy.v1 import admin_pb2

    try:
        with Progress("backing up", unit="bytes") as progress:
            run = ask_server(server, credentials, lambda stub: _follow(stub, run_id, progress))
    except KeyboardInterrupt:
        click.echo(
            f"understudy: run {run_id} goes on; `understudy backups watch {run_id} --server {server}` follows it "
            f"again, `understudy backups cancel {run_id} --server {server}` ends it",
            err=True,
        )
        context.exit(INTERRUPTED)
    if as_json:
        print_json(_facts(run))
    else:
        _tell(run)
    context.exit(ExitCode.DONE if run.state == admin_pb2.BackupRun.DONE else ExitCode.FAILED)


async def _follow(
    stub: admin_pb2_grpc.AdminAsyncStub, run_id: str, progress: Progress
) -> admin_pb2.BackupRun:
    """How the run has ended.

    Raises:
        PeerUnreachable: the server has ended before.
    """
    from understudy.common.errors import PeerUnreachable
    from understudy.common.known_runs import is_over
    from understudy.v1 import admin_pb2

    async for run in stub.WatchBackup(admin_pb2.WatchBackupRequest(id=run_id)):
        if is_over(run):
            return run
        if progress.is_watched:
            progress.update(run.done_bytes, run.total_bytes or None)
    raise PeerUnreachable(
        f"the server has ended before run {run_id} had",
        remedy="once it runs again, `understudy backups watch` tells what came of it",
    )


def _facts(run: admin_pb2.BackupRun) -> dict[str, Any]:
    from understudy.cli.output import moment
    from understudy.common.known_runs import state_name

    return {
        "id": run.id,
        "policy": run.policy,
        "state": state_name(run),
        "started": moment(run.started_s),
        "seconds": round(run.seconds, 3),
        "bytes": run.done_bytes,
        "total_bytes": run.total_bytes or None,
        "backups": list(run.paths),
        "errors": list(run.errors),
    }


def _tell(run: admin_pb2.BackupRun) -> None:
    from understudy.cli.output import plain, seconds_text
    from understudy.common.known_runs import state_name

    for path in run.paths:
        click.echo(plain(path))
    for error in run.errors:
        click.echo(f"problem: {plain(error)}", err=True)
    click.echo(f"run {run.id} of {plain(run.policy)}: {state_name(run)}, in {seconds_text(run.seconds)}")
