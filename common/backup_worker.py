"""The process that makes a node's scheduled backups, as the node sees it: started, heard, started again.

It is a process of its own because it needs processors and memory of its own, and may fail or hang without harm to
anybody's commits. It tells how things stand in lines of JSON on its standard output, takes orders as such lines on its
standard input, and ends with that.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from google.protobuf import json_format

from understudy.common.backoff import Backoff
from understudy.common.directory import DataDirectory
from understudy.common.errors import Unavailable, UsageError
from understudy.common.events import log
from understudy.common.known_runs import BackupRuns, is_over, new_run_id, state_name
from understudy.common.logs import log_format
from understudy.common.types import Lsn
from understudy.v1 import admin_pb2

MODULE = "understudy.backup.worker"
_LINE_BYTES_MAX = 4 << 20  # with the errors of all runs that are told of
_END_S_MAX = 10.0
_ANSWER_S_MAX = 10.0  # a process that was started just now says what it has within a second
_ORDERS_BYTES_MAX = 1 << 16  # that wait to be read
_HEALTHY_S = 60.0  # what has lived for so long is started again at once
_DAY_S = 24 * 3600.0
_LATE_S = 3600.0  # others may have to end first
_LONG_S = _DAY_S
_HUNG_S = 900.0  # one segment takes ten minutes at a megabit a second


class BackupWorker:
    """The process, and what it said last. Everything runs on one event loop."""

    def __init__(self, data_dir: Path, policies: Path, clock: Callable[[], float] = time.time) -> None:
        self._command = [sys.executable, "-P", "-m", MODULE, str(data_dir), str(policies), log_format()]
        self.report = admin_pb2.BackupReport()
        self.runs = BackupRuns()
        self._clock = clock  # seconds since 1970
        self._started_s = clock()
        self._problem = ""
        self._process: asyncio.subprocess.Process | None = None
        self._heard = asyncio.Event()  # set once it has said what policies there are

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
            found += failure_warnings(policy)
            found += self._lateness(policy)
            if policy.drill_warn_days and self._is_unproven(policy):
                found.append(
                    f"backup {name}: in a repository, none was proven by restoring it for "
                    f"{policy.drill_warn_days} days: run understudy backup drill {name}"
                )
            found += [
                f"backup {name}: the log is not shipped to {repository.url}: {repository.problem}"
                for repository in policy.repositories
                if repository.problem
            ]
            found += [
                f"backup {name}: the log has not got on to {repository.url} since {_utc(repository.shipped_s)}, and no "
                "error came: the storage does not answer"
                for repository in policy.repositories
                if not repository.problem
                and self._clock() - max(repository.shipped_s, self._started_s) > _HUNG_S
            ]
            found += [
                f"backup {name}: in {repository.url}, {repository.gap}; a new backup makes up for it: "
                f"understudy backups start {name} --server HOST:PORT"
                for repository in policy.repositories
                if repository.gap
            ]
        return found

    def _lateness(self, policy: admin_pb2.BackupStatus) -> list[str]:
        """Of what should have begun, or ended, long ago."""
        now_s, run = self._clock(), self.runs.of_policy(policy.policy)
        if run is not None and run.state == admin_pb2.BackupRun.RUNNING:
            if now_s - run.started_s <= _LONG_S:
                return []
            return [
                f"backup {policy.policy}: run {run.id} has been under way since {_utc(run.started_s)}: "
                f"understudy backups cancel {run.id} --server HOST:PORT ends it"
            ]
        # What came due while there was no server is made up once there is one.
        if not policy.next_s or now_s - max(policy.next_s, self._started_s) <= _LATE_S:
            return []
        return [
            f"backup {policy.policy}: was due at {_utc(policy.next_s)}, and has not been made: see what else runs, and "
            f"the server's log; understudy backup run {policy.policy} makes it by hand"
        ]

    def _is_unproven(self, policy: admin_pb2.BackupStatus) -> bool:
        since_s = policy.last_proven_s or (policy.last_success_s and self._started_s)
        return bool(since_s) and self._clock() - since_s > policy.drill_warn_days * _DAY_S

    # -- orders --------------------------------------------------------------------------------------------

    async def start(self, policy: str) -> admin_pb2.StartBackupResponse:
        """Has a policy run now, unless it does or is about to.

        Raises:
            UsageError: there is no such policy.
            Unavailable: there is no process that could.
        """
        await self._check_policy(policy)
        under_way = self.runs.of_policy(policy)
        if under_way is not None:
            return admin_pb2.StartBackupResponse(id=under_way.id, was_under_way=True)
        order = admin_pb2.BackupOrder(start=admin_pb2.BackupOrder.Start(id=new_run_id(), policy=policy))
        self._order(order)
        self.runs.take(
            [admin_pb2.BackupRun(id=order.start.id, policy=policy, state=admin_pb2.BackupRun.WAITING)]
        )
        return admin_pb2.StartBackupResponse(id=order.start.id)

    def cancel(self, run_id: str) -> admin_pb2.BackupRun:
        """Has a run end; returns how it stood.

        Raises:
            UsageError: there is none of that id, or it has ended.
            Unavailable: there is no process that could.
        """
        run = self.runs.find(run_id)
        if is_over(run):
            raise UsageError(
                f"backup run {run_id} of {run.policy} is over already: {state_name(run)}",
                remedy="what it has made is removed with `understudy backups delete`",
            )
        self._order(admin_pb2.BackupOrder(cancel=run_id))
        return run

    async def watch(self, run_id: str) -> AsyncIterator[admin_pb2.BackupRun]:
        """How a run stands, up to its end; also of one that ended before this server was started.

        Raises:
            UsageError: there is none of that id, or none any more.
            Unavailable: nobody knows yet.
        """
        await self._hear()
        async for run in self.runs.watch(run_id):
            yield run

    async def _hear(self) -> None:
        try:
            async with asyncio.timeout(_ANSWER_S_MAX):
                await self._heard.wait()
        except TimeoutError:
            raise self._away() from None

    async def _check_policy(self, policy: str) -> None:
        await self._hear()
        known = [status.policy for status in self.report.policies]
        if policy not in known:
            raise UsageError(
                f"this server has no backup policy {policy!r:.80}",
                remedy=f"known: {', '.join(sorted(known))}",
            )

    def _order(self, order: admin_pb2.BackupOrder) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            raise self._away()
        assert process.stdin is not None, "it is a pipe"
        if process.stdin.transport.get_write_buffer_size() > _ORDERS_BYTES_MAX:
            raise Unavailable("the process that makes backups does not take orders", remedy="look at its log")
        try:
            process.stdin.write(json_format.MessageToJson(order, indent=None).encode() + b"\n")
        except (OSError, RuntimeError):  # it has ended just now
            raise self._away() from None

    def _away(self) -> Unavailable:
        return Unavailable(
            self._problem or "the process that makes backups has not said anything yet",
            remedy="try again in a minute",
        )

    # -- the process ---------------------------------------------------------------------------------------

    async def run_forever(self) -> None:
        """Starts the process, and starts it again when it has ended."""
        backoff = Backoff(first_s=1.0, last_s=60.0)
        while True:
            begun_s = time.monotonic()
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
                await self._listen(self._process)
            code = await self._end()
            self._problem = f"the process that makes backups has ended with code {code}; it is started again"
            log.error("backup_worker_ended", code=code)
            self._note_end(admin_pb2.BackupRun.FAILED, self._problem)
            if time.monotonic() - begun_s > _HEALTHY_S:
                backoff.reset()
            await asyncio.sleep(backoff.next_s(random.random()))

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None, "it is a pipe"
        async for line in process.stdout:
            try:
                self.report = json_format.Parse(line, admin_pb2.BackupReport())
            except json_format.ParseError as error:
                log.error("backup_worker_unclear", error=str(error))
                return
            self._problem = ""
            self.runs.take(self.report.runs)
            self._heard.set()

    def _note_end(self, state: admin_pb2.BackupRun.State.ValueType, why: str) -> None:
        """No run is under way any more."""
        self.runs.end_all(state, why)
        for policy in self.report.policies:
            policy.running, policy.run = False, ""

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
        self._note_end(admin_pb2.BackupRun.CANCELLED, "the server ends")


def failure_warnings(policy: admin_pb2.BackupStatus) -> list[str]:
    """What an operator should look at where the last run was none that is done."""
    if policy.last_failure_s <= policy.last_success_s:
        return []
    return [f"backup {policy.policy}: the last run did not go well: {policy.last_error}"]


def _utc(time_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))


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
