"""The command ``understudy``: its commands, and how it ends.

A command returns, or raises one of our errors; here an error becomes one line on standard error and its exit
code. A new command gets a file of its own and a line in ``_COMMANDS``.
"""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

import click

from understudy.cli.client import client
from understudy.cli.data import delete, get, put, scan
from understudy.cli.demo import demo
from understudy.cli.export import export
from understudy.cli.fence import fence
from understudy.cli.forget import forget
from understudy.cli.grant import grant
from understudy.cli.import_ import import_
from understudy.cli.keys import keys
from understudy.cli.log import log
from understudy.cli.options import EPILOG, INTERRUPTED
from understudy.cli.output import plain
from understudy.cli.primary import primary
from understudy.cli.promote import promote
from understudy.cli.realms import realms
from understudy.cli.replica import replica
from understudy.cli.rewind import rewind
from understudy.cli.salvage import salvage
from understudy.cli.status import status
from understudy.cli.token import token
from understudy.cli.user import user
from understudy.cli.verify import verify
from understudy.common.errors import ExitCode, UnderstudyError

# gRPC's C library reads these when it is first imported, by a command. It would write notes of its own into our
# logs, such as one for each process that a server starts.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# In the order of `understudy --help`.
_COMMANDS = (
    primary,
    replica,
    promote,
    fence,
    rewind,
    salvage,
    forget,
    client,
    keys,
    user,
    grant,
    token,
    status,
    verify,
    log,
    realms,
    get,
    put,
    delete,
    scan,
    import_,
    export,
    demo,
)


class _InOrder(click.Group):
    """A group that lists its commands as they were added: running a server first, data last."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="understudy", prog_name="understudy")
def cli() -> None:
    """Continuous replication, failover and backup for a server of many LMDB realms.

    \b
    Example: a primary and its replica, then the replica takes over
      understudy primary --data-dir a
      understudy replica --data-dir b --primary 127.0.0.1:7850
      understudy promote b
    """


for _command in _COMMANDS:
    cli.add_command(_command)


def main() -> NoReturn:
    """Runs the command in ``sys.argv`` and ends the process."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a key must not fail on a terminal that can't show it
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command; returns what the process should end with, after saying on standard error why."""
    try:
        result = cli.main(arguments, prog_name="understudy", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            return INTERRUPTED
        click.echo("understudy: not done", err=True)
        return ExitCode.FAILED
    except UnderstudyError as error:
        click.echo(f"understudy: {plain(' '.join(str(error).split()))}", err=True)
        return error.exit_code
    except OSError as error:
        # A file given by name, or standard output: what the project itself opens has been translated at its edge.
        where = f"{error.filename}: " if error.filename else ""
        click.echo(plain(f"understudy: {where}{error.strerror or error}"), err=True)
        return ExitCode.FAILED
    return result if isinstance(result, int) else ExitCode.DONE
