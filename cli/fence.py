"""``understudy fence``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from understudy.cli.options import EPILOG, json_option, server_option, timeout_option

if TYPE_CHECKING:
    from understudy.common.credentials import Credentials
    from understudy.v1 import admin_pb2


@click.command(epilog=EPILOG)
@server_option(help_text="The primary that shall reign no more.")
@timeout_option
@json_option
def fence(server: str, credentials: Credentials, timeout_s: float, as_json: bool) -> None:
    """Have a running primary accept no more writes, for good.

    For a primary that can't be stopped while another is to take its place. It stays so after a restart, and is
    not asked twice. What it has acknowledged and no replica has fetched is on it alone: `understudy rewind` exports
    that, and makes it a replica of the new primary.

    \b
    Example:
      understudy fence --server 127.0.0.1:7850
    """
    import asyncio

    from understudy.cli.output import print_json
    from understudy.common.portal import new_event_loop

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        answer = runner.run(_ask(server, credentials, timeout_s))
    if as_json:
        print_json({"epoch": answer.epoch})
    else:
        click.echo(
            f"fenced {server} in epoch {answer.epoch}: it accepts no more writes. To bring it back, stop it and make "
            "it a replica of the new primary: understudy rewind DIR --to HOST:PORT"
        )


async def _ask(server: str, credentials: Credentials, timeout_s: float) -> admin_pb2.FenceResponse:
    from understudy.common.addresses import split_address
    from understudy.common.rpc import open_channel, peer_errors
    from understudy.v1 import admin_pb2, admin_pb2_grpc

    split_address(server)
    async with open_channel(server, credentials) as channel:
        with peer_errors(server):
            return await admin_pb2_grpc.AdminStub(channel).Fence(admin_pb2.FenceRequest(), timeout=timeout_s)
