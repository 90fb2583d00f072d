"""A server on a restored backup, in a process of its own that has read all of it when it says so.

It is another program, since a backup knows nothing of servers and clients; it ends with whoever started it, because its
standard input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from understudy.common.errors import CorruptionError, ExitCode, Unavailable, UnderstudyError

MODULE = "understudy.cli.drill_server"
ANY_PORT = "127.0.0.1:0"
STALLED_S = 300.0  # a server that reads tells of it every second; one that starts takes seconds
_END_S_MAX = 60.0
_CHECK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadReport:
    """What a client has read of a server."""

    address: str
    realms: int
    pairs: int  # of all realms


# Starts a server on a data directory, reads all of it, and ends the server.
ReadAll = Callable[[Path], ReadReport]


def read_all(directory: Path, *, check: Callable[[], None] = lambda: None) -> ReadReport:
    """A :data:`ReadAll` with a real server and a real client.

    Args:
        check: called every second meanwhile; it may raise what ends the reading.

    Raises:
        CorruptionError: what it holds can't be read.
        UnderstudyError: the server can't be started, or hangs.
    """
    with proven_server(directory, ANY_PORT, check=check) as (report, _):
        return report


@contextlib.contextmanager
def proven_server(
    directory: Path, listen: str, *, check: Callable[[], None] = lambda: None, stalled_s: float = STALLED_S
) -> Iterator[tuple[ReadReport, Callable[[], object]]]:
    """A server that was read completely: what was found, and a function that waits until it ends by itself.

    It serves until the block ends.

    Args:
        check: called every second while it is read; it may raise what ends that.
        stalled_s: for so long nothing may be read.

    Raises:
        CorruptionError: what it holds can't be read.
        UnderstudyError: the server can't be started, or hangs.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE, str(directory), listen],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is for us, who end it in order
        )
        assert process.stdin is not None, "it is a pipe"
        assert process.stdout is not None, "it is a pipe"
        try:
            facts = _read_report(process.stdout, check, stalled_s)
            if facts is None:
                code = process.wait()
                said.seek(0)
                raise _problem(code, said.read().decode(errors="replace"))
            yield ReadReport(**facts), process.wait
        except _Stalled:
            process.kill()  # it would not end by itself either
            raise Unavailable(
                f"a server on the restored backup has read nothing for {stalled_s:g} s",
                remedy="run the drill again where memory, disk and processors are less busy",
            ) from None
        finally:
            process.stdin.close()
            _end(process)


class _Stalled(Exception):
    """The server goes on with nothing: that says nothing about the backup."""


def _read_report(out: IO[bytes], check: Callable[[], None], stalled_s: float) -> dict[str, Any] | None:
    """The facts at the end of the reading, None if it ends without; what is told before only shows that it goes on.

    Raises:
        _Stalled: it does not.
    """
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_hand_on, args=(out, lines), name="drill-output", daemon=True).start()
    heard_s = time.monotonic()
    while time.monotonic() - heard_s < stalled_s:
        check()
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=min(_CHECK_EVERY_S, stalled_s))
            heard_s = time.monotonic()
            if not line.endswith(b"\n"):
                return None
            facts: dict[str, Any] = json.loads(line)
            if "pairs" in facts:
                return facts
    raise _Stalled


def _hand_on(out: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    for line in out:
        lines.put(line)
    lines.put(b"")


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_END_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _problem(code: int, said: str) -> UnderstudyError:
    last = said.strip().rpartition("\n")[2] or "it said nothing"
    kind = CorruptionError if code == ExitCode.CORRUPT else UnderstudyError
    return kind(f"a server on the restored backup ended with exit code {code}: {last}")


def _environment() -> dict[str, str]:
    """Ours, without settings that are meant for the real server, and with the modules that this process found."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("UNDERSTUDY_")}
    return {**plain, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
