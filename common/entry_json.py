"""Entries of the log as JSON objects: for people to read, and exact enough to be replayed."""

from __future__ import annotations

import base64
import json

from google.protobuf.message import DecodeError

from understudy.common import entries
from understudy.common.operations import KIND_NAMES
from understudy.common.records import PAYLOAD_BYTES_MAX, Record
from understudy.common.types import OPERATIONS_MAX, format_id, is_system_realm
from understudy.v1 import log_pb2

# The largest entry as text with every byte escaped (\u0000), once more as base64, and the names of its operations'
# fields: a longer line is none of :func:`entry_row`, and a file without line ends must not fill the memory.
LINE_BYTES_MAX = 8 * PAYLOAD_BYTES_MAX + 200 * OPERATIONS_MAX


def entry_row(record: Record) -> dict[str, object]:
    """One entry: what it does in words, and its exact bytes as ``entry_base64``.

    Raises:
        CorruptionError: it can't be decoded.
    """
    entry = entries.parse_entry(record.payload, record.lsn)
    row: dict[str, object] = {
        "lsn": record.lsn,
        "digest": record.digest.hex(),
        "time_us": entry.time_us,
        "kind": entry.WhichOneof("body"),
    }
    if entry.HasField("change"):
        change = entries.parse_change(entry.change, record.lsn)
        row |= {
            "realm": change.realm,
            "version": change.version,
            "client": format_id(change.client),
            "number": change.number,
            "operations": [operation_row(operation) for operation in change.operations],
        }
    row["entry_base64"] = base64.b64encode(record.payload).decode()
    return row


def signed_change(line: bytes) -> tuple[bytes, bytes] | None:
    """The serialized ``Change`` of one line as :func:`entry_row` made it, and its HMAC.

    None where it is no change, or one of the system's own realms: a server refuses those from outside.

    Raises:
        ValueError: what is wrong with the line, in words that go on behind "line 7: ".
    """
    if len(line) > LINE_BYTES_MAX:
        raise ValueError(f"it has more than {LINE_BYTES_MAX:,} bytes")
    try:
        row = json.loads(line)
        payload = base64.b64decode(row["entry_base64"], validate=True)
        entry = log_pb2.Entry.FromString(payload)
    except (ValueError, KeyError, TypeError, RecursionError, DecodeError):
        raise ValueError("it is not a line of an export: no JSON object with an entry_base64") from None
    return (entry.change, entry.hmac) if entry.change and not _is_of_the_system(row) else None


def is_system_change(line: bytes) -> bool:
    """Whether a line that :func:`signed_change` takes is a change of one of the system's own realms."""
    return _is_of_the_system(json.loads(line))


def _is_of_the_system(row: dict[str, object]) -> bool:
    return is_system_realm(str(row.get("realm")))


def operation_row(operation: log_pb2.Operation) -> dict[str, object]:
    """One operation; fields that its kind does not use are left out."""
    row: dict[str, object] = {"kind": kind_name(operation), **text_or_base64("key", operation.key)}
    if operation.value:
        row |= text_or_base64("value", operation.value)
    if operation.end:
        row |= text_or_base64("end", operation.end)
    if operation.amount:
        row["amount"] = operation.amount
    return row


def kind_name(operation: log_pb2.Operation) -> str:
    """What an operation is called; its number where a later version has made it."""
    return KIND_NAMES.get(operation.kind, f"kind {operation.kind}")


def text_or_base64(name: str, data: bytes) -> dict[str, str]:
    """``{name: text}`` where ``data`` is UTF-8, else ``{name_base64: …}``."""
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}
