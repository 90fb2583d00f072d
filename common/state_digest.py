"""State digests: what a realm, and a whole server, holds, in 16 bytes, whatever the order it came about in.

A realm's state digest is the sum, modulo 2^128, of XXH3-128 over ``key length u32 | key | value`` of all its
pairs. The server's is the sum of XXH3-128 over ``path length u32 | path | version u64 | entries u64 | state
digest 16 bytes`` of all its realms. Lengths and numbers are little-endian; a digest is stored with its most
significant byte first, which is also XXH3's canonical form. ``docs/FORMAT.md`` has the same facts for people.

A sum lets a checkpoint take out what it overwrites and put in what it writes. In memory it is an ``int`` that
may leave 0 … 2^128 - 1 on the way; :func:`encode` brings it back.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TypeVar

from xxhash import xxh3_128_intdigest

from understudy.common.types import KEY_BYTES_MAX

_Buffer = TypeVar("_Buffer", bytes, memoryview)

STATE_DIGEST_BYTES = 16
EMPTY_STATE = bytes(STATE_DIGEST_BYTES)  # of a realm without pairs, of a server without realms
REALM_PREFIX_BYTES = 8  # the store has the realm's id in front of every key

_MODULUS = 1 << (8 * STATE_DIGEST_BYTES)
# Looked up, since packing each key's length anew would take as long as the hash itself.
_KEY_LENGTH = tuple(struct.pack("<I", length) for length in range(KEY_BYTES_MAX + 1))
_STORED_KEY_LENGTH = (b"",) * REALM_PREFIX_BYTES + _KEY_LENGTH
_NUMBERS = struct.Struct("<QQ")


def encode(total: int) -> bytes:
    """The 16 bytes that stand for a sum."""
    return (total % _MODULUS).to_bytes(STATE_DIGEST_BYTES, "big")


def decode(digest: bytes) -> int:
    """The inverse of :func:`encode`."""
    return int.from_bytes(digest, "big")


def sum_pairs(keys: Iterable[bytes], values: Iterable[bytes]) -> int:
    """The sum over pairs, given as columns of equal length; keys have at most ``KEY_BYTES_MAX`` bytes."""
    digest, length = xxh3_128_intdigest, _KEY_LENGTH
    return sum([digest(length[len(key)] + key + value) for key, value in zip(keys, values, strict=True)])


def sum_stored_pairs(pairs: Iterable[tuple[_Buffer, _Buffer]]) -> int:
    """The sum over pairs as they lie in the store, with the realm's id before each key."""
    digest, length, join, skip = xxh3_128_intdigest, _STORED_KEY_LENGTH, b"".join, REALM_PREFIX_BYTES
    return sum([digest(join((length[len(key)], key[skip:], value))) for key, value in pairs])


def realm_hash(path: str, version: int, entries: int, state_digest: bytes) -> int:
    """What one realm adds to the server's state digest."""
    raw = path.encode()
    return xxh3_128_intdigest(
        struct.pack("<I", len(raw)) + raw + _NUMBERS.pack(version, entries) + state_digest
    )
