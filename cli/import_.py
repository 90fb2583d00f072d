"""``understudy import``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.options import EPILOG, json_option, server_option

if TYPE_CHECKING:
    from understudy.cli.loader import Loaded
    from understudy.common.credentials import Credentials

BATCH_PAIRS = 1_000  # in one transaction, unless they are large


@click.command("import", epilog=EPILOG)
@server_option
@click.argument("realm")
@click.argument("source", metavar="FILE.jsonl|DIR|-")
@click.option(
    "--batch",
    "batch_pairs",
    type=click.IntRange(1, 100_000),
    default=BATCH_PAIRS,
    show_default=True,
    metavar="N",
    help="At most so many keys in one transaction; fewer where they are large.",
)
@click.option(
    "--from-line",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Begin with this line, to go on after a broken one.",
)
@json_option
def import_(
    server: str,
    credentials: Credentials,
    realm: str,
    source: str,
    batch_pairs: int,
    from_line: int,
    as_json: bool,
) -> None:
    """Put keys and values into a realm.

    From a file of JSON lines, a directory tree, or JSON lines on standard input. A line is {"key": "…", "value":
    "…"}, with key_base64 or value_base64 for what is no text. Of a directory, each file's path is a key, its bytes
    the value. May be repeated.

    \b
    Example:
      understudy import --server 127.0.0.1:7850 /inventory inventory.jsonl
    """
    from understudy.cli import pairs
    from understudy.cli.loader import load
    from understudy.common.errors import UsageError
    from understudy.common.types import check_realm_path

    check_realm_path(realm)
    path = Path(source)
    if source == "-":
        found = pairs.lines(sys.stdin.buffer, "standard input", from_line=from_line)
    elif path.is_dir():
        if from_line != 1:
            raise UsageError(f"{path} is a directory and has no lines", remedy="leave --from-line out")
        found = pairs.tree(path)
    else:
        found = pairs.file_lines(path, from_line=from_line)
    _tell(load(server, credentials, realm, found, batch_pairs=batch_pairs), as_json=as_json)


def _tell(loaded: Loaded, *, as_json: bool) -> None:
    from understudy.cli.output import counted, print_json

    if as_json:
        print_json({"keys": loaded.keys, "transactions": loaded.transactions, "lsn": loaded.lsn})
    else:
        click.echo(f"imported {counted(loaded.keys, 'key')} in {counted(loaded.transactions, 'transaction')}")
