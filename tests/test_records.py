"""Records of the change-log: framing, chain, and the checks of both."""

from __future__ import annotations

import itertools
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_helpers import chain

from understudy.common.errors import CorruptionError
from understudy.common.records import (
    HEADER,
    PAYLOAD_BYTES_MAX,
    RECORD_HEADER_BYTES,
    ChainReader,
    encode_record,
    read_headers,
    scan_chain,
)
from understudy.common.types import START, Digest, Lsn, Position

PAYLOADS = [b"one", b"two" * 30, bytes(70), b"\xff"]
DATA = b"".join(data for data, _ in chain(START, PAYLOADS))
END = chain(START, PAYLOADS)[-1][1]

payload_lists = st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=12)


def feed_in_pieces(data: bytes, cuts: list[int]) -> tuple[ChainReader, list[bytes]]:
    reader = ChainReader(START)
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return reader, [r.payload for a, b in itertools.pairwise(edges) for r in reader.feed(data[a:b])]


def test_record_bytes_are_as_documented() -> None:
    """A record is length u32, LSN u64, digest, payload, little-endian, as docs/FORMAT.md says."""
    previous = Digest(b"p" * 32)
    data, digest = encode_record(previous, Lsn(0x0102030405060708), b"payload")
    assert digest == sha256(previous + bytes.fromhex("0807060504030201") + b"payload").digest()
    assert data == bytes.fromhex("07000000 0807060504030201") + digest + b"payload"
    assert chain(START, [b"a"])[0][0] == bytes.fromhex(
        "01000000 0100000000000000 fd12b7a19d2de41e2b02cb742377db9c6f15675cf41dda7702c6c515254a1170 61"
    )


@given(payload_lists, st.lists(st.integers(min_value=0), max_size=20))
def test_reader_gives_back_what_was_encoded_however_it_is_cut(payloads: list[bytes], cuts: list[int]) -> None:
    """A stream of records cut anywhere gives the same records, each with its position."""
    made = chain(START, payloads)
    reader, read = feed_in_pieces(b"".join(data for data, _ in made), cuts)
    assert read == payloads
    assert reader.position == made[-1][1]
    assert reader.pending_bytes == 0


def test_g3_any_flipped_bit_is_found_and_nothing_of_the_chunk_is_used() -> None:
    """G3: no bit of a record can change unnoticed, and the records before it in a chunk are not handed out."""
    for at, bit in itertools.product(range(len(DATA)), range(8)):
        reader = ChainReader(START)
        damaged = DATA[:at] + bytes([DATA[at] ^ 1 << bit]) + DATA[at + 1 :]
        try:
            read = reader.feed(damaged)
        except CorruptionError:
            assert reader.position == START
        else:  # a length that reaches beyond the chunk: the record does not come to an end
            assert reader.pending_bytes > 0
            assert len(read) < len(PAYLOADS)


@pytest.mark.parametrize("length", [0, PAYLOAD_BYTES_MAX + 1])
def test_g9_impossible_lengths_are_refused_before_anything_is_buffered(length: int) -> None:
    """G9: a length of zero or above the limit is damage at once, not something to wait for."""
    header = HEADER.pack(length, 1, bytes(32))
    with pytest.raises(CorruptionError, match="entry 1 "):
        ChainReader(START).feed(header)
    assert scan_chain(header, START).damage


def test_record_of_another_lsn_or_history_is_refused() -> None:
    """A record that doesn't follow, by number or by digest, is refused, and the error names the LSN wanted."""
    with pytest.raises(CorruptionError, match="entry 1 "):
        ChainReader(START).feed(chain(END, [b"next"])[0][0])
    other = Position(END.lsn, Digest(b"x" * 32))
    with pytest.raises(CorruptionError, match=f"entry {END.lsn + 1} "):
        ChainReader(other).feed(chain(END, [b"next"])[0][0])


@given(st.integers(min_value=0, max_value=len(DATA)))
def test_scan_ends_where_the_data_ends(cut: int) -> None:
    """Scanning a log that just ends gives the whole records before and finds no damage."""
    reached, good_bytes = START, 0
    for data, position in chain(START, PAYLOADS):
        if good_bytes + len(data) > cut:
            break
        reached, good_bytes = position, good_bytes + len(data)
    scan = scan_chain(DATA[:cut], START)
    assert (scan.position, scan.good_bytes, scan.damage) == (reached, good_bytes, "")


def test_scan_stops_before_the_damaged_record() -> None:
    """A flipped bit ends the scan right before its record, whatever byte it is in."""
    made = chain(START, PAYLOADS)
    start = len(made[0][0])
    for at in range(start, start + len(made[1][0])):
        damaged = DATA[:at] + bytes([DATA[at] ^ 0x80]) + DATA[at + 1 :]
        scan = scan_chain(damaged, START)
        assert (scan.position, scan.good_bytes) == (made[0][1], start)


def test_headers_are_read_without_their_payloads() -> None:
    """Headers give LSN, digest and place of each whole record."""
    places = [0]
    for data, _ in chain(START, PAYLOADS):
        places.append(places[-1] + len(data))
    found = list(read_headers(DATA[:-1], Lsn(1)))
    assert [(lsn, offset) for lsn, _, offset in found] == list(zip([1, 2, 3], places, strict=False))
    assert [Position(lsn, digest) for lsn, digest, _ in found] == [p for _, p in chain(START, PAYLOADS)][:3]
    assert places[-1] - places[-2] == RECORD_HEADER_BYTES + 1
