"""Real processes for the bench: nodes by their command line, and helpers, all ended by their own process ids."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import accounts
import grpc
from load import REALM

from understudy.v1 import admin_pb2, admin_pb2_grpc, data_pb2, data_pb2_grpc

HERE = Path(__file__).resolve().parent
READY_S_MAX = 60.0
HELPER_S_MAX = 900.0
END_S_MAX = 70.0  # a checkpoint under way may take a minute before it is cut off
_CALL_S_MAX = 120.0
_SHOWN_BYTES = 4_000  # of a process's log, where something failed
_ANY_PORT = "127.0.0.1:0"


class BenchFailed(Exception):
    """What was to be measured did not run."""


def wait_until(
    condition: Callable[[], bool], *, what: str, deadline_s: float = 120.0, every_s: float
) -> None:
    """Returns once ``condition`` holds.

    Raises:
        BenchFailed: it does not within ``deadline_s``; ``what`` says what was waited for.
    """
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            raise BenchFailed(f"not within {deadline_s:g} s: {what}")
        time.sleep(every_s)


class Process:
    """One process. What it logs goes to a file."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as err:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the bench, which ends its processes in order
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def first_line(self) -> str:
        """The first line that it prints."""
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        if not poll.poll(READY_S_MAX * 1000):
            raise self.failure(f"printed nothing within {READY_S_MAX:g} s")
        return self._process.stdout.readline().decode()

    def result(self) -> Any:
        """Closes its input, waits for its end, and gives what it printed, as JSON.

        Raises:
            BenchFailed: it failed.
        """
        try:
            printed, _ = self._process.communicate(timeout=HELPER_S_MAX)
        except subprocess.TimeoutExpired:
            raise self.failure(f"did not end within {HELPER_S_MAX:g} s") from None
        if self._process.returncode:
            raise self.failure(f"ended with exit code {self._process.returncode}")
        return json.loads(printed)

    def failure(self, what: str) -> BenchFailed:
        """An error with the end of its log."""
        return BenchFailed(f"{self.name} {what}:\n{self.logged()[-_SHOWN_BYTES:]}")

    def logged(self) -> str:
        """All that it wrote to standard error so far."""
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL, and waits until it is gone."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and waits until it is gone."""
        self._end(signal.SIGTERM)

    def wait(self) -> None:
        """Waits until it has ended by itself."""
        self._end(None)

    def _end(self, number: signal.Signals | None) -> None:
        if number is not None and self._process.poll() is None:
            self._process.send_signal(number)
        try:
            self._process.wait(END_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise self.failure("had to be killed") from None
        finally:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None


_P = TypeVar("_P", bound=Process)


class Node(Process):
    """A primary or a replica that serves."""

    def __init__(
        self, role: str, directory: Path, log: Path, flags: list[str], traced: Path | None = None
    ) -> None:
        arguments = [
            role,
            "--data-dir",
            str(directory),
            "--listen",
            _ANY_PORT,
            "--log-format",
            "json",
            *flags,
        ]
        started_s = time.monotonic()
        command = understudy_command(*arguments)
        if traced is not None:
            command = [sys.executable, "-P", str(HERE / "traced.py"), str(traced), *arguments]
        super().__init__(role, command, log)
        self._started_s = started_s
        self.address = ""
        self.ready_s = 0.0  # from the start of its process until it said that it serves
        self._channel: grpc.Channel | None = None

    def wait_until_ready(self) -> None:
        """Returns when it serves.

        Raises:
            BenchFailed: it does not.
        """
        self.address = self.first_line().partition(" ready on ")[2].strip()
        self.ready_s = time.monotonic() - self._started_s
        if not self.address:
            raise self.failure("ended before it was ready")
        self._channel = grpc.insecure_channel(self.address)

    @property
    def _connection(self) -> grpc.Channel:
        assert self._channel is not None, "it serves"
        return self._channel

    def status(self) -> admin_pb2.StatusResponse:
        """Its own account of itself."""
        return admin_pb2_grpc.AdminStub(self._connection).Status(
            admin_pb2.StatusRequest(), timeout=_CALL_S_MAX, wait_for_ready=True
        )

    def visible_lsn(self) -> int:
        """Up to which LSN its reads show entries; 0 while there is nothing to read."""
        request = data_pb2.GetRequest(realm=REALM)
        try:
            return data_pb2_grpc.DataStub(self._connection).Get(request, timeout=_CALL_S_MAX).lsn
        except grpc.RpcError:
            return 0  # no copy yet, or no such realm in it

    def checkpoint(self) -> int:
        """Has a primary write a checkpoint of all that it has now; returns its LSN."""
        request = admin_pb2.StateDigestsRequest(checkpoint=True)
        admin_pb2_grpc.AdminStub(self._connection).StateDigests(request, timeout=_CALL_S_MAX)
        return self.status().checkpoint_lsn

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of that name that it has logged."""
        lines = (line for line in self.logged().splitlines() if line.startswith("{"))
        return [event for event in map(json.loads, lines) if event.get("event") == name]

    def pids(self) -> dict[str, int]:
        """Process ids of the node and of its checkpoint process."""
        checkpoints = accounts.checkpoint_process(self.pid)
        if not checkpoints:
            raise self.failure("has no checkpoint process")
        return {self.name: self.pid, f"{self.name}'s checkpoints": checkpoints}

    def _end(self, number: signal.Signals | None) -> None:
        if self._channel is not None:
            self._channel.close()
        super()._end(number)


class Processes:
    """Starts processes, and ends all that are left when the block ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)
        self._started: list[Process] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_all()

    def end_all(self) -> None:
        """Kills those that still run."""
        for process in reversed(self._started):
            if process.is_running:
                process.kill()
        self._started.clear()

    def primary(self, directory: Path, *flags: str, traced: Path | None = None) -> Node:
        """A primary that serves; it notes in ``traced`` when commits pass which point."""
        return self._node("primary", directory, list(flags), traced)

    def replica(self, directory: Path, primary: Node | str, *flags: str, traced: Path | None = None) -> Node:
        """A replica that serves; it may have no copy yet."""
        address = primary.address if isinstance(primary, Node) else primary
        return self._node("replica", directory, ["--primary", address, "--id", "bench", *flags], traced)

    def _node(self, role: str, directory: Path, flags: list[str], traced: Path | None) -> Node:
        node = Node(role, directory, self._log(role), flags, traced)
        self._started.append(node)
        node.wait_until_ready()
        return node

    def helper(self, script: str, job: Any) -> Process:
        """Starts one of the bench's own scripts, with a job (a dataclass) as its argument."""
        command = [sys.executable, str(HERE / script), json.dumps(dataclasses.asdict(job))]
        process = Process(script, command, self._log(script.removesuffix(".py")))
        self._started.append(process)
        return process

    def program(self, kind: type[_P], name: str, command: list[str]) -> _P:
        """Starts any other program as a process of that kind."""
        process = kind(name, command, self._log(name))
        self._started.append(process)
        return process

    def run(self, script: str, job: Any) -> Any:
        """Runs one of the bench's own scripts to its end; returns what it printed, as JSON."""
        return self.helper(script, job).result()

    def command(self, *arguments: str) -> tuple[Any, float]:
        """Runs ``understudy ARGUMENTS``; returns what it printed, as JSON, and its wall time in seconds."""
        started_s = time.monotonic()
        process = Process(arguments[0], understudy_command(*arguments), self._log(arguments[0]))
        self._started.append(process)
        printed = process.result()
        return printed, time.monotonic() - started_s

    def _log(self, name: str) -> Path:
        return self._folder / f"{next(self._numbers):03d}-{name}.log"


def understudy_command(*arguments: str) -> list[str]:
    """The command line of an ``understudy`` command; -P: what lies in the working directory is not ours."""
    return [sys.executable, "-P", "-m", "understudy.cli", *arguments]


def _environment() -> Mapping[str, str]:
    """Ours, without settings that are meant for other servers.

    And with bytecode as an installed package has it: else each command that is timed would compile its modules first.
    """
    left_out = ("UNDERSTUDY_", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)}


def wait_for_replica(primary: Node, replica: Node, *, deadline_s: float = 300.0) -> None:
    """Returns once the replica has applied everything that the primary has made.

    Raises:
        BenchFailed: it does not get there.
    """
    wait_until(
        lambda: replica.status().committed_lsn >= primary.status().lsn,
        what="the replica catches up",
        deadline_s=deadline_s,
        every_s=0.02,
    )
