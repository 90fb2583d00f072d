"""One segment file: the bytes of its block, finding entries in it, and how it grows."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import xxhash
from faulty_files import FaultyFiles
from hypothesis import given
from hypothesis import strategies as st
from log_helpers import CLUSTER, LOG, chain

from understudy.common.errors import CorruptionError, DiskFull, NewerFormat, StorageFailed
from understudy.common.segment import (
    RECORDS_START,
    SEGMENT_BYTES,
    Segment,
    SegmentHeader,
    SegmentWriter,
    Watermark,
    boundary_behind,
    is_segment_name,
    segment_name,
)
from understudy.common.types import Digest, Epoch, Lsn, Position

PATH = LOG / "00000000000000000008.seg"
BEFORE = Position(Lsn(7), Digest(b"d" * 32))
HEADER = SegmentHeader(
    cluster=CLUSTER, epoch=Epoch(5), first_lsn=Lsn(8), first_offset=900, previous=BEFORE.digest
)
WATERMARK = Watermark(first_lsn=Lsn(8), last_lsn=Lsn(9), start_offset=900, end_offset=1300)
# Small ones, one that spans several steps of the index, and enough for several places in the index.
PAYLOADS = [b"a", b"b" * 300, b"c" * 150_000, *(bytes([i]) * 1000 for i in range(200)), b"z" * 70_000, b"end"]


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def reader_of(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: data[offset - HEADER.first_offset :][:length]


def batch(writer_end: int, data: bytes, lsn: int) -> Watermark:
    return Watermark(
        first_lsn=Lsn(lsn), last_lsn=Lsn(lsn), start_offset=writer_end, end_offset=writer_end + len(data)
    )


def test_header_bytes_are_as_documented() -> None:
    """Sector 0 has the fields at the places that docs/FORMAT.md gives."""
    sector = HEADER.encode()
    assert len(sector) == 512
    assert sector[:16] == b"UNDSTLOG" + bytes.fromhex("01000000 00000000")
    assert sector[16:32] == CLUSTER
    assert sector[32:56] == b"".join(n.to_bytes(8, "little") for n in (5, 8, 900))
    assert sector[56:88] == BEFORE.digest
    assert sector[88:480] == bytes(392)
    assert sector[480:] == sha256(sector[:480]).digest()
    assert SegmentHeader.decode(sector, PATH) == HEADER


def test_watermark_bytes_are_as_documented() -> None:
    """Sector 1 has the fields at the places that docs/FORMAT.md gives."""
    sector = WATERMARK.encode()
    assert sector[:32] == b"".join(n.to_bytes(8, "little") for n in (8, 9, 900, 1300))
    assert sector[32:504] == bytes(472)
    assert sector[504:] == xxhash.xxh3_64_intdigest(sector[:504]).to_bytes(8, "little")
    assert len(sector) == 512
    assert Watermark.decode(sector, PATH) == WATERMARK


def test_any_flipped_bit_of_header_or_watermark_is_found() -> None:
    """No bit of the two sectors can change unnoticed, and the error names the file and the bytes."""
    header, watermark = HEADER.encode(), WATERMARK.encode()
    for at, bit in itertools.product(range(512), range(8)):
        with pytest.raises(CorruptionError, match=f"{PATH}: bytes 0 to 511"):
            SegmentHeader.decode(flipped(header, at, bit), PATH)
        with pytest.raises(CorruptionError, match=f"{PATH}: bytes 512 to 1023"):
            Watermark.decode(flipped(watermark, at, bit), PATH)


def test_cut_off_header_or_watermark_is_found() -> None:
    """A file too short for its block is damaged, not an index error."""
    with pytest.raises(CorruptionError):
        SegmentHeader.decode(HEADER.encode()[:-1], PATH)
    with pytest.raises(CorruptionError):
        Watermark.decode(b"", PATH)


def test_newer_format_is_told_from_damage() -> None:
    """A whole header of a later version asks for an upgrade; a header of something else does not."""
    newer = HEADER.encode()[:8] + (2).to_bytes(4, "little") + HEADER.encode()[12:480]
    with pytest.raises(NewerFormat, match="format 2"):
        SegmentHeader.decode(newer + sha256(newer).digest(), PATH)
    other = b"SOMETHNG" + HEADER.encode()[8:480]
    with pytest.raises(CorruptionError, match="not a segment"):
        SegmentHeader.decode(other + sha256(other).digest(), PATH)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (segment_name(Lsn(17)), True),
        ("00000000000000000017.seg", True),
        ("17.seg", False),
        ("00000000000000000017", False),
        ("00000000000000000017.seg.new", False),
        ("lost+found", False),
    ],
)
def test_only_twenty_digits_and_suffix_name_a_segment(name: str, expected: bool) -> None:
    """Other files in the directory are left alone."""
    assert is_segment_name(name) is expected


def test_boundaries_lie_at_multiples_of_the_segment_size() -> None:
    """Where a segment ends depends on the log offset alone."""
    assert boundary_behind(0) == boundary_behind(SEGMENT_BYTES - 1) == SEGMENT_BYTES
    assert boundary_behind(SEGMENT_BYTES) == 2 * SEGMENT_BYTES


@given(st.lists(st.integers(min_value=0, max_value=len(PAYLOADS) - 1), max_size=30))
def test_entries_are_found_in_any_order(wanted: list[int]) -> None:
    """Each entry's position and end are found, whatever was looked up before and thus is in the index."""
    made = chain(BEFORE, PAYLOADS)
    ends = list(itertools.accumulate((len(data) for data, _ in made), initial=HEADER.first_offset))[1:]
    segment, read = Segment(PATH, HEADER), reader_of(b"".join(data for data, _ in made))
    for at in wanted:
        assert segment.find(made[at][1].lsn, read) == (made[at][1], ends[at])


def test_index_spares_reading_from_the_start() -> None:
    """A second look-up reads little."""
    made = chain(BEFORE, PAYLOADS)
    data = b"".join(data for data, _ in made)
    segment, lengths = Segment(PATH, HEADER), list[int]()

    def read(offset: int, length: int) -> bytes:
        piece = reader_of(data)(offset, length)
        lengths.append(len(piece))
        return piece

    segment.find(made[-1][1].lsn, read)
    lengths.clear()
    segment.find(made[-1][1].lsn, read)
    assert sum(lengths) < 200_000 < len(data) - 70_000 * 2


def test_index_stays_sparse() -> None:
    """However entries are noted, the places in the index lie at least 64 KiB apart."""
    ends = list(itertools.accumulate((len(data) for data, _ in chain(BEFORE, PAYLOADS)), initial=900))[1:]
    noted = [(Lsn(8 + i), end) for i, end in enumerate(ends)]
    for order in (noted, noted[::-1], noted[::3] + noted[::-2]):
        segment = Segment(PATH, HEADER)
        for lsn, end in order:
            segment.note(lsn, end)
        assert len(segment._offsets) > 3
        assert all(later - earlier >= 65536 for earlier, later in itertools.pairwise(segment._offsets))


def test_g3_damaged_digest_is_never_taken_for_another_history() -> None:
    """G3: a bit flipped in an entry or in the header before it is reported as damage with file, byte and LSN."""
    made = chain(BEFORE, [*PAYLOADS[:2], b"x" * 40])
    data = b"".join(data for data, _ in made)
    starts = list(itertools.accumulate((len(data) for data, _ in made), initial=0))
    for at in (*range(starts[1], starts[1] + 44), *range(starts[2], starts[3])):
        with pytest.raises(CorruptionError, match=rf"{PATH}: entry (9|10), at byte \d+, is damaged"):
            Segment(PATH, HEADER).find(Lsn(10), reader_of(flipped(data, at)))


def test_entry_that_is_cut_off_is_not_found() -> None:
    """An entry that the file does not hold whole is damage."""
    made = chain(BEFORE, [b"one", b"two"])
    data = b"".join(data for data, _ in made)
    for length in range(len(data)):
        with pytest.raises(CorruptionError):
            Segment(PATH, HEADER).find(Lsn(9), reader_of(data[:length]))


def test_g9_full_disk_while_creating_leaves_nothing() -> None:
    """G9: a segment that found no space is gone again, and can be created when there is some."""
    files = FaultyFiles()
    files.space = RECORDS_START + 5000
    with pytest.raises(DiskFull):
        SegmentWriter.create(LOG, HEADER, files)
    assert files.names(LOG) == []
    assert files.open_count == 0
    files.space = None
    SegmentWriter.create(LOG, HEADER, files)
    assert files.names(LOG) == [segment_name(Lsn(8))]


def test_g9_room_is_made_before_a_record_is_written() -> None:
    """G9: a disk that is full shows before any byte of a batch is in the file."""
    files = FaultyFiles()
    writer = SegmentWriter.create(LOG, HEADER, files)
    before = files.content(PATH)
    files.space = len(before) + 600
    data = b"r" * (len(before) + 1000)
    with pytest.raises(DiskFull):
        writer.append(data, batch(900, data, 8))
    assert files.content(PATH) == before + bytes(512)
    files.space = None
    writer.append(data, batch(900, data, 8))
    assert files.content(PATH)[RECORDS_START:].startswith(data)


@pytest.mark.parametrize("nth", [1, 2])
def test_g9_full_disk_while_overwriting_leaves_no_part_of_the_batch(nth: int) -> None:
    """G9: on a file system that copies on write a full disk shows late; then what was written is taken back."""
    files = FaultyFiles()
    writer = SegmentWriter.create(LOG, HEADER, files)
    files.fail("write", nth, errno.ENOSPC, written_bytes=600)
    with pytest.raises(DiskFull):
        writer.append(b"r" * 700, batch(900, b"r" * 700, 8))
    assert not any(files.content(PATH)[RECORDS_START:])
    writer.append(b"s" * 50, batch(900, b"s" * 50, 8))
    assert files.content(PATH)[RECORDS_START:].rstrip(b"\0") == b"s" * 50


def test_full_disk_reported_by_a_sync_is_final() -> None:
    """After a failed sync nobody knows what is on disk, so even a full disk can't be tried again."""
    files = FaultyFiles()
    writer = SegmentWriter.create(LOG, HEADER, files)
    files.fail("sync", 1, errno.ENOSPC)
    with pytest.raises(StorageFailed):
        writer.append(b"r", batch(900, b"r", 8))


def test_nothing_is_preallocated_behind_the_boundary() -> None:
    """Room made ahead ends where the segment does, unless a record goes beyond."""
    files = FaultyFiles()
    header = replace(HEADER, first_offset=SEGMENT_BYTES - 5000)
    writer = SegmentWriter.create(LOG, header, files)
    writer.seal(header.first_offset)
    writer.append(b"r" * 10, batch(header.first_offset, b"r" * 10, 8))
    assert len(files.content(PATH)) == RECORDS_START + 5000
    writer.append(b"r" * 6000, batch(header.first_offset + 10, b"r" * 6000, 9))
    assert len(files.content(PATH)) == RECORDS_START + 6010


def test_sealing_cuts_off_the_zeros() -> None:
    """A sealed segment ends with its last record."""
    files = FaultyFiles()
    writer = SegmentWriter.create(LOG, HEADER, files)
    writer.append(b"r" * 10, batch(900, b"r" * 10, 8))
    writer.seal(910)
    assert files.content(PATH)[RECORDS_START:] == b"r" * 10


def test_path_is_named_by_the_first_lsn() -> None:
    """The name sorts as the LSN does."""
    assert Path(segment_name(Lsn(2))) < Path(segment_name(Lsn(10)))
