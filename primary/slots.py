"""Slots: what the primary remembers of each replica, connected or not, so that what it needs is kept.

Persisted in ``slots.json``: a restart must not let the log go that a replica has yet to fetch. A position there
may be older than the truth, never newer; the cost of that is a little more log.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from understudy.common.errors import (
    CorruptionError,
    DiskFull,
    NewerFormat,
    Unavailable,
    UnderstudyError,
    UsageError,
)
from understudy.common.events import log
from understudy.common.files import publish
from understudy.common.types import Lsn

SLOTS_FILE = "slots.json"
FORMAT_VERSION = 1
SLOTS_MAX = 64  # far more replicas than a primary can feed; a bound against a client that invents ids
SAVE_INTERVAL_S = 5.0
# Of the ids that are known, in an error: it crosses gRPC twice over, whose metadata hold 8 KiB, where a byte that is
# not ASCII takes three.
_NAMED_MAX = 10
_NAMED_BYTES_MAX = 1_000


@dataclass(slots=True, kw_only=True)
class Slot:
    """One replica."""

    id: str
    node: str  # hex of the node id
    durable_lsn: int = 0
    durable_offset: int = 0
    applied_lsn: int = 0
    seen_us: int = 0  # when it was last heard, our clock
    lost: bool = False  # its log is gone: it will bootstrap again

    @property
    def needs_from(self) -> Lsn:
        """The first LSN that it has yet to make durable."""
        return Lsn(self.durable_lsn + 1)


_KINDS = get_type_hints(Slot)


def _slot(row: dict[str, object]) -> Slot:
    """The slot of a row; what a later version has added to it is passed over."""
    values = {name: row[name] for name in _KINDS if name in row}
    for name, value in values.items():
        if type(value) is not _KINDS[name] or (isinstance(value, int) and not 0 <= value < 1 << 63):
            raise ValueError(f"{name} is {value!r:.100}")
        if isinstance(value, str) and not value.isprintable():  # nor could it be told to anybody
            raise ValueError(f"{name} is {value!r:.100}")
    return Slot(**values)  # type: ignore[arg-type]  # checked just now


class SlotTable:
    """All slots, and which of them are connected."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slots: dict[str, Slot] = {}
        self._connected: set[str] = set()
        self._changed = False
        self._due_s = 0.0  # not to be saved before, but for what can't wait
        self._lock = threading.Lock()
        self._version = self._written = 0
        if path.exists():
            self._load()

    def _load(self) -> None:
        try:
            table = json.loads(self._path.read_bytes())
            if table["format"] > FORMAT_VERSION:
                raise NewerFormat(
                    f"{self._path} was written by a newer version of Understudy (format {table['format']})",
                    remedy=f"this version reads format {FORMAT_VERSION}; upgrade it",
                )
            self._slots = {row["id"]: _slot(row) for row in table["slots"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptionError(
                f"{self._path} can't be read: {error}",
                remedy="remove it; replicas that are far behind will bootstrap again",
            ) from error

    def __iter__(self) -> Iterator[Slot]:
        return iter(list(self._slots.values()))

    def __len__(self) -> int:
        return len(self._slots)

    def get(self, replica_id: str) -> Slot | None:
        """The slot of that name."""
        return self._slots.get(replica_id)

    def is_connected(self, replica_id: str) -> bool:
        """Whether that replica follows right now."""
        return replica_id in self._connected

    @property
    def connected_count(self) -> int:
        """How many follow right now."""
        return len(self._connected)

    def claim(self, replica_id: str, node: bytes, *, lsn: Lsn, offset: int, now_us: int) -> Slot:
        """The slot of that name from here on for this node, at this position; saved at once."""
        slot = Slot(
            id=replica_id,
            node=node.hex(),
            durable_lsn=lsn,
            durable_offset=offset,
            applied_lsn=0,
            seen_us=now_us,
        )
        self._slots[replica_id] = slot
        self.save()
        return slot

    def connect(self, replica_id: str) -> None:
        """Notes that it follows."""
        self._connected.add(replica_id)

    def disconnect(self, replica_id: str) -> None:
        """Notes that it does not follow any more."""
        self._connected.discard(replica_id)
        self._changed, self._due_s = True, 0.0

    def touch(self) -> None:
        """A slot has moved."""
        self._changed = True

    def saving(self, now_s: float) -> Callable[[], None] | None:
        """What has to be run, in any thread, for the table to be saved; None while nothing has to.

        Not for the event loop: on a busy disk, making a file durable can wait for all else that is being written.
        """
        if not self._changed or now_s < self._due_s:
            return None
        self._changed, self._due_s = False, now_s + SAVE_INTERVAL_S
        version, body = self._body()
        return lambda: self._save(version, body)

    def retain_from(self, head: Lsn) -> Lsn:
        """The first LSN that some slot still needs."""
        return min((slot.needs_from for slot in self._slots.values() if not slot.lost), default=Lsn(head + 1))

    def lose(self, slot: Slot) -> None:
        """Gives up keeping the log for a slot."""
        slot.lost = True
        log.warning("slot_lost", replica=slot.id, needs_from=slot.needs_from)
        self.save()

    def remove(self, replica_id: str) -> Slot:
        """Removes the slot of a replica that is not connected; returns it once that is durable.

        Raises:
            UsageError: nobody of that name is known.
            Unavailable: it is connected.
            DiskFull, StorageFailed: it stays.
        """
        if replica_id not in self._slots:
            raise UsageError(f"no replica {replica_id!r:.200} is known here", remedy=self._known())
        if replica_id in self._connected:
            raise Unavailable(f"replica {replica_id!r} is connected", remedy="stop it first")
        slot = self._slots.pop(replica_id)
        try:
            self._write(*self._body())
        except UnderstudyError:
            self._slots[replica_id] = slot
            raise
        log.info("slot_removed", replica=slot.id, needs_from=slot.needs_from)
        return slot

    def _known(self) -> str:
        if not self._slots:
            return "none is known"
        ids = sorted(self._slots)
        sizes = itertools.accumulate(len(one.encode()) for one in ids[:_NAMED_MAX])
        named = [one for one, size in zip(ids, sizes, strict=False) if size <= _NAMED_BYTES_MAX]
        more = f" and {len(ids) - len(named)} more" if len(named) < len(ids) else ""
        return f"known are: {', '.join(named)}{more}"

    def save(self) -> None:
        """Publishes the table. On a full disk the old one stays: older positions only keep more log."""
        self._save(*self._body())

    def _save(self, version: int, body: bytes) -> None:
        try:
            self._write(version, body)
        except DiskFull as error:
            log.warning("slots_not_saved", error=str(error))

    def _body(self) -> tuple[int, bytes]:
        self._version += 1
        body = {"format": FORMAT_VERSION, "slots": [asdict(slot) for slot in self._slots.values()]}
        return self._version, json.dumps(body, indent=1).encode() + b"\n"

    def _write(self, version: int, body: bytes) -> None:
        with self._lock:
            if version > self._written:  # else a newer one was quicker
                publish(self._path, body)
                self._written = version
