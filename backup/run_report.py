"""What came of a run of a policy: for each repository, and for people, hooks and the history."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from understudy.backup.catalog import StoredBackup
from understudy.backup.drill import Drill
from understudy.backup.history import Result
from understudy.backup.manifest import utc_text


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of one repository."""

    url: str
    backup: StoredBackup | None = None
    drill: Drill | None = None  # of the backup, if the policy wants one
    pruned: int = 0  # older backups
    pruned_stretches: int = 0  # of the log
    kept: set[str] | None = None  # ids of all backups of the policy there, if they were looked at
    shipped_lsn: int | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What went wrong, and what the backup lacks."""
        return self.errors + (self.backup.manifest.problems if self.backup is not None else [])


@dataclass(slots=True, kw_only=True)
class RunReport:
    """What came of a run."""

    number: int
    id: str  # by which a server knows it
    policy: str
    started_s: float  # since 1970
    seconds: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # of no single repository
    is_cancelled: bool = False

    @property
    def backups(self) -> list[StoredBackup]:
        """What was made."""
        return [outcome.backup for outcome in self.outcomes if outcome.backup is not None]

    @property
    def paths(self) -> list[str]:
        """Where it lies."""
        return [f"{one.url}/{one.backup.folder}" for one in self.outcomes if one.backup is not None]

    @property
    def all_errors(self) -> list[str]:
        """Each with its repository."""
        return self.errors + [f"{one.url}: {error}" for one in self.outcomes for error in one.problems]

    @property
    def result(self) -> Result:
        """Done, partial (something was made, not all went well), failed, or cancelled."""
        if self.is_cancelled:
            return Result.CANCELLED
        if not self.backups:
            return Result.FAILED
        return Result.PARTIAL if self.all_errors else Result.DONE

    def facts(self) -> dict[str, Any]:
        """For hooks and ``--json``."""
        return {
            "number": self.number,
            "id": self.id,
            "policy": self.policy,
            "started": utc_text(self.started_s),
            "seconds": round(self.seconds, 3),
            "result": self.result.value,
            "realms": max((backup.manifest.realms for backup in self.backups), default=0),
            "lsn": max((backup.manifest.lsn for backup in self.backups), default=0),
            "repositories": [
                {
                    "url": outcome.url,
                    "backup": outcome.backup.id if outcome.backup else None,
                    "bytes": outcome.backup.size if outcome.backup else 0,
                    "proven": outcome.drill.is_proven if outcome.drill else None,
                    "pruned": outcome.pruned,
                    "pruned_stretches": outcome.pruned_stretches,
                    "shipped_lsn": outcome.shipped_lsn,
                    "errors": outcome.problems,
                }
                for outcome in self.outcomes
            ],
            "errors": self.all_errors,
        }


def run_line(report: RunReport) -> str:
    """A run in a sentence."""
    said = f"run {report.number} of {report.policy}: {report.result}"
    if report.backups:
        newest = max(report.backups, key=lambda backup: backup.manifest.lsn)
        size = sum(backup.size for backup in report.backups)
        said += f", {newest.manifest.realms} realms, {size:,} bytes, at LSN {newest.manifest.lsn}"
    backups = sum(outcome.pruned for outcome in report.outcomes)
    stretches = sum(outcome.pruned_stretches for outcome in report.outcomes)
    if backups or stretches:
        older = "1 older backup" if backups == 1 else f"{backups:,} older backups"
        log = "1 stretch" if stretches == 1 else f"{stretches:,} stretches"
        said += f", {older} and {log} of log removed"
    said += f", in {report.seconds:.1f} s, id {report.id}"
    return said + "".join(f"; {error}" for error in report.all_errors)
