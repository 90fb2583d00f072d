"""A data directory at one moment, while its server goes on: the store's snapshot, pinned, and the log behind it.

Nothing is asked of the server, and nothing in the directory is changed but LMDB's table of readers. What may happen
meanwhile is told apart afterwards: where the copy was replaced (a bootstrap, a rewind) or the log pruned while it was
being looked at, it is looked at again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from understudy.backup.log_files import LogFiles, LogPart
from understudy.common.backup_end import check_end
from understudy.common.directory import NODE_FILE, NodeFile, Role, check_finished, check_restored
from understudy.common.errors import NotADataDirectory, StorageFailed, UnderstudyError
from understudy.common.files import storage_errors
from understudy.common.locator import History, lookup_in, span_of
from understudy.common.log_reader import LogPlace
from understudy.common.pinned_snapshot import PinnedSnapshot, checkpoint_of
from understudy.common.state import State
from understudy.common.store import Store
from understudy.common.store_layout import DATA_FILE
from understudy.common.types import ClusterId, Digest, Epoch, Lsn, Position

_TRIES = 5


class Source:
    """A pinned directory; made by :func:`open_source`."""

    def __init__(self, path: Path, node: NodeFile, snapshot: PinnedSnapshot, state: State) -> None:
        self.path = path
        self.node = node
        self.snapshot = snapshot
        self.state = state
        self.cluster: ClusterId = state.store.current.cluster()
        self.checkpoint = state.store.current.checkpoint
        self._log = LogFiles(path / "log", self.cluster)
        self._parts: list[LogPart] = []

    @property
    def end(self) -> LogPlace:
        """What a copy reaches up to."""
        return LogPlace(self.state.applied, self.state.offset)

    @property
    def begin(self) -> LogPlace:
        """Where the store stands, so that a copy needs the log from there on."""
        row = self.checkpoint
        return LogPlace(Position(Lsn(row.lsn), Digest(row.digest)), row.log_offset)

    @property
    def epoch(self) -> Epoch:
        """Of the last entry."""
        return Epoch(self.state.epochs[-1].info.epoch if self.state.epochs else 0)

    def replay(self) -> None:
        """Brings the state to the log's end, which checks all that a copy will have to replay, and makes it durable.

        Its files are opened as well: they may be pruned or replaced by the time that they are copied.

        Raises:
            CorruptionError, StorageFailed.
        """
        for record in self._log.durable_records(self.begin):
            self.state.apply(record)
        self._parts = self._log.parts(self.begin, self.end)

    def parts(self, after: LogPlace) -> list[LogPart]:
        """The log behind ``after``, which is on this history and not pruned, up to :attr:`end`.

        Raises:
            UsageError: it is pruned.
            CorruptionError, StorageFailed.
        """
        return self._parts if after == self.begin else self._log.parts(after, self.end)

    def history(self) -> History:
        """What is known here of this copy's history, to compare another copy with."""
        marks = {mark.lsn: mark.digest for mark in self.state.store.current.marks()}
        spans = [span_of(row.info) for row in self.state.epochs]
        marks |= {span.fork.lsn: span.fork.digest for span in spans}
        marks[self.end.position.lsn] = self.end.position.digest
        return History(
            head=self.end.position,
            epochs=spans,
            first_held=self._log.first_lsn,
            lookup=lookup_in(self._log.position_at, marks),
        )

    def close(self) -> None:
        """Closes the files of the log."""
        self._log.close()


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Pins the directory at ``path`` as it is now, until the block ends.

    A process can have one source of the same path open at a time, and not while it has that store open itself.

    Raises:
        NotADataDirectory, UnfinishedBackup, NewerFormat: there is nothing to copy.
        CorruptionError: the log behind the checkpoint, or the store, is damaged.
        StorageFailed: it can't be read.
    """
    with contextlib.ExitStack() as opened:
        source = _open_settled(path, opened)
        yield source


def _open_settled(path: Path, opened: contextlib.ExitStack) -> Source:
    for attempt in range(_TRIES):
        before = _identity(path)
        with contextlib.ExitStack() as tried:
            try:
                source = _open(path, tried)
            except (UnderstudyError, FileNotFoundError):
                # Something was moved or removed while we looked? Then what we saw says nothing.
                if attempt + 1 == _TRIES or _identity(path) == before:
                    raise
                continue
            # Else the log may be of another copy than the store, which is the first to be replaced.
            if _identity(path)[0] == before[0]:
                opened.push(tried.pop_all())
                return source
    raise StorageFailed(f"{path} is replaced faster than it can be looked at", remedy="try again later")


def _identity(path: Path) -> tuple[object, ...]:
    """The store's changes when a copy takes another's place, and the oldest segment's also when the log is pruned."""
    with storage_errors("read", path):
        store, names = path / "store" / DATA_FILE, sorted((path / "log").glob("*"))
        return (store.stat().st_ino if store.exists() else 0, names[:1])


def _open(path: Path, opened: contextlib.ExitStack) -> Source:
    check_finished(path)
    check_restored(path)
    if not (path / NODE_FILE).is_file():
        raise NotADataDirectory(
            f"{path} is not a data directory of Understudy: it has no {NODE_FILE}",
            remedy="give a server's directory, a replica's, or a backup",
        )
    node = NodeFile.read(path / NODE_FILE)
    if not node.cluster or node.role in (Role.CREATING, Role.INSTALLING):
        raise NotADataDirectory(
            f"{path} holds no whole copy yet: its role is {node.role.value}",
            remedy="wait until its node has created or fetched its data",
        )
    store = opened.enter_context(Store.open(path / "store"))
    if node.role is Role.BACKUP:
        check_end(path, store.current.cluster())
    snapshot = _pin(store, opened)
    source = Source(path, node, snapshot, State(store))
    opened.callback(source.close)
    source.replay()
    return source


def _pin(store: Store, opened: contextlib.ExitStack) -> PinnedSnapshot:
    """Pins what ``store.current`` shows."""
    for _ in range(_TRIES):
        snapshot = PinnedSnapshot.open(store.env, store.data_path)
        if store.refresh().checkpoint == checkpoint_of(store, snapshot):
            return opened.enter_context(snapshot)
        snapshot.close()
    raise StorageFailed(f"checkpoints of {store.path} follow each other too fast to pin one")
