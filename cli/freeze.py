"""``understudy freeze`` and ``understudy thaw``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from understudy.cli.admin_calls import ask_server
from understudy.cli.options import EPILOG, json_option, server_option, timeout_option

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
    directory that is taken now reaches exactly the LSN that is shown. Transactions wait meanwhile, and none is refused.
    `understudy thaw` ends it; it ends by itself after --for, too. Asked again, it goes on for longer.

    A snapshot taken without it is good as well, as after a power loss: it holds all that was acknowledged.

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
            }
        )
    else:
        click.echo(
            f"frozen at LSN {answer.lsn} {answer.digest.hex()} for {seconds_text(answer.seconds_left)}; before that: "
            f"understudy thaw --server {server}"
        )


@click.command(epilog=EPILOG)
@server_option(help_text="The primary.")
@timeout_option
@json_option
def thaw(server: str, credentials: Credentials, timeout_s: float, as_json: bool) -> None:
    """Have a primary that was frozen go on.

    \b
    Example:
      understudy thaw --server 127.0.0.1:7850
    """
    from understudy.cli.output import print_json
    from understudy.v1 import admin_pb2

    answer = ask_server(
        server, credentials, lambda stub: stub.Thaw(admin_pb2.ThawRequest(), timeout=timeout_s)
    )
    if as_json:
        print_json({"was_frozen": answer.was_frozen})
    else:
        click.echo(f"{server} goes on" if answer.was_frozen else f"{server} was not frozen, or not any more")
