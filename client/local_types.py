"""What goes into a local copy and what comes out: the values that store and session speak in. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from understudy.v1 import log_pb2


class Received(NamedTuple):
    """One change as a server sent it."""

    raw: bytes  # a serialized Change
    hmac: bytes  # 32 bytes


class Applied(NamedTuple):
    """One change that has entered a copy."""

    client: bytes
    number: int
    own: bool  # it was in this directory's queue, and has left it
    version: int
    keys: list[bytes]
    ranges: list[tuple[bytes, bytes]]


class Queued(NamedTuple):
    """One own change that is not confirmed yet."""

    number: int
    client: bytes  # under whose id it was made
    operations: Sequence[log_pb2.Operation]
    size: int  # bytes


class ForeignChange(Exception):
    """An own client id and number came back with other operations: somebody else uses this id.

    Attributes:
        client: the id.
        first, last: own changes in the queue of these numbers are surely not what the server has under them.
    """

    def __init__(self, message: str, client: bytes, *, first: int, last: int) -> None:
        super().__init__(message)
        self.client = client
        self.first = first
        self.last = last
