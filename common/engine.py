"""The engine of a node: change-log, state and checkpoints, opened and closed together.

What it does not know: where entries come from (a committer on a primary, a peer on a replica) and when they may
be applied. Its owner submits record bytes, hears when they are durable, and applies entries in LSN order.

Everything here runs on the owner's event loop, but the writer's thread, the checkpoint process, and their
callbacks' first steps, which only hand over to the loop; and before that begins, in recovery, a thread that waits for
the checkpoint process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import ParamSpec, Protocol

from understudy.common.changelog import ChangeLog
from understudy.common.checkpoint_process import Checkpointer
from understudy.common.digest_comparison import DigestComparison
from understudy.common.directory import DataDirectory
from understudy.common.entries import parse_epoch_start
from understudy.common.errors import DiskFull, UnderstudyError
from understudy.common.events import log
from understudy.common.files import FileSystem, OsFileSystem
from understudy.common.group_writer import GroupWriter
from understudy.common.metrics import EngineMetrics
from understudy.common.records import Record
from understudy.common.state import State
from understudy.common.store import Store
from understudy.common.tasks import Signal, spawn
from understudy.common.types import SYSTEM_REALM, Digest, Epoch, Lsn, Position
from understudy.v1 import log_pb2, store_pb2

HISTORY_KEY = b"history-key"
# Beyond this many frozen memtables the checkpoint has fallen behind; nothing more is applied until it caught up.
FROZEN_MAX = 2
_MISMATCH_ADVICE = (
    "find out which side is damaged with `understudy verify --server A --against B` and `understudy verify DIR`, then "
    "remove the damaged copy and let it bootstrap again"
)
_CHECKPOINT_RETRY_S = 2.0  # after a full disk


_P = ParamSpec("_P")


class EngineOwner(Protocol):
    """Who is told what happens; all calls come on the event loop."""

    def on_durable(self, position: Position, offset: int) -> None:
        """Everything up to ``position`` is durable here."""

    def on_checkpoint(self, result: store_pb2.CheckpointResult) -> None:
        """A checkpoint is in the store."""

    def on_disk_full(self, full: bool) -> None:
        """The disk has become full, or has space again."""

    def on_failure(self, error: UnderstudyError) -> None:
        """Storage failed or is corrupt: acknowledge nothing more and end the process."""

    def retain_from(self) -> Lsn:
        """The first LSN that somebody still needs from the log."""


class Engine:
    """A node's log, state and checkpoints."""

    def __init__(
        self, directory: DataDirectory, store: Store, changelog: ChangeLog, metrics: EngineMetrics
    ) -> None:
        self.directory = directory
        self.log = changelog
        self.state = State(store)
        self.metrics = metrics
        self._out_of_space: set[str] = set()  # what waits for space: the log, a checkpoint, or both
        self.failed: UnderstudyError | None = None
        self._checkpointer = Checkpointer()
        self._writer: GroupWriter | None = None
        self._owner: EngineOwner | None = None
        self._frozen = asyncio.Event()
        self._checkpointed = Signal()
        self.checkpointing = asyncio.Lock()  # whoever has it keeps the store as it is
        self._task: asyncio.Task[None] | None = None
        self._digests = DigestComparison(metrics)
        self._threads = futures.ThreadPoolExecutor(1)
        self._writing: futures.Future[store_pb2.CheckpointResult] | None = None  # a checkpoint of `replay`

    # -- opening and closing -------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        directory: DataDirectory,
        *,
        metrics: EngineMetrics | None = None,
        files: FileSystem | None = None,
    ) -> Engine:
        """Opens log and store and recovers: what is behind the checkpoint is applied from the log.

        Raises:
            CorruptionError, NewerFormat, StorageFailed, DiskFull.
        """
        store = Store.open(directory.store, cluster=directory.cluster)
        checkpoint = store.current.checkpoint
        try:
            changelog = ChangeLog.open(
                directory.log,
                cluster=directory.cluster,
                after=Position(Lsn(checkpoint.lsn), Digest(checkpoint.digest)),
                after_offset=checkpoint.log_offset,
                files=files or OsFileSystem(),
            )
        except BaseException:
            store.close()
            raise
        engine = cls(directory, store, changelog, metrics or EngineMetrics())
        try:
            engine._digests.note_own(checkpoint, store)  # its mark lies behind it in the log
            engine._recover()
        except BaseException:
            engine.abandon()
            raise
        return engine

    def _recover(self) -> None:
        if self.log.torn_bytes:
            log.warning("log_tail_cut", bytes=self.log.torn_bytes, lsn=self.log.end.lsn)
        self.replay(self.log.records(self.state.applied.lsn))
        self.finish_replay()

    def replay(self, records: Iterable[Record]) -> None:
        """Applies durable entries before :meth:`start`; a checkpoint is written while the next ones are applied.

        Raises:
            CorruptionError, DiskFull, StorageFailed.
        """
        for record in records:
            entry = self.state.apply(record)
            if entry.change:  # as most have
                continue
            self._note_entry(entry)
            if self._frozen.is_set():
                self._frozen.clear()
                self.finish_replay()
                # Here, since whoever closes the engine must know of the process by then.
                self._start_checkpointer()
                self._writing = self._threads.submit(self._write_oldest)

    def finish_replay(self) -> None:
        """Waits for the checkpoint that :meth:`replay` has left under way.

        Raises:
            DiskFull, StorageFailed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            self._note_result(writing.result())

    def _write_oldest(self) -> store_pb2.CheckpointResult:
        return self._checkpointer.run(self.state.frozen[-1].parts())

    def _start_checkpointer(self) -> None:
        # Not when opening: a promotion needs none, and must not wait for a process to start.
        if self._checkpointer.pid is None:
            self._checkpointer.start(self.directory.store, self.directory.lock_fd)

    def start(self, owner: EngineOwner) -> None:
        """Begins to write and to checkpoint; must be called on the event loop.

        An engine that works already goes on, for this owner: nothing may be submitted that is not yet durable.

        Raises:
            StorageFailed, DiskFull: the checkpoint process can't be started.
        """
        self._owner = owner
        if self._writer is not None:
            return
        self._threads.shutdown()  # there is no more to replay
        self._start_checkpointer()
        self._writer = GroupWriter(
            self.log,
            on_durable=self._handover(self._on_durable),
            on_disk_full=self._handover(self._on_disk_full),
            on_failed=self._handover(self.fail),
            on_sync=self.metrics.observe_sync,
        )
        self._task = spawn(self._checkpoint_forever(), self.fail)

    def _handover(self, callback: Callable[_P, None]) -> Callable[_P, None]:
        """A function for other threads that runs ``callback`` on the loop."""
        loop = asyncio.get_running_loop()

        def hand_over(*args: _P.args, **kwargs: _P.kwargs) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(lambda: self._guard(lambda: callback(*args, **kwargs)))

        return hand_over

    def _guard(self, step: Callable[[], None]) -> None:
        """Runs a step that nobody waits for; what goes wrong in it must not be lost."""
        try:
            step()
        except UnderstudyError as error:
            self.fail(error)
        except Exception as error:
            log.error("step_failed", exc_info=error)
            self.fail(UnderstudyError(f"internal error: {error!r}"))

    async def close(self) -> None:
        """Finishes what was submitted and lets go of everything but the directory."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._writer is not None:
            await asyncio.to_thread(self._writer.close)
        await asyncio.to_thread(self.abandon)

    def abandon(self) -> None:
        """Closes the files of an engine that was not started."""
        self._checkpointer.close()
        self._threads.shutdown()
        self.log.close()
        self.state.store.close()

    # -- facts ---------------------------------------------------------------------------------------------

    @property
    def mismatches(self) -> list[str]:
        """Where this copy's state was found not to be the primary's."""
        return self._digests.mismatches

    @property
    def warnings(self) -> list[str]:
        """What an operator should look into."""
        return [f"{mismatch}; {_MISMATCH_ADVICE}" for mismatch in self.mismatches]

    @property
    def durable(self) -> Position:
        """The last durable entry."""
        return self.log.end

    @property
    def checkpoint(self) -> store_pb2.CheckpointRow:
        """What the store holds."""
        return self.state.store.current.checkpoint

    @property
    def epoch(self) -> Epoch:
        """The epoch of the last applied entry; 0 before the first."""
        return Epoch(self.state.epochs[-1].info.epoch if self.state.epochs else 0)

    @property
    def was_promoted(self) -> bool:
        """Whether the present epoch began when this very copy was promoted; not the first, which no promotion began."""
        row = self.state.epochs[-1]
        parsed = parse_epoch_start(row.proof.entry)
        return row.info.epoch > 1 and parsed is not None and parsed[0].node == self.directory.node

    @property
    def history_key(self) -> bytes:
        """The key that changes are signed with; empty before it was made."""
        if self.state.realm(SYSTEM_REALM) is None:
            return b""
        return self.state.get(SYSTEM_REALM, HISTORY_KEY) or b""

    @property
    def disk_full(self) -> bool:
        """Whether something waits for space on the disk."""
        return bool(self._out_of_space)

    @property
    def is_behind(self) -> bool:
        """Whether checkpoints can't keep up, so that nothing more should be applied for now."""
        return len(self.state.frozen) >= FROZEN_MAX

    def first_lsn_within(self, newest_bytes: int) -> Lsn:
        """The first LSN of the oldest segment that is needed to hold the newest bytes of the log."""
        from_offset = self.log.end_offset - newest_bytes
        held = [segment.first_lsn for segment in self.log.segments() if segment.first_offset <= from_offset]
        return held[-1] if held else self.log.first_lsn

    def archived_from(self, ceiling_bytes: int) -> Lsn:
        """The first LSN that is still to be shipped to backup repositories, unless that would keep too much log."""
        worker = self.directory.backup_worker
        needed = worker.keep_from if worker is not None else Lsn(self.durable.lsn + 1)
        return max(needed, self.first_lsn_within(ceiling_bytes))

    # -- entries -------------------------------------------------------------------------------------------

    def submit(self, data: bytes, last: Position, epoch: Epoch) -> None:
        """Hands whole records, in order, to the writer; ``on_durable`` follows.

        Raises:
            StorageFailed: storage has failed before.
        """
        if self.failed is not None:
            raise self.failed
        assert self._writer is not None, "start() comes first"
        self._writer.submit(data, last, epoch)

    def apply(self, record: Record, entry: log_pb2.Entry | None = None) -> log_pb2.Entry:
        """Applies the next durable entry; see :meth:`State.apply`."""
        entry = self.state.apply(record, entry)
        if not entry.change:  # most have one, and are asked nothing more
            self._note_entry(entry)
        return entry

    def _note_entry(self, entry: log_pb2.Entry) -> None:
        if entry.HasField("freeze"):
            self._frozen.set()
        elif entry.HasField("digest_mark"):
            self._digests.note_mark(entry.digest_mark, self.state.store)

    def fail(self, error: UnderstudyError) -> None:
        """Notes the first failure and tells the owner."""
        if self.failed is None:
            self.failed = error
            self._checkpointed.notify()
            log.error("storage_failed", error=str(error))
            if self._owner is not None:
                self._owner.on_failure(error)

    def _on_durable(self, position: Position, offset: int) -> None:
        if self._owner is not None:
            self._owner.on_durable(position, offset)

    def _on_disk_full(self, full: bool, what: str = "log") -> None:
        before = self.disk_full
        (self._out_of_space.add if full else self._out_of_space.discard)(what)
        if self.disk_full != before:
            log.warning("disk_full" if full else "disk_has_space", directory=str(self.directory.path))
            if self._owner is not None:
                self._owner.on_disk_full(full)

    # -- checkpoints ---------------------------------------------------------------------------------------

    async def _checkpoint_forever(self) -> None:
        while True:
            await self._frozen.wait()
            self._frozen.clear()
            while self.state.frozen:
                try:
                    async with self.checkpointing:
                        await self._checkpoint_oldest()
                except DiskFull:
                    self._on_disk_full(True, "checkpoint")
                    await asyncio.sleep(_CHECKPOINT_RETRY_S)

    async def _checkpoint_oldest(self) -> None:
        table = self.state.frozen[-1]
        result = await asyncio.to_thread(lambda: self._checkpointer.run(table.parts()))
        self._on_disk_full(False, "checkpoint")
        self._note_result(result)
        if self._owner is not None:
            self._owner.on_checkpoint(result)
        for _ in table.dismantle():
            await asyncio.sleep(0)
        await self._prune()
        self._checkpointed.notify()

    def _note_result(self, result: store_pb2.CheckpointResult) -> None:
        self.state.checkpointed()
        self.metrics.observe_checkpoint(result.seconds)
        self._digests.note_own(result.checkpoint, self.state.store)

    async def _prune(self) -> None:
        if self._owner is None:
            return
        keep_from = min(self._owner.retain_from(), self.checkpoint.lsn + 1)
        removed = await asyncio.to_thread(self.log.prune, Lsn(keep_from))
        if removed:
            log.info("segments_removed", count=len(removed), first_lsn=self.log.first_lsn)

    async def wait_for_room(self) -> None:
        """Returns once checkpoints have caught up."""
        await self._checkpointed.wait_for(lambda: not self.is_behind or self.failed is not None)

    async def wait_for_checkpoint(self, lsn: Lsn) -> None:
        """Returns once the store holds everything up to ``lsn``, the LSN of a freeze mark or below it."""
        await self._checkpointed.wait_for(lambda: self.checkpoint.lsn >= lsn or self.failed is not None)
