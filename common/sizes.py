"""Sizes as people write them: ``268435456``, ``256MB``, ``1GiB``."""

from __future__ import annotations

import re

from understudy.common.errors import UsageError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 1_000,
    "MB": 1_000**2,
    "GB": 1_000**3,
    "TB": 1_000**4,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
# With more digits it is no size of anything, and in the end more than a float can hold.
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)\s*\Z")
RATE_MIN = 1_000  # bytes a second; with less a unit was forgotten


def parse_size(text: str) -> int:
    """Bytes.

    Raises:
        UsageError: not a size.
    """
    found = _SIZE.match(text)
    whole_bytes = found is not None and ("." not in found[1] or found[2].upper() not in ("", "B"))
    if found is None or not whole_bytes or found[2].upper() not in _UNITS:
        raise UsageError(f"{text!r} is not a size", remedy="give bytes, or for example 256MB or 1GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])
