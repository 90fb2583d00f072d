"""``understudy user``: who may log in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from understudy.cli.node_access import Node, node_options, password_option, read_password
from understudy.cli.options import EPILOG, json_option

if TYPE_CHECKING:
    from understudy.v1 import accounts_pb2


@click.group(epilog=EPILOG)
def user() -> None:
    """Make users, and change them.

    With the first one, a server stops to take calls of everybody on its machine: it asks for tokens from then on,
    also once there is no user any more.

    \b
    Example:
      understudy user add ann --group staff --data-dir /var/lib/understudy/data
    """


_group_option = click.option(
    "--group", "groups", multiple=True, metavar="GROUP", help="Again for each group."
)


@user.command(epilog=EPILOG)
@click.argument("name")
@_group_option
@password_option
@click.option("--no-password", is_flag=True, help="No login with a password; for an application's token.")
@node_options
@json_option
def add(
    name: str, groups: tuple[str, ...], from_stdin: bool, no_password: bool, node: Node, as_json: bool
) -> None:
    """Make a user. Asks for the password.

    Prints the user's id, under which its own realms are: to this user, /~/notes is /ID/notes.

    \b
    Example:
      understudy user add ann --group staff --server 127.0.0.1:7850 --token @admin-token
    """
    from understudy.cli.output import print_json
    from understudy.v1 import accounts_pb2

    password = "" if no_password else read_password(from_stdin=from_stdin, confirm=True)
    request = accounts_pb2.PutUserRequest(name=name, password=password, groups=groups, must_be_new=True)
    answer = node.ask(lambda stub, timeout_s: stub.PutUser(request, timeout=timeout_s))
    if as_json:
        print_json({"name": name, "id": answer.id})
    else:
        click.echo(f"added user {name}, id {answer.id}")


@user.command("set", epilog=EPILOG)
@click.argument("name")
@_group_option
@click.option("--disabled", is_flag=True, help="No login, and no token of this user is taken.")
@node_options
def set_(name: str, groups: tuple[str, ...], disabled: bool, node: Node) -> None:
    """Set a user's groups, and whether it is disabled, anew.

    \b
    Example:
      understudy user set ann --group staff --group buyers --server 127.0.0.1:7850 --token @admin-token
    """
    from understudy.v1 import accounts_pb2

    request = accounts_pb2.PutUserRequest(name=name, groups=groups, disabled=disabled)
    node.ask(lambda stub, timeout_s: stub.PutUser(request, timeout=timeout_s))
    click.echo(f"user {name}: groups {', '.join(sorted(set(groups))) or 'none'}{', disabled' * disabled}")


@user.command(epilog=EPILOG)
@click.argument("name")
@node_options
def remove(name: str, node: Node) -> None:
    """Remove a user with its permissions, tokens and logins. Its realms stay.

    \b
    Example:
      understudy user remove ann --server 127.0.0.1:7850 --token @admin-token
    """
    from understudy.v1 import accounts_pb2

    request = accounts_pb2.RemoveUserRequest(name=name)
    node.ask(lambda stub, timeout_s: stub.RemoveUser(request, timeout=timeout_s))
    click.echo(f"removed user {name}")


@user.command("list", epilog=EPILOG)
@node_options
@json_option
def list_(node: Node, as_json: bool) -> None:
    """List all users.

    \b
    Example:
      understudy user list --server 127.0.0.1:7850 --token @admin-token
    """
    from understudy.cli.output import print_json, print_table
    from understudy.v1 import accounts_pb2, accounts_pb2_grpc

    async def listed(stub: accounts_pb2_grpc.AccountsAsyncStub, timeout_s: float) -> list[accounts_pb2.User]:
        pages = stub.ListUsers(accounts_pb2.ListUsersRequest(), timeout=timeout_s)
        return [one async for page in pages for one in page.users]

    users = node.ask(listed)
    if as_json:
        print_json([_facts(one) for one in users])
    else:
        print_table(("name", "id", "groups", ""), [_row(one) for one in users])


def _facts(one: accounts_pb2.User) -> dict[str, object]:
    return {
        "name": one.name,
        "id": one.id,
        "groups": list(one.groups),
        "disabled": one.disabled,
        "has_password": one.has_password,
        "created_us": one.created_us,
    }


def _row(one: accounts_pb2.User) -> tuple[str, ...]:
    notes = ["disabled"] * one.disabled + ["no password"] * (not one.has_password)
    return one.name, one.id, ", ".join(one.groups), ", ".join(notes)


@user.command(epilog=EPILOG)
@click.argument("name")
@password_option
@click.option(
    "--own", is_flag=True, help="Of the user whose token is shown: asks for the old password first."
)
@node_options
def password(name: str, from_stdin: bool, own: bool, node: Node) -> None:
    """Change a password. All logins of that user end.

    With --own and --password-stdin, the old password is the first line, the new one the second.

    \b
    Example:
      understudy user password ann --server 127.0.0.1:7850 --token @admin-token
    """
    from understudy.v1 import accounts_pb2

    old = read_password(from_stdin=from_stdin, confirm=False) if own else ""
    new = read_password(from_stdin=from_stdin, confirm=True)
    request = accounts_pb2.SetPasswordRequest(name=name, password=new, old_password=old)
    node.ask(lambda stub, timeout_s: stub.SetPassword(request, timeout=timeout_s))
    click.echo(f"changed the password of {name}")
