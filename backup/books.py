"""What a server's directory remembers of its backups: the journal and the history, in ``backups/``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from understudy.backup.history import Entry, History, Result
from understudy.backup.journal import Journal
from understudy.common.files import storage_errors

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
        found = [
            entry for entry in self.history.entries() if entry.policy == policy and entry.result in wanted
        ]
        return found[-1] if found else None
