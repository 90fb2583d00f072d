"""The files of a backup of records: their names, and rows as bytes. ``docs/FORMAT.md`` has the same facts for people.

What may live here: framing and limits; nothing that knows what a row means, but for those of the log's tail.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from understudy.common.errors import OTHER_BACKUP, CorruptionError
from understudy.common.log_reader import LogPlace
from understudy.common.records import PAYLOAD_BYTES_MAX
from understudy.common.types import DIGEST_BYTES, Digest, Lsn, Position

FOLDER = "records/"
TAIL = "tail"
# Held in memory while it is written and while it is read; 64 Ki files for each TiB.
PART_BYTES = 16 << 20
# A part ends behind the row that fills it. The largest is a whole entry of the log, or one of history.
PART_BYTES_MAX = PART_BYTES + PAYLOAD_BYTES_MAX + (1 << 20)
_NAME = re.compile(r"records/(data|history|clients|realms|meta|tail)-[0-9]{6}\.rows\Z")
_KEY_BYTES_MAX = 511  # of LMDB
_ROW = struct.Struct("<II")
_LSN = struct.Struct(">Q")  # so that the order of bytes is the order of numbers
_TAIL_ROW = struct.Struct(f"<{DIGEST_BYTES}sQQ")


def part_name(database: str, number: int) -> str:
    """The file of a database's rows of that number, counted from 1."""
    return f"{FOLDER}{database}-{number:06d}.rows"


def database_of(name: str) -> str:
    """The database whose rows are in a file; empty where it is no such file."""
    found = _NAME.match(name)
    return found[1] if found is not None else ""


def encode_row(key: bytes, value: bytes) -> bytes:
    """One row."""
    return _ROW.pack(len(key), len(value)) + key + value


def decode_rows(data: bytes, name: str) -> Iterator[tuple[bytes, bytes]]:
    """The rows of a file; their keys ascend.

    Args:
        name: what error messages call it.

    Raises:
        CorruptionError: it was cut off, or is no such file.
    """
    at, before = 0, b""
    while at < len(data):
        start = at + _ROW.size
        if start > len(data):
            raise _damaged(name, at, "it ends within a row")
        key_bytes, value_bytes = _ROW.unpack_from(data, at)
        middle, end = start + key_bytes, start + key_bytes + value_bytes
        if end > len(data):
            raise _damaged(name, at, "it ends within a row")
        key = data[start:middle]
        if not before < key or key_bytes > _KEY_BYTES_MAX:
            raise _damaged(name, at, "a key that can't be there")
        yield key, data[middle:end]
        at, before = end, key


@dataclass(frozen=True, slots=True)
class TailRow:
    """An entry of the log that is kept, or, without a payload, the last one of a stretch that is left out."""

    place: LogPlace  # behind the entry
    time_us: int  # of the entry
    payload: bytes = b""

    def encode(self) -> bytes:
        """The row."""
        position, offset = self.place
        value = _TAIL_ROW.pack(position.digest, offset, self.time_us) + self.payload
        return encode_row(_LSN.pack(position.lsn), value)


def decode_tail(data: bytes, name: str) -> Iterator[TailRow]:
    """The rows of a file of the log's tail.

    Raises:
        CorruptionError: it was cut off, or is no such file.
    """
    for key, value in decode_rows(data, name):
        if len(key) != _LSN.size or len(value) < _TAIL_ROW.size:
            raise CorruptionError(f"{name} holds a row that is no entry of a log", remedy=OTHER_BACKUP)
        digest, offset, time_us = _TAIL_ROW.unpack_from(value)
        position = Position(Lsn(_LSN.unpack(key)[0]), Digest(digest))
        yield TailRow(LogPlace(position, offset), time_us, value[_TAIL_ROW.size :])


def _damaged(name: str, at: int, why: str) -> CorruptionError:
    return CorruptionError(f"{name} is damaged at byte {at}: {why}", remedy=OTHER_BACKUP)
