"""``understudy freeze`` and ``understudy thaw``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from understudy.cli.admin_calls import ask_server
from understudy.cli.options import EPILOG, json_option, server_option, timeout_option
from understudy.common.errors import UnderstudyError

if TYPE_CHECKING:
    from understudy.common.credentials import Credentials

# The server answers within the time of the freeze, which is 300 s at most.
_ANSWER_S = 310.0


@click.command(epilog=EPILOG)
@server_option(help_text="The primary.")
@click.option(
    "--for",
    "seconds",
    type=click.FloatRange(min=0, max=300, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="End it after so long at most, 300 at the longest.",
)
@json_option
def freeze(server: str, credentials: Credentials, seconds: float, as_json: bool) -> None:
    """Pause the writing of a primary, for a snapshot of its disk.

    Returns once all that was taken in is durable and committed, and no checkpoint runs: a snapshot of the data
    directory that is taken now reaches exactly the LSN that is shown. Transactions wait meanwhile, as long as their
    callers do. `understudy thaw` ends it; it ends by itself after --for, too. Asked again, it lasts for --for from then
    on at the least, and the answer is "still frozen" (`was_frozen` with --json). Where it is not, the freeze before has
    ended: what was not taken by then has to be taken again. Where it is unexpected, somebody else has frozen the
    server, and may thaw it.

    A snapshot that shows all files as of one moment is good without it, too, as after a power loss: it holds all that
    was acknowledged. A copy made file by file needs it, to the end of the copying.

    \b
    Example:
      understudy freeze --server 127.0.0.1:7850 && lvcreate --snapshot ... ; understudy thaw --server 127.0.0.1:7850
    """
    from understudy.cli.output import print_json, seconds_text
    from understudy.v1 import admin_pb2

    answer = ask_server(
        server,
        credentials,
        lambda stub: stub.Freeze(admin_pb2.FreezeRequest(seconds=seconds), timeout=_ANSWER_S),
    )
    if as_json:
        print_json(
            {
                "lsn": answer.lsn,
                "digest": answer.digest.hex(),
                "seconds_left": round(answer.seconds_left, 3),
                "was_frozen": answer.was_frozen,
            }
        )
    else:
        frozen = "still frozen" if answer.was_frozen else "frozen"
        click.echo(
            f"{frozen} at LSN {answer.lsn} {answer.digest.hex()} for {seconds_text(answer.seconds_left)}; before that: "
            f"understudy thaw --server {server}"
        )


@click.command(epilog=EPILOG)
@server_option(help_text="The primary.")
@timeout_option
@json_option
def thaw(server: str, credentials: Credentials, timeout_s: float, as_json: bool) -> None:
    """Have a primary that was frozen go on.

    Ends with 0 only if it was frozen until now. If the freeze had ended by itself before, or there was none, the exit
    code is 1: a snapshot that was taken meanwhile may not end at the LSN that `understudy freeze` showed.

    \b
    Example:
      understudy thaw --server 127.0.0.1:7850
    """
    from understudy.cli.output import moment, print_json
    from understudy.v1 import admin_pb2

    answer = ask_server(
        server, credentials, lambda stub: stub.Thaw(admin_pb2.ThawRequest(), timeout=timeout_s)
    )
    ran_out = None if answer.was_frozen else moment(answer.ran_out_s)
    if as_json:
        print_json({"was_frozen": answer.was_frozen, "ran_out": ran_out})
    elif answer.was_frozen:
        click.echo(f"{server} goes on")
    if not answer.was_frozen:
        raise _not_frozen(server, ran_out)


def _not_frozen(server: str, ran_out: str | None) -> UnderstudyError:
    if ran_out is None:
        return UnderstudyError(
            f"{server} was not frozen: it has been thawed already, its freeze has ended, or nobody has frozen it",
            remedy="if a snapshot was taken, take it again after `understudy freeze`",
        )
    return UnderstudyError(
        f"{server} was not frozen any more: the freeze ended by itself at {ran_out}, and a snapshot that was not taken "
        "by then does not end at its LSN",
        remedy="take it again after `understudy freeze`, with a longer --for",
    )
