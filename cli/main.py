"""The command ``understudy``: its commands, and how it ends.

A command returns, or raises one of our errors; here an error becomes one line on standard error and its exit
code. A new command gets a line in ``_MODULES``.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import NoReturn

import click

from understudy.cli.options import EPILOG, INTERRUPTED
from understudy.cli.output import plain
from understudy.common.errors import ExitCode, UnderstudyError

# gRPC's C library reads these when it is first imported, by a command. It would write notes of its own into our
# logs, such as one for each process that a server starts.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# The modules of the commands, in the order of `understudy --help`: running a server first, data last. Only what is
# called is loaded: all together take longer than `promote` does its work.
_MODULES = {
    "primary": "primary",
    "replica": "replica",
    "promote": "promote",
    "fence": "fence",
    "freeze": "freeze",
    "thaw": "freeze",
    "backup": "backup",
    "backups": "backups",
    "restore": "restore",
    "rewind": "rewind",
    "salvage": "salvage",
    "forget": "forget",
    "client": "client",
    "keys": "keys",
    "user": "user",
    "grant": "grant",
    "token": "token",
    "status": "status",
    "verify": "verify",
    "log": "log",
    "realms": "realms",
    "get": "data",
    "put": "data",
    "delete": "data",
    "scan": "data",
    "import": "import_",
    "export": "export",
    "demo": "demo",
}


class _Commands(click.Group):
    """The commands of :data:`_MODULES`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return None
        module = importlib.import_module(f"understudy.cli.{_MODULES[cmd_name]}")
        command: click.Command = getattr(module, "import_" if cmd_name == "import" else cmd_name)
        return command


@click.group(cls=_Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="understudy", prog_name="understudy")
def cli() -> None:
    """Continuous replication, failover and backup for a server of many LMDB realms.

    \b
    Example: a primary and its replica, then the replica takes over
      understudy primary --data-dir a
      understudy replica --data-dir b --primary 127.0.0.1:7850
      understudy promote b
    """


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
