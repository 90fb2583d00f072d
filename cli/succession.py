"""How a replica's process goes on as a primary, once ``understudy promote --serve`` has promoted its copy."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from understudy.common.settings import PrimarySettings, ReplicaSettings, read_settings
from understudy.primary.server import succeeding
from understudy.replica.server import Succession


def succession(settings: ReplicaSettings, file: Path | None) -> Succession:
    """What :func:`serving_replica` needs to go on as a primary.

    What the replica was not told itself comes from where ``understudy primary`` takes it, and is checked now: not
    when everybody waits for it.

    Raises:
        UsageError, NotPermitted: a setting of the primary can't be.
    """
    own = read_settings(PrimarySettings, {"data_dir": settings.data_dir}, file=file)
    names = {one.name for one in dataclasses.fields(own)} & {one.name for one in dataclasses.fields(settings)}
    shared = {name: getattr(settings, name) for name in names}
    # A replica has no ceiling, so nothing has kept its floor below ours.
    ceiling = max(own.log_ceiling_bytes, settings.log_floor_bytes)
    primary = dataclasses.replace(own, **shared, log_ceiling_bytes=ceiling)
    primary.validate()
    return functools.partial(succeeding, primary)
