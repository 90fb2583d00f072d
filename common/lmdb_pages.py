"""What is read of an LMDB file without LMDB: its meta pages, and the list of its free pages.

What may live here: facts of LMDB's data format 1 (LMDB 0.9, 64 bits, the machine's byte order), nothing that knows
what a store or a snapshot is. Sizes and offsets are those of ``MDB_page``, ``MDB_meta``, ``MDB_db`` and
``MDB_node`` in LMDB's ``mdb.c``.

Pages that a snapshot lists as free may be written at any time by transactions that come after it, all others stay
as they are while the snapshot is pinned.
"""

from __future__ import annotations

import array
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from understudy.common.errors import RESTORE, CorruptionError
from understudy.common.files import storage_errors

META_PAGES = 2
_MAGIC = 0xBEEFC0DE
_DATA_VERSION = 1
_PAGE_SIZES = frozenset(1 << bits for bits in range(8, 16))
_PAGES_MAX = 1 << 28  # what a store's map of 1 TiB holds: a damaged number must not be taken for a length
_DEPTH_MAX = 32  # LMDB's CURSOR_STACK

_HEADER = struct.Struct("=QHHHH")  # page number, pad, flags, lower, upper
# magic, version, address, map size; free list's tree: page size, …, root; main tree; last page, transaction id
_META = struct.Struct("=IIQQI36xQ48xQQ")
_META_BYTES = _HEADER.size + _META.size
_TXN_ID = struct.Struct("=Q")
_TXN_ID_AT = _META_BYTES - _TXN_ID.size
_PAGE_NUMBER = struct.Struct("=Q")
_NODE = struct.Struct("=HHHH")  # size low, size high, flags, key size; in a branch 1 to 3 are a page number
_BRANCH, _LEAF, _OVERFLOW, _META_FLAG = 0x01, 0x02, 0x04, 0x08
_BIG_DATA = 0x01
_NO_ROOT = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """What a meta page says. ``free_root`` is None where no page is free."""

    page_bytes: int
    last_page: int
    txn_id: int
    free_root: int | None

    @property
    def file_bytes(self) -> int:
        """The file's length with all pages up to the last used one."""
        return (self.last_page + 1) * self.page_bytes


def parse_meta(page: bytes, path: Path) -> Meta:
    """Reads a meta page, or the beginning of one.

    Raises:
        CorruptionError: it is none, or none of this format.
    """
    if len(page) < _META_BYTES or not _HEADER.unpack_from(page)[2] & _META_FLAG:
        raise CorruptionError(f"{path} is not an LMDB file: it has no meta page", remedy=RESTORE)
    magic, version, _, _, page_bytes, free_root, last_page, txn_id = _META.unpack_from(page, _HEADER.size)
    if magic != _MAGIC or version != _DATA_VERSION:
        raise CorruptionError(f"{path} is not an LMDB file of data format {_DATA_VERSION}", remedy=RESTORE)
    if page_bytes not in _PAGE_SIZES or not META_PAGES - 1 <= last_page < _PAGES_MAX:
        detail = f"page size {page_bytes}, last page {last_page}"
        raise CorruptionError(f"the meta page of {path} is damaged: {detail}", remedy=RESTORE)
    return Meta(
        page_bytes=page_bytes,
        last_page=last_page,
        txn_id=txn_id,
        free_root=None if free_root == _NO_ROOT else free_root,
    )


def read_metas(fd: int, path: Path) -> tuple[tuple[Meta, bytes], tuple[Meta, bytes]]:
    """Both meta pages, parsed and as they are, in their order.

    Raises:
        CorruptionError, StorageFailed.
    """
    with storage_errors("read", path):
        page_bytes = parse_meta(os.pread(fd, _META_BYTES, 0), path).page_bytes
        first = os.pread(fd, page_bytes, 0)
        second = os.pread(fd, page_bytes, page_bytes)
    return (parse_meta(first, path), first), (parse_meta(second, path), second)


def lone_meta_pages(page: bytes, meta: Meta) -> bytes:
    """Both meta pages of a file in which only the snapshot of ``page`` exists.

    LMDB reads transaction n at slot n & 1 and takes the slot with the higher number when it opens a file. The
    other one gets the same snapshot under the number before, so that either is whole.
    """
    slot = meta.txn_id & 1
    other = bytearray(page)
    _PAGE_NUMBER.pack_into(other, 0, 1 - slot)
    # Nothing was ever committed before number 0, and LMDB has it in both slots.
    _TXN_ID.pack_into(other, _TXN_ID_AT, max(meta.txn_id - 1, 0))
    return bytes(other) + page if slot else page + bytes(other)


def free_pages(fd: int, meta: Meta, path: Path) -> bytearray:
    """One byte for each page of the snapshot, 1 where it is free.

    Raises:
        CorruptionError: the list of free pages is damaged.
        StorageFailed: it can't be read.
    """
    free = bytearray(meta.last_page + 1)
    if meta.free_root is None:
        return free
    try:
        for record in _Tree(fd, meta, path).records(meta.free_root, _DEPTH_MAX):
            for number in _page_numbers(record, meta):
                free[number] = 1
    except (struct.error, IndexError, ValueError) as error:
        raise CorruptionError(
            f"the list of free pages in {path} is damaged: {error}", remedy=RESTORE
        ) from error
    return free


def _page_numbers(record: bytes, meta: Meta) -> array.array[int]:
    numbers = array.array("Q")
    numbers.frombytes(record)
    count = numbers.pop(0)
    if count != len(numbers):
        raise ValueError(f"a record of {len(numbers)} pages says that it has {count}")
    if count and (min(numbers) < META_PAGES or max(numbers) > meta.last_page):
        raise ValueError(f"it names pages {min(numbers)} to {max(numbers)}")
    return numbers


class _Tree:
    """The tree of records, each a count and so many page numbers, that lists the free pages."""

    def __init__(self, fd: int, meta: Meta, path: Path) -> None:
        self._fd = fd
        self._meta = meta
        self._path = path
        self._left = meta.last_page  # each page is met once at most: the bound on what a damaged file costs

    def records(self, number: int, depth: int) -> Iterator[bytes]:
        if not depth or not self._left:
            raise ValueError("its tree has no end")
        self._left -= 1
        page = self._read(number, self._meta.page_bytes)
        own_number, _, flags, lower, _ = _HEADER.unpack_from(page)
        if own_number != number or not flags & (_BRANCH | _LEAF):
            raise ValueError(f"page {number} says that it is page {own_number} of type {flags:#x}")
        for (at,) in struct.iter_unpack("=H", page[_HEADER.size : lower]):
            low, high, node_flags, key_bytes = _NODE.unpack_from(page, at)
            if flags & _BRANCH:
                yield from self.records(low | high << 16 | node_flags << 32, depth - 1)
            else:
                yield self._value(
                    page, at + _NODE.size + key_bytes, low | high << 16, big=node_flags & _BIG_DATA
                )

    def _value(self, page: bytes, at: int, length: int, *, big: int) -> bytes:
        if not big:
            return page[at : at + length]
        (number,) = _PAGE_NUMBER.unpack_from(page, at)
        data = self._read(number, _HEADER.size + length)
        if not _HEADER.unpack_from(data)[2] & _OVERFLOW:
            raise ValueError(f"page {number} should hold a long record")
        return data[_HEADER.size :]

    def _read(self, number: int, length: int) -> bytes:
        if not META_PAGES <= number <= self._meta.last_page:
            raise ValueError(f"it names page {number}")
        if length > self._meta.file_bytes:
            raise ValueError(f"a record has {length} bytes")
        with storage_errors("read", self._path):
            data = os.pread(self._fd, length, number * self._meta.page_bytes)
        if len(data) < length:
            raise ValueError(f"page {number} is cut off")
        return data
