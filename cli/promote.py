"""``understudy promote``."""

from __future__ import annotations

from pathlib import Path

import click

from understudy.cli.options import EPILOG, data_dir_argument, json_option


@click.command(epilog=EPILOG)
@data_dir_argument
@click.option(
    "--serve", is_flag=True, help="The replica's process goes on as the primary, behind its address."
)
@json_option
def promote(directory: Path, serve: bool, as_json: bool) -> None:
    """Make a replica's directory a primary's.

    Takes about a second, whatever its size. A replica that runs is asked to stop following, and ends. Then start the
    primary. Run again after it was cut off, promote goes on where it was.

    With --serve the replica has to run, and serves as the primary when this command ends. It takes --durability and
    the like from where `understudy primary` would, in the replica's environment and file. To be started again, it
    needs `understudy primary`.

    \b
    Example:
      understudy promote /var/lib/understudy/data
      understudy primary --data-dir /var/lib/understudy/data
    """
    import asyncio

    from understudy.cli.output import plain, print_json, seconds_text
    from understudy.common.logs import QUIET, configure_logs
    from understudy.common.portal import new_event_loop
    from understudy.replica.promote import promote_directory

    configure_logs(level=QUIET)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        promotion = runner.run(promote_directory(directory, serve=serve))
    for warning in promotion.warnings:
        click.echo(f"warning: {plain(warning)}", err=True)
    if as_json:
        print_json(
            {
                "epoch": promotion.epoch,
                "lsn": promotion.lsn,
                "digest": promotion.digest.hex(),
                "seconds": round(promotion.seconds, 3),
                "durability": promotion.durability or None,
            }
        )
        return
    click.echo(
        f"promoted in {seconds_text(promotion.seconds)}: epoch {promotion.epoch}, at LSN {promotion.lsn}, "
        f"digest {promotion.digest.hex()}"
    )
    start = f"understudy primary --data-dir {directory}, and the other options of the old primary"
    if serve:
        click.echo(f"it serves, at durability {promotion.durability}; should it end, start it with: {start}")
    else:
        click.echo(f"start it with: {start}")
    click.echo(f"it takes the old one's tokens; `understudy token admin {directory}` makes one for operators")
