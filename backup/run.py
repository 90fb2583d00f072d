"""One run of a policy: a backup in each of its repositories, the log behind it, old ones removed, and a report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from understudy.backup.archive_options import ArchiveOptions
from understudy.backup.archiver import Archiver
from understudy.backup.books import Books
from understudy.backup.catalog import BACKUPS, Catalog, StoredBackup, read_catalog
from understudy.backup.drill import drill_backup, scratch_parent
from understudy.backup.drill_server import ReadAll, read_all
from understudy.backup.encryption import Encryption
from understudy.backup.history import Result
from understudy.backup.hooks import run_hook
from understudy.backup.log_gap import is_followed
from understudy.backup.manifest import Manifest
from understudy.backup.places import check_repository_apart
from understudy.backup.policy import Policy
from understudy.backup.progress import OnProgress
from understudy.backup.repository import Repository, claim, open_repository
from understudy.backup.repository_lock import RepositoryLock, locked
from understudy.backup.run_report import Outcome, RunReport, run_line
from understudy.backup.source import Source, open_source
from understudy.backup.store_backup import publish_stored, store_archive
from understudy.backup.stretch import list_stretches
from understudy.backup.upkeep import prune
from understudy.common.directory import Role
from understudy.common.errors import UnderstudyError, UsageError
from understudy.common.events import log
from understudy.common.known_runs import new_run_id

# Rather than throw away what took hours to store. Who has crashed is not waited for: a lock lapses within a minute.
_LOCK_WAIT_S = 6 * 3600.0


class Cancelled(Exception):
    """Whoever watches a run wants it to end."""


class CutOff(Cancelled):
    """The process is about to end, and has no time left for anything else."""


def run_policy(
    policy: Policy,
    data_dir: Path,
    *,
    run_id: str | None = None,
    progress: OnProgress | None = None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], object] = time.sleep,
    check: Callable[[], object] = lambda: None,
    read_all: ReadAll = read_all,
) -> RunReport:
    """Runs a policy once, whatever its schedule says; what goes wrong is in the report.

    Args:
        data_dir: what is backed up, whose server may run; journal and history are kept there.
        run_id: by which others know the run; a new one if not given.
        progress: told of bytes done and in all, of each repository anew; it may raise :class:`Cancelled`.
        clock: seconds since 1970.
        sleep: waits between attempts, and for a repository's lock; it may raise :class:`Cancelled`, too.
        check: called again and again while a hook runs; it may raise :class:`Cancelled`, too.
        read_all: what drills read restored backups with.

    Raises:
        DiskFull, StorageFailed, NewerFormat: journal or history can't be kept.
    """
    books = Books.of(data_dir)
    report = RunReport(
        number=books.history.reserve(), id=run_id or new_run_id(), policy=policy.name, started_s=clock()
    )
    run = _Run(policy, data_dir, books, report, progress, sleep, check, read_all)
    started_s = time.monotonic()
    run.run()
    report.seconds = time.monotonic() - started_s
    run.write_down()
    run.tell_hooks()
    return report


def note_cancelled(
    policy: str, data_dir: Path, why: str, *, run_id: str, clock: Callable[[], float] = time.time
) -> None:
    """Writes down a run that was cancelled before its turn had come.

    Raises:
        DiskFull, StorageFailed, NewerFormat: journal or history can't be kept.
    """
    books = Books.of(data_dir)
    number = books.history.reserve()
    report = RunReport(
        number=number, id=run_id, policy=policy, started_s=clock(), errors=[why], is_cancelled=True
    )
    _write_down(books, report)


def note_failed(
    policy: Policy,
    data_dir: Path,
    why: str,
    *,
    run_id: str,
    clock: Callable[[], float] = time.time,
    check: Callable[[], object] = lambda: None,
) -> RunReport:
    """Writes down a run that is not made, and tells the operator's hook.

    Args:
        check: as of :func:`run_policy`.

    Raises:
        DiskFull, StorageFailed, NewerFormat: journal or history can't be kept.
    """
    books = Books.of(data_dir)
    number = books.history.reserve()
    report = RunReport(number=number, id=run_id, policy=policy.name, started_s=clock(), errors=[why])
    _write_down(books, report)
    _tell_hooks(policy, books, report, check)
    return report


class _Run:
    def __init__(
        self,
        policy: Policy,
        data_dir: Path,
        books: Books,
        report: RunReport,
        progress: OnProgress | None,
        sleep: Callable[[float], object],
        check: Callable[[], object],
        read_all: ReadAll,
    ) -> None:
        self.report = report
        self._policy = policy
        self._data_dir = data_dir
        self._books = books
        self._progress = progress
        self._sleep = sleep
        self._check = check
        self._read_all = read_all
        self._is_cut_off = False

    def run(self) -> None:
        """Each repository, one after the other."""
        try:
            self._run()
        except UnderstudyError as error:
            self.report.errors.append(str(error))
        except Cancelled as error:
            self.report.is_cancelled, self._is_cut_off = True, isinstance(error, CutOff)
            self.report.errors.append(str(error))

    def _run(self) -> None:
        if self._policy.before:
            run_hook(self._policy.before, self.report.facts(), setting="before", check=self._check)
        encryption = self._policy.encryption()
        for url in self._policy.repositories:
            outcome = Outcome(url=url)
            self.report.outcomes.append(outcome)
            self._try_again_and_again(outcome, encryption)

    def _try_again_and_again(self, outcome: Outcome, encryption: Encryption | None) -> None:
        for left in reversed(range(self._policy.retries + 1)):
            try:
                self._back_up(outcome, encryption)
                return
            except Cancelled:
                raise
            except Exception as error:
                if not isinstance(error, UnderstudyError):
                    log.error("backup_crashed", policy=self._policy.name, to=outcome.url, exc_info=error)
                is_lasting = isinstance(error, UnderstudyError) and error.is_lasting
                if not left or outcome.backup is not None or is_lasting:
                    outcome.errors.append(str(error) or repr(error))
                    return
                log.warning("backup_retry", policy=self._policy.name, to=outcome.url, error=str(error))
            self._sleep(self._policy.retry_wait_s)

    def _back_up(self, outcome: Outcome, encryption: Encryption | None) -> None:
        policy = self._policy
        check_repository_apart(outcome.url, self._data_dir)
        repository = open_repository(outcome.url)
        with open_source(self._data_dir) as source:
            claim(repository, source.cluster)
            _check_reigns(source)
            self._count_from(repository)
            stored = store_archive(
                source,
                repository,
                policy=policy.name,
                run=self.report.number,
                options=ArchiveOptions(
                    selection=policy.selection, encryption=encryption, level=policy.level, rate=policy.rate
                ),
                progress=self._progress,
            )
            cluster = source.cluster
        with self._locked(repository, "backup") as lock:
            publish_stored(repository, lock, stored)
            outcome.backup = stored
        # What comes now can fail without taking the backup back. Proven first: if it is not good, older ones stay.
        if policy.drill:
            self._drill(outcome)
        catalog = None
        with _noting(outcome):
            if policy.archive_log:
                archiver = Archiver(
                    self._data_dir / "log", cluster, repository, encryption=encryption, level=policy.level
                )
                outcome.shipped_lsn = archiver.ship()
            with self._locked(repository, "prune") as lock:
                catalog = self._prune(repository, lock, outcome)
        with _noting(outcome):  # also where that has failed
            _note_what_follows(outcome, repository, catalog or read_catalog(repository))

    def _locked(self, repository: Repository, what: str) -> AbstractContextManager[RepositoryLock]:
        return locked(repository, f"{what} {self._policy.name}", wait_s=_LOCK_WAIT_S, sleep=self._sleep)

    def _count_from(self, repository: Repository) -> None:
        """Without a history, numbers go on behind those that backups bear: it was lost, or this is another node's."""
        if self.report.number == 1:
            floor = max((backup.run for backup in read_catalog(repository).backups), default=0)
            if floor:
                self.report.number = self._books.history.reserve(floor)

    def _drill(self, outcome: Outcome) -> None:
        assert outcome.backup is not None, "it was made just now"
        with _noting(outcome):
            outcome.drill = drill_backup(
                self._policy,
                outcome.url,
                outcome.backup,
                scratch_parent(self._policy, self._data_dir),
                read_all=self._read_all,
                journal=self._books.journal,
                progress=self._progress,
            )
            if outcome.drill.problem:
                outcome.errors.append(f"the drill of {outcome.backup.id}: {outcome.drill.problem}")

    def _prune(self, repository: Repository, lock: RepositoryLock, outcome: Outcome) -> Catalog:
        """Also where all backups are kept: what runs have left that were cut off goes, and log that no backup needs.

        Returns:
            What was there before.
        """
        report = prune(repository, lock, self._policy.retention, policy=self._policy.name)
        outcome.pruned, outcome.pruned_stretches = len(report.removed), len(report.stretches)
        outcome.kept = {name for name, _ in report.kept}
        return report.catalog

    def tell_hooks(self) -> None:
        """The report goes to the operator's programs, if there is time left for them."""
        if not self._is_cut_off:
            # Who has cancelled the run may have a program told of that, so this is no reason to end it.
            check = (lambda: None) if self.report.is_cancelled else self._check
            _tell_hooks(self._policy, self._books, self.report, check)

    def write_down(self) -> None:
        """Journal and history."""
        _write_down(self._books, self.report)
        self._books.history.forget(self._policy.name, self._may_be_there)

    def _may_be_there(self, path: str) -> bool:
        """Whether a backup of this policy exists, as far as this run has seen."""
        for outcome in self.report.outcomes:
            if outcome.kept is not None and path.startswith(f"{outcome.url}/{BACKUPS}"):
                return path.rstrip("/").rpartition("/")[2] in outcome.kept
        return True


def _tell_hooks(policy: Policy, books: Books, report: RunReport, check: Callable[[], object]) -> None:
    """Tells the program of a run that was written down; what goes wrong with it is written down as well."""
    is_done = report.result is Result.DONE
    program, setting = (policy.after, "after") if is_done else (policy.on_failure, "on_failure")
    if program:
        try:
            run_hook(program, report.facts(), setting=setting, check=check)
        except (UnderstudyError, Cancelled) as error:
            report.errors.append(str(error))
            _write_down(books, report)


def _write_down(books: Books, report: RunReport) -> None:
    books.history.add(
        number=report.number,
        id=report.id,
        policy=report.policy,
        start_s=report.started_s,
        seconds=report.seconds,
        result=report.result,
        realms=max((backup.manifest.realms for backup in report.backups), default=0),
        bytes=sum(backup.size for backup in report.backups),
        lsn=max((backup.manifest.lsn for backup in report.backups), default=0),
        paths=report.paths,
        errors=report.all_errors,
    )
    books.journal.write(run_line(report))


def _check_reigns(source: Source) -> None:
    """A fenced primary's entries may have been given up: they are no successors of the backups that are there."""
    if source.node.role is Role.FENCED:
        raise UsageError(
            f"{source.path} is of a primary that was fenced: another one has taken over",
            remedy="run the policy on a node that follows that one; `understudy backup` copies this one by hand",
        )


def _note_what_follows(outcome: Outcome, repository: Repository, catalog: Catalog) -> None:
    assert outcome.backup is not None, "it was made just now"
    # What a node that was superseded has more than its successor is followed by nothing: that is no loss of log.
    problem = _superseded(outcome.backup, catalog) or _log_gone(outcome.backup.manifest, repository)
    if problem:
        outcome.errors.append(problem)


def _superseded(backup: StoredBackup, catalog: Catalog) -> str:
    """In words; a node that was cut off does not know that another reigns, but the repository may."""
    newest = max(catalog.backups, key=lambda backup: backup.manifest.rank, default=backup)
    if newest.manifest.epoch <= backup.manifest.epoch:
        return ""
    return (
        f"it is of epoch {backup.manifest.epoch}, and {newest.id} there is of epoch {newest.manifest.epoch}: "
        "another node has taken over, and this one does not follow it"
    )


def _log_gone(manifest: Manifest, repository: Repository) -> str:
    """In words; whoever ships the log goes on behind the newest stretch there, wherever this backup ends."""
    if not manifest.is_whole or is_followed(manifest, list_stretches(repository)):
        return ""
    return (
        f"the log behind LSN {manifest.lsn} is not all there: no moment from there to the next backup can be restored; "
        "to store it took more than a day, its source lags by as much, log was removed before it could be shipped, or "
        "another node has taken over"
    )


@contextlib.contextmanager
def _noting(outcome: Outcome) -> Iterator[None]:
    try:
        yield
    except UnderstudyError as error:
        outcome.errors.append(str(error))
