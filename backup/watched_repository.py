"""A policy's repository, looked after beside a server: the log is shipped to it, and what is there is read."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from understudy.backup.archiver import Archiver
from understudy.backup.catalog import last_proven_s, read_catalog
from understudy.backup.log_gap import find_gap
from understudy.backup.places import check_repository_apart
from understudy.backup.policy import Policy
from understudy.backup.repository import claim, open_repository
from understudy.backup.stretch import list_stretches
from understudy.common.backoff import Backoff
from understudy.common.directory import NODE_FILE, NodeFile
from understudy.common.errors import CorruptionError, NotADataDirectory, UnderstudyError, UsageError
from understudy.common.events import log
from understudy.common.types import NO_LSN, ClusterId

SHIP_EVERY_S = 5.0
LOOK_EVERY_S = 3600.0  # every manifest is read then
_TRY_AGAIN_S_MAX = 30.0


class WatchedRepository:
    """One repository of one policy.

    A thread of its own goes through :meth:`steps`, so that a storage that hangs holds up no other.

    Args:
        data_dir: of the node.
        clock: seconds since 1970.
    """

    def __init__(self, policy: Policy, url: str, data_dir: Path, clock: Callable[[], float]) -> None:
        self.policy = policy
        self.url = url
        self.shipped_lsn = NO_LSN
        self.shipped_s = clock()  # when shipping last got on, or there was nothing to do
        self.problem = ""  # why it does not
        self.gap = ""
        self.proven_s = 0.0  # when a drill last proved one of its backups there, since 1970; 0 for never
        self.pause_s = SHIP_EVERY_S  # until the next steps
        self._data_dir = data_dir
        self._clock = clock
        self._archiver: Archiver | None = None
        self._backoff = Backoff(first_s=SHIP_EVERY_S, last_s=_TRY_AGAIN_S_MAX)
        self._looked_s = 0.0

    def look_again(self) -> None:
        """Something has changed there: it is looked at by the next steps."""
        self._looked_s = 0.0

    def steps(self) -> Iterator[None]:
        """Ships what there is to be shipped, and looks at what is there if it is time to; yields when it has got on."""
        if self.policy.archive_log:
            yield from self._ship()
        if self._clock() - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = self._clock()
            self._look()
        yield

    def _ship(self) -> Iterator[None]:
        """What goes wrong is remembered, and tried again the next time."""
        was_going_on = self._archiver is not None and not self.problem
        try:
            if self._archiver is None:
                self._archiver = self._open()
            self._archiver.encryption = self.policy.encryption()  # whose passphrase may have been changed
            for lsn in self._archiver.ship_parts():
                if lsn > self.shipped_lsn:
                    self.problem = ""
                self.shipped_lsn, self.shipped_s = lsn, self._clock()
                yield
            self.problem, self.pause_s = "", SHIP_EVERY_S
            self._backoff.reset()
            if not was_going_on:
                self.look_again()  # there may be a gap before where it goes on
        except (UnderstudyError, OSError) as error:
            self._note(error)

    def _note(self, error: UnderstudyError | OSError) -> None:
        if str(error) != self.problem:
            log.warning("log_not_shipped", policy=self.policy.name, to=self.url, error=str(error))
        self.problem = str(error)
        self.pause_s = self._backoff.next_s(random.random())
        if isinstance(error, UsageError | CorruptionError):
            self._archiver = None  # the log is another one, or no longer holds what comes next

    def _open(self) -> Archiver:
        node = NodeFile.read(self._data_dir / NODE_FILE)
        if not node.cluster:
            raise NotADataDirectory(f"{self._data_dir} has no copy yet")
        cluster = ClusterId(uuid.UUID(node.cluster).bytes)
        check_repository_apart(self.url, self._data_dir)
        repository = open_repository(self.url)
        claim(repository, cluster)
        return Archiver(
            self._data_dir / "log",
            cluster,
            repository,
            encryption=self.policy.encryption(),
            level=self.policy.level,
        )

    def _look(self) -> None:
        """What drills have found out, those included that were run by hand, and what is missing of the log."""
        try:
            repository = open_repository(self.url)
            catalog = read_catalog(repository)
            self.proven_s = max(self.proven_s, last_proven_s(catalog, self.policy.name))
            if self.policy.archive_log:
                self.gap = find_gap(catalog, list_stretches(repository))
        except (UnderstudyError, OSError) as error:
            log.warning("repository_not_read", policy=self.policy.name, of=self.url, error=str(error))
