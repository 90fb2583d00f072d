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
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import json_format

from understudy.backup.archiver import Archiver
from understudy.backup.books import FOLDER, Books
from understudy.backup.catalog import last_proven_s, read_catalog
from understudy.backup.drill_server import read_all
from understudy.backup.history import Result
from understudy.backup.log_gap import find_gap
from understudy.backup.policy import Policy, read_policies
from understudy.backup.repository import claim, open_repository
from understudy.backup.run import RunReport, note_cancelled, run_policy
from understudy.backup.runs import Run, Runs
from understudy.backup.stretch import list_stretches
from understudy.common.backup_runs import new_run_id
from understudy.common.directory import NODE_FILE, NodeFile
from understudy.common.errors import NotADataDirectory, UnderstudyError, UsageError
from understudy.common.events import log
from understudy.common.files import publish, storage_errors
from understudy.common.types import NO_LSN, ClusterId, Lsn
from understudy.v1 import admin_pb2

NICENESS = 10  # commits go first
SHIP_EVERY_S = 5.0
LOOK_AT_REPOSITORIES_EVERY_S = 3600.0  # every manifest is read then
_LOOK_EVERY_S = 1.0
_TELL_EVERY_S = 1.0  # of a run's progress
_KEEP_NOTHING = Lsn((1 << 63) - 1)
_SEEN_FILE = "first-seen.json"
_BY_OPERATOR = "an operator has cancelled it"


@dataclass(slots=True)
class Shipping:
    """The log on its way to one repository of one policy."""

    policy: Policy
    url: str
    archiver: Archiver | None = None
    shipped_lsn: Lsn = NO_LSN
    problem: str = ""
    gap: str = ""

    def ship(self, data_dir: Path) -> bool:
        """Ships what there is; what goes wrong is remembered, and tried again the next time.

        Returns:
            Whether where it goes on was found out anew: there may be a gap before it.
        """
        is_new = self.archiver is None
        try:
            if self.archiver is None:
                self.archiver = self._open(data_dir)
            self.shipped_lsn = self.archiver.ship()
            self.problem = ""
            return is_new
        except (UnderstudyError, OSError) as error:
            if str(error) != self.problem:
                log.warning("log_not_shipped", policy=self.policy.name, to=self.url, error=str(error))
            self.problem = str(error)
            self.archiver = None
            return False

    def _open(self, data_dir: Path) -> Archiver:
        node = NodeFile.read(data_dir / NODE_FILE)
        if not node.cluster:
            raise NotADataDirectory(f"{data_dir} has no copy yet")
        cluster = ClusterId(uuid.UUID(node.cluster).bytes)
        repository = open_repository(self.url)
        claim(repository, cluster)
        return Archiver(
            data_dir / "log",
            cluster,
            repository,
            encryption=self.policy.encryption(),
            level=self.policy.level,
        )


@dataclass(slots=True)
class _Planned:
    """A policy and its runs."""

    policy: Policy
    first_seen_s: float
    attempted_s: float = 0.0  # a run that was cancelled, or can't be written down, is not made again at once
    looked_s: float = 0.0  # when its repositories were looked at; 0: they are to be
    proven_s: float = 0.0  # when a drill last proved one of its backups, since 1970; 0 for never
    shippings: list[Shipping] = field(default_factory=list)


class Worker:
    """All policies of one node. The caller's threads: one runs policies, one ships the log, one takes orders.

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
        self._runs = Runs(clock)
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
                shippings=[Shipping(policy, url) for url in policy.repositories if policy.archive_log],
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
                note_cancelled(was_waiting.policy, self._data_dir, _BY_OPERATOR, clock=self._clock)
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
        for name, planned in self._planned.items():
            if self._is_due(planned) and not self._runs.is_waiting(name):
                self._runs.add(name, new_run_id())
        while (run := self._runs.begin()) is not None:
            self.report()
            self._runs.end(self._run(run))
            self.report()

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
            report = run_policy(
                planned.policy,
                self._data_dir,
                progress=progress,
                clock=self._clock,
                sleep=run.sleep,
                read_all=functools.partial(read_all, check=run.check),
            )
        except UnderstudyError as error:  # of journal or history
            log.error("run_not_written_down", policy=run.policy, error=str(error))
            self._skip(run.policy)
            return error
        finally:
            planned.looked_s = 0.0
        if report.is_cancelled and not self._stopping.is_set():
            self._skip(run.policy)
        return report

    # -- the log -------------------------------------------------------------------------------------------

    def ship_forever(self) -> None:
        """Ships the log of each policy to its repositories until :meth:`stop`."""
        while True:
            for planned in self._planned.values():
                for shipping in planned.shippings:
                    if shipping.ship(self._data_dir):
                        planned.looked_s = 0.0
                    if self._stopping.is_set():
                        return
                if self._clock() - planned.looked_s >= LOOK_AT_REPOSITORIES_EVERY_S:
                    planned.looked_s = self._clock()
                    self._look_at_repositories(planned)
            self.report()
            if self._stopping.wait(SHIP_EVERY_S):
                return

    def _look_at_repositories(self, planned: _Planned) -> None:
        """What drills have found out, those included that were run by hand, and what is missing of the log."""
        for url in planned.policy.repositories:
            try:
                repository = open_repository(url)
                catalog = read_catalog(repository)
                planned.proven_s = max(planned.proven_s, last_proven_s(catalog))
                for shipping in planned.shippings:
                    if shipping.url == url:
                        shipping.gap = find_gap(catalog, list_stretches(repository))
            except (UnderstudyError, OSError) as error:
                log.warning("repository_not_read", policy=planned.policy.name, of=url, error=str(error))

    # -- telling -------------------------------------------------------------------------------------------

    def report(self) -> None:
        """Tells how things stand."""
        with self._telling:
            shippings = [one for planned in self._planned.values() for one in planned.shippings]
            keep_from = min((Lsn(one.shipped_lsn + 1) for one in shippings), default=_KEEP_NOTHING)
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
            last_proven_s=planned.proven_s,
            drill_warn_days=policy.drill_warn_days,
            repositories=[
                admin_pb2.RepositoryStatus(
                    url=shipping.url,
                    shipped_lsn=shipping.shipped_lsn,
                    problem=shipping.problem,
                    gap=shipping.gap,
                )
                for shipping in planned.shippings
            ],
        )


def main(data_dir: Path, policies: Path) -> int:
    """Works until standard input ends; returns the exit code."""
    os.nice(NICENESS)
    try:
        worker = Worker(data_dir, read_policies(policies), tell=_print)
        worker.report()  # before anything that can take its time
    except UnderstudyError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    threads = [
        threading.Thread(target=_ending_all, args=(work,), name=work.__name__)
        for work in (worker.run_when_due, worker.ship_forever)
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
    print(json_format.MessageToJson(report, indent=None), flush=True)


def _ending_all(work: Callable[[], None]) -> None:
    """Does a thread's work; should it fail in a way that nobody has foreseen, the process ends and is started again."""
    try:
        work()
    except BaseException as error:
        log.error("backup_worker_failed", exc_info=error)
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
