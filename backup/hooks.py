"""A program of the operator's own, run when a backup has ended."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from understudy.common.errors import HookFailed

# The hook's own children are nobody's business, so it must not hand these on.
SECRET_VARIABLES = frozenset({"UNDERSTUDY_PASSPHRASE", "UNDERSTUDY_TOKEN"})
GRACE_S = 5.0  # between SIGTERM and SIGKILL
_OUTPUT_BYTES = 4096  # of the end of what it says
_PIPE_BYTES = 1 << 20  # at least what a pipe holds
_POLL_S = 0.05  # a process that has closed its output is looked at so often


def run_hook(
    program: Sequence[str],
    report: Mapping[str, Any],
    *,
    setting: str = "",
    timeout_s: float = 300,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Runs ``program`` without a shell, with ``report`` as one line of JSON on its standard input, and waits for it.

    It need not read. What it says, on standard output or error, is in the error if it fails. It has a session of its
    own: when its time is up, it and the processes that it started end, but for those that left the session.

    Args:
        program: a path or a name in ``PATH``, and arguments.
        report: what JSON can hold.
        setting: what a policy calls it.
        timeout_s: how long it may take.
        check: called again and again meanwhile; what it raises ends the hook.

    Raises:
        HookFailed: it can't be started, ended with another status than 0, or took too long.
    """
    name = f"{program[0]} ({setting})" if setting else program[0]
    hook = _Hook(program, name, json.dumps(report).encode() + b"\n")
    try:
        in_time = hook.wait(timeout_s, check)
    finally:
        hook.end()
    if not in_time:
        raise hook.failed(f"did not end within {timeout_s:g} s")
    if hook.status:
        raise hook.failed(_how_it_ended(hook.status))


def _how_it_ended(status: int) -> str:
    return f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"


class _Hook:
    """The process, and what goes in and out."""

    def __init__(self, program: Sequence[str], name: str, data: bytes) -> None:
        self._name = name
        self._data = memoryview(data)
        self._output = b""
        self._process = self._start(program)
        self._selector = selectors.DefaultSelector()
        for pipe, event in (
            (self._process.stdin, selectors.EVENT_WRITE),
            (self._process.stdout, selectors.EVENT_READ),
        ):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, event)

    def _start(self, program: Sequence[str]) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
        try:
            return subprocess.Popen(
                program,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:  # ValueError: a zero byte in an argument
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise HookFailed(
                f"the hook {self._name} can't be run: {why}",
                remedy="give the path of a program that may be executed",
            ) from error

    @property
    def status(self) -> int:
        """Once it has ended, what it ended with, or the signal's number below 0."""
        assert self._process.returncode is not None
        return self._process.returncode

    def failed(self, why: str) -> HookFailed:
        """The error with what it said last."""
        said = self._output.decode("utf-8", "replace").strip()
        return HookFailed(f"the hook {self._name} {why}" + (f"; it said: {said}" if said else ""))

    def wait(self, timeout_s: float, check: Callable[[], object] = lambda: None) -> bool:
        """Whether it ends within that time; until then it is written to and listened to."""
        deadline_s = time.monotonic() + timeout_s
        while not self._has_ended():
            check()
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            for key, _ in self._selector.select(min(left_s, _POLL_S)):
                if key.fileobj is self._process.stdin:
                    self._write()
                else:
                    self._read()
        self._read()  # what came between the last look and its end
        return True

    def end(self) -> None:
        """Ends it with the processes that it started if it still runs, and lets go of it."""
        if not self._has_ended():
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self.wait(GRACE_S)
            finally:
                # Also if the hook has obeyed: what it started may not have.
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _has_ended(self) -> bool:
        """Without taking note of it: until then nobody else gets its number, which is the group's, too."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _write(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            self._data = self._data[os.write(pipe.fileno(), self._data) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # it does not want to know
            self._data = self._data[:0]
        if not self._data:
            self._close(pipe)

    def _read(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        if pipe.closed:
            return
        with contextlib.suppress(BlockingIOError):
            data = os.read(pipe.fileno(), _PIPE_BYTES)
            self._output = (self._output + data)[-_OUTPUT_BYTES:]
            if not data:
                self._close(pipe)

    def _close(self, pipe: IO[bytes]) -> None:
        self._selector.unregister(pipe)
        pipe.close()
