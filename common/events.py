"""Log events: a constant name with keys and values, through the standard ``logging`` under ``understudy``.

An application that embeds a primary hears of them as its own logging is set up, by default of warnings only; the
command line sets up its own.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

import structlog

LOGGER = "understudy"
FIELDS = "understudy_fields"  # the attribute of a log record that has the keys and values

_render = structlog.processors.LogfmtRenderer(key_order=["event"], drop_missing=True)


def _as_text_and_fields(
    logger: Any, method: str, event: MutableMapping[str, Any]
) -> tuple[tuple[str], dict[str, Any]]:
    exc_info = event.pop("exc_info", None)
    return (str(_render(logger, method, dict(event))),), {
        "extra": {FIELDS: dict(event)},
        "exc_info": exc_info,
    }


log: structlog.stdlib.BoundLogger = structlog.wrap_logger(
    logging.getLogger(LOGGER),
    processors=[structlog.stdlib.filter_by_level, _as_text_and_fields],
    wrapper_class=structlog.stdlib.BoundLogger,
)
