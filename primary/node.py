"""A primary: engine, commit pipeline, slots and snapshots wired together on one event loop."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from understudy.common import entries
from understudy.common.changelog import ChangeLog
from understudy.common.directory import DataDirectory, Role
from understudy.common.engine import HISTORY_KEY, Engine
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
from understudy.common.files import OsFileSystem
from understudy.common.memtable import Receipt
from understudy.common.metrics import EngineMetrics
from understudy.common.records import encode_record
from understudy.common.settings import PrimarySettings
from understudy.common.store import Store
from understudy.common.tasks import spawn
from understudy.common.types import (
    START,
    SYSTEM_REALM,
    ClusterId,
    Durability,
    Epoch,
    Lsn,
    NodeId,
    Position,
    new_id,
)
from understudy.common.version import VERSION
from understudy.primary.committer import CommitPolicy, Committer, Done
from understudy.primary.slots import SLOTS_FILE, Slot, SlotTable
from understudy.v1 import admin_pb2, data_pb2, log_pb2, replication_pb2, store_pb2

TICK_S = 0.2
_DIGESTS_IN_MARK_MAX = 1_000


def now_us() -> int:
    """The wall clock, microseconds since 1970."""
    return time.time_ns() // 1_000


class PrimaryNode:
    """A primary's moving parts. Everything runs on the loop that :meth:`start` is called on."""

    def __init__(self, engine: Engine, settings: PrimarySettings, slots: SlotTable) -> None:
        self.engine = engine
        self.settings = settings
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
        self._log_damage = ""
        self._room = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, directory: DataDirectory, settings: PrimarySettings, metrics: EngineMetrics) -> PrimaryNode:
        """Opens a primary's directory, or makes a new cluster in an empty one.

        Raises:
            WrongRole: the directory is a replica's or a fenced primary's.
            CorruptionError, StorageFailed, DiskFull.
        """
        if directory.is_new or directory.role is Role.CREATING:
            create_cluster(directory)
        _check_role(directory)
        slots = SlotTable(directory.path / SLOTS_FILE)
        return cls(Engine.open(directory, metrics=metrics), settings, slots)

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

    async def drop_realm(self, path: str) -> Receipt:
        """Drops a realm; returns when that is as durable as the server's level asks for.

        Raises:
            UnknownRealm, Fenced, DiskFull: it was not dropped.
            OutcomeUnknown: this server came to its end meanwhile.
        """
        if self.engine.state.realm(path) is None:
            raise UnknownRealm(f"no realm {path}")
        answer: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()

        def done(receipt: Receipt) -> None:
            if not answer.done():
                answer.set_result(receipt)

        self.committer.drop_realm(path, done)
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
        """Hands what was taken in to the writer."""
        self._flushing = False
        batch = self.committer.take_batch()
        if batch and self.engine.failed is None:
            self.engine.submit(batch, self.committer.position, self.engine.epoch)

    async def wait_for_room(self) -> None:
        """Returns when more transactions can be taken in."""
        while not self.committer.has_room and self.committer.refusal is None and self.engine.failed is None:
            self._room.clear()
            await self._room.wait()

    def _after_progress(self) -> None:
        if self.committer.has_room or self.committer.refusal is not None:
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
        """What slots need, or what the floor keeps, whichever is older."""
        needed = self.slots.retain_from(self.engine.durable.lsn)
        return min(needed, self.engine.first_lsn_within(self.settings.log_floor_bytes))

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
        if problem is not None and str(problem) != self._log_damage:
            log.error("log_damaged", detail=str(problem))
        self._log_damage = str(problem or self._log_damage)

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

    @property
    def epoch_proof(self) -> replication_pb2.EpochProof:
        """The start of the present epoch."""
        return self.engine.state.epochs[-1].proof

    # -- status ----------------------------------------------------------------------------------------------

    def status(self) -> admin_pb2.StatusResponse:
        """All that ``understudy status`` shows."""
        engine, committer = self.engine, self.committer
        return admin_pb2.StatusResponse(
            role=(Role.FENCED if self.is_fenced else engine.directory.role).value,
            cluster=engine.directory.cluster,
            node=engine.directory.node,
            epoch=engine.epoch,
            lsn=committer.position.lsn,
            durable_lsn=engine.durable.lsn,
            committed_lsn=committer.committed_lsn,
            checkpoint_lsn=engine.checkpoint.lsn,
            digest=engine.durable.digest,
            realms=max(engine.state.realm_count - 1, 0),  # without the system's own
            durability=self.settings.durability.name.lower() + (" (degraded)" if committer.degraded else ""),
            replicas=[self._replica_status(slot) for slot in self.slots],
            warnings=self._warnings(),
            version=VERSION,
            proof=self.epoch_proof,
        )

    def _replica_status(self, slot: Slot) -> admin_pb2.ReplicaStatus:
        head, end_offset = self.engine.durable.lsn, self.engine.log.end_offset
        connected = self.slots.is_connected(slot.id)
        behind = max(head - slot.applied_lsn, 0) if slot.applied_lsn else head - slot.durable_lsn
        if slot.lost:
            state = "lost"
        elif not connected:
            state = "disconnected"
        else:
            state = "streaming" if head - slot.durable_lsn < 10_000 else "catching up"
        return admin_pb2.ReplicaStatus(
            id=slot.id,
            connected=connected,
            state=state,
            durable_lsn=slot.durable_lsn,
            applied_lsn=slot.applied_lsn,
            lag_entries=max(head - slot.durable_lsn, 0),
            lag_bytes=max(end_offset - slot.durable_offset, 0),
            lag_seconds=self._lag_seconds(slot) if behind else 0.0,
        )

    def _lag_seconds(self, slot: Slot) -> float:
        """The age of the first entry that the replica has not applied (or not made durable, while it is away)."""
        upto = Lsn(slot.applied_lsn or slot.durable_lsn)
        if upto >= self.engine.durable.lsn:
            return 0.0
        if upto + 1 < self.engine.log.first_lsn:
            return (now_us() - slot.seen_us) / 1e6
        try:
            [record] = self.engine.log.records(upto, Lsn(upto + 1))
            return max(now_us() - entries.parse_entry(record.payload, record.lsn).time_us, 0) / 1e6
        except (
            UnderstudyError,
            ValueError,
        ):  # pruned just now, or storage has failed: status must still tell
            return max(now_us() - slot.seen_us, 0) / 1e6

    def _warnings(self) -> list[str]:
        found = list(self.engine.mismatches)
        if self.is_fenced:
            found.append(f"fenced: {self.committer.refusal}")
        if self._log_damage:
            found.append(self._log_damage)
        if self.engine.disk_full:
            found.append(f"no space left in {self.engine.directory.path}: writes are refused")
        if self.committer.degraded:
            found.append("durability is degraded to local: too few replicas are connected")
        elif (
            self.settings.durability > Durability.LOCAL
            and self.slots.connected_count < self.settings.sync_replicas
        ):
            found.append(
                f"{self.slots.connected_count} of {self.settings.sync_replicas} needed replicas are connected: "
                "transactions wait"
            )
        found += [
            f"replica {slot.id} was lost and must bootstrap again; if it will not come back: "
            f"understudy forget {slot.id} --server HOST:PORT"
            for slot in self.slots
            if slot.lost
        ]
        return found


def create_cluster(directory: DataDirectory) -> None:
    """Makes a new cluster's first log and store: epoch 1, and the history key in the system's realm."""
    cluster = ClusterId(new_id())
    directory.begin(Role.CREATING, cluster)
    directory.log.mkdir()
    Store.create(directory.store, cluster, store_pb2.CheckpointRow(digest=START.digest))
    changelog = ChangeLog.create(
        directory.log, cluster=cluster, epoch=Epoch(1), after=START, after_offset=0, files=OsFileSystem()
    )
    try:
        _write_first_entries(changelog, cluster, directory.node)
    finally:
        changelog.close()
    directory.set_role(Role.PRIMARY)


def _write_first_entries(changelog: ChangeLog, cluster: ClusterId, node: NodeId) -> None:
    key = secrets.token_bytes(32)
    change = log_pb2.Change(
        realm=SYSTEM_REALM,
        version=1,
        client=node,
        number=1,
        operations=[log_pb2.Operation(kind=log_pb2.Operation.PUT, key=HISTORY_KEY, value=key)],
    ).SerializeToString()
    time_us = now_us()
    payloads = (
        entries.epoch_entry(
            time_us=time_us, cluster=cluster, epoch=Epoch(1), after=START, node=node, key=key
        ),
        entries.change_entry(time_us, change, entries.sign(key, entries.change_digest(change))),
    )
    position, data = START, b""
    for payload in payloads:
        record, digest = encode_record(position.digest, Lsn(position.lsn + 1), payload)
        position = Position(Lsn(position.lsn + 1), digest)
        data += record
    changelog.write_batch(data, position, epoch=Epoch(1))


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
