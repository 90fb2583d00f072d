"""Following: asks the primary, and then takes its stream into the copy; comes again after every end of it.

The shell around :mod:`~understudy.replica.follow_session`: gRPC, clock and chance.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable

import grpc.aio

from understudy.common.backoff import Backoff
from understudy.common.errors import CorruptionError, Fenced, PeerUnreachable, UnderstudyError
from understudy.common.events import log
from understudy.common.follow_table import PROTOCOL_VERSION, Decision
from understudy.common.locator import lookup_in, make_locator
from understudy.common.records import Record
from understudy.common.rpc import open_channel, peer_errors
from understudy.common.settings import ReplicaSettings
from understudy.common.tasks import spawn
from understudy.common.types import START, Lsn, Position, new_id
from understudy.replica import bootstrap
from understudy.replica.asking import Call, ask
from understudy.replica.copy import Copy
from understudy.replica.follow_session import (
    BACKOFF_S,
    Action,
    Append,
    Apply,
    Bootstrap,
    ComeAgain,
    FollowSession,
    SendProgress,
    Stop,
    on_answer,
)
from understudy.v1 import admin_pb2, replication_pb2, replication_pb2_grpc

_TICK_S = 0.25
_PROBLEMS_SAID_MAX = 20  # of one outage: whatever comes after so many different ones is no news


class Follower:
    """Follows whichever of the addresses answers as a primary."""

    def __init__(
        self, copy: Copy, settings: ReplicaSettings, *, on_end: Callable[[UnderstudyError], None]
    ) -> None:
        self.problems = {"": "not yet connected"}  # why each address was not followed when asked last
        self.bootstrap_progress: tuple[int, int] | None = None  # bytes in place, bytes in all
        self._copy = copy
        self._settings = settings
        self._on_end = on_end
        self._addresses = [address.strip() for address in settings.primary.split(",")]
        self._run = new_id()
        self._session: FollowSession | None = None
        self._upstream = ""
        self._started_us = time.time_ns() // 1_000
        self._heard_us = 0  # by the primary's clock; 0: never
        self._head = Lsn(0), 0  # the primary's, when it was heard last: LSN and log offset
        self._silence: UnderstudyError | None = None  # why the ticker has ended the call
        self._said: dict[str, set[str]] = {}  # problems logged since we last followed, by address
        self._damaged = Lsn(0)  # the entry that came damaged last time; 0: none
        self._reign = replication_pb2.Answer()  # of the latest epoch whose primary let us follow or copy it
        self._progress: SendProgress | None = None
        self._wake_sender = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to follow, once what was stopped and has perhaps not ended yet is over."""
        self._task = spawn(self._follow_after(self._task), self._on_end)

    async def _follow_after(self, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            previous.cancel()
            await asyncio.gather(previous, return_exceptions=True)
        await self._follow_forever()

    async def stop(self) -> None:
        """Follows no more; what was received is still on its way to the log."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    @property
    def is_connected(self) -> bool:
        """Whether a primary streams to us right now."""
        return self._session is not None

    def status(self) -> admin_pb2.UpstreamStatus:
        """Whom it follows, and how far behind it is."""
        session, engine = self._session, self._copy.opened
        status = admin_pb2.UpstreamStatus(
            address=self._upstream or self._settings.primary, connected=session is not None
        )
        if engine is None:
            return status
        head_lsn, head_offset = self._head
        status.lag_entries = max(head_lsn - engine.durable.lsn, 0)
        status.lag_bytes = max(head_offset - engine.log.end_offset, 0)
        now_us = session.clock_us if session is not None else time.time_ns() // 1_000
        had_all = self._heard_us if engine.state.applied.lsn >= head_lsn else 0
        since_us = had_all or engine.state.time_us or self._started_us  # the last: a copy of nothing
        status.lag_seconds = max(now_us - since_us, 0) / 1e6
        return status

    # -- asking --------------------------------------------------------------------------------------------

    async def _follow_forever(self) -> None:
        backoff = Backoff(first_s=BACKOFF_S[0], last_s=BACKOFF_S[1])
        while True:
            for address in self._addresses:
                try:
                    error = await self._follow_once(address, backoff)
                except UnderstudyError as trouble:
                    self._note_problem(address, trouble)
                else:
                    if error is not None:
                        self._on_end(error)
                        return
                with contextlib.suppress(UnderstudyError):  # the copy has failed, and the process ends
                    await self._copy.drain()
            await asyncio.sleep(backoff.next_s(random.random()))

    def _note_problem(self, address: str, error: UnderstudyError) -> None:
        problem = str(error)
        self._tell(address, problem)
        said = self._said.setdefault(address, set())
        if problem not in said and len(said) < _PROBLEMS_SAID_MAX:  # once, not at every try
            said.add(problem)
            log.warning("not_following", primary=address, error=problem)

    def _tell(self, address: str, problem: str) -> None:
        self.problems.pop("", None)
        self.problems[address] = problem

    async def _follow_once(self, address: str, backoff: Backoff) -> UnderstudyError | None:
        """Follows until the connection ends; returns why this replica must not go on at all, if so.

        Raises:
            UnderstudyError: why not, or no longer; ask again later.
        """
        async with open_channel(address, self._settings.credentials) as channel:
            with peer_errors(address):
                call: Call = replication_pb2_grpc.ReplicationStub(channel).Follow()
                try:
                    answer = await ask(call, address, await self._hello())
                    await self._check_reign(channel, answer, address)
                    match on_answer(
                        answer.decision, directory=str(self._copy.directory.path), address=address
                    ):
                        case None:
                            await self._stream(call, answer, address, backoff)
                        case Bootstrap():
                            error = await self._bootstrap(channel, address)
                            if error is not None:
                                return error
                            backoff.reset()
                        case ComeAgain(reason=reason):
                            raise reason
                        case Stop(error=reason):
                            return reason
                finally:
                    call.cancel()
        return None

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
        call: Call = replication_pb2_grpc.ReplicationStub(channel).Follow()
        try:
            await ask(call, address, hello)
        finally:
            call.cancel()
        raise Fenced(f"{address} is in epoch {answer.epoch}, and epoch {reign.epoch} has begun elsewhere")

    async def _hello(self) -> replication_pb2.Hello:
        return await asyncio.to_thread(self._make_hello) if self._copy.opened else self._make_hello()

    def _make_hello(self) -> replication_pb2.Hello:
        directory, engine = self._copy.directory, self._copy.opened
        hello = replication_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            node=directory.node,
            run=self._run,
            replica_id=self._settings.id,
            damaged_lsn=self._damaged,
        )
        if engine is None:
            return hello

        hello.cluster = directory.cluster
        hello.epoch = engine.epoch
        if engine.state.epochs:
            hello.proof.CopyFrom(engine.state.epochs[-1].proof)
        with engine.state.store.hold() as snapshot:  # this runs beside the loop, which may replace it
            marks = snapshot.marks()
        for position in make_locator(engine.durable, lookup_in(engine.log.position_at, {}), marks):
            hello.locator.add(lsn=position.lsn, digest=position.digest)
        return hello

    # -- streaming -----------------------------------------------------------------------------------------

    async def _stream(
        self, call: Call, answer: replication_pb2.Answer, address: str, backoff: Backoff
    ) -> None:
        engine = self._copy.engine
        session = FollowSession(
            after=engine.durable, epoch=engine.epoch, offset=answer.start_offset, now_s=time.monotonic()
        )
        self._begin(session, address)
        sender = asyncio.create_task(self._send_progress_forever(call))  # ends as the call does
        ticker = spawn(self._tick_forever(session, call), self._on_end)
        try:
            while isinstance(response := await call.read(), replication_pb2.FollowResponse):
                if self._take_chunk(session, response.chunk):
                    # Only now: who sends nothing that can be used is not to be asked at once, again and again.
                    backoff.reset()
                    self._all_is_well(address)
                if not session.has_room:
                    await self._copy.wait_until(lambda: session.has_room)
            raise PeerUnreachable(f"{address} ended the stream")
        except asyncio.CancelledError:
            # A call that the ticker has cancelled ends in the same way as a task that its owner has.
            task = asyncio.current_task()
            if self._silence is not None and task is not None and not task.cancelling():
                raise self._silence from None
            raise
        finally:
            self._session = self._copy.listener = None
            for task in (sender, ticker):
                task.cancel()
            await asyncio.gather(sender, ticker, return_exceptions=True)

    def _begin(self, session: FollowSession, address: str) -> None:
        self._session, self._copy.listener = session, self
        self._upstream = address
        self._silence = None
        self._progress = None  # of the session before, and older than what this one has begun with
        self._wake_sender.clear()
        log.info("following", primary=address, lsn=session.head_lsn)

    def _all_is_well(self, address: str) -> None:
        self.problems.clear()
        self._said.pop(address, None)
        self._damaged = Lsn(0)

    def _take_chunk(self, session: FollowSession, chunk: replication_pb2.Chunk) -> bool:
        """Takes what came; whether it was of any use, be it only as a sign of life."""
        self._head, self._heard_us = (Lsn(chunk.head_lsn), chunk.head_offset), chunk.clock_us
        try:
            actions = session.on_chunk(
                chunk.records,
                head_lsn=Lsn(chunk.head_lsn),
                head_offset=chunk.head_offset,
                clock_us=chunk.clock_us,
                now_s=time.monotonic(),
            )
        except CorruptionError:
            self._damaged = session.next_lsn  # so that the primary looks at its own log there
            raise
        self._do(actions)
        return not chunk.records or any(isinstance(action, Append) for action in actions)

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Append(data=data, last=last, epoch=epoch):
                    self._copy.submit(data, last, epoch)
                case Apply(records=records):
                    self._copy.apply(records)
                case SendProgress():
                    self._progress = action
                    self._wake_sender.set()
                case _:
                    raise AssertionError(f"not for the shell: {action}")

    async def _send_progress_forever(self, call: Call) -> None:
        while True:
            await self._wake_sender.wait()
            self._wake_sender.clear()
            told, self._progress = self._progress, None
            if told is not None:
                progress = replication_pb2.Progress(
                    received_offset=told.received_offset,
                    durable_lsn=told.durable_lsn,
                    durable_offset=told.durable_offset,
                    applied_lsn=told.applied_lsn,
                )
                await call.write(replication_pb2.FollowRequest(progress=progress))

    async def _tick_forever(self, session: FollowSession, call: Call) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            for action in session.on_tick(now_s=time.monotonic()):
                if isinstance(action, ComeAgain):
                    self._silence = action.reason
                    call.cancel()
                    return
                self._do([action])

    # -- what the copy tells -------------------------------------------------------------------------------

    def on_durable(self, position: Position, offset: int, *, applies_at_once: bool) -> None:
        """Tells the primary, and has applied what may be."""
        if self._session is not None:
            self._do(self._session.on_durable(position, offset, applies_at_once=applies_at_once))

    def on_applied(self, record: Record) -> None:
        """Makes room for more."""
        if self._session is not None:
            self._session.on_applied(record)

    def on_applied_some(self) -> None:
        """Tells the primary."""
        if self._session is not None:
            self._do(self._session.on_applied_some())

    # -- bootstrap -----------------------------------------------------------------------------------------

    async def _bootstrap(self, channel: grpc.aio.Channel, address: str) -> UnderstudyError | None:
        """Fetches a copy beside the present one, then puts it in its place; returns why that failed, if it did.

        Raises:
            UnderstudyError: it could not be fetched; ask again later.
        """
        self._tell(address, f"fetching a copy from {address}")
        log.info("bootstrap_begins", primary=address)

        def on_progress(done: int, total: int) -> None:
            self.bootstrap_progress = (done, total)

        try:
            fetched = await bootstrap.fetch(
                channel,
                self._copy.directory,
                replica_id=self._settings.id,
                rate=self._settings.bootstrap_rate,
                progress=on_progress,
            )
        finally:
            self.bootstrap_progress = None
        try:
            await self._copy.replace(fetched.cluster)
        except UnderstudyError as error:
            # The next start finishes what was begun. To fetch once more here would be into the very place that an
            # unfinished installation takes its copy from.
            return error
        log.info("bootstrap_done", lsn=self._copy.engine.durable.lsn, bytes=fetched.bytes_total)
        return None
