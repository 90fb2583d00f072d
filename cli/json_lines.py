"""Pairs as JSON lines: ``{"key": "…", "value": "…"}``, as text where it is UTF-8, else base64 under other names."""

from __future__ import annotations

import base64
import binascii
import json

from understudy.cli.output import json_bytes
from understudy.common.entry_json import text_or_base64

_NAMES = ("key", "key_base64", "value", "value_base64")


def encode_pair(key: bytes, value: bytes) -> bytes:
    """One line in UTF-8, without its end."""
    return json_bytes(text_or_base64("key", key) | text_or_base64("value", value))


def decode_pair(line: bytes) -> tuple[bytes, bytes]:
    """The inverse of :func:`encode_pair`.

    Raises:
        ValueError: what is wrong with the line, in words that go on behind "line 7: ".
    """
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("it is not an object with a key and a value") from None
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    for name in row:
        if name not in _NAMES:
            raise ValueError(f"unknown field {name!r}")
    return _field(row, "key"), _field(row, "value")


def _field(row: dict[str, object], name: str) -> bytes:
    text, encoded = row.get(name), row.get(f"{name}_base64")
    if (name in row) == (f"{name}_base64" in row):
        raise ValueError(f"it needs either {name!r} or '{name}_base64'")
    try:
        if isinstance(text, str):
            return text.encode()
        if isinstance(encoded, str):
            return base64.b64decode(encoded, validate=True)
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} holds half of a surrogate pair") from None
    except binascii.Error as error:
        raise ValueError(f"'{name}_base64' is not base64: {error}") from None
    raise ValueError(f"{name!r} is not a string")
