"""Drills: a backup is proven by restoring it, verifying it, starting a server on it, and reading all of it.

What was found is noted in the repository: so a damaged backup is passed over by restores, and kept by no retention in
the place of a good one.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from understudy.backup.catalog import Finding, StoredBackup, note_check, read_catalog
from understudy.backup.drill_server import ReadAll, ReadReport
from understudy.backup.encryption import Unlocking
from understudy.backup.in_progress import in_progress
from understudy.backup.journal import Journal
from understudy.backup.log_following import Following, Goal, WrongWay
from understudy.backup.manifest import Form
from understudy.backup.policy import Policy
from understudy.backup.progress import OnProgress
from understudy.backup.repository import Repository, open_repository
from understudy.backup.restore import restore_stored
from understudy.backup.scratch import scratch
from understudy.backup.staging import check_staging, note_proven, replace_staging
from understudy.backup.stretch import list_stretches
from understudy.backup.target_log import Reached, settle
from understudy.backup.upkeep import archive_problem
from understudy.common.directory import DataDirectory
from understudy.common.errors import CorruptionError, NotPermitted, NotStored, UnderstudyError, UsageError
from understudy.common.files import sync_tree
from understudy.common.store import Store
from understudy.common.verify import verify_directory

# Called with the directory of a proven backup before that is removed.
OnProven = Callable[[Path], None]


@dataclass(slots=True, kw_only=True)
class Drill:
    """What came of one repository."""

    url: str
    backup: StoredBackup | None = None
    seconds: float = 0.0
    lsn: int = 0  # reached, with the log behind the backup
    realms: int = 0
    pairs: int = 0
    finding: Finding | None = None  # None: it could not be done
    problem: str = ""

    @property
    def is_proven(self) -> bool:
        """Whether the backup and the log behind it are good."""
        return self.finding is Finding.PROVEN


def drill_newest(
    policy: Policy,
    url: str,
    parent: Path,
    *,
    read_all: ReadAll,
    journal: Journal | None = None,
    on_proven: OnProven | None = None,
    progress: OnProgress | None = None,
) -> Drill:
    """Proves the newest backup of a policy in one of its repositories.

    Args:
        parent: the folder in which it is restored for the time of the drill, unless the policy has a staging.
        read_all: starts a server and reads.
        journal: told of it, if there is one.
        on_proven: given the proven directory, which goes on being there while it runs.

    Raises:
        DiskFull, StorageFailed: the journal can't be written. What else goes wrong is in what is returned.
    """
    drill = Drill(url=url)
    try:
        catalog = read_catalog(open_repository(url))
        backups = [one for one in catalog.backups if one.policy == policy.name]
        if not backups:
            raise UsageError("; ".join([f"there is no backup of {policy.name} in {url}", *catalog.problems]))
    except UnderstudyError as error:
        drill.problem = str(error)
        _tell(journal, drill)
        return drill
    return drill_backup(
        policy,
        url,
        max(backups, key=lambda backup: (backup.manifest.rank, backup.made_s)),
        parent,
        read_all=read_all,
        journal=journal,
        on_proven=on_proven,
        progress=progress,
    )


def drill_backup(
    policy: Policy,
    url: str,
    backup: StoredBackup,
    parent: Path,
    *,
    read_all: ReadAll,
    journal: Journal | None = None,
    on_proven: OnProven | None = None,
    progress: OnProgress | None = None,
) -> Drill:
    """Proves a backup; see :func:`drill_newest`."""
    drill = Drill(url=url, backup=backup)
    try:
        _Proving(policy, drill, backup, read_all, progress).run(parent, journal, on_proven)
    except UnderstudyError as error:
        drill.problem = str(error)
        if drill.finding is None:
            _tell(journal, drill)
    return drill


def scratch_parent(policy: Policy, data_dir: Path | None, given: Path | None = None) -> Path:
    """The folder to restore in: beside the staging, which takes it over by renaming; as given; or beside the data.

    Raises:
        UsageError: nobody says where.
    """
    if policy.staging is not None:
        return policy.staging.absolute().parent
    if given is not None:
        return given
    if data_dir is None:
        raise UsageError("no place to restore in", remedy="give --data-dir or --scratch")
    return data_dir.absolute().parent


class _Damaged(Exception):
    """The backup is, or the log behind it."""

    def __init__(self, finding: Finding, problem: object) -> None:
        super().__init__(str(problem))
        self.finding = finding


class _Proving:
    def __init__(
        self,
        policy: Policy,
        drill: Drill,
        backup: StoredBackup,
        read_all: ReadAll,
        progress: OnProgress | None,
    ) -> None:
        self._policy = policy
        self._drill = drill
        self._backup = backup
        self._read_all = read_all
        self._progress = progress

    def run(self, parent: Path, journal: Journal | None, on_proven: OnProven | None) -> None:
        repository, staging = open_repository(self._drill.url), self._policy.staging
        started_s = time.monotonic()
        if staging is not None:
            check_staging(staging)
        with scratch(parent) as target:
            self._find_out(repository, target)
            if self._drill.is_proven and staging is not None:
                target = self._stage(target, staging)
            self._drill.seconds = time.monotonic() - started_s
            _tell(journal, self._drill)
            if self._drill.is_proven and on_proven is not None:
                on_proven(target)

    def _find_out(self, repository: Repository, target: Path) -> None:
        """Sets what was found, and notes it in the repository."""
        finding, problem = Finding.PROVEN, ""
        try:
            self._prove(repository, target)
            note_proven(target, self._drill.url, self._backup)
        except _Damaged as error:
            finding, problem = error.finding, str(error)
        note_check(repository, self._backup, finding, problem, time.time())
        self._drill.finding, self._drill.problem = finding, problem

    def _stage(self, target: Path, staging: Path) -> Path:
        """Where the proven directory is then: a staging that can't be replaced takes nothing from the proof."""
        try:
            replace_staging(staging, target)
        except UnderstudyError as error:
            self._drill.problem = str(error)
            return target
        return staging

    def _prove(self, repository: Repository, target: Path) -> None:
        """Restores, verifies, compares, follows the log, and reads.

        Raises:
            _Damaged: the backup is not good, or the log behind it.
            UnderstudyError: it could not be found out.
        """
        unlocking = self._policy.unlocking()
        self._restore(repository, target, unlocking)
        try:
            self._compare(target)
        except CorruptionError as error:
            raise _Damaged(Finding.DAMAGED, error) from error
        try:
            reached = self._follow_log(repository, target, unlocking)
        except (CorruptionError, NotStored) as error:
            # What the backup itself holds was verified: it is what a restore without log gives.
            raise _Damaged(Finding.INTACT, f"the log behind it: {error}") from error
        try:
            self._read(target, reached)
        except CorruptionError as error:
            raise _Damaged(Finding.DAMAGED, error) from error

    def _restore(self, repository: Repository, target: Path, unlocking: Unlocking) -> None:
        try:
            restore_stored(
                repository,
                self._backup,
                target,
                with_log=False,
                unlocking=unlocking,
                progress=self._progress,
            )
        except CorruptionError as error:
            raise _Damaged(Finding.DAMAGED, error) from error
        except (NotPermitted, NotStored):
            # A damaged head looks like a wrong key, and the digest tells which it is.
            problem = archive_problem(repository, self._backup)
            if not problem:
                raise
            raise _Damaged(Finding.DAMAGED, problem) from None

    def _compare(self, target: Path) -> None:
        """Recomputes all that can be, and compares it with what the manifest says."""
        found = verify_directory(target)
        if found.problems:
            raise CorruptionError("; ".join(found.problems))
        with DataDirectory.open_existing(target) as directory:
            with Store.open(directory.store, cluster=directory.cluster) as store:
                row = store.current.checkpoint
            realms = settle(directory).realms
        manifest = self._backup.manifest
        compared: list[tuple[str, object, object]] = [
            ("LSN", found.lsn, manifest.lsn),
            ("digest", found.digest.hex(), manifest.digest),
            ("number of realms", realms, manifest.realms),
        ]
        if manifest.form is Form.PAGES:  # the store of one of records is made anew, at the backup's end
            compared += [
                ("checkpoint", row.lsn, manifest.checkpoint_lsn),
                ("state digest", row.state_digest.hex(), manifest.state_digest),
            ]
        for what, restored, said in compared:
            if restored != said:
                raise CorruptionError(f"its {what} is {restored}, and its manifest says {said}")

    def _follow_log(self, repository: Repository, target: Path, unlocking: Unlocking) -> Reached:
        """Goes on behind the backup as far as the shipped log reaches; one that lacks realms stays as it is."""
        if not self._backup.manifest.is_whole:
            with DataDirectory.open_existing(target) as directory:
                return settle(directory)
        stretches = list_stretches(repository)
        following = Following(repository, Goal(), unlocking, stretches=stretches, progress=self._progress)
        while True:
            with (
                DataDirectory.open_existing(target) as directory,
                in_progress(target, self._drill.url),
                contextlib.suppress(WrongWay),
            ):
                reached = following.follow(directory, self._backup.manifest.position)
                sync_tree(target)
                return reached
            shutil.rmtree(target)
            self._restore(repository, target, unlocking)

    def _read(self, target: Path, reached: Reached) -> None:
        report: ReadReport = self._read_all(target)
        if report.realms != reached.realms:
            raise CorruptionError(f"a server on it shows {report.realms} realms of {reached.realms}")
        self._drill.lsn = reached.place.position.lsn
        self._drill.realms, self._drill.pairs = report.realms, report.pairs


def _tell(journal: Journal | None, drill: Drill) -> None:
    if journal is not None:
        journal.write(drill_line(drill))


def drill_line(drill: Drill) -> str:
    """What came of it, in a sentence."""
    name = f"drill of {drill.backup.id} in {drill.url}" if drill.backup else f"drill of {drill.url}"
    if drill.finding is None:
        return f"{name}: could not be done: {drill.problem}"
    if drill.is_proven:
        return (
            f"{name}: proven, {_counted(drill.realms, 'realm')}, {_counted(drill.pairs, 'pair')}, to LSN {drill.lsn}, "
            f"in {drill.seconds:.1f} s" + (f"; {drill.problem}" if drill.problem else "")
        )
    return f"{name}: {drill.finding}: {drill.problem}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
