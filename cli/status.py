"""``understudy status``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.options import EPILOG, json_option, server_option, timeout_option

if TYPE_CHECKING:
    from understudy.common.credentials import Credentials
    from understudy.v1 import admin_pb2

_ACCESS = {
    "protected": "protected mode: only peers on this machine, who may do everything",
    "tokens": "only peers on this machine, with tokens",
    "tls": "TLS, with tokens",
}
_FOR_OPERATORS = (
    "node",
    "lsn",
    "durable_lsn",
    "committed_lsn",
    "checkpoint_lsn",
    "digest",
    "realms",
    "replicas",
    "upstream",
    "warnings",
    "healing",
    "backups",
)


@click.command(epilog=EPILOG)
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@server_option(required=False, help_text="A running node, instead of DIR.")
@timeout_option
@json_option
def status(
    directory: Path | None,
    server: str | None,
    credentials: Credentials,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Show position, replicas, lag and warnings.

    Of the node that has DIR open, if one has; otherwise what DIR holds. Of backups that is when each policy last
    succeeded and failed: when it is due and how far the log is shipped, a running node tells.

    \b
    Example:
      understudy status --server 127.0.0.1:7850
      understudy status /var/lib/understudy/data --json
    """
    import asyncio

    from understudy.cli.node_status import directory_status, server_status
    from understudy.cli.output import print_json
    from understudy.common.logs import QUIET, configure_logs
    from understudy.common.portal import new_event_loop

    if (directory is None) == (server is None):
        raise click.UsageError("Give either a directory or --server.")
    configure_logs(level=QUIET)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        if server is not None:
            found, is_running = runner.run(server_status(server, credentials, timeout_s=timeout_s)), True
        else:
            assert directory is not None
            found, is_running = runner.run(directory_status(directory, timeout_s=timeout_s))
    if as_json:
        print_json(_facts(found, is_running=is_running))
    else:
        _tell(found, is_running=is_running)


def _facts(found: admin_pb2.StatusResponse, *, is_running: bool) -> dict[str, object]:
    """The keys, in this order, are contract; new ones go to the end. What is not told to a user is null."""
    from understudy.common.types import format_id

    facts = {
        "role": found.role,
        "cluster": format_id(found.cluster),
        "node": format_id(found.node),
        "epoch": found.epoch,
        "lsn": found.lsn,
        "durable_lsn": found.durable_lsn,
        "committed_lsn": found.committed_lsn,
        "checkpoint_lsn": found.checkpoint_lsn,
        "digest": found.digest.hex(),
        "realms": found.realms,
        "durability": found.durability or None,
        "replicas": [_replica_facts(replica) for replica in found.replicas],
        "upstream": _upstream_facts(found.upstream) if found.HasField("upstream") else None,
        "warnings": list(found.warnings),
        "version": found.version,
        "running": is_running,
        "access": found.access or None,
        "healing": _healing_facts(found.healing),
        "backups": [_backup_facts(policy) for policy in found.backups],
    }
    return facts if _is_all(found) else facts | dict.fromkeys(_FOR_OPERATORS)


def _is_all(found: admin_pb2.StatusResponse) -> bool:
    """Whether this is what operators are told: a node's id is none of a user's business."""
    return bool(found.node)


def _healing_facts(healing: admin_pb2.Healing) -> dict[str, object] | None:
    from understudy.cli.output import homecoming_facts

    home = healing.homecoming
    if not healing.seconds_left and not home.ByteSize():
        return None
    return {
        "seconds_left": round(healing.seconds_left, 3),
        "clients": healing.clients,
        **homecoming_facts(home),
    }


def _replica_facts(replica: admin_pb2.ReplicaStatus) -> dict[str, object]:
    return {
        "id": replica.id,
        "connected": replica.connected,
        "state": replica.state,
        "durable_lsn": replica.durable_lsn,
        "applied_lsn": replica.applied_lsn,
        "lag_entries": replica.lag_entries,
        "lag_bytes": replica.lag_bytes,
        "lag_seconds": round(replica.lag_seconds, 6),
    }


def _upstream_facts(upstream: admin_pb2.UpstreamStatus) -> dict[str, object]:
    return {
        "address": upstream.address,
        "connected": upstream.connected,
        "lag_entries": upstream.lag_entries,
        "lag_bytes": upstream.lag_bytes,
        "lag_seconds": round(upstream.lag_seconds, 6),
    }


def _backup_facts(policy: admin_pb2.BackupStatus) -> dict[str, object]:
    from understudy.cli.output import moment

    return {
        "policy": policy.policy,
        "running": policy.running,
        "next": moment(policy.next_s),
        "last_success": moment(policy.last_success_s),
        "last_failure": moment(policy.last_failure_s),
        "last_error": policy.last_error or None,
        "last_proven": moment(policy.last_proven_s),
        "repositories": [
            {
                "url": repository.url,
                "shipped_lsn": repository.shipped_lsn,
                "problem": repository.problem or None,
                "gap": repository.gap or None,
            }
            for repository in policy.repositories
        ],
        "run": policy.run or None,
    }


def _tell_backups(policies: Iterable[admin_pb2.BackupStatus], lsn: int) -> None:
    from understudy.cli.output import moment, print_table
    from understudy.v1 import admin_pb2

    print_table(
        ("backup", "last success", "last failure", "next", "log shipped to", "entries behind"),
        [
            (
                policy.policy + (f" (run {policy.run} under way)" if policy.run else ""),
                moment(policy.last_success_s) or "never",
                moment(policy.last_failure_s) or "never",
                moment(policy.next_s) or "when asked for",
                repository.url,
                f"{max(lsn - repository.shipped_lsn, 0):,}",
            )
            for policy in policies
            for repository in policy.repositories or [admin_pb2.RepositoryStatus(url="-", shipped_lsn=lsn)]
        ],
        right=("entries behind",),
    )


def _tell_past_backups(policies: Iterable[admin_pb2.BackupStatus]) -> None:
    """Of a node that does not run, which knows nothing else of them."""
    from understudy.cli.output import moment, print_table

    print_table(
        ("backup", "last success", "last failure"),
        [
            (
                policy.policy,
                moment(policy.last_success_s) or "never",
                moment(policy.last_failure_s) or "never",
            )
            for policy in policies
        ],
    )


def _tell(found: admin_pb2.StatusResponse, *, is_running: bool) -> None:
    from understudy.cli.output import plain, print_facts
    from understudy.common.types import format_id

    facts = [
        ("role", found.role + ("" if is_running else ", not running")),
        ("cluster", format_id(found.cluster)),
        ("epoch", str(found.epoch)),
    ]
    if _is_all(found):
        facts[2:2] = [("node", format_id(found.node))]
        facts += [
            (
                "LSN",
                f"{found.lsn:,} (durable {found.durable_lsn:,}, committed {found.committed_lsn:,}, "
                f"checkpoint {found.checkpoint_lsn:,})",
            ),
            ("digest", found.digest.hex()),
            ("realms", f"{found.realms:,}"),
        ]
    if found.durability:
        facts.append(("durability", found.durability))
    if found.access:
        facts.append(("access", _ACCESS.get(found.access, found.access)))
    if found.HasField("upstream"):
        facts.append(("primary", _upstream_text(found.upstream)))
    facts += _healing(found.healing)
    print_facts(facts)
    if found.replicas:
        _tell_replicas(found.replicas)
    if found.backups and is_running:
        _tell_backups(found.backups, found.durable_lsn)
    elif found.backups:
        _tell_past_backups(found.backups)
    for warning in found.warnings:
        click.echo(f"warning: {plain(warning)}")


def _upstream_text(up: admin_pb2.UpstreamStatus) -> str:
    from understudy.cli.output import counted, seconds_text, size_text

    return (
        f"{up.address or 'unknown'}, {'connected' if up.connected else 'not connected'}, behind by "
        f"{counted(up.lag_entries, 'entry', 'entries')}, {size_text(up.lag_bytes)}, "
        f"{seconds_text(up.lag_seconds)}"
    )


def _tell_replicas(replicas: Iterable[admin_pb2.ReplicaStatus]) -> None:
    from understudy.cli.output import print_table, seconds_text, size_text

    print_table(
        ("replica", "state", "durable", "applied", "entries behind", "bytes behind", "time behind"),
        [
            (
                replica.id,
                replica.state,
                f"{replica.durable_lsn:,}",
                f"{replica.applied_lsn:,}",
                f"{replica.lag_entries:,}",
                size_text(replica.lag_bytes),
                seconds_text(replica.lag_seconds),
            )
            for replica in replicas
        ],
        right=("durable", "applied", "entries behind", "bytes behind", "time behind"),
    )


def _healing(healing: admin_pb2.Healing) -> list[tuple[str, str]]:
    """What came home, and whether new transactions still wait for more."""
    from understudy.cli.output import counted

    home = healing.homecoming
    told = []
    if healing.seconds_left:
        told.append(("healing", f"new transactions wait for {healing.seconds_left:.0f} s more"))
    if home.appended or home.renewed or home.refused:
        told.append(
            (
                "came home",
                f"{home.appended:,} changes as they were and {home.renewed:,} as new ones, from "
                f"{counted(healing.clients, 'client', 'clients')}; {home.refused:,} refused",
            )
        )
    return told
