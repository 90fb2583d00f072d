"""Structured logs on standard error, as ``key=value`` or as JSON, one event a line."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

# For commands that say themselves what they did.
QUIET = logging.WARNING


def configure_logs(log_format: str = "console", *, level: int = logging.INFO) -> None:
    """Sets logging up for the whole process.

    Args:
        log_format: ``console`` (``timestamp=… level=… event=… key=value``) or ``json``.
        level: what is less than that is left out.
    """
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"])
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,  # modules hold their loggers already
    )
