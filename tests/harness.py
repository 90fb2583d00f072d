"""Real processes for tests: the command line as people run it, ended by its pid whatever happens.

A test takes the fixture ``processes`` (in ``conftest.py``)::

    primary = processes.primary(tmp_path / "a")
    replica = processes.replica(tmp_path / "b", primary.address)
    primary.kill()
    processes.run("promote", tmp_path / "b")
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import pytest

# Long, because a loaded machine is no reason for a test to fail, and reached only by tests that fail anyway.
DEADLINE_S = 60.0
_POLL_S = 0.01
_SHOWN_BYTES = 8_000  # of a process's standard error, where a test fails
ANY_PORT = "127.0.0.1:0"

_T = TypeVar("_T")


def wait_until(
    condition: Callable[[], _T], *, deadline_s: float = DEADLINE_S, what: Callable[[], str] = str
) -> _T:
    """The first true value that ``condition`` returns.

    Fails the test after ``deadline_s``, with the last value and with what ``what`` has to say then.
    """
    deadline = time.monotonic() + deadline_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {deadline_s:g} s (last value: {value!r}) {what()}")
        time.sleep(_POLL_S)
    return value


def plain_environment() -> dict[str, str]:
    """The environment without settings of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("UNDERSTUDY_")}


class Running(Protocol):
    """What a :class:`Process` needs of a ``subprocess.Popen``, or of something like it."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float) -> int: ...

    def send_signal(self, number: int) -> None: ...


# Starts a command with these arguments and this environment; its output goes to the two files.
Launch = Callable[[list[str], dict[str, str], Path, Path], Running]


def as_module(arguments: list[str], environment: dict[str, str], stdout: Path, stderr: Path) -> Running:
    """``python -m understudy.cli ARGUMENTS``."""
    return as_program("-m", "understudy.cli")(arguments, environment, stdout, stderr)


def as_program(*program: str | Path) -> Launch:
    """``python PROGRAM ARGUMENTS``, for a program that runs the command line under odd circumstances."""

    def launch(arguments: list[str], environment: dict[str, str], stdout: Path, stderr: Path) -> Running:
        with open(stdout, "wb") as out, open(stderr, "wb") as err:
            return subprocess.Popen(
                [sys.executable, *map(str, program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
            )

    return launch


class Process:
    """A command that runs. Its output goes to files, so that it never has to wait for a reader."""

    def __init__(
        self, arguments: list[str], folder: Path, environment: dict[str, str], launch: Launch = as_module
    ) -> None:
        folder.mkdir()
        self.arguments = arguments
        self._stdout = folder / "stdout"
        self._stderr = folder / "stderr"
        self._process = launch(arguments, environment, self._stdout, self._stderr)
        self._place = contextlib.ExitStack()  # where it served

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        """What it has logged so far."""
        return self._stderr.read_text()

    @property
    def address(self) -> str:
        """Where it serves, once it says so."""
        return wait_until(self._ready_address, what=self.describe)

    def _ready_address(self) -> str:
        line = self.stdout
        if not line.endswith("\n") and self._process.poll() is not None:
            pytest.fail(f"it ended before it was ready\n{self.describe()}")
        return line.partition(" ready on ")[2].strip() if line.endswith("\n") else ""

    def kill(self) -> None:
        """SIGKILL, and waits until it is gone."""
        self.send(signal.SIGKILL)
        self.wait()

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        self.send(signal.SIGTERM)
        return self.wait()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to it, and to nothing else."""
        self._process.send_signal(number)

    def wait(self, *, deadline_s: float = DEADLINE_S) -> int:
        """Its exit code, once it has ended; negative where a signal ended it."""
        try:
            code = self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end within {deadline_s:g} s\n{self.describe()}")
        self._keep_port()
        return code

    def _keep_port(self) -> None:
        """Takes care that nobody is given its port by chance: tests that run at the same time ask for free ones.

        A socket that is bound and does not listen refuses connections as none would, and whoever asks for this very
        port gets it.
        """
        place = self._place.enter_context(socket.socket())
        with contextlib.suppress(OSError, ValueError):  # its successor listens there by now; it never served
            host, _, port = self.stdout.partition(" ready on ")[2].strip().rpartition(":")
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind((host, int(port)))

    def forget(self) -> None:
        """Gives its port back."""
        self._place.close()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def describe(self) -> str:
        """What it was, how it ended, and the end of what it logged."""
        return (
            f"understudy {' '.join(self.arguments)}: exit code {self._process.poll()}, stderr:\n"
            f"{self.stderr[-_SHOWN_BYTES:]}"
        )


class Processes:
    """Starts processes, and ends all that are left when the test is over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)
        self._started: list[Process] = []
        self.environment = plain_environment()

    def start(self, *arguments: str | Path, launch: Launch = as_module) -> Process:
        """Starts ``understudy ARGUMENTS`` and does not wait for anything."""
        words = [str(argument) for argument in arguments]
        folder = self._folder / f"{next(self._numbers)}-{words[0]}"
        process = Process(words, folder, self.environment, launch)
        self._started.append(process)
        return process

    def primary(self, data_dir: Path, *flags: str | Path, launch: Launch = as_module) -> Process:
        """A primary on a free port, serving."""
        return self._serving("primary", "--data-dir", data_dir, *_on_any_port(flags), launch=launch)

    def replica(
        self, data_dir: Path, primary: str, *flags: str | Path, launch: Launch = as_module
    ) -> Process:
        """A replica of the primary at that address, on a free port, serving."""
        return self._serving(
            "replica", "--data-dir", data_dir, "--primary", primary, *_on_any_port(flags), launch=launch
        )

    def _serving(self, *arguments: str | Path, launch: Launch) -> Process:
        process = self.start(*arguments, launch=launch)
        assert process.address
        return process

    def run(
        self, *arguments: str | Path, code: int = 0, stdin: bytes = b"", deadline_s: float = DEADLINE_S
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs ``understudy ARGUMENTS`` to its end, which must come with exit code ``code``."""
        words = [str(argument) for argument in arguments]
        done = subprocess.run(
            [sys.executable, "-m", "understudy.cli", *words],
            input=stdin,
            capture_output=True,
            timeout=deadline_s,
            env=self.environment,
        )
        if done.returncode != code:
            pytest.fail(
                f"understudy {' '.join(words)}: exit code {done.returncode}, not {code}\n"
                f"stdout: {done.stdout.decode(errors='replace')}\nstderr: {done.stderr.decode(errors='replace')}"
            )
        return done

    def close(self) -> None:
        """Kills what still runs, and prints what all have logged: pytest shows that where the test failed."""
        for process in self._started:
            if process.is_running:
                process.kill()
            process.forget()
            print(process.describe())


def complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line that a command said on standard error: what went wrong, without a traceback."""
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("understudy: ")
    return line


def _on_any_port(flags: tuple[str | Path, ...]) -> tuple[str | Path, ...]:
    return flags if "--listen" in flags else ("--listen", ANY_PORT, *flags)
