"""A server on a restored backup, in a process of its own that has read all of it when it says so.

It is another program, since a backup knows nothing of servers and clients; it ends with whoever started it, because its
standard input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from understudy.common.errors import CorruptionError, ExitCode, UnderstudyError

MODULE = "understudy.cli.drill_server"
ANY_PORT = "127.0.0.1:0"
_END_S_MAX = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadReport:
    """What a client has read of a server."""

    address: str
    pairs: dict[str, int]  # by realm


# Starts a server on a data directory, reads all of it, and ends the server.
ReadAll = Callable[[Path], ReadReport]


def read_all(directory: Path) -> ReadReport:
    """A :data:`ReadAll` with a real server and a real client.

    Raises:
        CorruptionError: what it holds can't be read.
        UnderstudyError: the server can't be started.
    """
    with proven_server(directory, ANY_PORT) as (report, _):
        return report


@contextlib.contextmanager
def proven_server(directory: Path, listen: str) -> Iterator[tuple[ReadReport, Callable[[], object]]]:
    """A server that was read completely: what was found, and a function that waits until it ends by itself.

    It serves until the block ends.

    Raises:
        CorruptionError: what it holds can't be read.
        UnderstudyError: the server can't be started.
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
            line = process.stdout.readline()
            if not line.endswith(b"\n"):
                code = process.wait()
                said.seek(0)
                raise _problem(code, said.read().decode(errors="replace"))
            facts = json.loads(line)
            yield ReadReport(address=facts["address"], pairs=facts["pairs"]), process.wait
        finally:
            process.stdin.close()
            _end(process)


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
