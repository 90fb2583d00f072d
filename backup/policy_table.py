"""A policy's table while it is being read: each setting of its kind, or an error that says where and what to give.

What a setting that may hold a credential was found to be is told by its kind only, and so is a secret key wherever
it was put by mistake.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from understudy.backup.encryption import holds_secret_key
from understudy.common.errors import UsageError
from understudy.common.sizes import RATE_MIN, parse_size

_SHOWN_CHARACTERS_MAX = 100
_SHOWN_BITS_MAX = 10_000  # of a number: Python refuses to print one of more than 4,300 digits
_RATE_MAX = 10**12  # more than any machine reads
_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "true or false"),  # before int, which it is too
    (str, "a text"),
    (int, "a number"),
    (float, "a number"),
    (list, "a list"),
    (dict, "a table"),
    (datetime.date, "a date"),
    (datetime.time, "a time"),
)


def found(value: object) -> str:
    """A value as it is shown to whoever wrote it."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)[:_SHOWN_CHARACTERS_MAX] if _may_be_shown(value) else _kind(value)


def _may_be_shown(value: object) -> bool:
    if isinstance(value, str):
        return not holds_secret_key(value)
    return isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= _SHOWN_BITS_MAX)


def _kind(value: object) -> str:
    if isinstance(value, str) and holds_secret_key(value):
        return "a secret key"
    return next(words for kind, words in _KINDS if isinstance(value, kind))


class PolicyTable:
    """The settings that have not been taken yet.

    Args:
        table: as TOML has it.
        where: file and policy, for messages.
        prefix: of a table within the policy's, for messages.

    Raises:
        UsageError: from all methods, with where, the setting, what was found and what is expected.
    """

    def __init__(self, table: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self._left = dict(table)
        self._where = where
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def wrong(self, what: str, expected: str) -> UsageError:
        """The error to raise."""
        return UsageError(f"{self._where}: {what}", remedy=expected)

    @contextlib.contextmanager
    def checking(self, key: str, expected: str) -> Iterator[None]:
        """Adds to what others say of a setting's value: where, which, and what is expected if they don't say that."""
        try:
            yield
        except UsageError as error:
            what = "it holds a secret key" if holds_secret_key(error.message) else error.message
            raise self.wrong(f"{self._prefix}{key}: {what}", error.remedy or f"give {expected}") from error

    def check_all_known(self, known: Iterable[str]) -> None:
        """Nothing is left."""
        if self._left:
            unknown = found(f"{self._prefix}{min(self._left)}")
            raise self.wrong(f"unknown key {unknown}", f"known: {', '.join(sorted(known))}")

    # -- settings ------------------------------------------------------------------------------------------

    def text(self, key: str, *, expected: str) -> str | None:
        """A text that is not empty; None if it is not given."""
        if key not in self._left:
            return None
        value = self._left.pop(key)
        if not _is_text(value):
            raise self._bad(key, value, expected)
        return str(value)

    def path(self, key: str) -> Path | None:
        """A path from the root on; None if it is not given.

        What else stands there may be what the file should hold, a passphrase or a key.
        """
        if key not in self._left:
            return None
        value = self._left.pop(key)
        if not _is_text(value) or not value.startswith("/"):
            raise self.wrong(
                f"{key} is {_kind(value)}", 'give a path from / on, such as "/etc/understudy/file"'
            )
        return Path(value)

    def texts(self, key: str, *, expected: str) -> tuple[str, ...]:
        """One text or more, none of them empty; none if the list is not given."""
        if key not in self._left:
            return ()
        values = self._left.pop(key)
        if not isinstance(values, list):
            raise self.wrong(f"{key} is {_kind(values)}", f"give a list of {expected}")
        if not values:
            raise self.wrong(f"{key} is an empty list", f"give {expected}, or leave it out")
        for value in values:
            if not _is_text(value):
                what = "a text that is empty or has a zero byte" if isinstance(value, str) else _kind(value)
                raise self.wrong(f"{key} holds {what}", f"give a list of {expected}")
        return tuple(values)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._left.pop(key, default)
        if not isinstance(value, bool):
            raise self._bad(key, value, "true or false, without quotes")
        return value

    def whole(self, key: str, default: int, *, least: int = 0, most: int) -> int:
        """A whole number."""
        value = self._left.pop(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self._bad(key, value, f"a whole number from {least:,} to {most:,}")
        return value

    def number(self, key: str, default: float, *, most: float) -> float:
        """A number, 0 or more."""
        value = self._left.pop(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= most:  # NaN is neither
            raise self._bad(key, value, f"a number from 0 to {most:,}")
        return float(value)

    def rate(self, key: str) -> int | None:
        """Bytes a second; None if it is not given."""
        if key not in self._left:
            return None
        value = self._left.pop(key)
        expected = 'bytes a second, from 1kB/s up to 1TB/s, such as "50MB/s"'
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise self._bad(key, value, expected)
        with self.checking(key, expected):
            rate = parse_size(value.removesuffix("/s")) if isinstance(value, str) else value
        if not RATE_MIN <= rate <= _RATE_MAX:
            raise self._bad(key, value, expected)
        return rate

    def table(self, key: str, *, expected: str) -> PolicyTable:
        """A table within this one; an empty one if it is not given."""
        value = self._left.pop(key, {})
        if not isinstance(value, dict):
            raise self._bad(key, value, expected)
        return PolicyTable(value, self._where, prefix=f"{key}.")

    def _bad(self, key: str, value: object, expected: str) -> UsageError:
        return self.wrong(f"{self._prefix}{key} is {found(value)}", f"give {expected}")


def _is_text(value: object) -> bool:
    """One that can name something."""
    return isinstance(value, str) and bool(value) and "\0" not in value
