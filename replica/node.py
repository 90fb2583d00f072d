"""A replica: follows a primary, keeps its log and state, and takes the primary's part when told to."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque

import grpc.aio

from understudy.common.directory import DataDirectory, Role
from understudy.common.engine import Engine
from understudy.common.errors import (
    Fenced,
    PeerUnreachable,
    ProtocolError,
    Unavailable,
    UnderstudyError,
    WrongRole,
)
from understudy.common.events import log
from understudy.common.follow_table import PROTOCOL_VERSION, Decision
from understudy.common.locator import make_locator
from understudy.common.metrics import EngineMetrics
from understudy.common.records import Record
from understudy.common.rpc import open_channel, peer_errors
from understudy.common.settings import ReplicaSettings
from understudy.common.tasks import Signal, spawn
from understudy.common.types import ID_BYTES, START, ClusterId, Digest, Lsn, Position
from understudy.common.version import VERSION
from understudy.replica import bootstrap
from understudy.replica.follow_session import (
    Action,
    Append,
    Apply,
    Backoff,
    Bootstrap,
    ComeAgain,
    FollowSession,
    SendProgress,
    Stop,
    on_answer,
)
from understudy.replica.promotion import Promotion, begin_reign
from understudy.v1 import admin_pb2, replication_pb2, replication_pb2_grpc, store_pb2

_TICK_S = 0.25
_ANSWER_S_MAX = 30.0  # the primary may have to read its log to answer
_PROBLEMS_SAID_MAX = 20  # of one outage: whatever comes after so many different ones is no news
_APPLY_SLICE = 500  # records applied before others get a turn


_Call = grpc.aio.StreamStreamCall[replication_pb2.FollowRequest, replication_pb2.FollowResponse]


class ReplicaNode:
    """A replica's moving parts. Everything runs on the loop that :meth:`start` is called on."""

    def __init__(self, directory: DataDirectory, settings: ReplicaSettings, metrics: EngineMetrics) -> None:
        self.directory = directory
        self.settings = settings
        self.metrics = metrics
        self.ended: asyncio.Future[UnderstudyError | None] = asyncio.get_running_loop().create_future()
        self.listening_on = ""
        self._engine: Engine | None = None
        self._session: FollowSession | None = None
        self._upstream = ""
        self._heard_s = 0.0
        self._silence: UnderstudyError | None = None  # why the ticker has ended the call
        self._problem = "not yet connected"
        self._said: dict[str, set[str]] = {}  # problems logged since we last followed, by address
        self._reign = replication_pb2.Answer()  # of the latest epoch whose primary let us follow or copy it
        self._submitted: Position | None = None
        self._to_apply: deque[Record] = deque()
        self._wake_applier = asyncio.Event()
        self._drained = Signal()
        self._progress: SendProgress | None = None
        self._wake_sender = asyncio.Event()
        self._bootstrap_progress: tuple[int, int] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._follower: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Makes a new directory ours, or checks that it is a replica's, and opens what copy it has.

        Raises:
            WrongRole: it is a primary's.
            CorruptionError, StorageFailed, DiskFull.
        """
        directory = self.directory
        if directory.is_new:
            directory.begin(Role.REPLICA, ClusterId(b""))
        _check_role(directory)
        if directory.has_copy:
            self._engine = Engine.open(directory, metrics=self.metrics)

    async def start(self) -> None:
        """Begins to follow."""
        if self._engine is not None:
            self._engine.start(self)
            self._submitted = self._engine.durable
        self._tasks = [spawn(self._apply_forever(), self._end)]
        self._follower = spawn(self._follow_forever(), self._end)

    async def close(self) -> None:
        """Stops following, writes what was received, and closes."""
        await self._stop_following()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._engine is not None:
            await self._engine.close()

    async def _stop_following(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
            self._follower = None

    @property
    def engine(self) -> Engine:
        """The engine of the copy.

        Raises:
            Unavailable: there is no copy yet.
        """
        if self._engine is None:
            raise Unavailable("this replica has no copy yet", remedy=f"it is {self._problem}")
        return self._engine

    def _end(self, error: UnderstudyError | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)

    # -- following -----------------------------------------------------------------------------------------

    async def _follow_forever(self) -> None:
        backoff = Backoff()
        addresses = [address.strip() for address in self.settings.primary.split(",")]
        while not self.ended.done():
            for address in addresses:
                try:
                    await self._follow_once(address, backoff)
                except UnderstudyError as error:
                    self._note_problem(address, error)
                if self.ended.done():
                    return
                await self._drain()
            await asyncio.sleep(backoff.after_failure(random.random()))

    def _note_problem(self, address: str, error: UnderstudyError) -> None:
        self._problem = str(error)
        said = self._said.setdefault(address, set())
        if self._problem not in said and len(said) < _PROBLEMS_SAID_MAX:  # once, not at every try
            said.add(self._problem)
            log.warning("not_following", primary=address, error=self._problem)

    async def _follow_once(self, address: str, backoff: Backoff) -> None:
        async with open_channel(address) as channel:
            with peer_errors(address):
                call: _Call = replication_pb2_grpc.ReplicationStub(channel).Follow()
                try:
                    answer = await self._greet(call, address, await self._hello())
                    await self._check_reign(channel, answer, address)
                    match on_answer(answer.decision, directory=str(self.directory.path), address=address):
                        case None:
                            backoff.reset()
                            await self._stream(call, answer, address)
                        case Bootstrap():
                            await self._bootstrap(channel, address)
                            backoff.reset()
                        case ComeAgain(reason=reason):
                            raise reason
                        case Stop(error=error):
                            self._end(error)
                finally:
                    call.cancel()

    async def _greet(self, call: _Call, address: str, hello: replication_pb2.Hello) -> replication_pb2.Answer:
        try:
            async with asyncio.timeout(_ANSWER_S_MAX):
                await call.write(replication_pb2.FollowRequest(hello=hello))
                response = await call.read()
        except TimeoutError:
            raise PeerUnreachable(f"{address} did not answer within {_ANSWER_S_MAX:.0f} s") from None
        if not isinstance(response, replication_pb2.FollowResponse):
            raise PeerUnreachable(f"{address} closed the connection")
        if response.answer.decision not in Decision.values() or len(response.answer.cluster) not in (
            0,
            ID_BYTES,
        ):
            raise ProtocolError(f"{address} gave an answer that this version does not know")
        log.info("primary_answered", primary=address, decision=Decision.Name(response.answer.decision))
        return response.answer

    async def _check_reign(
        self, channel: grpc.aio.Channel, answer: replication_pb2.Answer, address: str
    ) -> None:
        """Follows no primary of an earlier epoch than one met before: it would take us for its quorum (G7).

        Our own log may not have the new epoch's mark yet. So the old primary is shown what we were shown, and
        fences itself.

        Raises:
            Fenced: it is of an earlier epoch.
        """
        reign = self._reign
        if answer.decision not in (Decision.STREAM, Decision.BOOTSTRAP):
            return
        if answer.cluster != reign.cluster or answer.epoch >= reign.epoch:
            self._reign = answer
            return
        hello = await self._hello()
        hello.cluster, hello.epoch = reign.cluster, reign.epoch
        hello.proof.CopyFrom(reign.proof)
        if not hello.locator:
            hello.locator.add(lsn=START.lsn, digest=START.digest)
        call: _Call = replication_pb2_grpc.ReplicationStub(channel).Follow()
        try:
            await self._greet(call, address, hello)
        finally:
            call.cancel()
        raise Fenced(f"{address} is in epoch {answer.epoch}, and epoch {reign.epoch} has begun elsewhere")

    async def _hello(self) -> replication_pb2.Hello:
        return await asyncio.to_thread(self._make_hello) if self._engine else self._make_hello()

    def _make_hello(self) -> replication_pb2.Hello:
        hello = replication_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            node=self.directory.node,
            replica_id=self.settings.id,
            address=self.listening_on,
        )
        engine = self._engine
        if engine is None:
            return hello

        def lookup(lsn: Lsn) -> Digest | None:
            position = engine.log.position_at(lsn)
            return position.digest if position else None

        hello.cluster = self.directory.cluster
        hello.epoch = engine.epoch
        if engine.state.epochs:
            hello.proof.CopyFrom(engine.state.epochs[-1].proof)
        with engine.state.store.hold() as snapshot:  # this runs beside the loop, which may replace it
            marks = snapshot.marks()
        for position in make_locator(engine.durable, lookup, marks):
            hello.locator.add(lsn=position.lsn, digest=position.digest)
        return hello

    async def _stream(self, call: _Call, answer: replication_pb2.Answer, address: str) -> None:
        engine = self.engine
        now_s = time.monotonic()
        self._session = FollowSession(after=engine.durable, offset=answer.start_offset, now_s=now_s)
        self._upstream, self._heard_s, self._problem = address, now_s, ""
        self._silence = None
        self._said.pop(address, None)
        sender = asyncio.create_task(self._send_progress_forever(call))  # ends as the call does
        ticker = spawn(self._tick_forever(call), self._end)
        try:
            while isinstance(response := await call.read(), replication_pb2.FollowResponse):
                self._take_chunk(self._session, response.chunk)
                while not self._session.has_room:
                    await self._drained.wait_for(
                        lambda: self._session is None or self._session.has_room or engine.failed is not None
                    )
                    if engine.failed is not None:
                        raise engine.failed
            raise PeerUnreachable(f"{address} ended the stream")
        except asyncio.CancelledError:
            # A call that the ticker has cancelled ends in the same way as a task that its owner has.
            if self._silence is not None:
                raise self._silence from None
            raise
        finally:
            self._session = None
            for task in (sender, ticker):
                task.cancel()
            await asyncio.gather(sender, ticker, return_exceptions=True)

    def _take_chunk(self, session: FollowSession, chunk: replication_pb2.Chunk) -> None:
        self._heard_s = time.monotonic()
        self._do(
            session.on_chunk(
                chunk.records,
                head_lsn=Lsn(chunk.head_lsn),
                head_offset=chunk.head_offset,
                clock_us=chunk.clock_us,
                now_s=self._heard_s,
            )
        )

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Append(data=data, last=last):
                    self._submitted = last
                    self.engine.submit(data, last, self.engine.epoch)
                case Apply(records=records):
                    self._to_apply.extend(records)
                    self._wake_applier.set()
                case SendProgress():
                    self._progress = action
                    self._wake_sender.set()
                case _:
                    raise AssertionError(f"not for the shell: {action}")

    async def _send_progress_forever(self, call: _Call) -> None:
        while True:
            await self._wake_sender.wait()
            self._wake_sender.clear()
            told = self._progress
            if told is not None:
                self._progress = None
                await call.write(
                    replication_pb2.FollowRequest(
                        progress=replication_pb2.Progress(
                            received_offset=told.received_offset,
                            durable_lsn=told.durable_lsn,
                            durable_offset=told.durable_offset,
                            applied_lsn=told.applied_lsn,
                        )
                    )
                )

    async def _tick_forever(self, call: _Call) -> None:
        while self._session is not None:
            await asyncio.sleep(_TICK_S)
            if self._session is None:
                return
            for action in self._session.on_tick(now_s=time.monotonic()):
                if isinstance(action, ComeAgain):
                    self._silence = action.reason
                    call.cancel()
                    return
                self._do([action])

    # -- applying ------------------------------------------------------------------------------------------

    async def _apply_forever(self) -> None:
        while True:
            if not self._to_apply:
                self._wake_applier.clear()
                await self._wake_applier.wait()
            engine = self.engine
            try:
                await engine.wait_for_room()
                self._apply_slice(engine)
            except UnderstudyError as error:
                engine.fail(error)
                return
            self._drained.notify()
            await asyncio.sleep(0)

    def _apply_slice(self, engine: Engine) -> None:
        session = self._session
        for _ in range(min(_APPLY_SLICE, len(self._to_apply))):
            record = self._to_apply.popleft()
            engine.apply(record)
            if session is not None:
                session.on_applied(record)
            if engine.is_behind:
                break
        if session is not None:
            self._do(session.on_applied_all())

    async def _drain(self) -> None:
        """Returns once everything received is durable and applied."""
        engine = self._engine
        if engine is None:
            return
        await self._drained.wait_for(
            lambda: (
                engine.failed is not None
                or (engine.durable == self._submitted and engine.state.applied == engine.durable)
            )
        )

    # -- what the engine tells -----------------------------------------------------------------------------

    def on_durable(self, position: Position, offset: int) -> None:
        """Tells the primary and applies; without a session (the connection was lost meanwhile) only applies."""
        if self._session is not None:
            applies_at_once = not self._to_apply and not self.engine.is_behind
            self._do(self._session.on_durable(position, offset, applies_at_once=applies_at_once))
        elif self._engine is not None:
            known = self._to_apply[-1].lsn if self._to_apply else self._engine.state.applied.lsn
            self._to_apply.extend(self._engine.log.records(known, position.lsn))
            self._wake_applier.set()

    def on_checkpoint(self, result: store_pb2.CheckpointResult) -> None:
        """Nothing to do: the digest is compared by the engine."""

    def on_disk_full(self, full: bool) -> None:
        """Shown in the status; the primary sees our progress stand still."""

    def on_failure(self, error: UnderstudyError) -> None:
        """Ends the process."""
        self._end(error)
        self._drained.notify()

    def retain_from(self) -> Lsn:
        """The newest ``log_floor_bytes``, so that others can follow us after a promotion."""
        return self.engine.first_lsn_within(self.settings.log_floor_bytes)

    # -- bootstrap -----------------------------------------------------------------------------------------

    async def _bootstrap(self, channel: grpc.aio.Channel, address: str) -> None:
        """Fetches a copy beside the present one, then puts it in its place."""
        self._problem = f"fetching a copy from {address}"
        log.info("bootstrap_begins", primary=address)

        def on_progress(done: int, total: int) -> None:
            self._bootstrap_progress = (done, total)

        fetched = await bootstrap.fetch(
            channel,
            self.directory,
            replica_id=self.settings.id,
            rate=self.settings.bootstrap_rate,
            progress=on_progress,
        )
        self._bootstrap_progress = None
        old, self._engine = self._engine, None
        self._to_apply.clear()
        if old is not None:
            await old.close()
        try:
            await asyncio.to_thread(self.directory.install, fetched.cluster, keep_old=False)
            self._engine = await asyncio.to_thread(Engine.open, self.directory, metrics=self.metrics)
            self._engine.start(self)
        except UnderstudyError as error:
            # The next start finishes what was begun. To fetch once more here would be into the very place that an
            # unfinished installation takes its copy from.
            self._end(error)
            raise
        self._submitted = self._engine.durable
        log.info("bootstrap_done", lsn=self._engine.durable.lsn, bytes=fetched.bytes_total)

    # -- promotion -----------------------------------------------------------------------------------------

    async def promote(self) -> Promotion:
        """Stops following, applies what was received, and begins a new epoch. The process ends afterwards.

        Raises:
            Unavailable: there is no copy yet.
        """
        started_s = time.monotonic()
        engine = self.engine
        await self._stop_following()
        try:
            await self._drain()
            if engine.failed is not None:
                raise engine.failed
            promotion = begin_reign(engine, started_s=started_s)
        except BaseException as error:
            self._promotion_failed(error)
            raise
        self._submitted = engine.durable
        return promotion

    def _promotion_failed(self, error: BaseException) -> None:
        """Goes on as the replica that this still is; what is half promoted ends, and is promoted anew."""
        if self.directory.role is Role.REPLICA:
            self._follower = spawn(self._follow_forever(), self._end)
        else:
            self._end(
                error if isinstance(error, UnderstudyError) else UnderstudyError("promotion was cut off")
            )

    def leave(self) -> None:
        """Ends the process after a promotion."""
        self._end(None)

    # -- status --------------------------------------------------------------------------------------------

    def status(self) -> admin_pb2.StatusResponse:
        """All that ``understudy status`` shows."""
        response = admin_pb2.StatusResponse(
            role=self.directory.role.value,
            cluster=self.directory.cluster,
            node=self.directory.node,
            upstream=self._upstream_status(),
            warnings=self._warnings(),
            version=VERSION,
        )
        engine = self._engine
        if engine is not None:
            response.epoch = engine.epoch
            response.lsn = self._submitted.lsn if self._submitted else engine.durable.lsn
            response.durable_lsn = engine.durable.lsn
            response.committed_lsn = engine.state.applied.lsn
            response.checkpoint_lsn = engine.checkpoint.lsn
            response.digest = engine.durable.digest
            response.realms = max(engine.state.realm_count - 1, 0)
            if engine.state.epochs:
                response.proof.CopyFrom(engine.state.epochs[-1].proof)
        return response

    def _upstream_status(self) -> admin_pb2.UpstreamStatus:
        session, engine = self._session, self._engine
        status = admin_pb2.UpstreamStatus(
            address=self._upstream or self.settings.primary, connected=session is not None
        )
        if session is None or engine is None:
            status.lag_seconds = time.monotonic() - self._heard_s if self._heard_s else 0.0
            return status
        status.lag_entries = max(session.head_lsn - engine.durable.lsn, 0)
        status.lag_bytes = max(session.head_offset - engine.log.end_offset, 0)
        if engine.state.applied.lsn < session.head_lsn:
            status.lag_seconds = max(session.clock_us - engine.state.time_us, 0) / 1e6
        return status

    def _warnings(self) -> list[str]:
        found = list(self._engine.mismatches) if self._engine else []
        if self._engine is not None and self._engine.disk_full:
            found.append(f"no space left in {self.directory.path}: nothing more is received")
        if self._session is None:
            found.append(f"not following: {self._problem}")
        if self._bootstrap_progress is not None:
            done, total = self._bootstrap_progress
            found.append(f"bootstrapping: {done:,} of {total:,} bytes fetched")
        return found


def _check_role(directory: DataDirectory) -> None:
    remedies: dict[Role, str] = {
        Role.PRIMARY: f"understudy primary --data-dir {directory.path}, or understudy rewind {directory.path} "
        "--to HOST:PORT",
        Role.FENCED: f"understudy rewind {directory.path} --to HOST:PORT",
        Role.PROMOTING: f"understudy promote {directory.path}",
        Role.CREATING: f"understudy primary --data-dir {directory.path}",
    }
    if directory.role in remedies:
        raise WrongRole(
            f"{directory.path} is not a replica's directory, its role is {directory.role.value}",
            remedy=f"run: {remedies[directory.role]}",
        )
