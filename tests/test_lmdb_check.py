"""The check of an LMDB file's structure: silent about what LMDB does on purpose, loud about anything else."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
from lmdb.verify import verify

from understudy.common.errors import StorageFailed
from understudy.common.lmdb_check import check_structure

PAGE_BYTES = 4096
BRANCH, LEAF, OVERFLOW = 1, 2, 4
PAGES_AT = 12  # of an overflow page's count of pages


def make(path: Path, *steps: Callable[[lmdb.Transaction[bytes]], object]) -> Path:
    """An environment after one transaction for each step."""
    with lmdb.open(str(path), map_size=1 << 30, sync=False) as env:
        for step in steps:
            with env.begin(write=True) as txn:
                step(txn)
    return path


def some_of_everything(txn: lmdb.Transaction[bytes]) -> None:
    """Rows enough for a branch page, and values long enough for overflow pages."""
    for number in range(300):
        txn.put(b"%06d" % number, bytes(200))
    for number in range(20):
        txn.put(b"long %d" % number, b"v" * 10_000)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A file with branch, leaf and overflow pages, all of them in use."""
    path = make(tmp_path / "sound", some_of_everything)
    assert check_structure(path) == []
    return path / "data.mdb"


def pages_of(data: bytes, kind: int) -> list[int]:
    """Offsets of pages of one kind, but for those inside of overflow chains."""
    found, at = [], 2 * PAGE_BYTES
    while at < len(data):
        flags, count = struct.unpack_from("=HI", data, at + 10)
        if flags == kind:
            found.append(at)
        at += PAGE_BYTES * (count if flags == OVERFLOW else 1)
    return found


def test_a_long_value_overwritten_by_a_shorter_one_in_one_transaction_is_sound(tmp_path: Path) -> None:
    """LMDB keeps the chain of pages it has, which py-lmdb's own verifier takes for three kinds of damage."""

    def put_twice(txn: lmdb.Transaction[bytes]) -> None:
        txn.put(b"key", b"v" * 20_000)
        txn.put(b"key", b"v" * 3_000)
        txn.put(b"next", b"v" * 9_000)

    path = make(tmp_path / "env", put_twice)
    reported = verify(str(path))
    assert "header mp_pages 5 != OVPAGES(3000)=1" in reported[0]
    assert len(reported) == 3
    assert check_structure(path) == []
    make(path, lambda txn: txn.delete(b"key"))
    assert verify(str(path)) == []  # LMDB has given all five pages back


def test_a_list_of_free_pages_in_a_chain_too_long_is_sound(tmp_path: Path) -> None:
    """A commit alone can leave a record of the list of free pages in a longer chain, each key being put once."""
    found = []
    for pages in range(1005, 1025):
        found += _problems_of_a_commit(tmp_path / f"{pages}", pages)
    assert any("freeDB DB: overflow page" in problem for problem in found)


def _problems_of_a_commit(path: Path, pages: int) -> list[str]:
    """What py-lmdb's verifier says of a file after commits that found nearly ``pages`` free pages."""

    def fill(txn: lmdb.Transaction[bytes]) -> None:
        for number in range(pages):
            txn.put(b"%06d" % number, b"v" * 3_000, append=True)

    def clear(txn: lmdb.Transaction[bytes]) -> None:
        for number in range(1, pages - 1):
            txn.delete(b"%06d" % number)

    make(path, fill, clear, lambda txn: txn.put(b"a", b""), lambda txn: txn.put(b"b", b""))
    assert check_structure(path) == []
    problems: list[str] = verify(str(path))
    return problems


def test_a_deleted_long_value_put_again_shorter_gets_a_chain_of_its_own(tmp_path: Path) -> None:
    """What a checkpoint does with a range that is deleted and then written never makes a chain too long."""

    def delete_and_put(txn: lmdb.Transaction[bytes]) -> None:
        for number in range(20):
            txn.delete(b"long %d" % number)
            txn.put(b"long %d" % number, b"v" * 3_000)

    path = make(tmp_path / "env", some_of_everything, delete_and_put, delete_and_put)
    assert verify(str(path)) == []


@pytest.mark.parametrize("pages", [0, 1, 2, 4, 5, 1 << 31])
def test_a_chain_of_another_length_than_was_written_is_reported(sound: Path, pages: int) -> None:
    """A head that claims less pages than the value needs, or pages that others have, is damage."""
    data = bytearray(sound.read_bytes())
    head = pages_of(data, OVERFLOW)[3]
    assert struct.unpack_from("=I", data, head + PAGES_AT) == (3,)
    struct.pack_into("=I", data, head + PAGES_AT, pages)
    sound.write_bytes(data)
    problems = check_structure(sound)
    assert problems
    if pages < 3:
        assert f"header mp_pages {pages} != OVPAGES(10000)=3" in problems[0]


@pytest.mark.parametrize("kind", [BRANCH, LEAF, OVERFLOW])
@pytest.mark.parametrize("offset", [*range(8), *range(10, 14)])
def test_a_flipped_bit_in_the_head_of_a_page_is_reported(sound: Path, kind: int, offset: int) -> None:
    """Page number, type, and number of nodes or pages are all checked, bit by bit."""
    data = bytearray(sound.read_bytes())
    at = pages_of(data, kind)[0] + offset
    # Bytes of node pointers, two for each: LMDB and the check alike make an odd number even.
    skipped = 1 if offset == 12 and kind != OVERFLOW else 0
    for bit in range(skipped, 8):
        data[at] ^= 1 << bit
        sound.write_bytes(data)
        assert check_structure(sound), bit
        data[at] ^= 1 << bit
    sound.write_bytes(data)
    assert check_structure(sound) == []


@pytest.mark.parametrize("kind", [BRANCH, LEAF])
def test_a_flipped_bit_in_a_node_is_reported(sound: Path, kind: int) -> None:
    """A child's page number, a chain's page number, a key out of order."""
    data = bytearray(sound.read_bytes())
    at = pages_of(data, kind)[-1]
    (node,) = struct.unpack_from("=H", data, at + 16 + 2)
    if kind == BRANCH:
        data[at + node] ^= 4
    else:
        data[at + node + 8] ^= 0x80
    sound.write_bytes(data)
    assert check_structure(sound)


def test_a_file_that_was_cut_off_is_reported(sound: Path) -> None:
    """Pages behind the end of the file that something refers to are missing."""
    with sound.open("r+b") as file:
        file.truncate(sound.stat().st_size // 2)
    assert check_structure(sound)


def test_a_file_that_is_not_lmdbs_is_reported(tmp_path: Path) -> None:
    """What can't be checked at all is a problem like any other."""
    path = tmp_path / "data.mdb"
    path.write_bytes(b"not a database" * 1000)
    assert "not an LMDB data file" in check_structure(path)[0]


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """No file is no answer."""
    with pytest.raises(StorageFailed, match=r"data\.mdb"):
        check_structure(tmp_path)
