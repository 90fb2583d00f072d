"""A copy of a backup that is brought forward along the log: each entry is appended, and applied at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import takewhile

from understudy.backup.given_up import Fork
from understudy.backup.point import Point
from understudy.backup.target_log import Reached, in_batches, reached
from understudy.common.directory import DataDirectory
from understudy.common.engine import Engine
from understudy.common.entries import parse_epoch_start
from understudy.common.errors import CorruptionError
from understudy.common.records import ChainReader, Record, scan_chain
from understudy.common.types import ClusterId, Epoch, Lsn, Position


class Replay:
    """The copy; made by :func:`replaying`.

    Args:
        point: nothing that lies behind it is taken.
    """

    def __init__(self, engine: Engine, point: Point | None) -> None:
        self._engine = engine
        self._point = point
        self.read = engine.durable  # the last entry read; behind the point it is not taken
        self.read_offset = engine.log.end_offset  # the log offset behind it
        self.is_enough = False  # the point is reached: no more is wanted
        self.is_broken = False  # what was taken could not be applied
        self._behind: Record | None = None  # the first entry read that lies behind the point
        self._note_lsn()

    @property
    def cluster(self) -> ClusterId:
        """Whose log it is."""
        return self._engine.directory.cluster

    @property
    def end(self) -> Position:
        """The last entry."""
        return self._engine.durable

    @property
    def end_offset(self) -> int:
        """The log offset behind it."""
        return self._engine.log.end_offset

    @property
    def epoch(self) -> Epoch:
        """Of the last entry."""
        return self._engine.epoch

    def extend(self, pieces: Iterable[bytes], epoch: Epoch, *, last: Lsn) -> None:
        """Reads the records that follow, cut anywhere, and takes those that are not behind the point.

        Args:
            epoch: of the first of them, which a segment that they begin will name.
            last: the last entry to read.

        Raises:
            CorruptionError: they do not follow; those before are taken.
            DiskFull, StorageFailed.
        """
        rest = b""
        for batch in in_batches(pieces):
            rest = self._take(rest + batch, epoch, last)
            if self.read.lsn == last:
                return

    def _take(self, data: bytes, epoch: Epoch, last: Lsn) -> bytes:
        """Takes the whole records in ``data``, and returns the rest."""
        reader = ChainReader(self.read)
        try:
            found = reader.feed(data)
        except CorruptionError:
            # What comes before the damage is good, and perhaps all that is wanted.
            good = data[: scan_chain(data, self.read).good_bytes]
            self._take_records(ChainReader(self.read).feed(good), good, epoch, last)
            if self.read.lsn < last:
                raise
            return b""
        self._take_records(found, data, epoch, last)
        return data[len(data) - reader.pending_bytes :]

    def _take_records(self, found: list[Record], data: bytes, epoch: Epoch, last: Lsn) -> None:
        del found[last - self.read.lsn :]
        if not found:
            return
        wanted = [] if self.is_enough else self._wanted(found)
        if wanted:
            self._append(wanted, data[: sum(record.encoded_bytes for record in wanted)], epoch)
        self.read = found[-1].position
        self.read_offset += sum(record.encoded_bytes for record in found)

    def _append(self, records: list[Record], data: bytes, epoch: Epoch) -> None:
        try:
            self._engine.log.write_batch(data, records[-1].position, epoch=epoch)
            self._engine.replay(records)
        except BaseException:
            self.is_broken = True
            raise
        self._note_lsn()

    def read_from_end(self) -> None:
        """What comes next is read from where the copy ends."""
        self.read, self.read_offset = self.end, self.end_offset

    def forget_read(self) -> None:
        """What was read was of another history; nothing of it was taken."""
        self.is_enough, self._behind = False, None
        self._note_lsn()

    def forks(self) -> list[Fork]:
        """Where epochs of this history begin, up to the first entry that was not wanted."""
        infos = [row.info for row in self._engine.state.epochs]
        behind = parse_epoch_start(self._behind.payload) if self._behind is not None else None
        found = [Fork(Epoch(info.epoch), Lsn(info.first_lsn - 1)) for info in infos]
        return [*found, Fork(Epoch(behind[0].epoch), self.end.lsn)] if behind is not None else found

    def _wanted(self, records: list[Record]) -> list[Record]:
        """Those not behind the point. Times never go back from one entry to the next."""
        point = self._point
        if point is None or not point.is_before_entry(records[-1]):
            return records
        self.is_enough = True
        wanted = list(takewhile(lambda record: not point.is_before_entry(record), records))
        self._behind = records[len(wanted)]
        return wanted

    def _note_lsn(self) -> None:
        if self._point is not None and self._point.lsn is not None and self.end.lsn >= self._point.lsn:
            self.is_enough = True

    def finish(self) -> Reached:
        """All that was taken is in place; segments that are not needed are removed.

        Raises:
            CorruptionError: the state is not what the log says it was.
            DiskFull, StorageFailed.
        """
        self._engine.finish_replay()
        return reached(self._engine)


@contextlib.contextmanager
def replaying(directory: DataDirectory, point: Point | None = None) -> Iterator[Replay]:
    """Opens a copy as a server would.

    Raises:
        CorruptionError, NewerFormat, DiskFull, StorageFailed.
    """
    engine = Engine.open(directory)
    try:
        yield Replay(engine, point)
    finally:
        engine.abandon()
