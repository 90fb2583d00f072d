"""Structured logs on standard error, as ``key=value`` or as JSON, one event a line."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import traceback

from understudy.common.events import FIELDS, LOGGER

# For commands that say themselves what they did.
QUIET = logging.WARNING
_format = "console"


def configure_logs(log_format: str = "console", *, level: int = logging.INFO) -> None:
    """Sets logging up for the whole process.

    Args:
        log_format: ``console`` (``timestamp=… level=… event=… key=value``) or ``json``.
        level: what is less than that is left out.
    """
    global _format
    _format = log_format
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _LogfmtFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(LOGGER).setLevel(level)


def log_format() -> str:
    """As this process logs, for a process that it starts."""
    return _format


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")


class _LogfmtFormatter(logging.Formatter):
    """Lines for people and for ``grep``."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if not hasattr(record, FIELDS):
            text = f"event={json.dumps(text)}"
        line = f"timestamp={_timestamp(record)} level={record.levelname.lower()} {text}"
        return f"{line}\n{_trace(record)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    """Lines for machines."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, FIELDS, {"event": record.getMessage()})
        row = {"timestamp": _timestamp(record), "level": record.levelname.lower(), **fields}
        if record.exc_info:
            row["exception"] = _trace(record)
        return json.dumps(row, default=str)


def _trace(record: logging.LogRecord) -> str:
    assert record.exc_info is not None
    return "".join(traceback.format_exception(*record.exc_info)).rstrip()
