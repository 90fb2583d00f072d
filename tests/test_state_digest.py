"""State digests: their bytes, which two nodes must agree on, and their arithmetic."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from understudy.common.state_digest import (
    EMPTY_STATE,
    decode,
    encode,
    realm_hash,
    sum_pairs,
    sum_stored_pairs,
)

PAIRS = st.dictionaries(st.binary(min_size=1, max_size=480), st.binary(max_size=100), max_size=20)
PREFIX = bytes(7) + b"\x05"


def test_the_bytes_of_a_realms_digest_are_fixed() -> None:
    """One pair's digest is XXH3-128, in canonical form, over key length, key and value."""
    found = encode(sum_pairs([b"apple"], [b"3"]))
    assert found == xxh3_128_digest(b"\x05\0\0\0apple3")
    assert found.hex() == "2326fca4debc33f09d6c634e10fdac61"


def test_the_bytes_of_a_servers_digest_are_fixed() -> None:
    """One realm's digest is XXH3-128 over path length, path, version, entries and the realm's digest."""
    state = bytes(range(16))
    found = encode(realm_hash("/é", 7, 2, state))
    assert found == xxh3_128_digest(struct.pack("<I", 3) + "/é".encode() + struct.pack("<QQ", 7, 2) + state)
    assert found.hex() == "a084830b1cca3ddf0da8e99768326451"


def test_nothing_has_the_digest_zero() -> None:
    """A realm without pairs has the digest of 16 zero bytes."""
    assert encode(sum_pairs([], [])) == EMPTY_STATE == bytes(16)


def test_the_border_between_key_and_value_counts() -> None:
    """Moving a byte from the value to the key changes the digest."""
    assert sum_pairs([b"ab"], [b"c"]) != sum_pairs([b"a"], [b"bc"])


@given(pairs=PAIRS, order=st.randoms())
def test_the_order_does_not_count(pairs: dict[bytes, bytes], order: object) -> None:
    """The same pairs in any order have the same digest."""
    shuffled = list(pairs.items())
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert sum_pairs([k for k, _ in shuffled], [v for _, v in shuffled]) == sum_pairs(pairs, pairs.values())


@given(pairs=PAIRS)
def test_pairs_as_stored_come_to_the_same(pairs: dict[bytes, bytes]) -> None:
    """Pairs read from the store, with the realm's id before each key, have the digest of the pairs alone."""
    stored = [(memoryview(PREFIX + key), memoryview(value)) for key, value in pairs.items()]
    assert sum_stored_pairs(stored) == sum_pairs(pairs, pairs.values())


@given(pairs=PAIRS, others=PAIRS)
def test_what_is_taken_out_leaves_no_trace(pairs: dict[bytes, bytes], others: dict[bytes, bytes]) -> None:
    """Adding pairs and subtracting others, below zero in between, comes back to the same 16 bytes."""
    one, other = sum_pairs(pairs, pairs.values()), sum_pairs(others, others.values())
    assert encode(decode(encode(one - other)) + other) == encode(one)
    assert len(encode(one - other)) == 16
