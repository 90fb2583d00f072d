"""``understudy export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.options import EPILOG, server_option

if TYPE_CHECKING:
    from understudy.cli.sinks import Sink
    from understudy.common.credentials import Credentials


@click.command(epilog=EPILOG)
@server_option
@click.argument("realm")
@click.argument("file", metavar="[FILE.jsonl|-]", required=False)
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write a tree of files instead; DIR must be absent or empty.",
)
@click.option("--force", is_flag=True, help="Replace FILE.jsonl if it is there.")
def export(
    server: str,
    credentials: Credentials,
    realm: str,
    file: str | None,
    directory: Path | None,
    force: bool,
) -> None:
    """Write out a realm's keys and values.

    All as of one moment, as JSON lines or as a tree of files. Standard output if no file is given. A file or
    directory appears under its name only once it is complete.

    \b
    Example:
      understudy export --server 127.0.0.1:7850 /inventory inventory.jsonl
      understudy export --server 127.0.0.1:7850 /pages --directory pages
    """
    from understudy.cli.output import Progress, counted
    from understudy.client.blocking import connect_as

    if file is not None and directory is not None:
        raise click.UsageError("Give either a file or --directory.")
    if force and (file is None or file == "-"):
        raise click.UsageError("--force is for a file.")
    sink = _sink(file, directory, force=force)
    count = 0
    with connect_as(credentials, server) as connection, Progress("exporting", unit="keys") as progress:
        # Counted a moment before the scan, so it only guides the eye.
        total = connection.count(realm) if progress.is_watched else None
        with sink:
            for key, value in connection.scan(realm):
                sink.write(key, value)
                count += 1
                progress.update(count, total)
    click.echo(f"exported {counted(count, 'key')}", err=True)


def _sink(file: str | None, directory: Path | None, *, force: bool) -> Sink:
    from understudy.cli.sinks import FileSink, StandardOutput, TreeSink

    if directory is not None:
        return TreeSink(directory)
    return StandardOutput() if file is None or file == "-" else FileSink(Path(file), replace=force)
