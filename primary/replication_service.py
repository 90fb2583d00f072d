"""Replicas over gRPC: ``Follow``, and the snapshot that a new one starts from."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable

import grpc.aio
from google.protobuf.message import Message

from understudy.common import entries
from understudy.common.errors import CorruptionError, Overloaded, ProtocolError, Unavailable
from understudy.common.events import log
from understudy.common.follow_table import (
    PROTOCOL_VERSION,
    Claim,
    Cluster,
    Decision,
    FollowFacts,
    Protocol,
    Reign,
    Relation,
    Slot,
    decide,
)
from understudy.common.locator import LOCATOR_POSITIONS_MAX, History, last_common, lookup_in, relate, span_of
from understudy.common.pinned_snapshot import PinnedSnapshot
from understudy.common.read_service import Context
from understudy.common.rpc import answering_errors, first_message
from understudy.common.snapshot_ranges import digest_of_zeros, range_digest
from understudy.common.types import ID_BYTES, Digest, Epoch, Lsn, Position
from understudy.primary import slots
from understudy.primary.follower_session import (
    SILENCE_S_MAX,
    FollowerSession,
    GiveUp,
    Progress,
    SendRecords,
)
from understudy.primary.node import PrimaryNode, now_us
from understudy.primary.snapshots import PinBoard
from understudy.v1 import replication_pb2, replication_pb2_grpc

_DIGESTS_PER_MESSAGE = 64
# Each holds some 7 MiB of what was read and not yet taken; a bootstrap has two at a time.
READINGS_MAX = 16
UNREAD_S_MAX = 60.0  # a bootstrap that is throttled takes its ranges seldom
_READ_AHEAD = 4  # ranges read at a time; each trip to another thread costs as much as a tenth of reading one


class ReplicationService(replication_pb2_grpc.ReplicationServicer):
    """What replicas ask of a primary."""

    def __init__(self, node: PrimaryNode, pins: PinBoard) -> None:
        self._node = node
        self._pins = pins
        self._following: dict[str, tuple[bytes, asyncio.Task[None]]] = {}
        self._displaced: set[asyncio.Task[None]] = set()
        self._readings = 0  # of snapshots

    # -- following -----------------------------------------------------------------------------------------

    async def Follow(self, _: object, context: Context) -> None:  # type: ignore[override]
        """One replica, until either side goes away."""
        async with answering_errors(context):
            first = await first_message(context)
            if first is grpc.aio.EOF:
                return
            if first.WhichOneof("message") != "hello":
                raise ProtocolError("the first message of a Follow is a hello")
            hello = _checked(first.hello)
            async with self._displaced_told(), self._seat(hello) as seat:
                decision, common = await self._decide(hello, seat)
                bound = log.bind(replica=hello.replica_id, peer=context.peer())
                if decision == Decision.STREAM:
                    self._check_slots(hello.replica_id)
                bound.info("follow_asked", decision=Decision.Name(decision), lsn=_head(hello).lsn)
                if decision == Decision.FENCED and not self._node.is_fenced:
                    self._node.fence(Epoch(hello.epoch))
                offset = self._start_offset(hello) if decision == Decision.STREAM else 0
                await context.write(self._answer(decision, common, offset))
                if decision == Decision.STREAM:
                    await self._stream(hello, offset, context)

    @contextlib.asynccontextmanager
    async def _displaced_told(self) -> AsyncIterator[None]:
        """Ends a call that gives way with a status; cancelling its task alone would leave the peer waiting."""
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task not in self._displaced:
                raise
            raise Unavailable("another connection of this replica has taken over") from None

    @contextlib.asynccontextmanager
    async def _seat(self, hello: replication_pb2.Hello) -> AsyncIterator[Slot]:
        """The replica id's seat, held from before the decision until the stream ends.

        An older connection of the same process is half-open, or it would not ask again: it gives way. Another
        process does not, even if its copy says that it is the same node: it may be a copied directory, and the
        two would drive each other out for ever. One that was killed is gone at the latest when its silence is
        noticed.
        """
        while (known := self._following.get(hello.replica_id)) and known[0] == hello.run:
            self._displaced.add(known[1])
            known[1].cancel()
            await asyncio.wait([known[1]])
            self._displaced.discard(known[1])
        if known is not None:
            yield Slot.TAKEN
            return
        task = asyncio.current_task()
        assert task is not None
        self._following[hello.replica_id] = (hello.run, task)
        try:
            yield Slot.FREE
        finally:
            del self._following[hello.replica_id]

    async def _decide(
        self, hello: replication_pb2.Hello, seat: Slot
    ) -> tuple[Decision.ValueType, Position | None]:
        engine = self._node.engine
        history = self._history()
        locator = [Position(Lsn(one.lsn), Digest(one.digest)) for one in hello.locator]
        relation, common = Relation.PRUNED, None
        if hello.cluster == engine.directory.cluster:
            # Looking up digests reads the log: not on the loop.
            relation = await asyncio.to_thread(relate, locator, Epoch(hello.epoch), history)
            common = await asyncio.to_thread(last_common, locator, history.lookup)
            if relation is Relation.ON_LOG and hello.damaged_lsn > locator[0].lsn:
                problem = await asyncio.to_thread(self._damage, locator[0].lsn, Lsn(hello.damaged_lsn))
                self._node.note_log_damage(problem)
                if problem is not None:
                    relation = Relation.PRUNED  # the log does not go on from there
        decision = decide(
            FollowFacts(
                protocol=Protocol.SAME if hello.protocol_version == PROTOCOL_VERSION else Protocol.OTHER,
                reign=Reign.FENCED if self._node.is_fenced else Reign.PRIMARY,
                cluster=self._cluster(hello),
                claim=self._claim(hello),
                slot=seat,
                relation=relation,
            )
        )
        return decision, common

    def _damage(self, after: Lsn, upto: Lsn) -> CorruptionError | None:
        """What is wrong with our own log behind ``after``, where a replica says that ``upto`` came damaged."""
        try:
            for _ in self._node.engine.log.records(after, upto):
                pass
        except CorruptionError as error:
            return error
        return None

    def _cluster(self, hello: replication_pb2.Hello) -> Cluster:
        if not hello.cluster:
            return Cluster.NONE
        return Cluster.SAME if hello.cluster == self._node.engine.directory.cluster else Cluster.FOREIGN

    def _claim(self, hello: replication_pb2.Hello) -> Claim:
        engine = self._node.engine
        if hello.epoch <= engine.epoch:
            return Claim.NOT_HIGHER
        proven = entries.proves_epoch(
            hello.proof.entry,
            epoch=Epoch(hello.epoch),
            cluster=engine.directory.cluster,
            keys=[engine.history_key],
        )
        return Claim.HIGHER_PROVEN if proven else Claim.HIGHER_UNPROVEN

    def _history(self) -> History:
        engine = self._node.engine
        epochs = [span_of(row.info) for row in engine.state.epochs]
        marks = {mark.lsn: mark.digest for mark in engine.state.store.current.marks()}
        marks |= {span.fork.lsn: span.fork.digest for span in epochs}
        lookup = lookup_in(engine.log.position_at, marks)
        return History(head=engine.durable, epochs=epochs, first_held=engine.log.first_lsn, lookup=lookup)

    def _start_offset(self, hello: replication_pb2.Hello) -> int:
        offset = self._node.engine.log.offset_behind(_head(hello).lsn)
        if offset is None:
            raise Unavailable("the log that this replica needs was removed just now", remedy="ask again")
        return offset

    def _answer(
        self, decision: Decision.ValueType, common: Position | None, start_offset: int
    ) -> replication_pb2.FollowResponse:
        engine = self._node.engine
        head = engine.durable
        return replication_pb2.FollowResponse(
            answer=replication_pb2.Answer(
                decision=decision,
                cluster=engine.directory.cluster,
                epoch=engine.epoch,
                proof=self._node.epoch_proof,
                common=replication_pb2.Position(lsn=common.lsn, digest=common.digest) if common else None,
                epochs=[row.info for row in engine.state.epochs],
                head=replication_pb2.Position(lsn=head.lsn, digest=head.digest),
                start_offset=start_offset,
            )
        )

    async def _stream(self, hello: replication_pb2.Hello, offset: int, context: Context) -> None:
        node, replica_id = self._node, hello.replica_id
        lsn = _head(hello).lsn
        slot = node.slots.claim(replica_id, hello.node, lsn=lsn, offset=offset, now_us=now_us())
        node.forget_progress(replica_id)
        node.slots.connect(replica_id)
        session = FollowerSession(lsn=lsn, offset=offset, now_s=time.monotonic())
        wake = asyncio.Event()
        node.listeners.add(wake)
        reader = asyncio.create_task(self._read_progress(slot, session, context, wake))
        try:
            await self._send(session, context, wake, reader)
        finally:
            reader.cancel()
            # Before anything is awaited: a peer that goes away cancels this call, and that may come just then.
            node.listeners.discard(wake)
            node.slots.disconnect(replica_id)
            log.info("follow_ended", replica=replica_id, durable_lsn=slot.durable_lsn)
            await asyncio.gather(reader, return_exceptions=True)

    async def _send(
        self, session: FollowerSession, context: Context, wake: asyncio.Event, reader: asyncio.Task[None]
    ) -> None:
        engine = self._node.engine
        while not reader.done():
            wake.clear()
            head_lsn, head_offset = engine.durable.lsn, engine.log.end_offset
            action = session.next_action(durable_offset=head_offset, now_s=time.monotonic())
            if action is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(session.next_deadline_s() - time.monotonic(), 0.001)):
                        await wake.wait()
                continue
            if isinstance(action, GiveUp):
                raise ProtocolError(action.reason)
            data = b""
            if isinstance(action, SendRecords):
                data = engine.log.read(action.offset, action.bytes_max)
            chunk = replication_pb2.Chunk(
                records=data, head_lsn=head_lsn, head_offset=head_offset, clock_us=now_us()
            )
            # Before the write: the replica's progress may come in before the write returns.
            session.on_sending(len(data), now_s=time.monotonic())
            try:
                async with asyncio.timeout(SILENCE_S_MAX):
                    await context.write(replication_pb2.FollowResponse(chunk=chunk))
            except TimeoutError:
                raise ProtocolError(f"it has taken nothing for {SILENCE_S_MAX:.0f} s") from None
        reader.result()  # raises what ended it

    async def _read_progress(
        self, slot: slots.Slot, session: FollowerSession, context: Context, wake: asyncio.Event
    ) -> None:
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                if message.WhichOneof("message") != "progress":
                    raise ProtocolError("progress comes after hello, nothing else")
                told = message.progress
                progress = Progress(
                    durable_lsn=Lsn(told.durable_lsn),
                    durable_offset=told.durable_offset,
                    applied_lsn=Lsn(told.applied_lsn),
                )
                session.on_progress(
                    progress,
                    received_offset=told.received_offset,
                    durable_lsn_here=self._node.engine.durable.lsn,
                    now_s=time.monotonic(),
                )
                self._node.on_replica_progress(
                    slot, progress.durable_lsn, progress.durable_offset, progress.applied_lsn
                )
                if session.sent_offset < self._node.engine.log.end_offset:
                    wake.set()  # there may be room now for what had to wait
        finally:
            wake.set()

    # -- snapshots -----------------------------------------------------------------------------------------

    async def PinSnapshot(
        self, request: replication_pb2.PinSnapshotRequest, context: Context
    ) -> replication_pb2.SnapshotInfo:
        """Pins the present checkpoint, and the log from there on under the replica's slot."""
        async with answering_errors(context):
            if self._node.committer.refusal is not None and self._node.is_fenced:
                raise self._node.committer.refusal
            replica_id = _checked_id(request.replica_id)
            self._check_slots(replica_id)
            if len(request.node) != ID_BYTES:
                raise ProtocolError(f"a node id has {ID_BYTES} bytes, not {len(request.node)}")
            if self._node.slots.is_connected(replica_id):
                raise ProtocolError(
                    f"another replica follows as {replica_id!r}", remedy="give each its own --id"
                )
            pin = self._pins.pin(replica_id, request.node, request.resume)
            row = pin.checkpoint
            self._node.forget_progress(replica_id)
            self._node.slots.claim(
                replica_id, request.node, lsn=Lsn(row.lsn), offset=row.log_offset, now_us=now_us()
            )
            return self._pins.info(pin, epoch=self._node.engine.epoch)
        raise AssertionError("aborted")

    async def DigestSnapshot(  # type: ignore[override]  # it writes to the context, as gRPC lets it
        self, request: replication_pb2.DigestSnapshotRequest, context: Context
    ) -> None:
        """The digests of all ranges."""
        async with answering_errors(context), self._one_reading():
            count = self._pins.get(request.snapshot).snapshot.ranges
            for first in range(0, count, _DIGESTS_PER_MESSAGE):
                snapshot = self._pins.get(request.snapshot).snapshot
                indexes = range(first, min(first + _DIGESTS_PER_MESSAGE, count))
                digests = await asyncio.to_thread(_digests, snapshot, indexes)
                await _write(context, replication_pb2.RangeDigests(first_range=first, digests=digests))

    async def ReadSnapshot(  # type: ignore[override]
        self, request: replication_pb2.ReadSnapshotRequest, context: Context
    ) -> None:
        """The ranges asked for, each with its digest."""
        async with answering_errors(context), self._one_reading():
            count = self._pins.get(request.snapshot).snapshot.ranges
            wrong = next((index for index in request.ranges if index >= count), None)
            if wrong is not None:
                raise ProtocolError(f"range {wrong} of a snapshot that has {count}")
            for first in range(0, len(request.ranges), _READ_AHEAD):
                # Kept from expiring for as long as its ranges are taken.
                snapshot = self._pins.get(request.snapshot).snapshot
                indexes = request.ranges[first : first + _READ_AHEAD]
                for part in await asyncio.to_thread(_read, snapshot, indexes):
                    await _write(context, part)

    @contextlib.asynccontextmanager
    async def _one_reading(self) -> AsyncIterator[None]:
        if self._readings >= READINGS_MAX:
            raise Overloaded(f"{READINGS_MAX} snapshots are being read already", remedy="try again later")
        self._readings += 1
        try:
            yield
        finally:
            self._readings -= 1

    async def ReleaseSnapshot(
        self, request: replication_pb2.ReleaseSnapshotRequest, context: Context
    ) -> replication_pb2.ReleaseSnapshotResponse:
        """Lets a snapshot go."""
        async with answering_errors(context):
            self._pins.release(request.snapshot)
            return replication_pb2.ReleaseSnapshotResponse()
        raise AssertionError("aborted")

    def _check_slots(self, replica_id: str) -> None:
        if self._node.slots.get(replica_id) is None and len(self._node.slots) >= slots.SLOTS_MAX:
            raise ProtocolError(
                f"{slots.SLOTS_MAX} replicas are known already",
                remedy="remove those that are gone: understudy forget ID --server HOST:PORT",
            )


async def _write(context: Context, message: Message) -> None:
    """Sends a message, unless the peer takes none any more."""
    try:
        async with asyncio.timeout(UNREAD_S_MAX):
            await context.write(message)
    except TimeoutError:
        raise Unavailable(f"it has taken nothing for {UNREAD_S_MAX:.0f} s") from None


def _digests(snapshot: PinnedSnapshot, indexes: Iterable[int]) -> list[bytes]:
    return [range_digest(snapshot.read(index)) for index in indexes]


def _read(snapshot: PinnedSnapshot, indexes: Iterable[int]) -> list[replication_pb2.RangeData]:
    return [_range_data(index, snapshot.read(index)) for index in indexes]


def _range_data(index: int, data: bytes) -> replication_pb2.RangeData:
    digest = range_digest(data)
    if digest == digest_of_zeros(len(data)):
        return replication_pb2.RangeData(range=index, digest=digest)
    return replication_pb2.RangeData(range=index, digest=digest, data=data)


def _head(hello: replication_pb2.Hello) -> Position:
    if not hello.locator:
        return Position(Lsn(0), Digest(b""))
    return Position(Lsn(hello.locator[0].lsn), Digest(hello.locator[0].digest))


def _checked(hello: replication_pb2.Hello) -> replication_pb2.Hello:
    _checked_id(hello.replica_id)
    if {len(hello.node), len(hello.run)} != {ID_BYTES}:
        raise ProtocolError(f"ids of node and run have {ID_BYTES} bytes")
    if len(hello.locator) > LOCATOR_POSITIONS_MAX or (hello.cluster and not hello.locator):
        raise ProtocolError(f"a locator has 1 to {LOCATOR_POSITIONS_MAX} positions, not {len(hello.locator)}")
    return hello


def _checked_id(replica_id: str) -> str:
    if not replica_id.isprintable() or not 1 <= len(replica_id) <= 100:
        raise ProtocolError(f"bad replica id {replica_id!r:.120}")
    return replica_id
