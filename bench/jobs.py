"""What the bench's helper processes are told; each is their one argument, as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Literal, TypeVar

_J = TypeVar("_J")
LocalDurability = Literal["durable", "relaxed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FillJob:
    """Each of the first ``keys`` keys once, in order, in large transactions; several are under way."""

    address: str
    keys: int
    value_bytes: int
    puts_each: int  # of one transaction
    mode: str = "fill"


@dataclass(frozen=True, slots=True, kw_only=True)
class FillRealmsJob:
    """So many realms of ``keys_each`` keys, each made by one transaction; many are under way."""

    address: str
    realms: int
    keys_each: int
    value_bytes: int
    mode: str = "fill_realms"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedJob:
    """Writers that each wait for their answer before they go on, for ``warm_s`` and then ``window_s``.

    ``watched``: processes whose processor time is read at both ends of the window, by name.
    """

    address: str
    writers: int
    keys: int
    value_bytes: int
    warm_s: float
    window_s: float
    seed: int
    watched: dict[str, int] = field(default_factory=dict)
    mode: str = "timed"


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedJob:
    """One writer, for ``warm_s`` and then ``window_s``; gives when each of its commits was asked for and answered."""

    address: str
    keys: int
    value_bytes: int
    warm_s: float
    window_s: float
    seed: int
    mode: str = "traced"


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedJob:
    """So many transactions of ``puts_each`` random puts, by writers that wait for their answers."""

    address: str
    writers: int
    keys: int
    value_bytes: int
    transactions: int
    puts_each: int
    seed: int
    mode: str = "counted"


@dataclass(frozen=True, slots=True, kw_only=True)
class PacedJob:
    """``rate`` transactions a second, begun when they are due, whatever became of those before (an open loop)."""

    address: str
    rate: int
    seconds: float
    keys: int
    value_bytes: int
    seed: int
    mode: str = "paced"


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchJob:
    """Asks a node again and again which LSN its reads show, until standard input ends."""

    address: str
    every_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EchoJob:
    """Messages of ``message_bytes`` to the echo server at ``address`` and back; an empty address: be the server."""

    address: str
    message_bytes: int = 0
    in_flight: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RawJob:
    """Writes to a bare LMDB environment; with ``batches`` empty, makes it and fills it in order.

    ``batches`` says how many pairs of the sequence go into each transaction.
    """

    folder: str
    keys: int
    value_bytes: int
    seed: int
    batches: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalJob:
    """So many local transactions of one put into a synced realm that has no server, one after the other."""

    directory: str
    durability: LocalDurability
    transactions: int
    keys: int
    value_bytes: int
    mode: str = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadJob:
    """So many local transactions of one put without a server; then with one, until all are uploaded."""

    address: str
    directory: str
    transactions: int
    keys: int
    value_bytes: int
    mode: str = "upload"


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadJob:
    """The whole of a realm into a new directory."""

    address: str
    directory: str
    mode: str = "download"


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowJob:
    """One realm open in several directories; a line says when all are up to date. Ends with standard input."""

    address: str
    directories: list[str]
    mode: str = "follow"


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveJob:
    """``rate`` local transactions of one put a second, begun when they are due, while a server is connected.

    ``watched``: processes whose processor time is read at both ends, by name.
    """

    address: str
    directory: str
    rate: int
    seconds: float
    keys: int
    value_bytes: int
    watched: dict[str, int]
    mode: str = "drive"


@dataclass(frozen=True, slots=True, kw_only=True)
class RealmsJob:
    """``realms_each`` realms of its own open in each directory; a line says when all are up to date.

    Then ``rate`` local transactions a second for ``seconds``, all in all. Ends with standard input.
    """

    address: str
    directories: list[str]
    first_realm: int
    realms_each: int
    begin_s: float  # when to begin, by CLOCK_MONOTONIC
    rate: int
    seconds: float
    value_bytes: int
    mode: str = "realms"


def parse_job(kind: type[_J], text: str) -> _J:
    """The job that a helper was started with."""
    return kind(**json.loads(text))


def argument() -> str:
    """This process's one argument."""
    return sys.argv[1]
