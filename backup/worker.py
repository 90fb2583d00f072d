"""The process beside a server that runs its policies when they are due, and ships its log: ``DATA_DIR POLICIES``.

It tells how things stand in lines of JSON (``BackupReport``) on standard output, and ends when its standard input does:
nothing of a server that was killed goes on by itself.
"""

from __future__ import annotations

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
from understudy.backup.history import Result
from understudy.backup.policy import Policy, read_policies
from understudy.backup.repository import claim, open_repository
from understudy.backup.run import Cancelled, run_policy
from understudy.common.directory import NODE_FILE, NodeFile
from understudy.common.errors import NotADataDirectory, UnderstudyError
from understudy.common.events import log
from understudy.common.files import publish, storage_errors
from understudy.common.types import NO_LSN, ClusterId, Lsn
from understudy.v1 import admin_pb2

NICENESS = 10  # commits go first
SHIP_EVERY_S = 5.0
PROOFS_EVERY_S = 3600.0  # every manifest is read for them
_LOOK_EVERY_S = 1.0
_KEEP_NOTHING = Lsn((1 << 63) - 1)
_SEEN_FILE = "first-seen.json"


@dataclass(slots=True)
class Shipping:
    """The log on its way to one repository of one policy."""

    policy: Policy
    url: str
    archiver: Archiver | None = None
    shipped_lsn: Lsn = NO_LSN
    problem: str = ""

    def ship(self, data_dir: Path) -> None:
        """Ships what there is; what goes wrong is remembered, and tried again the next time."""
        try:
            if self.archiver is None:
                self.archiver = self._open(data_dir)
            self.shipped_lsn = self.archiver.ship()
            self.problem = ""
        except (UnderstudyError, OSError) as error:
            if str(error) != self.problem:
                log.warning("log_not_shipped", policy=self.policy.name, to=self.url, error=str(error))
            self.problem = str(error)
            self.archiver = None  # where it goes on is found out anew

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
    running: bool = False
    attempted_s: float = 0.0  # so that a run that can't be written down is not made again and again
    proven_s: float = 0.0  # when a drill last proved one of its backups, since 1970; 0 for never
    shippings: list[Shipping] = field(default_factory=list)


class Worker:
    """All policies of one node. The caller's threads: one runs policies, one ships the log.

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
        self._stopping = threading.Event()
        seen = self._first_seen(list(policies))
        self._planned = [
            _Planned(
                policy,
                seen[name],
                shippings=[Shipping(policy, url) for url in policy.repositories if policy.archive_log],
            )
            for name, policy in policies.items()
        ]

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

    # -- runs ----------------------------------------------------------------------------------------------

    def run_when_due(self) -> None:
        """Runs policies, one at a time, until :meth:`stop`."""
        while not self._stopping.wait(_LOOK_EVERY_S):
            self.look_once()

    def look_once(self) -> None:
        """Runs the policies that are due now."""
        for planned in self._planned:
            if self._is_due(planned):
                self._run(planned)

    def _is_due(self, planned: _Planned) -> bool:
        schedule = planned.policy.schedule
        if schedule is None or self._stopping.is_set():
            return False
        return schedule.is_due(last_s=self._last_start_s(planned), now_s=self._clock())

    def _last_start_s(self, planned: _Planned) -> float:
        # One that was cut off is made up.
        entry = self._books.last(planned.policy.name, Result.DONE, Result.PARTIAL, Result.FAILED)
        return max(entry.start_s if entry is not None else planned.first_seen_s, planned.attempted_s)

    def _run(self, planned: _Planned) -> None:
        planned.running = True
        self.report()
        try:
            run_policy(
                planned.policy,
                self._data_dir,
                progress=self._check_stopping,
                clock=self._clock,
                sleep=self._stopping.wait,
            )
        except UnderstudyError as error:  # of journal or history
            log.error("run_not_written_down", policy=planned.policy.name, error=str(error))
            planned.attempted_s = self._clock()
        finally:
            planned.running = False
        self.report()

    def _look_for_proofs(self, planned: _Planned) -> None:
        """What drills have found out, those included that were run by hand."""
        for url in planned.policy.repositories:
            try:
                planned.proven_s = max(planned.proven_s, last_proven_s(read_catalog(open_repository(url))))
            except (UnderstudyError, OSError) as error:
                log.warning("catalog_not_read", policy=planned.policy.name, of=url, error=str(error))

    def _check_stopping(self, done: int, total: int | None) -> None:
        if self._stopping.is_set():
            raise Cancelled("the server ends")

    # -- the log -------------------------------------------------------------------------------------------

    def ship_forever(self) -> None:
        """Ships the log of each policy to its repositories until :meth:`stop`."""
        looked_s = 0.0
        while True:
            if self._clock() - looked_s >= PROOFS_EVERY_S:
                looked_s = self._clock()
                for planned in self._planned:
                    self._look_for_proofs(planned)
            for planned in self._planned:
                for shipping in planned.shippings:
                    shipping.ship(self._data_dir)
                    if self._stopping.is_set():
                        return
            self.report()
            if self._stopping.wait(SHIP_EVERY_S):
                return

    # -- telling -------------------------------------------------------------------------------------------

    def report(self) -> None:
        """Tells how things stand."""
        shippings = [shipping for planned in self._planned for shipping in planned.shippings]
        keep_from = min((Lsn(shipping.shipped_lsn + 1) for shipping in shippings), default=_KEEP_NOTHING)
        self._tell(
            admin_pb2.BackupReport(
                policies=[self._status(planned) for planned in self._planned], keep_from_lsn=keep_from
            )
        )

    def _status(self, planned: _Planned) -> admin_pb2.BackupStatus:
        policy, books = planned.policy, self._books
        success = books.last(policy.name, Result.DONE)
        failure = books.last(policy.name, Result.PARTIAL, Result.FAILED)
        schedule = policy.schedule
        return admin_pb2.BackupStatus(
            policy=policy.name,
            next_s=schedule.next_after(self._last_start_s(planned)) if schedule else 0.0,
            running=planned.running,
            last_success_s=success.start_s if success else 0.0,
            last_failure_s=failure.start_s if failure else 0.0,
            last_error=failure.errors[0] if failure and failure.errors else "",
            last_proven_s=planned.proven_s,
            drill_warn_days=policy.drill_warn_days,
            repositories=[
                admin_pb2.RepositoryStatus(
                    url=shipping.url, shipped_lsn=shipping.shipped_lsn, problem=shipping.problem
                )
                for shipping in planned.shippings
            ],
        )


def main(data_dir: Path, policies: Path) -> int:
    """Works until standard input ends; returns the exit code."""
    os.nice(NICENESS)
    telling = threading.Lock()

    def tell(report: admin_pb2.BackupReport) -> None:
        with telling:
            print(json_format.MessageToJson(report, indent=None), flush=True)

    try:
        worker = Worker(data_dir, read_policies(policies), tell=tell)
    except UnderstudyError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    threads = [
        threading.Thread(target=_ending_all, args=(work,), name=work.__name__)
        for work in (worker.run_when_due, worker.ship_forever)
    ]
    for thread in threads:
        thread.start()
    sys.stdin.buffer.read()
    worker.stop()
    for thread in threads:
        thread.join()
    return 0


def _ending_all(work: Callable[[], None]) -> None:
    """Runs a thread's work; should it fail in a way that nobody has foreseen, the process ends and is started again."""
    try:
        work()
    except BaseException as error:
        log.error("backup_worker_failed", exc_info=error)
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
