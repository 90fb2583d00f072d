"""How commands are told what encrypts a backup, and what opens one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PASSPHRASE_VARIABLE = "UNDERSTUDY_PASSPHRASE"

_PASSPHRASE_HELP = (
    f"Holds the passphrase, on its first line. [{PASSPHRASE_VARIABLE} is the passphrase itself]"
)


def encryption_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--recipient`` and ``--passphrase-file``, together as ``encryption``; None where nothing is asked for."""

    @functools.wraps(function)
    def with_encryption(
        *arguments: Any, recipients: tuple[str, ...], passphrase_file: Path | None, **options: Any
    ) -> Any:
        passphrase = _passphrase(passphrase_file)
        encryption = None
        if recipients or passphrase:
            from understudy.backup.encryption import Encryption

            encryption = Encryption(passphrase, recipients)
            encryption.check()
        return function(*arguments, encryption=encryption, **options)

    return click.option(
        "--recipient",
        "recipients",
        multiple=True,
        metavar="KEY",
        help="Encrypt for this key, age1… or ssh-…; may be given several times.",
    )(
        click.option(
            "--passphrase-file",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help=_PASSPHRASE_HELP,
        )(with_encryption)
    )


def unlocking_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--identity`` and ``--passphrase-file``, together as ``unlocking``."""

    @functools.wraps(function)
    def with_unlocking(
        *arguments: Any, identities: tuple[Path, ...], passphrase_files: tuple[Path, ...], **options: Any
    ) -> Any:
        from understudy.backup.encryption import Unlocking

        passphrases = [_passphrase(path) for path in passphrase_files] or [_passphrase(None)]
        unlocking = Unlocking.given(passphrases=list(filter(None, passphrases)), identity_files=identities)
        return function(*arguments, unlocking=unlocking, **options)

    return click.option(
        "--identity",
        "identities",
        multiple=True,
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="A file with a key that opens the backup: age's or SSH's.",
    )(
        click.option(
            "--passphrase-file",
            "passphrase_files",
            multiple=True,
            metavar="FILE",
            type=click.Path(path_type=Path),
            help=f"{_PASSPHRASE_HELP} Several where it was changed between a backup and the log behind it.",
        )(with_unlocking)
    )


def _passphrase(path: Path | None) -> str:
    """The passphrase; empty where none is given."""
    if path is None:
        return os.environ.get(PASSPHRASE_VARIABLE, "")
    from understudy.backup.policy import read_passphrase

    return read_passphrase(path)
