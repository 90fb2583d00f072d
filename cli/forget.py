"""``understudy forget``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from understudy.cli.options import EPILOG, json_option, server_option, timeout_option
from understudy.common.errors import UsageError

if TYPE_CHECKING:
    from understudy.common.credentials import Credentials
    from understudy.v1 import admin_pb2


@click.command(epilog=EPILOG)
@click.argument("replica_id", metavar="ID")
@server_option(help_text="The primary.")
@timeout_option
@json_option
def forget(replica_id: str, server: str, credentials: Credentials, timeout_s: float, as_json: bool) -> None:
    """Forget a replica that will not come back.

    The primary keeps the log that a replica has yet to fetch, for as long as it knows of it. Refused while the
    replica is connected. One that comes back after all is taken in as a new one.

    \b
    Example:
      understudy forget second --server 127.0.0.1:7850
    """
    import asyncio

    from understudy.cli.output import print_json
    from understudy.common.portal import new_event_loop

    name = _encoded(replica_id)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        answer = runner.run(_ask(server, credentials, replica_id, timeout_s))
    if as_json:
        print_json(
            {"id": replica_id, "durable_lsn": answer.durable_lsn, "released_bytes": answer.released_bytes}
        )
    else:
        _tell(name, answer)


def _encoded(replica_id: str) -> bytes:
    try:
        return replica_id.encode()
    except UnicodeEncodeError:
        # Bytes of an argument that are not UTF-8 arrive as lone surrogates.
        raise UsageError(
            f"bad id {replica_id!r}: it is not UTF-8",
            remedy="`understudy status --server HOST:PORT` shows the ids that are known",
        ) from None


async def _ask(
    server: str, credentials: Credentials, replica_id: str, timeout_s: float
) -> admin_pb2.ForgetResponse:
    from understudy.common.addresses import split_address
    from understudy.common.rpc import open_channel, peer_errors
    from understudy.v1 import admin_pb2, admin_pb2_grpc

    split_address(server)
    async with open_channel(server, credentials) as channel:
        with peer_errors(server):
            return await admin_pb2_grpc.AdminStub(channel).Forget(
                admin_pb2.ForgetRequest(replica_id=replica_id), timeout=timeout_s
            )


def _tell(name: bytes, answer: admin_pb2.ForgetResponse) -> None:
    from understudy.cli.output import printable, size_text

    released = (
        f"{size_text(answer.released_bytes)} of log need not be kept any more, and go with the next checkpoints"
        if answer.released_bytes
        else "no log was kept for it alone"
    )
    click.echo(f"forgot {printable(name)}, which had got to LSN {answer.durable_lsn:,}: {released}")
