"""Records of the change-log: framing, digests, and the check of the chain.

What may live here: bytes to values and back, for one record and for a stream of them. No files, no clock, no
knowledge of what a payload means. ``docs/FORMAT.md`` has the same facts for people.

A record is ``length u32 | lsn u64 | digest 32 bytes | payload``, integers little-endian, where ``digest`` is
SHA-256 over (previous digest, lsn u64, payload): checksum and chain at once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from understudy.common.errors import CorruptionError
from understudy.common.types import Digest, Lsn, Position

HEADER = struct.Struct("<IQ32s")
RECORD_HEADER_BYTES = HEADER.size
PAYLOAD_BYTES_MAX = 18 << 20  # the largest transaction with its change and entry around it

_LSN = struct.Struct("<Q")


class Record(NamedTuple):
    """One record whose digest was computed or checked."""

    lsn: Lsn
    digest: Digest
    payload: bytes

    @property
    def position(self) -> Position:
        """Where the log stands after it."""
        return Position(self.lsn, self.digest)

    @property
    def encoded_bytes(self) -> int:
        """Its length in the log."""
        return RECORD_HEADER_BYTES + len(self.payload)


def chain_digest(previous: Digest, lsn: Lsn, payload: bytes) -> Digest:
    """The digest of the entry ``payload`` at ``lsn`` behind an entry of digest ``previous``."""
    return Digest(sha256(previous + _LSN.pack(lsn) + payload).digest())


def encode_record(previous: Digest, lsn: Lsn, payload: bytes) -> tuple[bytes, Digest]:
    """The record's bytes and its digest."""
    digest = chain_digest(previous, lsn, payload)
    return HEADER.pack(len(payload), lsn, digest) + payload, digest


class ChainReader:
    """Turns a stream of log bytes, cut anywhere, into records, checking the chain.

    Used alike for what is read from segment files and what comes over the wire.
    """

    def __init__(self, after: Position) -> None:
        self._previous: Digest = after.digest
        self._next_lsn: int = after.lsn + 1
        self._buffer = b""

    @property
    def position(self) -> Position:
        """The position after the last whole record."""
        return Position(Lsn(self._next_lsn - 1), self._previous)

    @property
    def pending_bytes(self) -> int:
        """How much of an unfinished record is held; never more than the largest record and one chunk."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Record]:
        """The records that ``data`` completes.

        Raises:
            CorruptionError: a record's length, LSN or digest does not follow from the one before; the records
                before it in ``data`` are lost with it, so that nothing of a bad chunk is used.
        """
        buffer = self._buffer + data if self._buffer else data
        records = []
        offset, end = 0, len(buffer)
        previous, lsn = self._previous, self._next_lsn
        while end - offset >= RECORD_HEADER_BYTES:
            length, found_lsn, digest = HEADER.unpack_from(buffer, offset)
            if found_lsn != lsn or not 0 < length <= PAYLOAD_BYTES_MAX:
                raise self._corrupt(lsn, f"its header says LSN {found_lsn}, {length} bytes")
            start = offset + RECORD_HEADER_BYTES
            if end - start < length:
                break
            offset = start + length
            payload = buffer[start:offset]
            if sha256(previous + _LSN.pack(lsn) + payload).digest() != digest:
                raise self._corrupt(lsn, "its digest does not match its content and the entry before it")
            records.append(Record(Lsn(lsn), digest, payload))
            previous = digest
            lsn += 1
        self._previous, self._next_lsn = previous, lsn
        self._buffer = buffer[offset:]
        return records

    @staticmethod
    def _corrupt(lsn: int, why: str) -> CorruptionError:
        return CorruptionError(f"entry {lsn} of the change-log is damaged: {why}")


@dataclass(frozen=True, slots=True)
class Scan:
    """How far a piece of log follows from the position before it."""

    position: Position  # behind the last good record
    good_bytes: int  # of whole, good records
    damage: str  # what is wrong with the next record; empty if the data just ends, perhaps within a record


def scan_chain(data: bytes, after: Position) -> Scan:
    """Checks the chain as :class:`ChainReader` does, but keeps no records and says where it breaks.

    For reading a log after a crash, where a break is to be expected; half the time that making records takes.
    """
    previous: bytes = after.digest
    lsn = after.lsn + 1
    offset, end, damage = 0, len(data), ""
    while end - offset >= RECORD_HEADER_BYTES:
        length, found_lsn, digest = HEADER.unpack_from(data, offset)
        if found_lsn != lsn or not 0 < length <= PAYLOAD_BYTES_MAX:
            damage = f"its header says LSN {found_lsn}, {length} bytes"
            break
        behind = offset + RECORD_HEADER_BYTES + length
        if behind > end:
            break
        payload = data[offset + RECORD_HEADER_BYTES : behind]
        if sha256(previous + _LSN.pack(lsn) + payload).digest() != digest:
            damage = "its digest does not match its content and the entry before it"
            break
        previous = digest
        offset = behind
        lsn += 1
    return Scan(Position(Lsn(lsn - 1), Digest(previous)), offset, damage)


def read_headers(data: bytes, first_lsn: Lsn) -> Iterator[tuple[Lsn, Digest, int]]:
    """(LSN, digest, offset in ``data``) of each whole record in ``data``, without checking digests."""
    offset, lsn, end = 0, int(first_lsn), len(data)
    while end - offset >= RECORD_HEADER_BYTES:
        length, found_lsn, digest = HEADER.unpack_from(data, offset)
        if found_lsn != lsn or end - offset - RECORD_HEADER_BYTES < length:
            return
        yield Lsn(lsn), digest, offset
        offset += RECORD_HEADER_BYTES + length
        lsn += 1
