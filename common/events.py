"""Log events: a constant name with keys and values, through the standard ``logging`` under ``understudy``.

An application that embeds a primary hears of them as its own logging is set up, by default of warnings only; the
command line sets up its own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import structlog

LOGGER = "understudy"
FIELDS = "understudy_fields"  # the attribute of a log record that has the keys and values


class _Log:
    """The logger, made when the first event is logged: structlog takes longer to load than most commands to run."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_logger(), name)


@functools.cache
def _logger() -> structlog.stdlib.BoundLogger:
    import structlog

    render = structlog.processors.LogfmtRenderer(key_order=["event"], drop_missing=True)

    def as_text_and_fields(
        logger: Any, method: str, event: MutableMapping[str, Any]
    ) -> tuple[tuple[str], dict[str, Any]]:
        exc_info = event.pop("exc_info", None)
        return (str(render(logger, method, dict(event))),), {
            "extra": {FIELDS: dict(event)},
            "exc_info": exc_info,
        }

    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(LOGGER),
        processors=[structlog.stdlib.filter_by_level, as_text_and_fields],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return logger


if TYPE_CHECKING:
    log: structlog.stdlib.BoundLogger
else:
    log = _Log()
