"""What disk and transport do by themselves, measured beside the rows that depend on them."""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from jobs import EchoJob
from processes import HERE, Process, Processes
from results import quantile

RECORD_BYTES = 250  # of the log, for one put of a 100-byte value
_SYNCS = 1_000
_ROUND_TRIPS = 10_000
_ECHO_S = 1.0
_IN_FLIGHT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Physics:
    """What a commit can't be faster than."""

    sync_s: float  # median of fdatasync behind a write of RECORD_BYTES
    loopback_s: float  # median round trip of RECORD_BYTES over plain TCP
    echo_s: float  # median round trip of one message of RECORD_BYTES over gRPC
    echo_rate: float  # messages a second that come back, with 64 on their way

    @property
    def replicated_commit_s(self) -> float:
        """Two syncs and two round trips, one after the other: what a replicated commit waits for."""
        return 2 * (self.sync_s + self.echo_s)


def measure(processes: Processes, folder: Path) -> Physics:
    """Measures all; takes about three seconds."""
    server = processes.helper("echo.py", EchoJob(address=""))
    address = server.first_line().strip()
    one = _echo(processes, address, in_flight=1)
    many = _echo(processes, address, in_flight=_IN_FLIGHT)
    server.kill()
    loopback_s = _loopback_seconds(processes)
    return Physics(
        sync_s=sync_seconds(folder), loopback_s=loopback_s, echo_s=one["p50_s"], echo_rate=many["rate"]
    )


def _loopback_seconds(processes: Processes) -> float:
    server = processes.program(Process, "loopback.py", [sys.executable, str(HERE / "loopback.py")])
    message = bytes(RECORD_BYTES)
    times_s = []
    with socket.create_connection(("127.0.0.1", int(server.first_line()))) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_ROUND_TRIPS):
            began_s = time.monotonic()
            peer.sendall(message)
            peer.recv(RECORD_BYTES, socket.MSG_WAITALL)
            times_s.append(time.monotonic() - began_s)
    server.wait()
    return quantile(times_s, 0.5)


def _echo(processes: Processes, address: str, *, in_flight: int) -> dict[str, float]:
    job = EchoJob(address=address, message_bytes=RECORD_BYTES, in_flight=in_flight, seconds=_ECHO_S)
    found: dict[str, float] = processes.run("echo.py", job)
    return found


def sync_seconds(folder: Path) -> float:
    """Median seconds of a write of RECORD_BYTES with fdatasync, into a file that has its blocks already.

    That is how the change-log writes: a file that grows needs a commit of the file system's journal as well.
    """
    path = folder / "fdatasync"
    record = os.urandom(RECORD_BYTES)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(fd, bytes(_SYNCS * RECORD_BYTES), 0)
        os.fsync(fd)
        times_s = []
        for number in range(_SYNCS):
            began_s = time.monotonic()
            os.pwrite(fd, record, number * RECORD_BYTES)
            os.fdatasync(fd)
            times_s.append(time.monotonic() - began_s)
    finally:
        os.close(fd)
        path.unlink()
    return quantile(times_s, 0.5)
