"""What is written: realm, keys and values, the same for a server and for the raw LMDB that it is compared with."""

from __future__ import annotations

import random
from collections.abc import Iterator

REALM = "/bench"


def realm(number: int) -> str:
    """One of many realms."""
    return f"{REALM}/{number:06d}"


def key(number: int) -> bytes:
    """A key of 16 bytes; keys sort as their numbers do."""
    return b"%016d" % number


def random_pairs(*, seed: int, keys: int, value_bytes: int) -> Iterator[tuple[bytes, bytes]]:
    """Pairs without end: keys drawn evenly from the first ``keys``, values that can't be compressed."""
    source = random.Random(seed)
    while True:
        yield key(int(source.random() * keys)), source.randbytes(value_bytes)


def ordered_pairs(*, seed: int, keys: int, value_bytes: int) -> Iterator[tuple[bytes, bytes]]:
    """Each of the first ``keys`` keys once, in order."""
    source = random.Random(seed)
    for number in range(keys):
        yield key(number), source.randbytes(value_bytes)
