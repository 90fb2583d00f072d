"""``understudy replica``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from understudy.cli.options import EPILOG, byte_size, credential_settings, process_options, setting
from understudy.cli.policies import check_policies


@click.command(epilog=EPILOG)
@setting("--data-dir", "data_dir", "Where the copy lives; made if absent.", type=Path, metavar="DIR")
@setting(
    "--primary",
    "primary",
    "Whom to follow; several with commas: the one that is primary.",
    metavar="HOST:PORT",
)
@setting(
    "--listen",
    "listen",
    "Where to serve; port 0 takes a free one. 127.0.0.1:7851 if not set.",
    metavar="HOST:PORT",
)
@setting(
    "--id",
    "id",
    "Its name at the primary, its own among all replicas. The host's if not set.",
    metavar="NAME",
)
@setting(
    "--bootstrap-rate",
    "bootstrap_rate",
    "Bytes a second that a first copy may take. All if not set.",
    type=byte_size,
    metavar="SIZE",
)
@setting(
    "--log-floor",
    "log_floor_bytes",
    "How much log is always kept. 256MiB if not set.",
    type=byte_size,
    metavar="SIZE",
)
@credential_settings
@process_options("replica")
def replica(config: Path | None, log_format: str, **flags: Any) -> None:
    """Run a replica.

    It follows a primary and can take its place. Prints one line with its address when it serves; `understudy
    status` says how far its copy is. Ends by itself, with exit code 0, once `understudy promote` has made its
    directory a primary's; or goes on as that primary, if it is told `--serve`.

    \b
    Example:
      understudy replica --data-dir /var/lib/understudy/data --primary 192.0.2.1:7850
    """
    from understudy.cli.grpc_engine import prefer_the_faster_engine

    prefer_the_faster_engine()
    from understudy.cli.serve import serve
    from understudy.cli.succession import succession
    from understudy.common.settings import ReplicaSettings, load_settings
    from understudy.replica.server import serving_replica

    settings = load_settings(ReplicaSettings, flags, file=config)
    check_policies(settings.backup_policies, settings.data_dir)
    succeeding = succession(settings, config)
    ended_by_itself = serve(
        "replica",
        lambda: serving_replica(settings, succeeding),
        ended=lambda server: server.node.ended,
        log_format=log_format,
    )
    if ended_by_itself:
        start = f"understudy primary --data-dir {settings.data_dir}"
        click.echo(f"promoted: {settings.data_dir} is a primary's now; start it with: {start}", err=True)
