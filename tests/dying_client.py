"""Clients that are killed at a step of a reset, to see that the next opening makes it good.

A step is whatever changes something on disk, and each callback: the transactions of the local store, and what is done
to files. Counted are those from where the reset begins, or goes on. As starting Python takes most of the time, this
file is also a program that has imported everything, and forks for each client::

    with DyingClients(environment) as clients:
        assert clients.reset(directory, "/realm", address, "recover", step=3) == KILLED
        assert clients.reset(directory, "/realm", address, "recover") == 0
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

KILLED = -signal.SIGKILL
_STEPS = ("mkdir", "rename", "unlink", "rmdir")
_DEADLINE_S = 60


class DyingClients:
    """Runs one client after the other."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def __enter__(self) -> DyingClients:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def reset(self, directory: Path, path: str, server: str, mode: str, *, step: int = 0) -> int:
        """The exit code of a client that is killed at the ``step``-th step of a reset; at 0 never."""
        request = {"directory": str(directory), "path": path, "server": server, "mode": mode, "step": step}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


# -- the program -----------------------------------------------------------------------------------------------


def _serve() -> None:
    from understudy.client import Realm  # before the fork, once for all

    assert Realm
    for line in sys.stdin.buffer:
        pid = os.fork()
        if not pid:
            code = 70
            try:
                code = _run(json.loads(line))
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(request: dict[str, Any]) -> int:
    from understudy.client import Realm

    signal.alarm(_DEADLINE_S)
    count = _wrap(request["step"])
    with Realm.open(
        request["path"],
        server=request["server"],
        directory=request["directory"],
        on_reset=request["mode"],
        before_reset=lambda _: count(),
        after_reset=lambda *_: count(),
    ) as realm:
        realm.wait_for_download(_DEADLINE_S)
        realm.wait_for_upload(_DEADLINE_S)
        assert realm.state.reset is None
    return 0


def _wrap(step: int) -> Callable[[], None]:
    """Wraps whatever changes something on disk; what counts a step."""
    from understudy.client.local_file import LocalFile
    from understudy.client.reset import CopyResetter

    numbers = itertools.count(1)
    is_armed = False

    def count() -> None:
        if is_armed and next(numbers) == step:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()

    def arming(function: Callable[..., Any]) -> Callable[..., Any]:
        def armed(self: CopyResetter, *arguments: Any) -> Any:
            nonlocal is_armed
            is_armed = (
                is_armed or function.__name__ == "required" or bool(arguments[0].realm.row.reset.attempted)
            )
            return function(self, *arguments)

        return armed

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            count()
            return function(*arguments, **keywords)

        return call

    writing = LocalFile.writing

    @contextlib.contextmanager
    def counted_writing(self: LocalFile) -> Iterator[Any]:
        with writing(self) as found:
            yield found
            count()  # just before it is committed

    for name in _STEPS:
        setattr(os, name, counted(getattr(os, name)))
    for method in ("required", "opened"):
        setattr(CopyResetter, method, arming(getattr(CopyResetter, method)))
    LocalFile.writing = counted_writing  # type: ignore[method-assign]
    return count


if __name__ == "__main__":
    _serve()
