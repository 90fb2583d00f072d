"""What commands have in common: their options, how a person gives keys and sizes, and the table of exit codes.

Imported by every command, so it imports nothing that takes time to load; nor do the commands' files, except
inside their functions.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from understudy.common.errors import BadKey, BadOperation, ExitCode, UsageError
from understudy.common.sizes import parse_size

_MEANINGS = {
    ExitCode.DONE: "done",
    ExitCode.FAILED: "failed",
    ExitCode.USAGE: "usage",
    ExitCode.RESET_NEEDED: "reset or rewind needed: diverged, foreign, ahead, fenced",
    ExitCode.CORRUPT: "verification failed, or data corrupt",
    ExitCode.UNREACHABLE: "peer not reachable",
    ExitCode.DIRECTORY: "data directory in use, or of the wrong role",
    ExitCode.NOT_PERMITTED: "not permitted",
}
INTERRUPTED = 130  # what shells give a command that Ctrl-C ended

# click keeps the line breaks of a paragraph that begins with a backspace.
EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code.value}  {meaning}" for code, meaning in _MEANINGS.items())

_F = TypeVar("_F", bound=Callable[..., Any])
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def byte_size(text: str) -> int:
    """A number of bytes: ``65536``, ``256MB``, ``1.5GiB``; click's usage error where it is none."""
    try:
        return parse_size(text)
    except UsageError as error:
        raise click.BadParameter(f"{error.message}: {error.remedy}.") from error


def data_dir_argument(function: _F) -> _F:
    """``DIR``, as ``directory``."""
    return click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))(function)


def server_option(function: _F) -> _F:
    """``--server HOST:PORT``, required."""
    return click.option(
        "--server",
        required=True,
        metavar="HOST:PORT",
        help="The server; several with commas: the primary is found.",
    )(function)


def timeout_option(function: _F) -> _F:
    """``--timeout SECONDS``, as ``timeout_s``."""
    return click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True),
        default=30.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait for an answer.",
    )(function)


def json_option(function: _F) -> _F:
    """``--json``, as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")(function)


def base64_option(function: _F) -> _F:
    """``--base64``, as ``is_base64``."""
    return click.option(
        "--base64",
        "is_base64",
        is_flag=True,
        help="Keys and values on the command line are base64, not text.",
    )(function)


def setting(flag: str, field: str, help_text: str, **attributes: Any) -> Decorator:
    """A flag for one field of the settings, whose help also names its environment variable."""
    return click.option(
        flag, field, help=f"{help_text} [UNDERSTUDY_{field.upper()}]", default=None, **attributes
    )


def process_options(section: str) -> Decorator:
    """What both processes take: ``--metrics``, ``--insecure``, ``--config``, ``--log-format``."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(
            (
                setting(
                    "--metrics",
                    "metrics",
                    "Serve Prometheus metrics here. Off if not set.",
                    metavar="HOST:PORT",
                ),
                setting(
                    "--insecure",
                    "insecure",
                    "Allow addresses beyond this machine, unencrypted and open to all who reach them.",
                    is_flag=True,
                ),
                click.option(
                    "--config",
                    type=click.Path(path_type=Path, dir_okay=False),
                    metavar="FILE.toml",
                    help=f"Settings by the names in brackets, in lower case, in a table [{section}]; flags and "
                    "variables win.",
                ),
                click.option(
                    "--log-format",
                    type=click.Choice(["console", "json"]),
                    default="console",
                    show_default=True,
                    help="How to log, on standard error.",
                ),
            )
        ):
            function = option(function)
        return function

    return decorate


def key_bytes(text: str, *, is_base64: bool) -> bytes:
    """A key given on the command line.

    Raises:
        BadKey: it is not UTF-8, or not base64 where it should be.
    """
    try:
        return _decoded(text, is_base64=is_base64)
    except ValueError as error:
        raise BadKey(
            f"bad key {text!r}: {error}", remedy="give UTF-8 text, or --base64 and base64"
        ) from error


def value_bytes(text: str, *, is_base64: bool) -> bytes:
    """A value given on the command line.

    Raises:
        BadOperation: it is not UTF-8, or not base64 where it should be.
    """
    try:
        return _decoded(text, is_base64=is_base64)
    except ValueError as error:
        raise BadOperation(
            f"bad value {text[:40]!r}: {error}",
            remedy="give UTF-8 text, --base64 and base64, or - for standard input",
        ) from error


def _decoded(text: str, *, is_base64: bool) -> bytes:
    if not is_base64:
        try:
            return text.encode()
        except UnicodeEncodeError:
            # Bytes of an argument that are not UTF-8 arrive as lone surrogates.
            raise ValueError("it is not UTF-8") from None
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"it is not base64: {error}") from error
