"""The process beside a server that runs its policies when they are due, and ships its log: ``DATA_DIR POLICIES``.

It tells how things stand in lines of JSON (``BackupReport``) on standard output, takes orders as such lines
(``BackupOrder``) on standard input, and ends when that does: nothing of a server that was killed goes on by itself.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import json_format

from understudy.backup.attempts import ATTEMPTS_MAX, Attempts
from understudy.backup.books import FOLDER, Books
from understudy.backup.drill_server import read_all
from understudy.backup.history import Result
from understudy.backup.manifest import utc_text
from understudy.backup.policy import Policy, read_policies
from understudy.backup.run import note_cancelled, note_failed, run_policy
from understudy.backup.run_queue import Run, Runs
from understudy.backup.run_report import RunReport
from understudy.backup.watched_repository import WatchedRepository
from understudy.common.errors import UnderstudyError, UsageError
from understudy.common.events import log
from understudy.common.files import publish, storage_errors
from understudy.common.known_runs import new_run_id
from understudy.common.logs import configure_logs
from understudy.common.niceness import let_commits_go_first
from understudy.common.types import Lsn
from understudy.v1 import admin_pb2

_LOOK_EVERY_S = 1.0
_TELL_EVERY_S = 1.0  # of a run's progress
_KEEP_NOTHING = Lsn((1 << 63) - 1)
_SEEN_FILE = "first-seen.json"
_ATTEMPTS_FILE = "attempts.json"
_BY_OPERATOR = "an operator has cancelled it"


@dataclass(slots=True)
class _Planned:
    """A policy and its runs."""

    policy: Policy
    first_seen_s: float
    attempted_s: float = 0.0  # a run that was cancelled, or can't be written down, is not made again at once
    watched: list[WatchedRepository] = field(default_factory=list)

    @property
    def shipping(self) -> list[WatchedRepository]:
        """Where its log goes to."""
        return self.watched if self.policy.archive_log else []


class Worker:
    """All policies of one node.

    The caller's threads: one runs policies, one takes orders, and each of :meth:`watchers` has one.

    Args:
        data_dir: of the node.
        tell: takes each report.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        data_dir: Path,
        policies: dict[str, Policy],
        *,
        tell: Callable[[admin_pb2.BackupReport], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._data_dir = data_dir
        self._books = Books.of(data_dir)
        self._tell = tell
        self._clock = clock
        self._attempts = Attempts(data_dir / FOLDER / _ATTEMPTS_FILE)
        self._runs = Runs(clock)
        self._runs.remember(self._books.history.entries())
        self._journal_mark = self._books.journal.mark()
        self._stopping = threading.Event()
        self._look = threading.Event()  # there is something to run, or to end
        self._telling = threading.Lock()  # what is told later is also later
        self._told = admin_pb2.BackupReport()  # but for runs
        self._told_s = 0.0  # by the monotonic clock
        seen = self._first_seen(list(policies))
        self._planned = {
            name: _Planned(
                policy,
                seen[name],
                watched=[WatchedRepository(policy, url, data_dir, clock) for url in policy.repositories],
            )
            for name, policy in policies.items()
        }

    def _first_seen(self, names: list[str]) -> dict[str, float]:
        """When each policy was first seen here, so that the first run of one is not missed for ever."""
        path = self._data_dir / FOLDER / _SEEN_FILE
        known: dict[str, float] = {}
        with storage_errors("read", path):
            if path.exists():
                try:
                    known = {name: float(seen) for name, seen in json.loads(path.read_bytes()).items()}
                except (ValueError, TypeError, AttributeError):
                    log.warning("first_seen_unclear", path=str(path))
        seen = {name: known.get(name, self._clock()) for name in names}
        if seen != known:
            publish(path, json.dumps(seen, indent=1).encode() + b"\n")
        return seen

    def stop(self) -> None:
        """Has the loops end, and a run under way break off."""
        self._stopping.set()
        self._runs.close("the server ends")
        self._look.set()

    # -- orders --------------------------------------------------------------------------------------------

    def take(self, line: bytes) -> None:
        """Takes an order; what it leads to is told."""
        try:
            order = json_format.Parse(line, admin_pb2.BackupOrder())
        except json_format.ParseError as error:
            log.error("order_unclear", error=str(error))
            return
        if order.HasField("start"):
            self._runs.add(order.start.policy, order.start.id)
        else:
            self._cancel(order.cancel)
        self._look.set()
        self.report()

    def _cancel(self, run_id: str) -> None:
        was_waiting = self._runs.cancel(run_id, _BY_OPERATOR)
        if was_waiting is not None:
            self._skip(was_waiting.policy)
            try:
                note_cancelled(
                    was_waiting.policy, self._data_dir, _BY_OPERATOR, run_id=run_id, clock=self._clock
                )
            except UnderstudyError as error:
                log.error("run_not_written_down", policy=was_waiting.policy, error=str(error))

    def _skip(self, policy: str) -> None:
        """The policy is not due again before its next time."""
        if policy in self._planned:
            self._planned[policy].attempted_s = self._clock()

    # -- runs ----------------------------------------------------------------------------------------------

    def run_when_due(self) -> None:
        """Runs policies, one at a time, until :meth:`stop`."""
        while not self._stopping.is_set():
            self.look_once()
            self._look.wait(_LOOK_EVERY_S)
            self._look.clear()

    def look_once(self) -> None:
        """Runs the policies that are due now, and those that were ordered."""
        self._notice_others()
        for name, planned in self._planned.items():
            if self._is_due(planned) and not self._runs.is_waiting(name):
                assert planned.policy.schedule is not None, "it is due"
                due_s = planned.policy.schedule.next_after(self._last_start_s(planned))
                self._runs.add(name, new_run_id(), due_s=due_s)
        while (run := self._runs.begin()) is not None:
            self.report()
            self._runs.end(self._run(run))
            self._journal_mark = self._books.journal.mark()
            self.report()

    def _notice_others(self) -> None:
        """Where somebody has run or drilled a policy by hand, the journal has grown, and repositories are looked at."""
        mark = self._books.journal.mark()
        if mark != self._journal_mark:
            self._journal_mark = mark
            for planned in self._planned.values():
                for watched in planned.watched:
                    watched.look_again()

    def _is_due(self, planned: _Planned) -> bool:
        schedule = planned.policy.schedule
        if schedule is None or self._stopping.is_set():
            return False
        return schedule.is_due(last_s=self._last_start_s(planned), now_s=self._clock())

    def _last_start_s(self, planned: _Planned) -> float:
        # One that was cut off is made up.
        entry = self._books.last(planned.policy.name, Result.DONE, Result.PARTIAL, Result.FAILED)
        return max(entry.start_s if entry is not None else planned.first_seen_s, planned.attempted_s)

    def _run(self, run: Run) -> RunReport | UnderstudyError:
        """Runs a policy; what came of it, or why that can't be written down."""
        planned = self._planned.get(run.policy)
        if planned is None:
            return UsageError(f"there is no backup policy {run.policy!r} any more")

        def progress(done: int, total: int | None) -> None:
            run.progress(done, total)
            self._tell_progress()

        try:
            report = self._given_up(run, planned.policy) or run_policy(
                planned.policy,
                self._data_dir,
                run_id=run.id,
                progress=progress,
                clock=self._clock,
                sleep=run.sleep,
                check=run.check,
                read_all=functools.partial(read_all, check=run.check),
            )
            self._attempts.end(run.policy)
        except UnderstudyError as error:  # of journal, history or attempts
            log.error("run_not_written_down", policy=run.policy, error=str(error))
            self._skip(run.policy)
            return error
        finally:
            for watched in planned.watched:
                watched.look_again()
        if report.is_cancelled and not self._stopping.is_set():
            self._skip(run.policy)
        return report

    def _given_up(self, run: Run, policy: Policy) -> RunReport | None:
        """Takes note of an attempt at a scheduled run; the run has failed where none of the last ones has ended.

        What has ended the process, such as LMDB on a damaged page, would do so again for ever.
        """
        if run.due_s is None:
            return None
        cut_off = self._attempts.begin(policy.name, run.due_s)
        if cut_off < ATTEMPTS_MAX:
            self._note_cut_off(run, cut_off)
            return None
        why = (
            f"the process that made it has ended {ATTEMPTS_MAX} times: see the server's log, and look for damage with "
            f"`understudy verify {self._data_dir}`"
        )
        return note_failed(policy, self._data_dir, why, run_id=run.id, clock=self._clock, check=run.check)

    def _note_cut_off(self, run: Run, attempts: int) -> None:
        """Tells people of the attempt before, which can't have told of its end."""
        if attempts:
            assert run.due_s is not None, "others are not tried again"
            self._books.journal.write(
                f"the run of {run.policy} that was due at {utc_text(run.due_s)}: attempt {attempts} was cut off with "
                f"its process; attempt {attempts + 1} follows"
            )

    # -- repositories --------------------------------------------------------------------------------------

    def watchers(self) -> list[Callable[[], None]]:
        """For each repository what ships the log to it, and looks at it, until :meth:`stop`; each wants a thread."""
        return [
            functools.partial(self._watch, watched)
            for planned in self._planned.values()
            for watched in planned.watched
        ]

    def _watch(self, watched: WatchedRepository) -> None:
        while True:
            for _ in watched.steps():
                self.report()
                if self._stopping.is_set():
                    return
            if self._stopping.wait(watched.pause_s):
                return

    # -- telling -------------------------------------------------------------------------------------------

    def report(self) -> None:
        """Tells how things stand."""
        with self._telling:
            shipping = [one for planned in self._planned.values() for one in planned.shipping]
            keep_from = min((Lsn(one.shipped_lsn + 1) for one in shipping), default=_KEEP_NOTHING)
            self._told = admin_pb2.BackupReport(
                policies=[self._status(planned) for planned in self._planned.values()],
                keep_from_lsn=keep_from,
            )
            self._tell_with_runs()

    def _tell_progress(self) -> None:
        """Tells how runs stand, now and then, without looking at anything else anew."""
        if time.monotonic() - self._told_s >= _TELL_EVERY_S:
            with self._telling:
                self._tell_with_runs()

    def _tell_with_runs(self) -> None:
        report = admin_pb2.BackupReport(runs=self._runs.messages())
        report.MergeFrom(self._told)
        self._tell(report)
        self._told_s = time.monotonic()

    def _status(self, planned: _Planned) -> admin_pb2.BackupStatus:
        policy, books = planned.policy, self._books
        success = books.last(policy.name, Result.DONE)
        failure = books.last(policy.name, Result.PARTIAL, Result.FAILED)
        schedule = policy.schedule
        run = self._runs.of_policy(policy.name)
        return admin_pb2.BackupStatus(
            policy=policy.name,
            next_s=schedule.next_after(self._last_start_s(planned)) if schedule else 0.0,
            running=run is not None,
            run=run.id if run is not None else "",
            last_success_s=success.start_s if success else 0.0,
            last_failure_s=failure.start_s if failure else 0.0,
            last_error=failure.errors[0] if failure and failure.errors else "",
            # Whichever repository is left after a loss: the one that was proven last says nothing about the others.
            last_proven_s=min(watched.proven_s for watched in planned.watched),
            drill_warn_days=policy.drill_warn_days,
            repositories=[
                admin_pb2.RepositoryStatus(
                    url=watched.url,
                    shipped_lsn=watched.shipped_lsn,
                    problem=watched.problem,
                    gap=watched.gap,
                    shipped_s=watched.shipped_s,
                )
                for watched in planned.shipping
            ],
        )


def main(data_dir: Path, policies: Path, log_format: str) -> int:
    """Works until standard input ends; returns the exit code."""
    configure_logs(log_format)
    let_commits_go_first()
    try:
        worker = Worker(data_dir, read_policies(policies, data_dir), tell=_print)
        worker.report()  # before anything that can take its time
    except UnderstudyError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    threads = [
        threading.Thread(target=_ending_all, args=(work,))
        for work in (worker.run_when_due, *worker.watchers())
    ]
    for thread in threads:
        thread.start()
    _ending_all(functools.partial(_take_orders, worker))
    worker.stop()
    for thread in threads:
        thread.join()
    return 0


def _take_orders(worker: Worker) -> None:
    for line in sys.stdin.buffer:
        worker.take(line)


def _print(report: admin_pb2.BackupReport) -> None:
    try:
        print(json_format.MessageToJson(report, indent=None), flush=True)
    except BrokenPipeError:
        # The server was killed: standard input ends as well, and ends us in order. Until then there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _ending_all(work: Callable[[], None]) -> None:
    """Does a thread's work; should it fail in a way that nobody has foreseen, the process ends and is started again."""
    try:
        work()
    except BaseException as error:
        log.error("backup_worker_failed", exc_info=error)
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
