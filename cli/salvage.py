"""``understudy salvage``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.options import EPILOG, json_option, server_option
from understudy.common.errors import ExitCode

if TYPE_CHECKING:
    from understudy.common.credentials import Credentials
    from understudy.v1 import sync_pb2

_REMEDY = "give the file as `understudy rewind` left it in set-aside/"


@click.command(epilog=EPILOG)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@server_option
@json_option
def salvage(file: Path, server: str, credentials: Credentials, as_json: bool) -> int:
    """Bring home what only an old primary had.

    FILE is the export that `understudy rewind` left in set-aside/. Changes that the server lacks are applied: as they
    were where their realm has not gone on since, else as new changes. What it has already is passed over, so this can
    be repeated. Changes of users, permissions and tokens are left out: make those again.

    \b
    Example:
      understudy salvage data/set-aside/entries-101-107-9f86d081884c.jsonl --server 127.0.0.1:7850
    """
    import asyncio

    from understudy.cli.output import homecoming_facts, print_json
    from understudy.common.portal import new_event_loop

    left_out = _check(file)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        found = runner.run(_send(file, server, credentials))
    if as_json:
        print_json(homecoming_facts(found) | {"left_out": left_out})
    else:
        _tell(found, left_out)
    return ExitCode.FAILED if found.refused else ExitCode.DONE


def _tell(found: sync_pb2.Homecoming, left_out: int) -> None:
    from understudy.cli.output import plain

    click.echo(
        f"{found.appended:,} changes came home as they were, {found.renewed:,} as new ones; "
        f"the server had {found.known:,}"
    )
    if left_out:
        click.echo(f"{left_out:,} changes of users, permissions and tokens were left out: make those again")
    if found.refused:
        click.echo(f"{found.refused:,} were refused:", err=True)
    for problem in found.problems:
        click.echo(f"  {plain(problem)}", err=True)


async def _send(file: Path, server: str, credentials: Credentials) -> sync_pb2.Homecoming:
    from understudy.client.direct import aconnect_as

    async with aconnect_as(credentials, server) as connected:
        return await connected.salvage(_changes(file))


def _check(file: Path) -> int:
    """Reads the file through before anything is sent: a line that is none must not break off a call half done.

    Returns how many changes are left out.
    """
    from understudy.common.entry_json import is_system_change
    from understudy.common.errors import UsageError

    if file.exists() and not file.is_file():
        raise UsageError(
            f"{file} is no regular file, and has to be read twice", remedy="write it to one first"
        )
    for _ in _changes(file):
        pass
    with open(file, "rb") as lines:
        return sum(map(is_system_change, lines))


def _changes(file: Path) -> Iterator[tuple[bytes, bytes]]:
    from understudy.common.entry_json import LINE_BYTES_MAX, signed_change
    from understudy.common.errors import BadImport

    number = 0
    with open(file, "rb") as lines:
        while line := lines.readline(LINE_BYTES_MAX + 1):
            number += 1
            try:
                found = signed_change(line)
            except ValueError as error:
                raise BadImport(f"{file}, line {number}: {error}", remedy=_REMEDY) from None
            if found is not None:
                yield found
