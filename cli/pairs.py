"""Where imported pairs come from: JSON lines and directory trees, each pair with its place for error messages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import click

from understudy.cli.json_lines import decode_pair
from understudy.common.errors import BadImport
from understudy.common.operations import OPERATION_OVERHEAD_BYTES
from understudy.common.types import KEY_BYTES_MAX, TRANSACTION_BYTES_MAX

# The largest value with every byte escaped (\u0000), and its key: a longer line can't be a pair, and a file
# without line ends must not fill the memory.
LINE_BYTES_MAX = 6 * (TRANSACTION_BYTES_MAX + KEY_BYTES_MAX) + 100


@dataclass(frozen=True, slots=True)
class Pair:
    """A key and a value that fit into a transaction, and where to begin again to get this pair first."""

    key: bytes
    value: bytes
    line: int  # 0: not from a file of lines

    @property
    def size(self) -> int:
        """What it counts for in a transaction, in bytes."""
        return len(self.key) + len(self.value) + OPERATION_OVERHEAD_BYTES


def file_lines(path: Path, *, from_line: int) -> Iterator[Pair]:
    """The pairs of a file of JSON lines; see :func:`lines`."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise BadImport(f"can't read {path}: {error.strerror}") from error
    with file:
        yield from lines(file, str(path), from_line=from_line)


def lines(file: BinaryIO, name: str, *, from_line: int) -> Iterator[Pair]:
    """The pairs of JSON lines from line ``from_line`` on; empty lines are passed over.

    Raises:
        BadImport: with name and line number.
    """
    number = 0
    while line := _read_line(file, name, number + 1):
        number += 1
        if number >= from_line and not line.isspace():
            try:
                key, value = decode_pair(line)
                yield _checked(Pair(key, value, number))
            except ValueError as error:
                raise _broken_line(name, number, str(error)) from error


def _read_line(file: BinaryIO, name: str, number: int) -> bytes:
    try:
        line = file.readline(LINE_BYTES_MAX + 1)
    except OSError as error:
        raise BadImport(f"can't read {name} at line {number}: {error.strerror}") from error
    if len(line) > LINE_BYTES_MAX:
        raise _broken_line(name, number, f"it has more than {LINE_BYTES_MAX:,} bytes")
    return line


def _broken_line(name: str, number: int, why: str) -> BadImport:
    return BadImport(
        f"{name}, line {number}: {why}",
        remedy=f"all lines before it are in; mend it and go on with --from-line {number}",
    )


def tree(root: Path) -> Iterator[Pair]:
    """The regular files below ``root``, in order of their paths; says how many others it left out.

    Raises:
        BadImport: a file can't be read, or its path or content is too long.
    """
    left_out = 0
    for path in _files(root):
        if path.is_symlink() or not path.is_file():
            left_out += 1
            continue
        try:
            if path.stat().st_size > TRANSACTION_BYTES_MAX:
                raise ValueError(_too_large(path.stat().st_size))
            yield _checked(Pair(os.fsencode(path.relative_to(root)), path.read_bytes(), 0))
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise BadImport(
                f"{path}: {why}",
                remedy="all files before it are in; mend it or take it away and import again",
            ) from error
    if left_out:
        click.echo(f"{root}: {left_out} symbolic links and special files left out", err=True)


def _files(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise BadImport(f"can't read {folder}: {error.strerror}") from error
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        else:
            yield Path(entry.path)


def _checked(pair: Pair) -> Pair:
    """The pair, if a transaction can hold it; ValueError says why not."""
    if not 1 <= len(pair.key) <= KEY_BYTES_MAX:
        raise ValueError(f"a key of {len(pair.key):,} bytes, where 1 to {KEY_BYTES_MAX} are allowed")
    if pair.size > TRANSACTION_BYTES_MAX:
        raise ValueError(_too_large(len(pair.value)))
    return pair


def _too_large(size: int) -> str:
    return f"a value of {size:,} bytes, where a transaction has at most {TRANSACTION_BYTES_MAX:,}"
