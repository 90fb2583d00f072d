"""``understudy get``, ``put``, ``delete`` and ``scan``: single keys and ranges."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from understudy.cli.options import (
    EPILOG,
    base64_option,
    json_option,
    key_bytes,
    server_option,
    timeout_option,
    value_bytes,
)
from understudy.common.errors import OutcomeUnknown, UnderstudyError

if TYPE_CHECKING:
    from understudy.client import Operation, Server
    from understudy.common.credentials import Credentials

_ANY_KEY = b"any"


@click.command(epilog=EPILOG)
@server_option
@click.argument("realm")
@click.argument("key")
@base64_option
@timeout_option
@json_option
def get(
    server: str,
    credentials: Credentials,
    realm: str,
    key: str,
    is_base64: bool,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Print the value of a key.

    Byte for byte. On a terminal with a line end, and what is no text in quotes, with escapes. Exit code 1 if there
    is no such key.

    \b
    Example:
      understudy get --server 127.0.0.1:7850 /inventory apple
    """
    from understudy.cli.output import printable
    from understudy.client.blocking import connect_as

    raw = key_bytes(key, is_base64=is_base64)
    with connect_as(credentials, server, timeout_s=timeout_s) as connection:
        value = connection.get(realm, raw, timeout_s=timeout_s)
    if value is None:
        raise UnderstudyError(f"no key {printable(raw)} in {realm}")
    if as_json:
        from understudy.cli.json_lines import encode_pair

        click.echo(encode_pair(raw, value))
        return
    if sys.stdout.isatty():
        click.echo(_for_terminal(value))
        return
    sys.stdout.buffer.write(value)
    sys.stdout.buffer.flush()


def _for_terminal(value: bytes) -> str:
    """Text as it is, also on several lines, without its last line end; all else as :func:`printable` shows it."""
    from understudy.cli.output import printable

    text = value.removesuffix(b"\n")
    on_one_line = text.replace(b"\n", b" ").replace(b"\t", b" ")
    if printable(on_one_line, length_max=None).encode() == on_one_line:
        return text.decode()
    return printable(value, length_max=None)


@click.command(epilog=EPILOG)
@server_option
@click.argument("realm")
@click.argument("key")
@click.argument("value")
@base64_option
@timeout_option
@json_option
def put(
    server: str,
    credentials: Credentials,
    realm: str,
    key: str,
    value: str,
    is_base64: bool,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Set a key's value.

    The value - stands for standard input, byte for byte. The realm comes into being with its first key.

    \b
    Example:
      understudy put --server 127.0.0.1:7850 /inventory apple 3
      understudy put --server 127.0.0.1:7850 /inventory picture - < apple.png
    """
    from understudy.client import Put

    raw = _standard_input() if value == "-" else value_bytes(value, is_base64=is_base64)
    operation = Put(key_bytes(key, is_base64=is_base64), raw)
    with _primary(server, credentials, timeout_s) as connection:
        _commit(connection, realm, [operation], timeout_s=timeout_s, as_json=as_json)


@click.command(epilog=EPILOG)
@server_option
@click.argument("realm")
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option(
    "--range",
    "bounds",
    nargs=2,
    metavar="START END",
    help='All keys from START to before END; "" is without bound.',
)
@base64_option
@timeout_option
@json_option
def delete(
    server: str,
    credentials: Credentials,
    realm: str,
    keys: tuple[str, ...],
    bounds: tuple[str, str] | None,
    is_base64: bool,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Remove keys, or a range of them.

    All in one transaction. A key that does not exist is no error, a realm that does not exist is one.

    \b
    Example:
      understudy delete --server 127.0.0.1:7850 /inventory apple pear
      understudy delete --server 127.0.0.1:7850 /inventory --range a b
    """
    from understudy.client import Delete, DeleteRange
    from understudy.common.operations import to_protos

    if not keys and bounds is None:
        raise click.UsageError("Give keys, or --range.")
    operations: list[Operation] = [Delete(key_bytes(key, is_base64=is_base64)) for key in keys]
    if bounds is not None:
        start, end = (key_bytes(bound, is_base64=is_base64) for bound in bounds)
        operations.append(DeleteRange(start, end))
    with _primary(server, credentials, timeout_s) as connection:
        to_protos(operations)  # what is wrong with them is said first
        connection.get(realm, _ANY_KEY, timeout_s=timeout_s)  # else the transaction would make the realm
        _commit(connection, realm, operations, timeout_s=timeout_s, as_json=as_json)


@click.command(epilog=EPILOG)
@server_option
@click.argument("realm")
@click.option("--start", default="", metavar="KEY", help="The first key.")
@click.option("--end", default="", metavar="KEY", help="The first key that is left out.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many.")
@click.option("--reverse", is_flag=True, help="The last key first.")
@base64_option
@json_option
def scan(
    server: str,
    credentials: Credentials,
    realm: str,
    start: str,
    end: str,
    limit: int | None,
    reverse: bool,
    is_base64: bool,
    as_json: bool,
) -> None:
    """Print keys and values in order.

    All as of one moment, a pair to a line; what is no text in quotes, with escapes, and long values cut. What --json
    prints, whole, `import` reads.

    \b
    Example:
      understudy scan --server 127.0.0.1:7850 /inventory --start a --end b --json
    """
    from understudy.cli.json_lines import encode_pair
    from understudy.client.blocking import connect_as

    first, behind = key_bytes(start, is_base64=is_base64), key_bytes(end, is_base64=is_base64)
    with connect_as(credentials, server) as connection:
        for key, value in connection.scan(realm, start=first, end=behind, limit=limit, reverse=reverse):
            click.echo(encode_pair(key, value) if as_json else _line(key, value))


def _line(key: bytes, value: bytes) -> str:
    from understudy.cli.output import printable

    return f"{printable(key, length_max=None)}\t{printable(value)}"


@contextlib.contextmanager
def _primary(server: str, credentials: Credentials, timeout_s: float) -> Iterator[Server]:
    from understudy.cli.writing import check_primary
    from understudy.client.blocking import connect_as

    with connect_as(credentials, server, timeout_s=timeout_s) as connection:
        check_primary(connection.status(timeout_s=timeout_s), server)
        yield connection


def _commit(
    connection: Server,
    realm: str,
    operations: list[Operation],
    *,
    timeout_s: float,
    as_json: bool,
) -> None:
    from understudy.cli.output import print_json
    from understudy.cli.writing import unanswered

    try:
        receipt = connection.commit(realm, operations, timeout_s=timeout_s)
    except OutcomeUnknown:
        raise unanswered(connection, realm, timeout_s) from None
    if as_json:
        print_json(
            {
                "realm": receipt.realm,
                "version": receipt.version,
                "lsn": receipt.lsn,
                "digest": receipt.digest.hex(),
            }
        )
    else:
        click.echo(f"{receipt.realm} is at version {receipt.version}, LSN {receipt.lsn}")


def _standard_input() -> bytes:
    """All of it, up to just beyond what a transaction may hold: the check for that says the rest."""
    from understudy.common.types import TRANSACTION_BYTES_MAX

    return sys.stdin.buffer.read(TRANSACTION_BYTES_MAX + 1)
