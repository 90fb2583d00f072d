"""The runs of one node: those that wait for their turn, the one under way, and the last that have ended.

One thread works through them; others add runs, cancel them, and ask how they stand.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from understudy.backup.history import ERROR_CHARACTERS_MAX, ERRORS_MAX, Entry, Result
from understudy.backup.run import Cancelled, CutOff
from understudy.backup.run_report import RunReport
from understudy.common.errors import UnderstudyError
from understudy.common.known_runs import ENDED_MAX
from understudy.v1.admin_pb2 import BackupRun

_ENDS = {
    Result.DONE: BackupRun.DONE,
    Result.PARTIAL: BackupRun.PARTIAL,
    Result.FAILED: BackupRun.FAILED,
    Result.CANCELLED: BackupRun.CANCELLED,
}


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """One run of a policy."""

    id: str
    policy: str
    due_s: float | None = None  # when it was planned for, since 1970; None where it was asked for
    state: BackupRun.State.ValueType = BackupRun.WAITING
    started_s: float = 0.0  # seconds since 1970
    seconds: float = 0.0  # once it has ended
    done_bytes: int = 0
    total_bytes: int = 0
    paths: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _begun_s: float = 0.0  # by the monotonic clock
    _ending: threading.Event = field(default_factory=threading.Event)
    _reason: Cancelled = field(default_factory=Cancelled)

    @classmethod
    def of(cls, entry: Entry) -> Run:
        """One that has ended, as the history knows it."""
        return cls(
            id=entry.id,
            policy=entry.policy,
            state=_ENDS[entry.result],
            started_s=entry.start_s,
            seconds=entry.seconds,
            paths=entry.paths,
            errors=entry.errors,
        )

    def begin(self, now_s: float) -> None:
        """Its turn has come."""
        self.state, self.started_s, self._begun_s = BackupRun.RUNNING, now_s, time.monotonic()

    def cancel(self, reason: Cancelled) -> None:
        """Has it end where it looks next."""
        self._reason = reason
        self._ending.set()

    def progress(self, done: int, total: int | None) -> None:
        """An ``OnProgress``.

        Raises:
            Cancelled.
        """
        self.done_bytes, self.total_bytes = done, total or 0
        self.check()

    def sleep(self, seconds: float) -> None:
        """Waits.

        Raises:
            Cancelled: also in the middle.
        """
        self._ending.wait(seconds)
        self.check()

    def check(self) -> None:
        """Goes on.

        Raises:
            Cancelled.
        """
        if self._ending.is_set():
            raise self._reason

    def end(self, report: RunReport) -> None:
        """It has ended so."""
        self.state, self.paths, self.errors = _ENDS[report.result], report.paths, report.all_errors
        self.seconds = report.seconds

    def fail(self, error: str) -> None:
        """It has ended, and could not be written down."""
        self.state, self.errors = BackupRun.FAILED, [error]
        self.seconds = time.monotonic() - self._begun_s

    def message(self) -> BackupRun:
        """For others."""
        is_running = self.state == BackupRun.RUNNING
        return BackupRun(
            id=self.id,
            policy=self.policy,
            state=self.state,
            started_s=self.started_s,
            seconds=time.monotonic() - self._begun_s if is_running else self.seconds,
            done_bytes=self.done_bytes,
            total_bytes=self.total_bytes,
            paths=self.paths,
            errors=[error[:ERROR_CHARACTERS_MAX] for error in self.errors[:ERRORS_MAX]],
        )


class Runs:
    """All of them.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: list[Run] = []
        self._current: Run | None = None
        self._ended: deque[Run] = deque(maxlen=ENDED_MAX)
        self._is_closed = False

    def remember(self, entries: Iterable[Entry]) -> None:
        """Takes in runs that have ended before, the oldest first."""
        with self._lock:
            self._ended.extend(Run.of(entry) for entry in entries if entry.id)

    def add(self, policy: str, run_id: str, *, due_s: float | None = None) -> None:
        """Has a policy run when its turn comes.

        Args:
            due_s: when it was planned for, by schedule.
        """
        with self._lock:
            self._waiting.append(Run(id=run_id, policy=policy, due_s=due_s))

    def is_waiting(self, policy: str) -> bool:
        """Whether a run of the policy waits."""
        with self._lock:
            return any(run.policy == policy for run in self._waiting)

    def of_policy(self, policy: str) -> Run | None:
        """The run of the policy that is under way."""
        with self._lock:
            return self._current if self._current is not None and self._current.policy == policy else None

    def begin(self) -> Run | None:
        """The next, which is under way from now on; None where there is none."""
        with self._lock:
            if self._is_closed or not self._waiting:
                return None
            self._current = self._waiting.pop(0)
            self._current.begin(self._clock())
            return self._current

    def end(self, came: RunReport | UnderstudyError) -> None:
        """The one under way has ended, with a report or without."""
        with self._lock:
            run = self._current
            assert run is not None, "it was begun"
            if isinstance(came, RunReport):
                run.end(came)
            else:
                run.fail(str(came))
            self._ended.append(run)
            self._current = None

    def cancel(self, run_id: str, why: str) -> Run | None:
        """Ends the one that is meant if it has not ended yet; returns it if it had been waiting, and so has ended."""
        with self._lock:
            if self._current is not None and self._current.id == run_id:
                self._current.cancel(Cancelled(why))
            for run in self._waiting:
                if run.id == run_id:
                    self._waiting.remove(run)
                    run.state, run.errors = BackupRun.CANCELLED, [why]
                    self._ended.append(run)
                    return run
        return None

    def close(self, why: str) -> None:
        """Begins none any more, and ends the one under way."""
        with self._lock:
            self._is_closed = True
            if self._current is not None:
                self._current.cancel(CutOff(why))

    def messages(self) -> list[BackupRun]:
        """How they stand."""
        with self._lock:
            current = [self._current] if self._current is not None else []
            return [run.message() for run in (*self._ended, *current, *self._waiting)]
