"""``understudy grant``: who may read, write and manage which realms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from understudy.cli.node_access import Node, node_options
from understudy.cli.options import EPILOG, json_option

if TYPE_CHECKING:
    from understudy.v1 import accounts_pb2

_LEVELS = ("none", "read", "write", "manage")


@click.group(epilog=EPILOG)
def grant() -> None:
    """Permit users to read, write and manage realms.

    A user may do everything with realms below its own id, which it calls /~/…, and nothing with others that is not
    permitted here.

    \b
    Example:
      understudy grant add --user ann --level write '/inventory/**' --server 127.0.0.1:7850 --token @admin-token
    """


@grant.command(epilog=EPILOG)
@click.argument("pattern")
@click.option("--user", metavar="NAME", help="Whom to permit it.")
@click.option("--group", metavar="NAME", help="All users of this group.")
@click.option("--anyone", is_flag=True, help="All users.")
@click.option("--level", type=click.Choice(_LEVELS[1:]), required=True, help="Each with those before it.")
@node_options
@json_option
def add(
    pattern: str,
    user: str | None,
    group: str | None,
    anyone: bool,
    level: str,
    node: Node,
    as_json: bool,
) -> None:
    """Permit something.

    PATTERN is a realm path in which * stands for any one segment, and ** at the end for any rest, also none. Given
    again with another level, that one counts.

    \b
    Example:
      understudy grant add --group staff --level read '/inventory/**' --server 127.0.0.1:7850 --token @admin-token
    """
    from understudy.cli.output import print_json
    from understudy.v1 import accounts_pb2

    if [user is not None, group is not None, anyone].count(True) != 1:
        raise click.UsageError("Give one of --user, --group and --anyone.")
    subject = accounts_pb2.Subject()
    if user is not None:
        subject.user = user
    elif group is not None:
        subject.group = group
    else:
        subject.anyone = True
    request = accounts_pb2.GrantRequest(subject=subject, pattern=pattern)
    request.level = accounts_pb2.Level.Value(f"LEVEL_{level.upper()}")
    answer = node.ask(lambda stub, timeout_s: stub.Grant(request, timeout=timeout_s))
    if as_json:
        print_json({"id": answer.id})
    else:
        click.echo(f"{_subject_text(subject)} may {level} {pattern}; permission {answer.id}")


def _subject_text(subject: accounts_pb2.Subject) -> str:
    kind = subject.WhichOneof("subject")
    return "anyone" if kind == "anyone" else f"{kind} {subject.user or subject.group}"


@grant.command(epilog=EPILOG)
@click.argument("permission", metavar="ID")
@node_options
def remove(permission: str, node: Node) -> None:
    """Take a permission back, by the id that `grant list` shows.

    \b
    Example:
      understudy grant remove 0f3c5a9b7d2e4816 --server 127.0.0.1:7850 --token @admin-token
    """
    from understudy.v1 import accounts_pb2

    request = accounts_pb2.RevokeGrantRequest(id=permission)
    node.ask(lambda stub, timeout_s: stub.RevokeGrant(request, timeout=timeout_s))
    click.echo(f"removed permission {permission}")


@grant.command(epilog=EPILOG)
@click.argument("realm", metavar="PATH")
@click.option(
    "--recovery",
    type=click.Choice(["allowed", "forbidden"]),
    required=True,
    help="Whether clients may replay their own changes over a fresh state after a client reset.",
)
@node_options
def policy(realm: str, recovery: str, node: Node) -> None:
    """Set what all clients may do with a realm, whatever else is permitted to them.

    \b
    Example:
      understudy grant policy /ledger --recovery forbidden --server 127.0.0.1:7850 --token @admin-token
    """
    from understudy.v1 import accounts_pb2

    request = accounts_pb2.SetPolicyRequest(realm=realm, recovery_forbidden=recovery == "forbidden")
    node.ask(lambda stub, timeout_s: stub.SetPolicy(request, timeout=timeout_s))
    click.echo(f"recovery of {realm} is {recovery}")


@grant.command("list", epilog=EPILOG)
@node_options
@json_option
def list_(node: Node, as_json: bool) -> None:
    """List all permissions.

    \b
    Example:
      understudy grant list --server 127.0.0.1:7850 --token @admin-token
    """
    from understudy.cli.output import print_json, print_table
    from understudy.v1 import accounts_pb2, accounts_pb2_grpc

    async def listed(
        stub: accounts_pb2_grpc.AccountsAsyncStub, timeout_s: float
    ) -> list[accounts_pb2.GrantInfo]:
        pages = stub.ListGrants(accounts_pb2.ListGrantsRequest(), timeout=timeout_s)
        return [one async for page in pages for one in page.grants]

    grants = node.ask(listed)
    if as_json:
        print_json(
            [
                {
                    "id": one.id,
                    "subject": _subject_text(one.subject),
                    "level": _LEVELS[one.level],
                    "pattern": one.pattern,
                }
                for one in grants
            ]
        )
    else:
        rows = [(one.id, _subject_text(one.subject), _LEVELS[one.level], one.pattern) for one in grants]
        print_table(("id", "subject", "level", "pattern"), rows)
