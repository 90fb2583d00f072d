"""The process that makes a node's scheduled backups, as the node sees it: started, heard, started again.

It is a process of its own because it needs processors and memory of its own, and may fail or hang without harm to
anybody's commits. It tells how things stand in lines of JSON on its standard output, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from google.protobuf import json_format

from understudy.common.backoff import Backoff
from understudy.common.directory import DataDirectory
from understudy.common.events import log
from understudy.common.types import Lsn
from understudy.v1 import admin_pb2

MODULE = "understudy.backup.worker"
_LINE_BYTES_MAX = 1 << 20
_END_S_MAX = 10.0
_DAY_S = 24 * 3600.0


class BackupWorker:
    """The process, and what it said last. Everything runs on one event loop."""

    def __init__(self, data_dir: Path, policies: Path) -> None:
        self._command = [sys.executable, "-P", "-m", MODULE, str(data_dir), str(policies)]
        self.report = admin_pb2.BackupReport()
        self._started_s = time.time()
        self._problem = ""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def keep_from(self) -> Lsn:
        """The first LSN that is still to be shipped; before it has been said, all that is there."""
        return Lsn(self.report.keep_from_lsn)

    def statuses(self) -> list[admin_pb2.BackupStatus]:
        """How the policies stand."""
        return list(self.report.policies)

    def warnings(self) -> list[str]:
        """What an operator should look at."""
        found = [self._problem] if self._problem else []
        for policy in self.report.policies:
            name = policy.policy
            if policy.last_failure_s > policy.last_success_s:
                found.append(f"backup {name}: the last run did not go well: {policy.last_error}")
            if policy.drill_warn_days and self._is_unproven(policy):
                found.append(
                    f"backup {name}: none was proven by restoring it for {policy.drill_warn_days} days: run "
                    f"understudy backup drill {name}"
                )
            found += [
                f"backup {name}: the log is not shipped to {repository.url}: {repository.problem}"
                for repository in policy.repositories
                if repository.problem
            ]
        return found

    def _is_unproven(self, policy: admin_pb2.BackupStatus) -> bool:
        since_s = policy.last_proven_s or (policy.last_success_s and self._started_s)
        return bool(since_s) and time.time() - since_s > policy.drill_warn_days * _DAY_S

    async def run_forever(self) -> None:
        """Starts the process, and starts it again when it has ended."""
        backoff = Backoff(first_s=1.0, last_s=60.0)
        while True:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=_LINE_BYTES_MAX
                )
            except OSError as error:  # no memory, no process, no descriptor, for now
                self._problem = f"the process that makes backups can't be started: {error.strerror}"
                log.error("backup_worker_not_started", error=str(error))
                await asyncio.sleep(backoff.next_s(random.random()))
                continue
            with contextlib.suppress(ValueError):  # a line without end
                await self._listen(self._process, backoff)
            code = await self._end()
            self._problem = f"the process that makes backups has ended with code {code}; it is started again"
            log.error("backup_worker_ended", code=code)
            await asyncio.sleep(backoff.next_s(random.random()))

    async def _listen(self, process: asyncio.subprocess.Process, backoff: Backoff) -> None:
        assert process.stdout is not None, "it is a pipe"
        async for line in process.stdout:
            try:
                self.report = json_format.Parse(line, admin_pb2.BackupReport())
            except json_format.ParseError as error:
                log.error("backup_worker_unclear", error=str(error))
                return
            self._problem = ""
            backoff.reset()

    async def _end(self) -> int:
        """Has the process end, and returns its exit code."""
        process = self._process
        if process is None:
            return 0
        assert process.stdin is not None, "it is a pipe"
        process.stdin.close()
        try:
            async with asyncio.timeout(_END_S_MAX):
                return await process.wait()
        except TimeoutError:
            process.kill()
            return await process.wait()

    async def close(self) -> None:
        """Ends the process; a backup under way is cut off."""
        if self._process is not None and self._process.returncode is None:
            await self._end()


@contextlib.asynccontextmanager
async def backing_up(directory: DataDirectory, policies: Path | None) -> AsyncIterator[None]:
    """Makes the backups of a file's policies while the block runs.

    Args:
        directory: of the node in this process.
        policies: a TOML file; None: there are none to make.
    """
    if policies is None:
        yield
        return
    directory.backup_worker = worker = BackupWorker(directory.path, policies)
    task = asyncio.create_task(worker.run_forever())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await worker.close()
