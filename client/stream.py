"""The commit stream: transactions are numbered, sent, sent again, and answered.

Any number of tasks share it. What they commit while the last message was on its way goes out with the next. A
transaction keeps its number until it is answered, over any number of connections and servers, and so is applied
once (G6).
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import OrderedDict, deque
from dataclasses import dataclass

from understudy.client.peers import Peers, Stream, kept, stream_end
from understudy.common.backoff import Backoff
from understudy.common.errors import (
    Diverged,
    NotAuthenticated,
    NotPermitted,
    NotPrimary,
    OutcomeUnknown,
    Overloaded,
    PeerUnreachable,
    ProtocolError,
    ResetNeeded,
    UnderstudyError,
    UsageError,
    from_code,
)
from understudy.common.memtable import Receipt
from understudy.common.rpc import peer_errors
from understudy.common.tasks import Signal, spawn
from understudy.common.types import DIGEST_BYTES, Digest, Lsn
from understudy.v1 import data_pb2

MESSAGE_TRANSACTIONS_MAX = 256
MESSAGE_BYTES_TARGET = 1 << 20
# Sent and not answered: what must be kept for sending again, and what a server may be asked to hold for us.
IN_FLIGHT_MAX = 10_000
IN_FLIGHT_BYTES_MAX = 16 << 20
_DEADLINE_CHECK_S = 0.02
_LATE_MAX = 10_000  # outcomes that came after their deadline, kept until somebody asks
_BIND_S_MAX = 5.0
BACKOFF_S = (0.02, 1.0)

# Trying the same address again will not help.
_FINAL = (NotPermitted, NotPrimary, ResetNeeded, ProtocolError, UsageError)


@dataclass(slots=True)
class _Commit:
    message: data_pb2.Transaction
    size: int
    answer: asyncio.Future[Receipt]  # made anew when it is given up: the old one then says so
    deadline_s: float | None
    sent: bool = False  # ever: then a server may have it
    given_up: bool = False  # nobody waits for it any more but with `wait`


class CommitStream:
    """Transactions on their way to whichever of ``peers`` is the primary. For one event loop."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._numbers = itertools.count(1)
        self._unanswered: dict[int, _Commit] = {}
        self._unanswered_bytes = 0
        self._unsent: deque[_Commit] = deque()
        self._late: OrderedDict[int, Receipt | UnderstudyError] = OrderedDict()
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._changed = Signal()  # of the three that follow
        self._is_bound = False
        self._split_brain: Diverged | None = None
        self._closed = False
        self._backoff = Backoff(first_s=BACKOFF_S[0], last_s=BACKOFF_S[1])
        self._runner: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------------

    async def bound_within(self, timeout_s: float) -> None:
        """Returns once a primary is found; ``peers.current`` says which.

        Raises:
            Diverged: there are two.
            UnderstudyError: none within ``timeout_s``, and why.
        """
        self._run()
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait_for(
                    lambda: self._is_bound or self._split_brain is not None or self._closed
                )
        except TimeoutError:
            raise self._peers.last_error or PeerUnreachable(
                f"none of {', '.join(self._peers.addresses)} answered within {timeout_s:g} s",
                remedy="is it running, and is the address right?",
            ) from None
        self.check_open()
        if self._split_brain is not None:
            raise self._split_brain

    def check_open(self) -> None:
        """Refuses to work after :meth:`close`.

        Raises:
            UsageError.
        """
        if self._closed:
            raise UsageError("this connection is closed", remedy="connect anew")

    async def close(self) -> None:
        """What was not answered fails with :class:`OutcomeUnknown`."""
        self._closed = True
        self._changed.notify()
        for task in (self._runner, self._watcher):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        for number, commit in self._unanswered.items():
            what = f"the client was closed before transaction {number} was answered"
            _fail(commit.answer, OutcomeUnknown(what, number=number))
        self._unanswered.clear()
        self._unanswered_bytes = 0
        self._room.set()

    # -- what callers wait for -------------------------------------------------------------------------------

    async def commit(self, message: data_pb2.Transaction, timeout_s: float | None) -> Receipt:
        """Numbers the transaction, sends it, and returns its receipt.

        Raises:
            OutcomeUnknown: no answer in time.
            Overloaded: too much was unanswered all the time; it was not sent.
            UnderstudyError: it was refused.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._has_room:
            await self._wait_for_room(deadline_s)
            self.check_open()
        message.number = next(self._numbers)  # only now: numbers must be sent in their order
        answer: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        commit = _Commit(message, message.ByteSize(), answer, deadline_s)
        self._unanswered[message.number] = commit
        self._unanswered_bytes += commit.size
        self._unsent.append(commit)
        self._work.set()
        self._run()
        return await answer

    async def wait(self, number: int, timeout_s: float | None) -> Receipt:
        """The receipt of a transaction that was given up.

        Raises:
            UsageError: no transaction of that number is unanswered.
            OutcomeUnknown: still no answer.
        """
        if number in self._late:
            outcome = self._late[number]
            if isinstance(outcome, UnderstudyError):
                raise outcome
            return outcome
        commit = self._unanswered.get(number)
        if commit is None:
            raise UsageError(
                f"transaction {number!r} of this client is not unanswered",
                remedy="give the `number` of an OutcomeUnknown that this connection raised",
            )
        self._run()  # after a crash, it is not on its way
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(commit.answer)  # others may wait for it, too
        except TimeoutError:
            raise self._outcome_unknown(commit.message) from None

    @property
    def _has_room(self) -> bool:
        return len(self._unanswered) < IN_FLIGHT_MAX and self._unanswered_bytes < IN_FLIGHT_BYTES_MAX

    async def _wait_for_room(self, deadline: float | None) -> None:
        self._run()  # after a crash, nobody makes room
        while not self._has_room and not self._closed:
            self._room.clear()
            try:
                async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                    await self._room.wait()
            except TimeoutError:
                raise Overloaded(
                    f"{len(self._unanswered)} transactions of this client are unanswered",
                    remedy="try again later",
                ) from None

    # -- what they learn without an answer -------------------------------------------------------------------

    async def _watch_deadlines(self) -> None:
        """One task for all transactions: a timer for each would cost more than the rest of a commit."""
        while True:
            await asyncio.sleep(_DEADLINE_CHECK_S)
            now_s = time.monotonic()
            for commit in self._unanswered.values():
                if commit.deadline_s is not None and commit.deadline_s <= now_s:
                    self._give_up(commit)

    def _give_up(self, commit: _Commit) -> None:
        """Lets the caller go; the transaction is still sent, and its outcome kept for :meth:`wait`."""
        late, commit.answer = commit.answer, asyncio.get_running_loop().create_future()
        commit.deadline_s, commit.given_up = None, True
        _fail(late, self._outcome_unknown(commit.message))

    def _note_late(self, number: int, outcome: Receipt | UnderstudyError) -> None:
        self._late[number] = outcome
        while len(self._late) > _LATE_MAX:
            self._late.popitem(last=False)

    def _outcome_unknown(self, message: data_pb2.Transaction) -> OutcomeUnknown:
        why = f": {self._peers.last_error}" if self._peers.last_error else ""
        return OutcomeUnknown(
            f"transaction {message.number} on {message.realm} was not answered in time{why}",
            remedy="it may or may not have been applied; wait() for it, or let this client go on trying",
            number=message.number,
        )

    def _fail_unsent(self, error: UnderstudyError) -> None:
        """Nobody will take writes: what no server has ever seen was certainly not applied."""
        for number in [number for number, commit in self._unanswered.items() if not commit.sent]:
            self._refuse(number, error)
        self._unsent.clear()  # nobody sends now; what is left is put back when there is a connection again
        self._room.set()

    # -- connections -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._runner is None or self._runner.done():
            self._runner = spawn(self._run_forever(), self._on_crash)
        if self._watcher is None or self._watcher.done():
            self._watcher = spawn(self._watch_deadlines(), self._on_crash)

    def _on_crash(self, error: UnderstudyError) -> None:
        # They are kept, and sent again: whoever took them for refused would have them applied twice.
        self._peers.last_error = error
        for commit in self._unanswered.values():
            self._give_up(commit)

    async def _run_forever(self) -> None:
        while True:
            await self._attempt()
            await asyncio.sleep(self._backoff.next_s(random.random()))

    async def _attempt(self) -> None:
        """Tries the addresses until one takes us, and stays with it while it does."""
        try:
            order = await self._peers.in_order()
            self._split_brain = None  # as far as anybody who answers can tell
            for index in order:
                if await self._converse(index):
                    return
        except UnderstudyError as error:
            self._on_refusal(error)

    async def _converse(self, index: int) -> bool:
        """Binds to one address and sends and receives until that ends; whether it was bound."""
        address = self._peers.addresses[index]
        call = self._peers.data(address).Commit()
        was_bound = False
        try:
            with peer_errors(address):
                async with asyncio.timeout(_BIND_S_MAX):
                    await self._peers.bind(address, call)
                was_bound = True
                self._on_bound(index)
                await self._exchange(call)
        except TimeoutError:
            self._peers.last_error = PeerUnreachable(f"{address} did not answer within {_BIND_S_MAX:g} s")
        except UnderstudyError as error:
            if was_bound and isinstance(error, NotAuthenticated):
                # The token has expired meanwhile. The next attempt shows one that was renewed, or is refused.
                self._peers.last_error = kept(error)
            else:
                self._on_refusal(kept(error))
        finally:
            self._is_bound = False
            call.cancel()
        return was_bound

    def _on_bound(self, index: int) -> None:
        self._peers.current = index
        self._peers.last_error = self._split_brain = None
        self._is_bound = True
        self._changed.notify()

    def _on_refusal(self, error: UnderstudyError) -> None:
        self._peers.last_error = error
        if isinstance(error, Diverged):
            self._split_brain = error
            self._changed.notify()
        elif not (self._peers.is_one and isinstance(error, _FINAL)):
            return
        self._fail_unsent(error)
        if isinstance(error, ResetNeeded):
            # Only an operator can mend it. We go on trying, but nobody should wait for that.
            for commit in self._unanswered.values():
                if not commit.given_up:
                    self._give_up(commit)

    # -- one connection --------------------------------------------------------------------------------------

    async def _exchange(self, call: Stream) -> None:
        self._unsent = deque(self._unanswered.values())  # in order of their numbers
        sender = asyncio.create_task(self._send_forever(call))
        try:
            while isinstance(message := await call.read(), data_pb2.CommitResponse):
                self._take_results(message.results)
            raise await stream_end(call)
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _send_forever(self, call: Stream) -> None:
        while True:
            while not self._unsent:
                self._work.clear()
                await self._work.wait()
            batch: list[data_pb2.Transaction] = []
            size = 0
            while self._unsent and len(batch) < MESSAGE_TRANSACTIONS_MAX and size < MESSAGE_BYTES_TARGET:
                if batch and size + self._unsent[0].size > MESSAGE_BYTES_TARGET:
                    break
                commit = self._unsent.popleft()
                commit.sent = True
                batch.append(commit.message)
                size += commit.size
            await call.write(data_pb2.CommitRequest(transactions=data_pb2.Transactions(transactions=batch)))

    def _take_results(self, results: data_pb2.Results) -> None:
        numbers, digests = results.numbers, results.digests
        if not len(numbers) == len(results.lsns) == len(results.versions) == len(digests) / DIGEST_BYTES:
            raise ProtocolError("the server's columns of results are of different lengths")
        for index, (number, lsn, version) in enumerate(
            zip(numbers, results.lsns, results.versions, strict=True)
        ):
            commit = self._answer(number)
            if commit is not None and not commit.answer.done():
                digest = Digest(digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])
                receipt = Receipt(commit.message.realm, version, Lsn(lsn), digest)
                commit.answer.set_result(receipt)
                if commit.given_up:
                    self._note_late(number, receipt)
        for refusal in results.refusals:
            self._refuse(refusal.number, from_code(refusal.code, refusal.message, refusal.remedy))
        if numbers or results.refusals:
            # Not when the stream opens: a server that takes us and fails each stream would be asked without a pause.
            self._backoff.reset()
        self._room.set()

    def _refuse(self, number: int, error: UnderstudyError) -> None:
        commit = self._answer(number)
        if commit is not None:
            _fail(commit.answer, error)
            if commit.given_up:
                self._note_late(number, error)

    def _answer(self, number: int) -> _Commit | None:
        commit = self._unanswered.pop(number, None)
        if commit is not None:
            self._unanswered_bytes -= commit.size
        return commit


def _fail(answer: asyncio.Future[Receipt], error: UnderstudyError) -> None:
    if not answer.done():
        answer.set_exception(error)
        answer.exception()  # whoever gave up waiting does not want to hear of it
