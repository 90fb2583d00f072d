"""``understudy client``: the local copies of a device, from outside."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.options import EPILOG, json_option, server_option, timeout_option

if TYPE_CHECKING:
    from understudy.client.local_store import LocalStore
    from understudy.client.realm import ResetMode
    from understudy.client.recovery import Dropped, Recovery
    from understudy.common.credentials import Credentials
    from understudy.v1 import local_pb2

_MODES = ("recover", "discard", "recover_or_discard")


@click.group(epilog=EPILOG)
def client() -> None:
    """Look at the local copies of synced realms, and reset them.

    \b
    Example:
      understudy client status local
    """


@client.command(epilog=EPILOG)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@json_option
def status(directory: Path, as_json: bool) -> None:
    """Show versions, own changes that wait, and resets of the realms in DIR.

    Also while an application has it open.

    \b
    Example:
      understudy client status local
    """
    from understudy.cli.output import print_json
    from understudy.client.local_store import LocalStore

    with LocalStore.open(directory, read_only=True) as store:
        facts = _directory_facts(store, LocalStore.is_in_use(directory))
    if as_json:
        print_json(facts)
    else:
        _tell(facts)


def _directory_facts(store: LocalStore, pid: int | None) -> dict[str, object]:
    from understudy.common.types import format_id

    return {
        "client": format_id(store.client),
        "cluster": format_id(store.met.cluster),
        "epoch": store.met.epoch,
        "in_use_by": pid,
        "realms": [
            {"realm": path, **_realm_facts(store.realm(path, create=False).row)} for path in store.paths()
        ],
    }


def _realm_facts(row: local_pb2.LocalRealm) -> dict[str, object]:
    from understudy.client.reset_table import reason_name

    return {
        "version": row.copy.version,
        "entries": row.copy.entries,
        "bytes": row.copy.bytes,
        "safe_version": row.safe_version,
        "tail_dropped": row.tail_dropped,
        "pending_changes": row.queue_count,
        "pending_bytes": row.queue_bytes,
        "loading": {"entries": row.incoming.entries, "of_about": row.incoming.expected_entries}
        if row.incoming.id
        else None,
        "reset": {
            "reason": reason_name(row.reset.reason),
            "common_version": row.reset.common.version or None,
            "attempted": row.reset.attempted or None,
            "kept": row.reset.kept or None,
            "stopped": row.reset.stopped or None,
        }
        if row.HasField("reset")
        else None,
    }


def _tell(facts: dict[str, object]) -> None:
    from understudy.cli.output import print_facts, print_table

    pid = facts["in_use_by"]
    print_facts(
        [
            ("client", str(facts["client"])),
            ("cluster", f"{facts['cluster']}, epoch {facts['epoch']}"),
            ("in use", "no" if pid is None else f"by process {pid or 'unknown'}"),
        ]
    )
    realms = facts["realms"]
    assert isinstance(realms, list)
    print_table(
        ("realm", "version", "safe up to", "keys", "own changes waiting", "state"),
        [
            (
                realm["realm"],
                f"{realm['version']:,}",
                f"{realm['safe_version']:,}",
                f"{realm['entries']:,}",
                f"{realm['pending_changes']:,}",
                _state(realm),
            )
            for realm in realms
        ],
        right=("version", "safe up to", "keys", "own changes waiting"),
    )


def _state(realm: dict[str, dict[str, object] | None]) -> str:
    reset, loading = realm["reset"], realm["loading"]
    if reset is not None:
        return f"reset: {reset['reason']}, {reset['stopped'] or reset['attempted'] or 'not begun'}"
    return f"loading, {loading['entries']:,} of about {loading['of_about']:,}" if loading is not None else ""


@client.command(epilog=EPILOG)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("realm")
@click.option("--mode", type=click.Choice(_MODES), required=True, help="What to keep of the queue.")
@server_option
@timeout_option
@json_option
def reset(
    directory: Path,
    realm: str,
    mode: ResetMode,
    server: str,
    credentials: Credentials,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Give up a local copy that is not on the server's history.

    The application must be stopped. The copy is kept in DIR/recovered/ first. Where the server takes the copy as it is,
    nothing is reset.

    \b
    Example:
      understudy client reset local /notes --mode recover --server 127.0.0.1:7850
    """
    from understudy.cli.output import print_json
    from understudy.common.logs import QUIET, configure_logs

    configure_logs(level=QUIET)
    found = _reset(directory, realm, mode, server, credentials, timeout_s)
    if as_json:
        print_json(
            {
                "reset": found is not None,
                "applied": found.applied if found else 0,
                "dropped": found.dropped if found else 0,
                "why": {reason.name: count for reason, count in _reasons(found).items()},
            }
        )
    elif found is None:
        click.echo(f"{realm} is on the server's history: nothing was reset")
    else:
        click.echo(
            f"{realm} was reset: {found.applied:,} own operations made again, {found.dropped:,} dropped; "
            f"the old copy is in {directory / 'recovered'}"
        )
        for reason, count in _reasons(found).items():
            click.echo(f"  {count:,} dropped: {reason.value}")


def _reasons(found: Recovery | None) -> Counter[Dropped]:
    changes = found.changes if found else ()
    return Counter(dropped.reason for change in changes for dropped in change.dropped)


def _reset(
    directory: Path, path: str, mode: ResetMode, server: str, credentials: Credentials, timeout_s: float
) -> Recovery | None:
    """Opens the realm until it is in step with the server; what became of its queue if that took a reset."""
    from understudy.client.local_view import LocalView
    from understudy.client.realm import Realm

    _begin_anew(directory, path)
    recoveries: list[Recovery] = []

    def after_reset(local: LocalView, fresh: LocalView, recovered: Recovery) -> None:
        recoveries.append(recovered)

    tls = credentials.tls
    with Realm.open(
        path,
        server=server,
        directory=directory,
        on_reset=mode,
        after_reset=after_reset,
        ca=tls.ca if tls else None,
        cert=tls.cert if tls else None,
        key=tls.key if tls else None,
        token=credentials.token,
    ) as realm:
        realm.wait_for_download(timeout_s)
        realm.wait_for_upload(timeout_s)
    return recoveries[-1] if recoveries else None


def _begin_anew(directory: Path, path: str) -> None:
    """Forgets what the last reset had tried: this one is no loop, somebody has asked for it."""
    from understudy.client.local_store import LocalStore
    from understudy.common.errors import UnknownRealm

    if not (directory / "data.mdb").exists():
        raise UnknownRealm(f"there are no local copies in {directory}")
    with LocalStore.open(directory) as store:
        local = store.realm(path, create=False)
        if local.row.reset.swapped:
            local.set_reset(None)
