"""What every system that is compared can do, so that a row is written once for all of them."""

from __future__ import annotations

import shutil
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from processes import BenchFailed, Process, wait_until
from stage import Bench

Durability = Literal["local", "replica", "applied"]
HOST = "127.0.0.1"
COMMAND_S_MAX = 900.0
_MARKER_S_MAX = 600.0
_POLL_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """What a system is preloaded with, and what is written to it: values of ``value_bytes`` at the first ``keys`` keys.

    The key behind the last is for markers, which tell how far a replica is.
    """

    keys: int
    value_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """What came of writers that each wait for their answer before they go on."""

    rate: float  # commits a second
    p50_s: float
    p99_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a node can be asked, and in whose language."""

    system: str
    address: str  # HOST:PORT


class Client(Protocol):
    """A blocking connection to one node, for markers."""

    def put(self, key: int, value: int) -> bool:
        """Writes; returns whether it was acknowledged. False: the node takes no writes (yet)."""

    def get(self, key: int) -> int:
        """Reads; -1 where there is nothing."""

    def close(self) -> None:
        """Ends the connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paced:
    """A steady load that runs."""

    process: Process
    finish: Callable[[], float]  # waits for its end; returns the commits a second that it achieved


class System(ABC):
    """One system that replicates what it commits. Its nodes are started here, and ended with the bench's processes."""

    name: ClassVar[str]
    programs: ClassVar[Mapping[str, str]] = {}  # that it needs -> Debian package that has it
    durabilities: ClassVar[Mapping[Durability, str]]  # that it has -> how that is said in its own terms
    settings: ClassVar[Sequence[str]]  # what it was set to, beyond its defaults

    def __init__(self, bench: Bench, folder: Path, data: DataSet) -> None:
        self.bench = bench
        self.folder = folder
        self.data = data
        folder.mkdir()

    @classmethod
    def missing(cls) -> list[str]:
        """Debian packages to install before it can be measured."""
        return sorted({package for program, package in cls.programs.items() if not find(program)})

    @classmethod
    @abstractmethod
    def version(cls) -> str:
        """Which one is installed."""

    @abstractmethod
    def make(self) -> None:
        """Makes its nodes, preloads them, and stops them."""

    @abstractmethod
    def start(self, durability: Durability) -> None:
        """Starts all its nodes; returns when they are up to date."""

    @abstractmethod
    def stop(self) -> None:
        """Stops all its nodes."""

    @abstractmethod
    def timed(self, writers: int, seed: int) -> Timed:
        """Commits by so many writers at once, for the scale's window."""


class Pair(System):
    """A system with one primary and one replica that can take its place."""

    @abstractmethod
    def make_primary(self) -> None:
        """Makes a primary, preloads it, and leaves it running without a replica."""

    @abstractmethod
    def start_primary(self, durability: Durability) -> None:
        """Starts the primary on its directory."""

    @abstractmethod
    def stop_primary(self) -> None:
        """Stops it cleanly."""

    @abstractmethod
    def kill_primary(self) -> None:
        """Kills all its processes."""

    @abstractmethod
    def new_replica(self) -> None:
        """Begins a replica with nothing in its directory; returns when its process runs, up to date or not."""

    @abstractmethod
    def start_replica(self) -> None:
        """Starts the replica on its directory."""

    @abstractmethod
    def stop_replica(self) -> None:
        """Stops it cleanly."""

    @abstractmethod
    def remove_replica(self) -> None:
        """Removes the directory of a stopped replica."""

    @abstractmethod
    def promote(self) -> None:
        """Makes the replica the primary, and forgets the old one. It may take writes only a little later."""

    @abstractmethod
    def endpoint(self, *, replica: bool) -> Endpoint:
        """Where a node serves."""

    @abstractmethod
    def client(self, *, replica: bool) -> Client:
        """Connects to a node."""

    @abstractmethod
    def counted(self, transactions: int, seed: int) -> None:
        """Commits so many transactions of one put, as fast as it goes."""

    @abstractmethod
    def paced(self, rate: int, seconds: float, seed: int) -> Paced:
        """Begins so many commits a second, whatever becomes of those before."""

    def cut_replica_off(self) -> None:
        """The replica misses what is committed from now on."""
        self.stop_replica()

    def let_replica_rejoin(self) -> None:
        """Ends that."""
        self.start_replica()

    def make(self) -> None:
        self.bench.say(f"{self.name}: preloading {self.data.keys:,} keys")
        self.make_primary()
        self.new_replica()
        self.wait_for_replica()
        self.stop()

    def start(self, durability: Durability) -> None:
        self.start_primary(durability)
        self.start_replica()
        self.wait_for_replica()

    def stop(self) -> None:
        self.stop_replica()
        self.stop_primary()

    def mark(self, value: int) -> None:
        """Commits a marker on the primary."""
        client = self.client(replica=False)
        try:
            if not client.put(self.data.keys, value):
                raise BenchFailed(f"{self.name}: the primary takes no writes")
        finally:
            client.close()

    def wait_for_mark(self, value: int) -> None:
        """Returns when a read at the replica shows the marker, asked for every 10 ms."""
        client = self.client(replica=True)
        try:
            wait_until(
                lambda: client.get(self.data.keys) == value,
                what=f"{self.name}'s replica has all",
                deadline_s=_MARKER_S_MAX,
                every_s=_POLL_S,
            )
        finally:
            client.close()

    def wait_for_replica(self) -> None:
        """Returns when the replica has all that was committed before."""
        value = next(_marks)
        self.mark(value)
        self.wait_for_mark(value)


_marks = iter(range(1, 1 << 31))


def next_mark() -> int:
    """A value for a marker that none before had."""
    return next(_marks)


def find(program: str) -> str:
    """The path of an installed program; empty if there is none. Debian keeps most of PostgreSQL's out of PATH."""
    homes = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda home: int(home.parent.name))
    return next((str(home / program) for home in reversed(homes) if (home / program).exists()), "") or (
        shutil.which(program) or ""
    )


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def run(command: Sequence[str], *, timeout_s: float = COMMAND_S_MAX) -> str:
    """Runs a command to its end; returns what it printed.

    Raises:
        BenchFailed: it failed, or did not end in time.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise BenchFailed(f"{command[0]} did not end within {timeout_s:g} s") from None
    if done.returncode:
        raise BenchFailed(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2_000:]}")
    return done.stdout
