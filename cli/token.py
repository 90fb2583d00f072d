"""``understudy token``: logins, and tokens that last."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.node_access import Node, node_options, password_option, read_password
from understudy.cli.options import EPILOG, data_dir_argument, json_option

if TYPE_CHECKING:
    from understudy.v1 import accounts_pb2

_KINDS = ("", "admin", "replica", "app", "login")
_DAY_S = 86_400.0


@click.group(epilog=EPILOG)
def token() -> None:
    """Log in, and issue tokens for replicas, applications and operators.

    \b
    Example:
      understudy token issue --replica --server 127.0.0.1:7850 --token @admin-token
    """


@token.command(epilog=EPILOG)
@click.option("--user", required=True, metavar="NAME", help="Who logs in.")
@password_option
@node_options
@json_option
def login(user: str, from_stdin: bool, node: Node, as_json: bool) -> None:
    """Log in with a password. Prints an access token, and a refresh token for new ones.

    \b
    Example:
      understudy token login --user ann --server 127.0.0.1:7850
    """
    from understudy.cli.output import print_facts, print_json, seconds_text
    from understudy.v1 import accounts_pb2

    request = accounts_pb2.LoginRequest(
        user=user, password=read_password(from_stdin=from_stdin, confirm=False)
    )
    tokens = node.ask(lambda stub, timeout_s: stub.Login(request, timeout=timeout_s))
    if as_json:
        print_json(
            {
                "access": tokens.access,
                "refresh": tokens.refresh,
                "access_s": tokens.access_s,
                "refresh_s": tokens.refresh_s,
                "user_id": tokens.user_id,
            }
        )
        return
    print_facts(
        (
            ("user id", tokens.user_id),
            (f"access token, good for {seconds_text(tokens.access_s)}", tokens.access),
            (f"refresh token, good for {seconds_text(tokens.refresh_s)}, once", tokens.refresh),
        )
    )


@token.command(epilog=EPILOG)
@click.option("--replica", is_flag=True, help="For a replica to follow, and nothing else.")
@click.option("--app", metavar="USER", help="For an application that acts as this user.")
@click.option("--admin", is_flag=True, help="For an operator: everything is permitted.")
@click.option("--note", default="", metavar="TEXT", help="What it is for; `token list` shows it.")
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="How long it is good for.")
@node_options
@json_option
def issue(
    replica: bool,
    app: str | None,
    admin: bool,
    note: str,
    days: float | None,
    node: Node,
    as_json: bool,
) -> None:
    """Issue a token that lasts, until it is revoked if --days is not given.

    It is shown this once: what the server keeps does not tell it.

    \b
    Example:
      understudy token issue --replica --note second --server 127.0.0.1:7850 --token @admin-token
    """
    from understudy.cli.output import print_json
    from understudy.v1 import accounts_pb2

    if [replica, app is not None, admin].count(True) != 1:
        raise click.UsageError("Give one of --replica, --app and --admin.")
    kind = "replica" if replica else "admin" if admin else "app"
    request = accounts_pb2.IssueTokenRequest(user=app or "", note=note, lifetime_s=(days or 0) * _DAY_S)
    request.kind = accounts_pb2.TokenKind.Value(f"TOKEN_{kind.upper()}")
    answer = node.ask(lambda stub, timeout_s: stub.IssueToken(request, timeout=timeout_s))
    if as_json:
        print_json({"id": answer.id, "token": answer.token})
    else:
        click.echo(answer.token)


@token.command("list", epilog=EPILOG)
@node_options
@json_option
def list_(node: Node, as_json: bool) -> None:
    """List tokens that last, and logins.

    \b
    Example:
      understudy token list --server 127.0.0.1:7850 --token @admin-token
    """
    from understudy.cli.output import print_json, print_table
    from understudy.v1 import accounts_pb2, accounts_pb2_grpc

    async def listed(
        stub: accounts_pb2_grpc.AccountsAsyncStub, timeout_s: float
    ) -> list[accounts_pb2.TokenInfo]:
        pages = stub.ListTokens(accounts_pb2.ListTokensRequest(), timeout=timeout_s)
        return [one async for page in pages for one in page.tokens]

    tokens = node.ask(listed)
    if as_json:
        print_json([_facts(one) for one in tokens])
    else:
        print_table(("id", "kind", "user", "good until", "note"), [_row(one) for one in tokens])


def _facts(one: accounts_pb2.TokenInfo) -> dict[str, object]:
    return {
        "id": one.id,
        "kind": _KINDS[one.kind],
        "user": one.user or None,
        "note": one.note,
        "created_us": one.created_us,
        "expires_us": one.expires_us or None,
    }


def _row(one: accounts_pb2.TokenInfo) -> tuple[str, ...]:
    import datetime

    until = "it is revoked"
    if one.expires_us:
        until = f"{datetime.datetime.fromtimestamp(one.expires_us / 1e6, datetime.UTC):%Y-%m-%d %H:%M}"
    return one.id, _KINDS[one.kind], one.user, until, one.note


@token.command(epilog=EPILOG)
@click.argument("token_id", metavar="ID")
@node_options
def revoke(token_id: str, node: Node) -> None:
    """Revoke a token, or end a login, by the id that `token list` shows. It counts at once.

    \b
    Example:
      understudy token revoke 0f3c5a9b7d2e4816 --server 127.0.0.1:7850 --token @admin-token
    """
    from understudy.v1 import accounts_pb2

    request = accounts_pb2.RevokeTokenRequest(id=token_id)
    node.ask(lambda stub, timeout_s: stub.RevokeToken(request, timeout=timeout_s))
    click.echo(f"revoked {token_id}")


@token.command("rotate-keys", epilog=EPILOG)
@node_options
@json_option
def rotate_keys(node: Node, as_json: bool) -> None:
    """Sign with a new key from now on. Nobody is logged out.

    \b
    Example:
      understudy token rotate-keys --server 127.0.0.1:7850 --token @admin-token
    """
    from understudy.cli.output import print_json
    from understudy.v1 import accounts_pb2

    answer = node.ask(lambda stub, s: stub.RotateKeys(accounts_pb2.RotateKeysRequest(), timeout=s))
    if as_json:
        print_json({"key": answer.key_id})
    else:
        click.echo(f"key {answer.key_id} signs from now on")


@token.command(epilog=EPILOG)
@data_dir_argument
@json_option
def admin(directory: Path, as_json: bool) -> None:
    """Make a new admin token, in the file DIR/admin-token.

    For whoever may use the primary's data directory, whether it runs or not. Earlier ones stay good until they are
    revoked.

    \b
    Example:
      understudy token admin /var/lib/understudy/data
    """
    import asyncio

    from understudy.cli.output import print_json
    from understudy.common.directory import ADMIN_TOKEN_FILE
    from understudy.common.logs import QUIET, configure_logs
    from understudy.common.portal import new_event_loop
    from understudy.primary.admin_token_renewal import renew_admin_token

    configure_logs(level=QUIET)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(renew_admin_token(directory))
    path = directory / ADMIN_TOKEN_FILE
    if as_json:
        print_json({"file": str(path)})
    else:
        click.echo(f"a new admin token is in {path}")
