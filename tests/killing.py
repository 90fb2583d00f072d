"""Commands that are killed, stopped, or find the disk full, at a step of one's choice, to see that they make it good.

What a step changes on disk is what a crash between two steps leaves behind. So the functions that change files are
wrapped, and the n-th call of any of them sends SIGKILL to its own process, or fails, before it does anything. Code
under test knows nothing of this.

Trying one step after the other takes many processes, and most of a command's time goes into starting Python. So
this file is also a program, the nursery: it has imported everything, and each command runs in a fork of it::

    nursery = Nursery(environment)
    for step in itertools.count(1):
        process = processes.start("promote", copy, launch=nursery.dying_at(step))
        if process.wait() == 0:
            break  # it took fewer steps
        assert process.wait() == KILLED
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Launch, Running

KILLED = -signal.SIGKILL
# Together they are all that the code under test changes files with, but for LMDB's own writes. Syncs are not among
# them: kill -9 takes nothing from the kernel that was written.
_STEPS = ("mkdir", "link", "rename", "unlink", "rmdir", "ftruncate", "pwrite", "pwritev", "copy_file_range")
_STEPS_AFTER_FAILURE = 5
_NEEDING_SPACE = ("mkdir", "link", "rename", "pwrite", "pwritev", "copy_file_range")
# What the commands import only when they run.
_MODULES = ("cli.node_status", "cli.output", "primary.server", "replica.server", "replica.rewind")
_POLL_S = 0.005


# -- the test's side -------------------------------------------------------------------------------------------


class Nursery:
    """Starts commands as forks of one process; ends that one, and with it them, when it is closed."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.close()
        self._process.wait()

    def dying_at(self, step: int, *, armed: Path | None = None) -> Launch:
        """A way to start a command that is killed before its ``step``-th step, or never at 0.

        Args:
            step: the first is 1.
            armed: steps are counted only once this file exists.
        """
        return self._launch({"fault": "killed", "step": step, "armed": str(armed or "")})

    def stopping_at(self, step: int) -> Launch:
        """A way to start a command that stops before its ``step``-th step, and goes on at SIGCONT."""
        return self._launch({"fault": "stopped", "step": step, "armed": ""})

    def out_of_space_at(self, step: int) -> Launch:
        """A way to start a command whose ``step``-th step, of those that need space, finds none.

        If it goes on, it is killed a few steps later.
        """
        return self._launch({"fault": "out of space", "step": step, "armed": ""})

    def _launch(self, fault: dict[str, Any]) -> Launch:
        def launch(arguments: list[str], environment: dict[str, str], stdout: Path, stderr: Path) -> Running:
            for path in (stdout, stderr):
                path.touch()  # there to be read from the beginning
            asked = fault | {"arguments": arguments, "stdout": str(stdout), "stderr": str(stderr)}
            return _Forked(self, int(self.ask(asked)))

        return launch

    def ask(self, request: dict[str, Any]) -> Any:
        """What the nursery answers."""
        with self._lock:
            self._pipe.write(json.dumps(request).encode() + b"\n")
            self._pipe.flush()
            assert self._process.stdout is not None
            return json.loads(self._process.stdout.readline())

    @property
    def _pipe(self) -> Any:
        assert self._process.stdin is not None
        return self._process.stdin


class _Forked:
    """A command in a fork of the nursery, which alone can wait for it."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery = nursery
        self._pid = pid
        self._code: int | None = None

    @property
    def pid(self) -> int:
        return self._pid

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._nursery.ask({"poll": self._pid})
        return self._code

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired([str(self._pid)], timeout)
            time.sleep(_POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._pid, number)


# -- the nursery's side ----------------------------------------------------------------------------------------


def _nursery() -> None:
    from understudy.cli import main

    for module in _MODULES:
        importlib.import_module(f"understudy.{module}")
    children: dict[int, int | None] = {}
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "poll" in request:
            answer = _poll(children, request["poll"])
        else:
            answer = _fork(request, main.run)
            children[answer] = None
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid, code in children.items():
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _poll(children: dict[int, int | None], pid: int) -> int | None:
    if children[pid] is None:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            children[pid] = os.waitstatus_to_exitcode(status)
    return children[pid]


def _fork(request: dict[str, Any], run: Callable[[list[str]], int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        for target, path in ((1, request["stdout"]), (2, request["stderr"])):
            fd = os.open(path, os.O_WRONLY)
            os.dup2(fd, target)
            os.close(fd)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        if request["step"]:
            _wrap(request["fault"], request["step"], request["armed"])
        code = run(request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wrap(fault: str, step: int, armed: str) -> None:
    """Wraps the functions that change files: the ``step``-th call of them is where it happens."""
    numbers = itertools.count(1)
    lock = threading.Lock()

    def count() -> None:
        if armed and not os.path.exists(armed):
            return
        with lock:
            number = next(numbers)
        if fault == "out of space" and number == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fault == "stopped":
            if number == step:
                os.kill(os.getpid(), signal.SIGSTOP)
            return
        if number != (step if fault == "killed" else step + _STEPS_AFTER_FAILURE):
            return
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            count()
            return function(*arguments, **keywords)

        return counted

    for name in _NEEDING_SPACE if fault == "out of space" else _STEPS:
        setattr(os, name, wrapped(getattr(os, name)))


if __name__ == "__main__":
    _nursery()
