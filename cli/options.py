"""What commands have in common: their options, how a person gives keys and sizes, and the table of exit codes.

Imported by every command, so it imports nothing that takes time to load; nor do the commands' files, except
inside their functions.
"""

from __future__ import annotations

import base64
import binascii
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from understudy.common.errors import BadKey, BadOperation, ExitCode, UsageError
from understudy.common.sizes import RATE_MIN, parse_size

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


def byte_rate(text: str) -> int:
    """Bytes a second: ``50MB/s``, or without the ``/s``; click's usage error where it is none."""
    rate = byte_size(text.removesuffix("/s"))
    if rate < RATE_MIN:
        raise click.BadParameter(f"{rate} bytes a second are too few: give a unit, such as 50MB/s.")
    return rate


def absolute_repository(context: click.Context, parameter: click.Parameter, text: str) -> str:
    """A callback: a folder's path as seen from here becomes one from the root; URLs stay as they are."""
    return text if "://" in text else os.path.abspath(text)


def data_dir_argument(function: _F) -> _F:
    """``DIR``, as ``directory``."""
    return click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))(function)


# Flag, name, what it takes, help: what whoever connects shows, and whom it trusts.
_CREDENTIALS = (
    ("--ca", "ca", "FILE", "Use TLS, and trust servers whose certificate this CA has signed."),
    ("--cert", "cert", "FILE", "The client certificate to show."),
    ("--cert-key", "cert_key", "FILE", "Its key."),
    (
        "--token",
        "token",
        "@FILE|TOKEN",
        "The token to show. Better in a file, or in the variable: others see what stands in a command.",
    ),
)


def credential_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--ca``, ``--cert``, ``--cert-key`` and ``--token``, together as ``credentials``."""

    @functools.wraps(function)
    def with_credentials(
        *arguments: Any,
        ca: str | None,
        cert: str | None,
        cert_key: str | None,
        token: str | None,
        **options: Any,
    ) -> Any:
        from understudy.common.credentials import Credentials

        credentials = Credentials.given(ca=ca, cert=cert, key=cert_key, token=token)
        return function(*arguments, credentials=credentials, **options)

    decorated: Callable[..., Any] = with_credentials
    for flag, name, takes, help_text in reversed(_CREDENTIALS):
        variable = f"UNDERSTUDY_{name.upper()}"
        decorated = click.option(
            flag, name, metavar=takes, envvar=variable, help=f"{help_text} [{variable}]"
        )(decorated)
    return decorated


def credential_settings(function: _F) -> _F:
    """The same flags as settings of a process that connects."""
    for flag, name, takes, help_text in reversed(_CREDENTIALS):
        function = setting(flag, name, help_text, metavar=takes)(function)  # type: ignore[assignment]
    return function


def server_option(
    function: Callable[..., Any] | None = None,
    *,
    required: bool = True,
    help_text: str = "The server; several with commas: the primary is found.",
) -> Callable[..., Any]:
    """``--server HOST:PORT`` as ``server``, and as ``credentials`` what to show it."""

    def decorate(decorated: Callable[..., Any]) -> Callable[..., Any]:
        return click.option("--server", required=required, metavar="HOST:PORT", help=help_text)(
            credential_options(decorated)
        )

    return decorate(function) if function is not None else decorate


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
    """What both processes take: ``--metrics``, ``--tls-...``, ``--config``, ``--log-format``."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(
            (
                setting(
                    "--metrics",
                    "metrics",
                    "Serve Prometheus metrics here, over HTTPS if there is TLS. Off if not set.",
                    metavar="HOST:PORT",
                ),
                setting(
                    "--tls-cert",
                    "tls_cert",
                    "The server's certificate in PEM, read again when it changes. Without one, only addresses of "
                    "this machine are served.",
                    metavar="FILE",
                ),
                setting("--tls-key", "tls_key", "Its key.", metavar="FILE"),
                setting(
                    "--tls-ca", "tls_ca", "The CA that signs the certificates of clients.", metavar="FILE"
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
