"""The demo's processes: the commands that an operator would type, each ended by its own process id."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from understudy.common.errors import UnderstudyError

READY_S_MAX = 60.0
COMMAND_S_MAX = 120.0
END_S_MAX = 10.0  # after SIGTERM; then SIGKILL
_PROGRAM = (
    sys.executable,
    "-P",
    "-m",
    "understudy.cli",
)  # -P: what lies in the working directory is not ours


def _environment() -> dict[str, str]:
    """Ours, without settings that are meant for other servers."""
    return {name: value for name, value in os.environ.items() if not name.startswith("UNDERSTUDY_")}


class Node:
    """One of the demo's two nodes: its data directory, its log, its address, and its process while it runs.

    The address is a free one at the first start; after that the node keeps it, whatever its role.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.directory = folder / name
        self.log = folder / f"{name}.log"
        self.address = "127.0.0.1:0"
        self._log_start = 0  # of the present process
        self._process: asyncio.subprocess.Process | None = None

    async def start_primary(self, *flags: str) -> None:
        """Runs ``understudy primary``; returns when it serves."""
        await self._start("primary", *flags)

    async def start_replica(self, primary: str) -> None:
        """Runs ``understudy replica``; returns when it serves, which is before it has caught up."""
        await self._start("replica", "--primary", primary, "--id", self.name)

    async def _start(self, role: str, *flags: str) -> None:
        await self.stop()  # a promoted replica ends by itself, perhaps a moment later
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *_PROGRAM,
                role,
                "--data-dir",
                str(self.directory),
                "--listen",
                self.address,
                *flags,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the demo, which ends its nodes in order
            )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(READY_S_MAX):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise self._problem(f"was not ready within {READY_S_MAX:g} s") from None
        self.address = line.decode().partition(" ready on ")[2].strip()
        if not self.address:
            raise self._problem(
                f"ended as {role} with exit code {await self._process.wait()} before it was ready"
            )

    def check(self) -> None:
        """Raises UnderstudyError if the process, once started, has ended by itself with an error."""
        if self._process is not None and self._process.returncode:
            raise self._problem(f"ended with exit code {self._process.returncode}")

    def _problem(self, what: str) -> UnderstudyError:
        said = self.log.read_bytes()[self._log_start :].decode(errors="replace")
        last = said.strip().rpartition("\n")[2] or "it said nothing"
        return UnderstudyError(f"{self.name} {what}: {last}", remedy=f"its log is {self.log}")

    async def kill(self) -> None:
        """SIGKILL, and waits until it is gone."""
        assert self._process is not None, "it runs"
        self._process.kill()
        await self._process.wait()
        self._process = None

    async def stop(self) -> None:
        """Ends the process, if one runs: cleanly if it will."""
        if self._process is not None:
            await _end(self._process)
            self._process = None


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may end by itself meanwhile
        process.terminate()
        try:
            async with asyncio.timeout(END_S_MAX):
                await process.wait()
        except TimeoutError:
            process.kill()
    await process.wait()


async def run_command(*arguments: str) -> dict[str, Any]:
    """Runs ``understudy ARGUMENTS --json`` to its end; returns what it printed.

    Raises:
        UnderstudyError: it failed, with what it said.
    """
    process = await asyncio.create_subprocess_exec(
        *_PROGRAM,
        *arguments,
        "--json",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(),
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(COMMAND_S_MAX):
            printed, said = await process.communicate()
    except TimeoutError:
        raise UnderstudyError(f"`understudy {' '.join(arguments)}` did not end") from None
    finally:
        if process.returncode is None:
            await _end(process)
    # A command that found something wrong prints its facts and ends with an error: the facts are what we want.
    if process.returncode and not printed:
        why = said.decode(errors="replace").strip().rpartition("\n")[2]
        raise UnderstudyError(f"`understudy {' '.join(arguments)}`: exit code {process.returncode}: {why}")
    facts: dict[str, Any] = json.loads(printed)
    return facts
