"""Scheduled runs that were begun and have not ended: one that takes its process with it is not made up for ever."""

from __future__ import annotations

import json
from pathlib import Path

from understudy.common.events import log
from understudy.common.files import publish, storage_errors

ATTEMPTS_MAX = 3  # enough for servers that are started anew meanwhile


class Attempts:
    """How often the run of each policy that is due was begun, in a small file that one process writes.

    What can't be read counts as nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._load()

    def begin(self, policy: str, due_s: float) -> int:
        """Notes durably that a run is about to begin; returns how many of the same due time have not ended.

        Args:
            due_s: when it was planned for, seconds since 1970.

        Raises:
            DiskFull, StorageFailed.
        """
        last_due_s, count = self._known.get(policy, (due_s, 0))
        before = count if last_due_s == due_s else 0
        self._store({**self._known, policy: (due_s, before + 1)})
        return before

    def end(self, policy: str) -> None:
        """The policy's run has ended, in whatever way.

        Raises:
            DiskFull, StorageFailed.
        """
        if policy in self._known:
            self._store({name: noted for name, noted in self._known.items() if name != policy})

    def _store(self, known: dict[str, tuple[float, int]]) -> None:
        publish(self._path, json.dumps(known, indent=1).encode() + b"\n")
        self._known = known

    def _load(self) -> dict[str, tuple[float, int]]:
        with storage_errors("read", self._path):
            if not self._path.exists():
                return {}
            data = self._path.read_bytes()
        try:
            return {name: (float(due_s), int(count)) for name, (due_s, count) in json.loads(data).items()}
        except (ValueError, TypeError, AttributeError, RecursionError):
            log.warning("backup_attempts_unclear", path=str(self._path))
            return {}
