"""The runs of a server's policies as the server knows them: what it has asked for, and what it was told of them.

A run that has ended stays as it ended, whatever is told afterwards.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable

from understudy.common.errors import UsageError
from understudy.v1.admin_pb2 import BackupRun

ENDED_MAX = 16  # so many that have ended are remembered
_UNDER_WAY = (BackupRun.WAITING, BackupRun.RUNNING)


def new_run_id() -> str:
    """A name for a run, short enough to be typed."""
    return secrets.token_hex(4)


def is_over(run: BackupRun) -> bool:
    """Whether a run has ended."""
    return run.state not in _UNDER_WAY


def state_name(run: BackupRun) -> str:
    """``waiting``, ``running``, ``done``, ``partial``, ``failed`` or ``cancelled``."""
    return BackupRun.State.Name(run.state).lower()


class BackupRuns:
    """The runs, the oldest first. Everything happens on one event loop."""

    def __init__(self) -> None:
        self._runs: dict[str, BackupRun] = {}
        self._changed = asyncio.Event()

    def take(self, runs: Iterable[BackupRun]) -> None:
        """Takes note of how runs stand; those that are not among them stay as they were."""
        for run in runs:
            known = self._runs.get(run.id)
            if known is None or not is_over(known):
                self._runs[run.id] = run
        ended = [run.id for run in self._runs.values() if is_over(run)]
        for run_id in ended[:-ENDED_MAX]:
            del self._runs[run_id]
        self._changed.set()
        self._changed = asyncio.Event()

    def end_all(self, state: BackupRun.State.ValueType, why: str) -> None:
        """Nobody is left who could finish a run."""
        left = [run for run in self._runs.values() if not is_over(run)]
        self.take(
            BackupRun(id=run.id, policy=run.policy, state=state, started_s=run.started_s, errors=[why])
            for run in left
        )

    def find(self, run_id: str) -> BackupRun:
        """The run of that id.

        Raises:
            UsageError: there is none, or none any more.
        """
        run = self._runs.get(run_id)
        if run is None:
            raise UsageError(
                f"there is no backup run {run_id!r:.80}",
                remedy="`understudy status` shows the one that is under way; of those that have ended, the last "
                f"{ENDED_MAX} are known; journal and history, in the data directory's folder backups, tell of more",
            )
        return run

    def of_policy(self, policy: str) -> BackupRun | None:
        """The policy's run that waits or is under way."""
        return next((run for run in self._runs.values() if run.policy == policy and not is_over(run)), None)

    async def watch(self, run_id: str) -> AsyncIterator[BackupRun]:
        """How a run stands, and again when that has changed, up to its end. Who is slow misses what came between.

        Raises:
            UsageError: there is none of that id.
        """
        told: BackupRun | None = None
        while told is None or not is_over(told):
            changed, run = self._changed, self.find(run_id)
            if run != told:
                yield run
                told = run
            else:
                await changed.wait()
