"""What a server's directory remembers of its backups: the journal and the history, in ``backups/``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from understudy.backup.history import Entry, History, Result
from understudy.backup.journal import Journal
from understudy.common.files import storage_errors
from understudy.v1 import admin_pb2

FOLDER = "backups"


@dataclass(frozen=True, slots=True)
class Books:
    """Journal and history of one data directory."""

    journal: Journal
    history: History

    @classmethod
    def of(cls, data_dir: Path) -> Books:
        """Those of a data directory; made when they are first written.

        Raises:
            DiskFull, StorageFailed.
        """
        folder = data_dir / FOLDER
        with storage_errors("create", folder):
            folder.mkdir(mode=0o700, exist_ok=True)
        return cls(Journal(folder / "journal"), History(folder / "history.json"))

    def last(self, policy: str, *results: Result) -> Entry | None:
        """The latest run of a policy that ended so; of any, if none is named.

        Raises:
            NewerFormat, StorageFailed.
        """
        wanted = results or tuple(Result)
        return _last(self.history.entries(), policy, *wanted)

    def statuses(self) -> list[admin_pb2.BackupStatus]:
        """When each policy that was ever run last succeeded and failed, by name.

        What its server alone knows is left out: when it is due, how far its log is shipped, what was proven.

        Nothing is changed, a history that is damaged neither.

        Raises:
            CorruptionError, NewerFormat, StorageFailed.
        """
        entries = self.history.look()
        return [_status(entries, policy) for policy in sorted({one.policy for one in entries})]


def _status(entries: list[Entry], policy: str) -> admin_pb2.BackupStatus:
    success = _last(entries, policy, Result.DONE)
    failure = _last(entries, policy, Result.PARTIAL, Result.FAILED)
    return admin_pb2.BackupStatus(
        policy=_as_utf8(policy),
        last_success_s=success.start_s if success else 0.0,
        last_failure_s=failure.start_s if failure else 0.0,
        last_error=_as_utf8(failure.errors[0]) if failure and failure.errors else "",
    )


def _last(entries: list[Entry], policy: str, *wanted: Result) -> Entry | None:
    found = [entry for entry in entries if entry.policy == policy and entry.result in wanted]
    return found[-1] if found else None


def _as_utf8(text: str) -> str:
    """JSON holds halves of characters, as of a file's name that is no UTF-8; a message can't."""
    return text.encode(errors="backslashreplace").decode()
