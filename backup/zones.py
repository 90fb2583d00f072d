"""Time zones by their IANA names."""

from __future__ import annotations

import datetime
import zoneinfo

from understudy.common.errors import UsageError


def zone_named(name: str) -> datetime.tzinfo:
    """The zone, such as ``Europe/Berlin``.

    Raises:
        UsageError: there is none of that name here.
    """
    if name == "UTC":  # known even where the system has no zones installed
        return datetime.UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:  # OSError: "Europe" may be a folder
        raise UsageError(
            f"there is no time zone {name!r} on this machine",
            remedy="give a name such as Europe/Berlin, or UTC; the system's package of them is mostly called tzdata",
        ) from error
