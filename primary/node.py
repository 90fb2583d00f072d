"""A primary: engine, commit pipeline, slots and snapshots wired together on one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from understudy.common import entries
from understudy.common.backup_end import check_end
from understudy.common.directory import DataDirectory, Role
from understudy.common.engine import Engine
from understudy.common.errors import (
    CorruptionError,
    DiskFull,
    Fenced,
    OutcomeUnknown,
    Unavailable,
    UnderstudyError,
    UnknownRealm,
    WrongRole,
)
from understudy.common.events import log
from understudy.common.memtable import Receipt
from understudy.common.metrics import EngineMetrics
from understudy.common.operations import Operation, to_protos
from understudy.common.records import Record
from understudy.common.reign import begin_epoch
from understudy.common.settings import PrimarySettings, load_tls
from understudy.common.tasks import Signal, spawn
from understudy.common.tls import ServerTls
from understudy.common.types import (
    Epoch,
    Lsn,
    Position,
    is_system_realm,
)
from understudy.primary.committer import CommitPolicy, Committer
from understudy.primary.freezer import Freezer
from understudy.primary.heal_window import HealWindow
from understudy.primary.in_flight import Done
from understudy.primary.new_cluster import create_cluster
from understudy.primary.node_status import tell_status
from understudy.primary.slots import SLOTS_FILE, Slot, SlotTable
from understudy.v1 import admin_pb2, data_pb2, log_pb2, replication_pb2, store_pb2

TICK_S = 0.2
_DIGESTS_IN_MARK_MAX = 1_000


def now_us() -> int:
    """The wall clock, microseconds since 1970."""
    return time.time_ns() // 1_000


class PrimaryNode:
    """A primary's moving parts. Everything runs on the loop that :meth:`start` is called on."""

    def __init__(
        self, engine: Engine, settings: PrimarySettings, slots: SlotTable, tls: ServerTls | None
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.tls = tls
        self.slots = slots
        self.failed: asyncio.Future[UnderstudyError] = asyncio.get_running_loop().create_future()
        self.committer = Committer(
            engine,
            policy=CommitPolicy(
                durability=settings.durability,
                sync_replicas=settings.sync_replicas,
                degrade_after_s=settings.degrade_after_s,
            ),
            history_key=engine.history_key,
            clock_us=now_us,
        )
        # What no caller waits beyond: fenced, failed, or closed.
        self.over: asyncio.Future[UnderstudyError] = asyncio.get_running_loop().create_future()
        self.listeners: set[asyncio.Event] = set()  # of the followers' senders
        self.streams: set[asyncio.Task[None]] = set()  # clients' commit streams
        self._progress: dict[str, tuple[Lsn, Lsn]] = {}  # of replicas seen by this process
        self._flushing = False
        self._was_degraded = False
        self.log_damage = ""
        self._own_numbers: dict[str, int] = {}  # of our last change to each of the system's own realms
        self._room = asyncio.Event()
        self._progressed = Signal()
        self.heal_window = HealWindow(self._heal_until_s())
        self.freezer = Freezer(self)
        self._ticker: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, directory: DataDirectory, settings: PrimarySettings, metrics: EngineMetrics) -> PrimaryNode:
        """Opens a primary's directory, makes a new cluster in an empty one, or begins a new epoch on a backup.

        Raises:
            WrongRole: the directory is a replica's or a fenced primary's.
            CorruptionError, StorageFailed, DiskFull.
        """
        if directory.is_new or directory.role is Role.CREATING:
            create_cluster(directory)
        tls = load_tls(settings)
        is_backup = directory.role is Role.BACKUP
        if is_backup:
            check_end(directory.path, directory.cluster)
            directory.leave_backup()
        else:
            _check_role(directory)
        engine = Engine.open(directory, metrics=metrics)
        if is_backup:
            _begin_epoch(engine)
        return cls(engine, settings, SlotTable(directory.path / SLOTS_FILE), tls)

    @classmethod
    def succeed(cls, engine: Engine, settings: PrimarySettings, tls: ServerTls | None) -> PrimaryNode:
        """Goes on with the engine of a replica that was promoted just now."""
        _check_role(engine.directory)
        return cls(engine, settings, SlotTable(engine.directory.path / SLOTS_FILE), tls)

    def _heal_until_s(self) -> float:
        """When new transactions are taken: at once, or some time after a promotion behind which none was taken yet."""
        state, changelog = self.engine.state, self.engine.log
        begun = Lsn(state.epochs[-1].info.first_lsn)
        has_gone_on = (
            len(state.epochs) < 2
            or changelog.first_lsn > begun  # so long ago that the log begins behind it
            or any(map(_is_of_a_client, changelog.records(Lsn(begun - 1))))
        )
        return 0.0 if has_gone_on else time.monotonic() + self.settings.heal_window_s

    async def start(self) -> None:
        """Begins to work."""
        self.engine.start(self)
        self._ticker = spawn(self._tick_forever(), self.engine.fail)

    async def close(self) -> None:
        """Writes what was taken in, and closes."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        self._end_reign(Unavailable("this primary was closed"))
        self.freezer.thaw()
        try:
            self.flush()
        finally:
            await self.engine.close()
        self.slots.save()

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._report_replicas()
            self.committer.on_tick(time.monotonic())
            self._note_degraded()
            self._enforce_ceiling()
            self._record_fence()
            self._after_progress()
            save_slots = self.slots.saving(time.monotonic())
            if save_slots is not None:
                await asyncio.to_thread(save_slots)

    def _note_degraded(self) -> None:
        if self.committer.degraded and not self._was_degraded:
            log.warning("durability_degraded", connected=self.slots.connected_count)
        elif self._was_degraded and not self.committer.degraded:
            log.info("durability_restored")
        self._was_degraded = self.committer.degraded

    # -- transactions --------------------------------------------------------------------------------------

    def submit(self, client: bytes, transaction: data_pb2.Transaction, done: Done) -> None:
        """Takes a transaction in; see :meth:`Committer.submit`."""
        self.committer.submit(client, transaction, done)
        self.flush_soon()

    async def commit_system(self, path: str, operations: Iterable[Operation]) -> Receipt:
        """Changes one of the system's own realms; returns when that is as durable as the server's level asks for.

        Raises:
            Fenced, DiskFull: it was not applied.
            OutcomeUnknown: this server came to its end meanwhile.
        """
        client = self.engine.directory.node
        last = max(self.engine.state.last_number(path, client), self._own_numbers.get(path, 0))
        transaction = data_pb2.Transaction(realm=path, number=last + 1, operations=to_protos(operations))
        answer: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self.committer.submit_own(client, transaction, lambda receipt: _answer(answer, receipt))
        self._own_numbers[path] = last + 1
        self.flush_soon()
        return await self.answered(answer, f"a change of {path}")

    async def drop_realm(self, path: str) -> Receipt:
        """Drops a realm; returns when that is as durable as the server's level asks for.

        Raises:
            UnknownRealm, Fenced, DiskFull: it was not dropped.
            OutcomeUnknown: this server came to its end meanwhile.
        """
        if self.engine.state.realm(path) is None:
            raise UnknownRealm(f"no realm {path}")
        answer: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()

        self.committer.drop_realm(path, lambda receipt: _answer(answer, receipt))
        self.flush_soon()
        return await self.answered(answer, f"the drop of {path}")

    async def answered(self, answer: asyncio.Future[Receipt], what: str, *, number: int = 0) -> Receipt:
        """The receipt of what was taken in.

        Raises:
            OutcomeUnknown: there will be none, but what was taken in may be durable by now, or become so elsewhere.
        """
        either: list[asyncio.Future[Any]] = [answer, self.over]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            error = self.over.result()
            raise OutcomeUnknown(
                f"{what} may or may not have been applied: {error.message}",
                remedy="look before you repeat it",
                number=number,
            ) from error
        return answer.result()

    def flush_soon(self) -> None:
        """Hands what was taken in to the writer once everything that is ready now has been taken in."""
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Hands what was taken in to the writer; while it is frozen, that waits."""
        self._flushing = False
        if self.freezer.is_on:
            return
        batch = self.committer.take_batch()
        if batch and self.engine.failed is None:
            self.engine.submit(batch, self.committer.position, self.engine.epoch)

    @property
    def takes_more(self) -> bool:
        """Whether more transactions should be taken in now."""
        return self.committer.has_room and not self.heal_window.is_open(time.monotonic())

    async def wait_for_room(self) -> None:
        """Returns when more transactions can be taken in."""
        while not self.takes_more and self.committer.refusal is None and self.engine.failed is None:
            self._room.clear()
            await self._room.wait()

    async def wait_for_space(self) -> None:
        """Returns when more can be taken in, also while new transactions have to wait for what comes home."""
        await self._progressed.wait_for(
            lambda: self.committer.has_room or self.committer.refusal is not None or self.over.done()
        )

    async def settled(self, path: str) -> None:
        """Returns when all that was taken in for the realm is applied, or never will be."""
        await self._progressed.wait_for(lambda: self.committer.is_settled(path) or self.over.done())

    async def wait_until_committed(self, position: Position) -> None:
        """Returns when all up to there is durable and committed, or never will be."""
        await self._progressed.wait_for(
            lambda: self.committer.committed_lsn >= position.lsn or self.over.done()
        )

    def _after_progress(self) -> None:
        self._progressed.notify()
        if self.takes_more or self.committer.refusal is not None:
            self._room.set()
        self.flush_soon()  # advancing may have set a freeze mark

    # -- what the engine tells -------------------------------------------------------------------------------

    def on_durable(self, position: Position, offset: int) -> None:
        """Ships to followers and answers what needed no more than this."""
        for listener in self.listeners:
            listener.set()
        self._guarded(lambda: self.committer.on_durable(position))

    def on_checkpoint(self, result: store_pb2.CheckpointResult) -> None:
        """Sets the digest mark, and goes on applying if that had to wait."""
        row = result.checkpoint
        mark = log_pb2.DigestMark(
            freeze_lsn=row.lsn,
            state_digest=row.state_digest,
            realms=row.realms,
            changed=result.changed[:_DIGESTS_IN_MARK_MAX],
        )
        if self.committer.refusal is None:
            self.committer.submit_mark(lambda time_us: entries.digest_entry(time_us, mark))
        self._guarded(self.committer.advance)

    def on_disk_full(self, full: bool) -> None:
        """Refuses transactions, or takes them again."""
        self.committer.on_disk_full(full, str(self.engine.directory.path))
        self._after_progress()

    def on_failure(self, error: UnderstudyError) -> None:
        """Ends the process by way of :attr:`failed`."""
        if not self.failed.done():
            self.failed.set_result(error)
        self._end_reign(error)

    def _end_reign(self, error: UnderstudyError) -> None:
        if not self.over.done():
            self.over.set_result(error)
        self._room.set()

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except UnderstudyError as error:
            self.engine.fail(error)
        self._after_progress()

    def retain_from(self) -> Lsn:
        """What slots or the archive need, or what the floor keeps, whichever is older."""
        return min(
            self.slots.retain_from(self.engine.durable.lsn),
            self.engine.archived_from(self.settings.log_ceiling_bytes),
            self.engine.first_lsn_within(self.settings.log_floor_bytes),
        )

    def _enforce_ceiling(self) -> None:
        """Gives slots up that would keep more than the ceiling."""
        if self.engine.log.retained_bytes <= self.settings.log_ceiling_bytes:
            return
        oldest_offset = self.engine.log.end_offset - self.settings.log_ceiling_bytes
        for slot in self.slots:
            if not slot.lost and slot.durable_offset < oldest_offset:
                self.slots.lose(slot)

    # -- replicas ------------------------------------------------------------------------------------------

    def on_replica_progress(self, slot: Slot, durable: Lsn, durable_offset: int, applied: Lsn) -> None:
        """A replica is further than it was."""
        slot.durable_lsn, slot.durable_offset, slot.applied_lsn = durable, durable_offset, applied
        slot.seen_us = now_us()
        slot.lost = durable_offset < self.engine.log.first_offset
        self.slots.touch()
        self._progress[slot.id] = (durable, applied)
        self._report_replicas()

    def forget_progress(self, replica_id: str) -> None:
        """A replica begins anew: what it held before says nothing any more."""
        self._progress.pop(replica_id, None)

    def _report_replicas(self) -> None:
        connected = self.slots.connected_count
        self._guarded(
            lambda: self.committer.on_replicas(
                list(self._progress.values()), connected=connected, now_s=time.monotonic()
            )
        )

    def note_log_damage(self, problem: CorruptionError | None) -> None:
        """What was found in our own log when a replica could not use what we had sent; None: it was sound."""
        if problem is not None and str(problem) != self.log_damage:
            log.error("log_damaged", detail=str(problem))
        self.log_damage = str(problem or self.log_damage)

    def fence(self, epoch: Epoch | None) -> None:
        """Accepts no more writes, durably, for good (G7): because of an epoch, or (None) of an operator."""
        if self.is_fenced:
            return
        log.error("fenced", epoch=epoch, by_operator=epoch is None)
        self.committer.fence(epoch)  # first: whatever the disk says, nothing is acknowledged from here on
        for stream in self.streams:
            stream.cancel()
        if self.committer.refusal is not None:
            self._end_reign(self.committer.refusal)
        self._record_fence()
        self._after_progress()

    def _record_fence(self) -> None:
        """Makes the fence outlive this process; on a full disk, as soon as there is space."""
        if self.is_fenced and self.engine.directory.role is not Role.FENCED:
            try:
                self.engine.directory.set_role(Role.FENCED)
            except DiskFull as error:
                log.error("fence_not_recorded", error=str(error))

    @property
    def is_fenced(self) -> bool:
        """Whether this server accepts no more writes, for good."""
        return isinstance(self.committer.refusal, Fenced)

    def refuse_if_fenced(self) -> None:
        """Raises what tells a client to look elsewhere.

        Raises:
            Fenced: this server accepts no more writes.
        """
        if isinstance(self.committer.refusal, Fenced):
            raise self.committer.refusal

    @property
    def epoch_proof(self) -> replication_pb2.EpochProof:
        """The start of the present epoch."""
        return self.engine.state.epochs[-1].proof

    # -- status ----------------------------------------------------------------------------------------------

    def status(self) -> admin_pb2.StatusResponse:
        """All that ``understudy status`` shows."""
        return tell_status(self)


def _begin_epoch(engine: Engine) -> None:
    try:
        begin_epoch(engine)
    except BaseException:
        engine.abandon()
        raise
    log.info("backup_revived", epoch=engine.epoch, lsn=engine.durable.lsn)


def _is_of_a_client(record: Record) -> bool:
    """Whether this is a change to one of the clients' realms."""
    raw = entries.parse_entry(record.payload, record.lsn).change
    return bool(raw) and not is_system_realm(entries.parse_change(raw, record.lsn).realm)


def _answer(answer: asyncio.Future[Receipt], receipt: Receipt) -> None:
    if not answer.done():  # whoever waited may have gone
        answer.set_result(receipt)


def _check_role(directory: DataDirectory) -> None:
    path: Path = directory.path
    remedies = {
        Role.REPLICA: f"understudy promote {path}",
        Role.PROMOTING: f"understudy promote {path}",
        Role.FENCED: f"understudy rewind {path} --to HOST:PORT",
    }
    if directory.role in remedies:
        raise WrongRole(
            f"{path} is not a primary's directory, its role is {directory.role.value}",
            remedy=f"to change that: {remedies[directory.role]}",
        )
