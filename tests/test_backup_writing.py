"""Files of a backup as they are written, and the pinned store as it is read for them: all bytes, in whatever pieces."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from understudy.backup import writing
from understudy.backup.contents import Member
from understudy.backup.progress import Meter
from understudy.backup.writing import describe_file, write_member
from understudy.common import snapshot_ranges
from understudy.common.pinned_snapshot import PinnedSnapshot

BLOCK = 4096
MIB = 1 << 20


def in_memory(data: bytes) -> memoryview:
    """The same bytes where a page of memory begins."""
    memory = mmap.mmap(-1, max(len(data), 1))
    memory[: len(data)] = data
    return memoryview(memory)[: len(data)]


def pieces(seed: int) -> Iterator[bytes | memoryview]:
    """Pieces of all kinds, more than fit into a few writes: copied and not, in whole blocks and not, of zeros too."""
    source = random.Random(seed)
    for _ in range(40):
        blocks, odd = source.randrange(64), source.randrange(BLOCK)
        yield in_memory(source.randbytes((blocks + 1) * BLOCK))
        yield source.randbytes(blocks * BLOCK)
        if source.random() < 0.2:
            yield source.randbytes(odd)
            yield in_memory(source.randbytes(BLOCK))
            yield source.randbytes(BLOCK - odd)
        if source.random() < 0.2:
            yield in_memory(bytes(MIB))
    yield from [in_memory(source.randbytes(BLOCK)) for _ in range(2_000)]  # more than one write takes
    yield source.randbytes(odd)


def write(root: Path, seed: int) -> bytes:
    """Writes them, checks that the file is what it is said to be, and returns what it should hold."""
    wanted = b"".join(pieces(seed))
    entry = write_member(root, Member("store/data.mdb", len(wanted), pieces(seed)), Meter(None))
    assert entry == describe_file(root, "store/data.mdb")
    return wanted


@pytest.mark.parametrize("way", ["past the cache", "through the cache", "in short writes"])
def test_a_file_is_its_pieces_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """G8: new, over the half of an attempt before, and over something else; its digest is of what was written."""
    if way == "through the cache":
        monkeypatch.setattr(writing, "_open_past_cache", lambda path: None)
    if way == "in short writes":
        pwritev = os.pwritev
        monkeypatch.setattr(os, "pwritev", lambda fd, data, at: pwritev(fd, [data[0][:BLOCK]], at))
    path = tmp_path / "store/data.mdb"
    wanted = write(tmp_path, 1)
    assert path.read_bytes() == wanted
    path.write_bytes(wanted[: len(wanted) // 2])
    write(tmp_path, 1)
    assert path.read_bytes() == wanted
    wanted = write(tmp_path, 2)
    assert path.read_bytes() == wanted


def test_what_is_all_zeros_is_left_as_a_hole(tmp_path: Path) -> None:
    """Much of a store may be free pages, which take no space in its backup."""
    member = Member("data", 64 * MIB, [in_memory(bytes(MIB))] * 64)
    write_member(tmp_path, member, Meter(None))
    assert (tmp_path / "data").stat().st_blocks * 512 < MIB


@pytest.mark.parametrize("is_mapped", [True, False])
def test_a_pinned_store_is_the_same_in_pieces_as_by_ranges_while_commits_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_mapped: bool
) -> None:
    """G8: neither free pages, which commits fill meanwhile, nor the meta pages are taken as they are in the file."""
    if not is_mapped:
        monkeypatch.setattr(snapshot_ranges, "_POPULATE_READ", -1)
    source = random.Random(0)
    with lmdb.open(str(tmp_path), map_size=1 << 30, lib_version=0) as env:
        for number in range(4):
            _put(env, source, 20_000)
            with env.begin(write=True) as txn:
                for key in range(number, 20_000, 5):
                    txn.delete(b"%d" % key)
        with PinnedSnapshot.open(env, tmp_path / "data.mdb") as pinned:
            found = []
            for piece in pinned.content():
                found.append(bytes(piece))
                if len(found) % 200 == 1:
                    _put(env, source, 100)
            assert any(isinstance(piece, memoryview) for piece in pinned.content()) == is_mapped
            assert b"".join(found) == b"".join(map(pinned.read, range(pinned.ranges)))


def _put(env: lmdb.Environment, source: random.Random, count: int) -> None:
    with env.begin(write=True) as txn:
        for _ in range(count):
            txn.put(b"%d" % source.randrange(20_000), source.randbytes(500))
