"""Entries of a data directory's log, as ``understudy log`` shows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from google.protobuf.message import DecodeError

from understudy.cli.output import printable
from understudy.common.directory import NODE_FILE, NodeFile
from understudy.common.entries import parse_change, parse_entry
from understudy.common.entry_json import kind_name, operation_row, text_or_base64
from understudy.common.errors import CorruptionError, NotADataDirectory
from understudy.common.log_reader import read_records
from understudy.common.operations import ADD, DELETE_RANGE, PUT, UPDATE
from understudy.common.records import Record
from understudy.common.types import ClusterId, Lsn, format_id, is_system_realm
from understudy.v1 import log_pb2

_OPERATIONS_SHOWN = 3  # of one transaction, on its line
_BYTES_SHOWN = 40  # of a key or a value


def directory_records(path: Path, from_lsn: int | None, to_lsn: int | None) -> Iterator[Record]:
    """The log's records from ``from_lsn`` to ``to_lsn``, both included; None is the log's own end.

    Raises:
        NotADataDirectory, NewerFormat: there is nothing to read.
        UsageError: the log does not go back to ``from_lsn``.
        CorruptionError: with file, byte and LSN.
    """
    cluster = directory_cluster(path)
    after = None if from_lsn is None else Lsn(from_lsn - 1)
    for record in read_records(path / "log", cluster, after):
        if to_lsn is not None and record.lsn > to_lsn:
            return
        yield record


def directory_cluster(path: Path) -> ClusterId:
    """Whose log a data directory holds.

    Raises:
        NotADataDirectory, NewerFormat: there is nothing to read.
    """
    if not (path / NODE_FILE).is_file():
        raise NotADataDirectory(f"{path} is not a data directory of Understudy: it has no {NODE_FILE}")
    cluster = NodeFile.read(path / NODE_FILE).cluster
    if not cluster:
        raise NotADataDirectory(f"{path} has no copy yet: its replica has not finished its bootstrap")
    return ClusterId(UUID(cluster).bytes)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry, parsed."""

    record: Record
    entry: log_pb2.Entry
    change: log_pb2.Change | None

    @classmethod
    def of(cls, record: Record) -> LogEntry:
        """Parses a record.

        Raises:
            CorruptionError: it can't be decoded.
        """
        entry = parse_entry(record.payload, record.lsn)
        change = parse_change(entry.change, record.lsn) if entry.HasField("change") else None
        return cls(record, entry, change)

    @property
    def kind(self) -> str:
        """What it is: the name of the body's field."""
        return self.entry.WhichOneof("body") or ""

    @property
    def realm(self) -> str:
        """The realm that it is about; empty if none."""
        return self.change.realm if self.change else self.entry.realm_dropped.realm

    @property
    def time_us(self) -> int:
        """When it was taken in, microseconds since 1970."""
        return self.entry.time_us

    @property
    def origin(self) -> str:
        """The client that made the change; ``-`` for what the server did itself."""
        return format_id(self.change.client) if self.change else "-"

    @property
    def is_secret(self) -> bool:
        """Whether its values must not be shown: one is the key that changes are signed with."""
        return is_system_realm(self.realm)

    # -- JSON ----------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """The entry as a JSON object."""
        return {
            "lsn": self.record.lsn,
            "digest": self.record.digest.hex(),
            "time_us": self.time_us,
            "kind": self.kind,
            **self._body_facts(),
        }

    def _body_facts(self) -> dict[str, Any]:
        entry = self.entry
        if self.change is not None:
            return self._change_facts(self.change)
        if entry.HasField("epoch_start"):
            start = _epoch_start(entry)
            return {"epoch": start.epoch, "node": format_id(start.node)}
        if entry.HasField("digest_mark"):
            mark = entry.digest_mark
            return {
                "freeze_lsn": mark.freeze_lsn,
                "state_digest": mark.state_digest.hex(),
                "realms": mark.realms,
            }
        return {"realm": self.realm} if self.realm else {}

    def _change_facts(self, change: log_pb2.Change) -> dict[str, Any]:
        return {
            "realm": change.realm,
            "version": change.version,
            "client": self.origin,
            "number": change.number,
            "operations": [self._operation_facts(operation) for operation in change.operations],
        }

    def _operation_facts(self, operation: log_pb2.Operation) -> dict[str, Any]:
        if not self.is_secret:
            return operation_row(operation)
        return {"kind": kind_name(operation), **text_or_base64("key", operation.key), "hidden": True}

    # -- text ----------------------------------------------------------------------------------------------

    def line(self) -> str:
        """The entry on one line: LSN, time, digest, and what it does."""
        time = shown_time(self.time_us)
        return f"{self.record.lsn:>8}  {time}  {self.record.digest.hex()[:12]}  {self._words()}"

    def _words(self) -> str:
        entry = self.entry
        if self.change is not None:
            return f"{self.realm} version {self.change.version}: {self._operations_words(self.change)}"
        if entry.HasField("epoch_start"):
            start = _epoch_start(entry)
            return f"epoch {start.epoch} begins, by node {format_id(start.node)}"
        if entry.HasField("digest_mark"):
            mark = entry.digest_mark
            return f"digest mark: the state at {mark.freeze_lsn} is {mark.state_digest.hex()}"
        if entry.HasField("realm_dropped"):
            return f"{self.realm} dropped"
        return f"{self.kind} mark"

    def _operations_words(self, change: log_pb2.Change) -> str:
        words = [self._operation_words(operation) for operation in change.operations[:_OPERATIONS_SHOWN]]
        more = len(change.operations) - len(words)
        return ", ".join([*words, f"and {more} more"] if more else words)

    def _operation_words(self, operation: log_pb2.Operation) -> str:
        kind = operation.kind
        words = f"{kind_name(operation)} {_shown(operation.key)}"
        if kind == DELETE_RANGE:
            return (
                f"{kind_name(operation)} from {_shown(operation.key) or 'the first'} "
                f"to before {_shown(operation.end) or 'the end'}"
            )
        if kind == ADD:
            return f"{words} {operation.amount:+d}"
        if kind in (PUT, UPDATE):
            return f"{words} = {'(hidden)' if self.is_secret else _shown(operation.value)}"
        return words


def _epoch_start(entry: log_pb2.Entry) -> log_pb2.EpochStart:
    try:
        return log_pb2.EpochStart.FromString(entry.epoch_start)
    except DecodeError as error:
        raise CorruptionError(f"the start of an epoch can't be decoded: {error}") from error


def shown_time(time_us: int) -> str:
    """A time of the log, microseconds since 1970, as people read it."""
    try:
        return datetime.fromtimestamp(time_us / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    except (ValueError, OverflowError, OSError):  # a damaged clock, in a year that has five digits
        return f"{time_us} us"


def _shown(data: bytes) -> str:
    return printable(data, length_max=_BYTES_SHOWN)
