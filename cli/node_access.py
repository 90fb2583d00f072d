"""How commands reach the accounts of a server: by its address, or by the Unix socket in its data directory."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from understudy.cli.options import server_option, timeout_option
from understudy.common.errors import PeerUnreachable, UsageError

if TYPE_CHECKING:
    from understudy.common.credentials import Credentials
    from understudy.v1 import accounts_pb2_grpc

_T = TypeVar("_T")


def node_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--server`` with what to show it, or ``--data-dir``, and ``--timeout``; together as ``node``."""
    import functools

    @functools.wraps(function)
    def with_node(
        *arguments: Any,
        server: str | None,
        data_dir: Path | None,
        credentials: Credentials,
        timeout_s: float,
        **options: Any,
    ) -> Any:
        if (server is None) == (data_dir is None):
            raise click.UsageError("Give either --server or --data-dir.")
        return function(*arguments, node=Node(server, data_dir, credentials, timeout_s), **options)

    decorated: Callable[..., Any] = server_option(required=False, help_text="The primary.")(
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path),
            metavar="DIR",
            envvar="UNDERSTUDY_DATA_DIR",
            help="Of a primary that runs on this machine; instead of --server, and without a token.",
        )(timeout_option(with_node))
    )
    return decorated


class Node:
    """A running node, as the command line names it."""

    def __init__(
        self, server: str | None, data_dir: Path | None, credentials: Credentials, timeout_s: float
    ) -> None:
        self.name = server or str(data_dir)
        self._server = server
        self._data_dir = data_dir
        self._credentials = credentials
        self._timeout_s = timeout_s

    def ask(self, call: Callable[[accounts_pb2_grpc.AccountsAsyncStub, float], Awaitable[_T]]) -> _T:
        """What ``call`` returns, given the service and the seconds that it may take.

        Raises:
            UnderstudyError: of the node, or on the way to it.
        """
        import asyncio

        from understudy.common.portal import new_event_loop

        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(self._ask(call))

    async def _ask(self, call: Callable[[accounts_pb2_grpc.AccountsAsyncStub, float], Awaitable[_T]]) -> _T:
        from understudy.common.addresses import split_address
        from understudy.common.credentials import ANONYMOUS
        from understudy.common.directory import CONTROL_SOCKET
        from understudy.common.rpc import short_socket_path

        if self._server is not None:
            split_address(self._server)
            return await self._ask_at(self._server, self._credentials, call)
        assert self._data_dir is not None
        try:
            with short_socket_path(self._data_dir / CONTROL_SOCKET) as socket:
                return await self._ask_at(f"unix:{socket}", ANONYMOUS, call)
        except (PeerUnreachable, FileNotFoundError, NotADirectoryError) as error:
            raise PeerUnreachable(
                f"no server runs in {self._data_dir}", remedy="start it, or give the --server that does"
            ) from error

    async def _ask_at(
        self,
        target: str,
        credentials: Credentials,
        call: Callable[[accounts_pb2_grpc.AccountsAsyncStub, float], Awaitable[_T]],
    ) -> _T:
        from understudy.common.rpc import open_channel, peer_errors
        from understudy.v1 import accounts_pb2_grpc

        async with open_channel(target, credentials) as channel:
            with peer_errors(self.name):
                return await call(accounts_pb2_grpc.AccountsStub(channel), self._timeout_s)


def read_password(*, from_stdin: bool, confirm: bool) -> str:
    """A password from the terminal, where it is not shown, or the first line of standard input.

    Raises:
        UsageError: there is none.
    """
    if not from_stdin:
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=confirm, err=True))
    password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise UsageError("no password on standard input")
    return password


def password_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--password-stdin``, as ``from_stdin``."""
    return click.option(
        "--password-stdin", "from_stdin", is_flag=True, help="Read the password from standard input."
    )(function)
