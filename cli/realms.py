"""``understudy realms``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from understudy.cli.options import EPILOG, json_option, server_option, timeout_option

if TYPE_CHECKING:
    from understudy.common.credentials import Credentials

_COUNTS = ("entries at checkpoint", "bytes at checkpoint")


@click.command(epilog=EPILOG)
@server_option
@click.option("--drop", metavar="PATH", help="Drop this realm and everything in it, on all nodes.")
@click.option("--yes", is_flag=True, help="Drop without asking.")
@timeout_option
@json_option
def realms(
    server: str, credentials: Credentials, drop: str | None, yes: bool, timeout_s: float, as_json: bool
) -> None:
    """List the realms of a server, or drop one.

    Entries and bytes are as of the server's last checkpoint: what was written since is not counted yet.

    \b
    Example:
      understudy realms --server 127.0.0.1:7850
      understudy realms --server 127.0.0.1:7850 --drop /inventory
    """
    if drop is not None:
        _drop(server, credentials, drop, ask=not yes, timeout_s=timeout_s, as_json=as_json)
    else:
        _list(server, credentials, timeout_s=timeout_s, as_json=as_json)


def _list(server: str, credentials: Credentials, *, timeout_s: float, as_json: bool) -> None:
    from understudy.cli.output import print_json, print_table, size_text
    from understudy.client.blocking import connect_as

    with connect_as(credentials, server, timeout_s=timeout_s) as connection:
        found = connection.realms(timeout_s=timeout_s)
    if as_json:
        print_json(
            [
                {"path": realm.path, "version": realm.version, "entries": realm.entries, "bytes": realm.bytes}
                for realm in found
            ]
        )
        return
    print_table(
        ("realm", "version", *_COUNTS),
        [(realm.path, f"{realm.version:,}", f"{realm.entries:,}", size_text(realm.bytes)) for realm in found],
        right=("version", *_COUNTS),
    )


def _drop(
    server: str, credentials: Credentials, path: str, *, ask: bool, timeout_s: float, as_json: bool
) -> None:
    from understudy.cli.output import counted, print_json
    from understudy.client.blocking import connect_as

    with connect_as(credentials, server, timeout_s=timeout_s) as connection:
        count = connection.count(path, timeout_s=timeout_s)  # also says if there is no such realm
        if ask:
            click.confirm(f"Drop {path} with {counted(count, 'key')}, on all nodes?", abort=True, err=True)
        lsn = connection.drop_realm(path, timeout_s=timeout_s)
    if as_json:
        print_json({"realm": path, "keys": count, "lsn": lsn})
    else:
        click.echo(f"dropped {path} with {counted(count, 'key')}, LSN {lsn}")
