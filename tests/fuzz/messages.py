"""Several messages as one input: behind each other, each behind its length; and operations for them to carry."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from google.protobuf.message import DecodeError

from understudy.common.operations import Add, Delete, DeleteRange, Put, Update, to_protos

MESSAGES_MAX = 20
OPERATIONS = to_protos(
    (Put(b"key", b"value"), Update(b"key", b""), Delete(b"k"), DeleteRange(b"a", b""), Add(b"n", 5))
)


def framed(messages: Iterable[Any]) -> bytes:
    """Messages behind each other, each behind its length in two bytes."""
    raw = [message.SerializeToString() for message in messages]
    return b"".join(len(one).to_bytes(2, "little") + one for one in raw)


def frames(data: bytes) -> Iterator[bytes]:
    """The messages of an input, the first :data:`MESSAGES_MAX`."""
    at = 0
    for _ in range(MESSAGES_MAX):
        if at >= len(data):
            return
        length = int.from_bytes(data[at : at + 2], "little")
        yield data[at + 2 : at + 2 + length]
        at += 2 + length


def parsed(kind: Any, data: bytes) -> Iterator[Any]:
    """Messages as gRPC hands them out, which ends a call where one is none."""
    with contextlib.suppress(DecodeError):
        for frame in frames(data):
            yield kind.FromString(frame)
