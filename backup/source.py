"""A data directory at one moment, while its server goes on: the store's snapshot, pinned, and the log behind it.

Nothing is asked of the server, and nothing in the directory is changed but LMDB's table of readers. What may happen
meanwhile is told apart afterwards: where the copy was replaced (a bootstrap, a rewind) or the log pruned while it was
being looked at, it is looked at again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from understudy.common.directory import NODE_FILE, NodeFile, Role, check_finished
from understudy.common.errors import (
    CorruptionError,
    NotADataDirectory,
    StorageFailed,
    UnderstudyError,
    UsageError,
)
from understudy.common.files import storage_errors
from understudy.common.locator import History, lookup_in, span_of
from understudy.common.log_reader import LogPlace, records_from, segments_behind
from understudy.common.pinned_snapshot import PinnedSnapshot, checkpoint_of
from understudy.common.segment import RECORDS_START, Segment, SegmentHeader, Watermark, segment_name
from understudy.common.state import State
from understudy.common.store import Store
from understudy.common.store_layout import DATA_FILE
from understudy.common.types import ClusterId, Digest, Epoch, Lsn, Position

_TRIES = 5
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPart:
    """A stretch of records of one segment, as a segment of a copy."""

    header: SegmentHeader  # of the copy's segment
    end: LogPlace  # behind its last record
    fd: int  # of the source's segment; closed with the source
    start_byte: int  # of the first record, in the source's file

    @property
    def name(self) -> str:
        """The copy's file name."""
        return segment_name(self.header.first_lsn)

    @property
    def record_bytes(self) -> int:
        """How many bytes of records."""
        return self.end.offset - self.header.first_offset

    @property
    def file_bytes(self) -> int:
        """The copy's length."""
        return RECORDS_START + self.record_bytes

    def content(self) -> Iterator[bytes]:
        """The copy's file, in pieces.

        Raises:
            StorageFailed, CorruptionError: see :meth:`records`.
        """
        watermark = Watermark.settled(self.end.position.lsn, self.end.offset)
        yield (self.header.encode() + watermark.encode()).ljust(RECORDS_START, b"\0")
        yield from self.records()

    def records(self) -> Iterator[bytes]:
        """The record bytes, in pieces.

        Raises:
            StorageFailed, CorruptionError: the file can't be read, or has become shorter.
        """
        at, left = self.start_byte, self.record_bytes
        while left:
            with storage_errors("read", Path(self.name)):
                data = os.pread(self.fd, min(_READ_BYTES, left), at)
            if not data:
                raise CorruptionError(f"{self.name} was cut off at byte {at}")
            yield data
            at, left = at + len(data), left - len(data)


class Source:
    """A pinned directory; made by :func:`open_source`."""

    def __init__(self, path: Path, node: NodeFile, snapshot: PinnedSnapshot, state: State) -> None:
        self.path = path
        self.node = node
        self.snapshot = snapshot
        self.state = state
        self.cluster: ClusterId = state.store.current.cluster()
        self.checkpoint = state.store.current.checkpoint
        self._opened = contextlib.ExitStack()

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

        Raises:
            CorruptionError, StorageFailed.
        """
        segments = self._segments_behind(self.begin.position.lsn)
        for record in records_from(segments, self.begin):
            self.state.apply(record)
        # Records can be read before they are durable. A copy must not hold what a power failure takes from its source.
        with storage_errors("sync", segments[-1].path):
            os.fdatasync(self._open(segments[-1]))

    def _segments_behind(self, after: Lsn | None) -> list[Segment]:
        return segments_behind(self.path / "log", self.cluster, after)

    def parts(self, after: LogPlace) -> list[LogPart]:
        """The log behind ``after``, which is on this history and not pruned, up to :attr:`end`.

        Raises:
            UsageError: it is pruned.
            CorruptionError, StorageFailed.
        """
        segments = self._segments_behind(after.position.lsn)
        segments = [segment for segment in segments if segment.header.before.lsn <= self.end.position.lsn]
        ends = [
            LogPlace(following.header.before, following.header.first_offset)
            for _, following in pairwise(segments)
        ]
        return [
            self._part(segment, after if segment is segments[0] else None, end)
            for segment, end in zip(segments, [*ends, self.end], strict=True)
        ]

    def _part(self, segment: Segment, after: LogPlace | None, end: LogPlace) -> LogPart:
        header = segment.header
        if after is not None and after.offset > header.first_offset:
            header = SegmentHeader(
                cluster=header.cluster,
                epoch=header.epoch,
                first_lsn=Lsn(after.position.lsn + 1),
                first_offset=after.offset,
                previous=after.position.digest,
            )
        return LogPart(
            header=header,
            end=end,
            fd=self._open(segment),
            start_byte=segment.byte_of(header.first_offset),
        )

    def _open(self, segment: Segment) -> int:
        with storage_errors("read", segment.path):
            fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
        self._opened.callback(os.close, fd)
        return fd

    def history(self) -> History:
        """What is known here of this copy's history, to compare another copy with."""
        marks = {mark.lsn: mark.digest for mark in self.state.store.current.marks()}
        marks[self.begin.position.lsn] = self.begin.position.digest
        marks[self.end.position.lsn] = self.end.position.digest
        spans = [span_of(row.info) for row in self.state.epochs]
        marks.update((span.fork.lsn, span.fork.digest) for span in spans)
        first_held = self._segments_behind(None)[0].header.first_lsn
        return History(
            head=self.end.position,
            epochs=spans,
            first_held=first_held,
            lookup=lookup_in(self._position_at, marks),
        )

    def _position_at(self, lsn: Lsn) -> Position | None:
        """The position of an entry that the log holds."""
        if lsn > self.end.position.lsn:
            return None
        with contextlib.suppress(UsageError):
            segment = self._segments_behind(lsn)[0]
            if segment.header.before.lsn == lsn:
                return segment.header.before
            fd = self._open(segment)
            found, _ = segment.find(lsn, lambda at, length: os.pread(fd, length, segment.byte_of(at)))
            return found
        return None

    def close(self) -> None:
        """Closes the files of the log."""
        self._opened.close()


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
            opened.push(tried.pop_all())
            return source
    raise AssertionError("the last attempt returns or raises")


def _identity(path: Path) -> tuple[object, ...]:
    """Changes when a copy takes another's place, or the log is pruned."""
    with storage_errors("read", path):
        store, names = path / "store" / DATA_FILE, sorted((path / "log").glob("*"))
        return (store.stat().st_ino if store.exists() else 0, names[:1])


def _open(path: Path, opened: contextlib.ExitStack) -> Source:
    check_finished(path)
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
