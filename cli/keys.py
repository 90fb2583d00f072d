"""``understudy keys``: certificates for a quick start with TLS."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.options import EPILOG, data_dir_argument, json_option

if TYPE_CHECKING:
    from cryptography import x509

_HOST_HELP = "A name or an IP address of the servers; again for each."


@click.group(epilog=EPILOG)
def keys() -> None:
    """Make certificates for TLS.

    \b
    Example:
      understudy keys init keys --host db1.example.org --host db2.example.org
    """


@keys.command(epilog=EPILOG)
@data_dir_argument
@click.option("--host", "hosts", multiple=True, required=True, metavar="NAME", help=_HOST_HELP)
@json_option
def init(directory: Path, hosts: tuple[str, ...], as_json: bool) -> None:
    """Make a private CA, and certificates for servers and replicas.

    DIR must be absent or empty. This machine is among the servers' names without being named. The CA is valid for ten
    years, its certificates for 825 days.

    \b
    Example:
      understudy keys init keys --host db1.example.org --host 192.0.2.2
    """
    from understudy.common.certificate_authority import create_keys

    _tell(directory, create_keys(directory, hosts), hosts[0], as_json=as_json)


@keys.command(epilog=EPILOG)
@data_dir_argument
@click.option("--host", "hosts", multiple=True, metavar="NAME", help=f"{_HOST_HELP} As before if not set.")
@json_option
def renew(directory: Path, hosts: tuple[str, ...], as_json: bool) -> None:
    """Sign the certificates of servers and replicas anew.

    Keys and CA stay. A running server takes up server.pem by itself once it is copied there. If a key has come into
    wrong hands, make a new CA with `keys init` in another directory instead.

    \b
    Example:
      understudy keys renew keys
    """
    from understudy.common.certificate_authority import renew_keys

    _tell(directory, renew_keys(directory, hosts), hosts[0] if hosts else None, as_json=as_json)


def _tell(directory: Path, server: x509.Certificate, host: str | None, *, as_json: bool) -> None:
    from understudy.cli.output import print_json
    from understudy.common.certificate_authority import KeyFiles
    from understudy.common.certificates import names_of

    files = KeyFiles(directory)
    names = names_of(server)[:-1]  # the last is the common name
    until = server.not_valid_after_utc
    if as_json:
        pairs = {"ca": files.ca, "server": files.server, "replica": files.replica}
        paths = {
            f"{name}{suffix}": str(path)
            for name, pair in pairs.items()
            for suffix, path in zip(("", "_key"), pair, strict=True)
        }
        print_json({"hosts": list(names), "expires": until.isoformat(), **paths})
        return
    ca, ca_key = files.ca
    click.echo(f"{ca}: who may have signed certificates; for all, servers and clients")
    click.echo(f"{ca_key}: signs certificates; for `keys renew`, best kept off all servers")
    click.echo(f"{' '.join(map(str, files.server))}: for servers at {', '.join(names)}")
    click.echo(f"{' '.join(map(str, files.replica))}: for replicas, to show their primary")
    click.echo(f"valid until {until:%Y-%m-%d}; before that: understudy keys renew {directory}")
    if host is not None:
        _tell_start(files.directory, host)


def _tell_start(directory: Path, host: str) -> None:
    from understudy.common.certificate_authority import KeyFiles

    files = KeyFiles(directory)
    address = f"[{host}]:7850" if ":" in host else f"{host}:7850"
    ca, (cert, key), (own, own_key) = files.ca[0], files.server, files.replica
    click.echo(
        "start with:\n"
        f"  understudy primary --data-dir DIR --listen {address} --tls-cert {cert} --tls-key {key} --tls-ca {ca}\n"
        f"  understudy replica --data-dir DIR --primary {address} --ca {ca} --cert {own} --cert-key {own_key}"
    )
