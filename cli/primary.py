"""``understudy primary``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from understudy.cli.options import EPILOG, byte_size, process_options, setting
from understudy.cli.policies import check_policies


@click.command(epilog=EPILOG)
@setting("--data-dir", "data_dir", "Where the data lives; made if absent.", type=Path, metavar="DIR")
@setting(
    "--listen",
    "listen",
    "Where to serve; port 0 takes a free one. 127.0.0.1:7850 if not set.",
    metavar="HOST:PORT",
)
@setting(
    "--durability",
    "durability",
    "When a transaction is acknowledged. local if not set.",
    type=click.Choice(["local", "replica", "applied"]),
)
@setting(
    "--sync-replicas", "sync_replicas", "How many replicas that takes. 1 if not set.", type=int, metavar="N"
)
@setting(
    "--degrade-after",
    "degrade_after_s",
    "Fall to local after so long without enough replicas. Wait for them if not set.",
    type=float,
    metavar="SECONDS",
)
@setting(
    "--heal-window",
    "heal_window_s",
    "After a promotion, take only what clients bring home for so long, before new transactions. 0 if not set.",
    type=float,
    metavar="SECONDS",
)
@setting(
    "--log-floor",
    "log_floor_bytes",
    "How much log is always kept. 256MiB if not set.",
    type=byte_size,
    metavar="SIZE",
)
@setting(
    "--log-ceiling",
    "log_ceiling_bytes",
    "How much log is kept at most for replicas that are away. 8GiB if not set.",
    type=byte_size,
    metavar="SIZE",
)
@process_options("primary")
def primary(config: Path | None, log_format: str, **flags: Any) -> None:
    """Run a primary.

    It takes transactions and ships them to its replicas. Prints one line with its address when it serves.
    SIGTERM and Ctrl-C end it cleanly, a second one at once.

    \b
    Example:
      understudy primary --data-dir /var/lib/understudy/data --durability replica
    """
    from understudy.cli.grpc_engine import prefer_the_faster_engine

    prefer_the_faster_engine()
    from understudy.cli.serve import serve
    from understudy.common.settings import PrimarySettings, load_settings
    from understudy.primary.server import serving_primary

    settings = load_settings(PrimarySettings, flags, file=config)
    check_policies(settings.backup_policies, settings.data_dir)
    serve(
        "primary",
        lambda: serving_primary(settings),
        ended=lambda server: server.node.failed,
        log_format=log_format,
    )
