"""Both ends of a Follow, joined in memory: whatever is cut, slow or lost, both logs stay the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_helpers import chain

from understudy.common import entries
from understudy.common.backoff import Backoff
from understudy.common.errors import CorruptionError, ProtocolError
from understudy.common.records import RECORD_HEADER_BYTES, Record
from understudy.common.types import START, ClusterId, Epoch, Lsn, NodeId, Position
from understudy.primary import follower_session
from understudy.primary.follower_session import (
    HEARTBEAT_S,
    FollowerSession,
    GiveUp,
    Progress,
    SendHeartbeat,
    SendRecords,
)
from understudy.replica import follow_session
from understudy.replica.follow_session import (
    BACKOFF_S,
    PROGRESS_S,
    SILENCE_S_MAX,
    Action,
    Append,
    Apply,
    ComeAgain,
    FollowSession,
    SendProgress,
)
from understudy.v1 import log_pb2

PAYLOADS = [b"one", b"two" * 30, bytes(200), b"\xff", b"five" * 10]


def _entry(value: bytes) -> bytes:
    """An entry that carries ``value``."""
    change = log_pb2.Change(realm="/realm", operations=[log_pb2.Operation(value=value)])
    return entries.change_entry(1, change.SerializeToString(), b"")


def _epoch(epoch: int) -> bytes:
    """An entry that starts an epoch."""
    return entries.epoch_entry(
        time_us=1,
        cluster=ClusterId(bytes(16)),
        epoch=Epoch(epoch),
        after=START,
        node=NodeId(bytes(16)),
        key=b"",
    )


@dataclass
class Log:
    """A log in memory: its bytes, and the position and offset behind each record."""

    data: bytes = b""
    positions: list[Position] = field(default_factory=lambda: [START])
    offsets: list[int] = field(default_factory=lambda: [0])

    def write(self, *payloads: bytes) -> None:
        self.append([_entry(payload) for payload in payloads])

    def append(self, entries_: Iterable[bytes]) -> None:
        for data, position in chain(self.positions[-1], entries_):
            self.data += data
            self.positions.append(position)
            self.offsets.append(len(self.data))

    @property
    def end(self) -> Position:
        return self.positions[-1]


@dataclass(frozen=True)
class Chunk:
    """What is on its way to the replica."""

    records: bytes
    head_lsn: Lsn
    head_offset: int


class Pair:
    """A primary's and a replica's session; every action is checked before it is carried out."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.log = Log()
        self.durable = 0  # how many entries are durable at the primary
        self.copy = b""  # what the replica was told to append
        self.copy_durable = 0  # how many entries of it are durable
        self.epochs: list[tuple[int, int]] = []  # last LSN and epoch of each append
        self._join()

    def connect_again(self) -> None:
        """A new connection: what was on its way is lost, what the replica has taken becomes durable first."""
        self.make_durable_there(1 << 30)
        self._join()

    def _join(self) -> None:
        here, offset = self.log.positions[self.copy_durable], self.log.offsets[self.copy_durable]
        self.primary = FollowerSession(lsn=here.lsn, offset=offset, now_s=self.now_s)
        self.replica = FollowSession(after=here, epoch=Epoch(1), offset=offset, now_s=self.now_s)
        self.applied = self.copy_durable
        self.received = offset
        self.to_replica: deque[Chunk] = deque()
        self.to_primary: deque[SendProgress] = deque()
        self.to_apply: deque[Record] = deque()
        self.gave_up: str | None = None

    # -- the primary ---------------------------------------------------------------------------------------

    def write(self, *payloads: bytes) -> None:
        self.log.write(*payloads)

    def make_durable_here(self, entries: int) -> None:
        self.durable = min(self.durable + entries, self.log.end.lsn)

    @property
    def durable_offset(self) -> int:
        return self.log.offsets[self.durable]

    def send(self) -> bool:
        """Carries out the primary's next action; whether there was one."""
        action = self.primary.next_action(durable_offset=self.durable_offset, now_s=self.now_s)
        if isinstance(action, GiveUp):
            self.gave_up = action.reason
        if action is None or isinstance(action, GiveUp):
            return False
        data = b""
        if isinstance(action, SendRecords):
            assert action.offset == self.primary.sent_offset
            data = self.log.data[action.offset : min(action.offset + action.bytes_max, self.durable_offset)]
            assert data
        self.primary.on_sending(len(data), now_s=self.now_s)
        assert self.primary.sent_offset <= self.durable_offset
        assert self.primary.sent_offset - self.received <= follower_session.WINDOW_BYTES
        self.to_replica.append(Chunk(data, self.log.positions[self.durable].lsn, self.durable_offset))
        return True

    def hear(self) -> None:
        """The primary gets the replica's next message."""
        told = self.to_primary.popleft()
        self.primary.on_progress(
            Progress(
                durable_lsn=told.durable_lsn, durable_offset=told.durable_offset, applied_lsn=told.applied_lsn
            ),
            received_offset=told.received_offset,
            durable_lsn_here=self.log.positions[self.durable].lsn,
            now_s=self.now_s,
        )

    # -- the replica ---------------------------------------------------------------------------------------

    def deliver(self, change: Callable[[bytes], bytes] = bytes) -> None:
        """The replica gets the primary's next message, perhaps changed on the way."""
        chunk = self.to_replica.popleft()
        self.received += len(chunk.records)
        self._carry_out(
            self.replica.on_chunk(
                change(chunk.records),
                head_lsn=chunk.head_lsn,
                head_offset=chunk.head_offset,
                clock_us=1,
                now_s=self.now_s,
            )
        )

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Append(data=data, last=last, epoch=epoch):
                    assert self.log.data.startswith(self.copy + data)
                    self.copy += data
                    self.epochs.append((last.lsn, epoch))
                    assert len(self.copy) == self.log.offsets[last.lsn]
                    assert last == self.log.positions[last.lsn]
                case Apply(records=records):
                    lsns = [record.lsn for record in records]
                    begin = self.applied + len(self.to_apply) + 1
                    assert lsns == list(range(begin, begin + len(lsns)))
                    assert lsns[-1] <= self.copy_durable
                    self.to_apply += records
                case SendProgress():
                    assert action.durable_lsn <= self.copy_durable
                    assert action.durable_offset == self.log.offsets[action.durable_lsn]
                    assert action.applied_lsn <= self.applied
                    assert action.received_offset <= self.received
                    self.to_primary.append(action)
                case ComeAgain(reason=reason):
                    self.gave_up = str(reason)
                case _:
                    pytest.fail(f"unexpected {action}")

    def make_durable_there(self, entries: int, *, applies_at_once: bool = False) -> None:
        appended = self.log.offsets.index(len(self.copy))
        if self.copy_durable == appended:
            return
        self.copy_durable = min(self.copy_durable + entries, appended)
        lsn = self.copy_durable
        actions = self.replica.on_durable(
            self.log.positions[lsn], self.log.offsets[lsn], applies_at_once=applies_at_once
        )
        self._carry_out(actions)
        if applies_at_once:
            self.apply(1 << 30)

    def apply(self, entries: int) -> None:
        for _ in range(min(entries, len(self.to_apply))):
            record = self.to_apply.popleft()
            self.applied = record.lsn
            self.replica.on_applied(record)
        self._carry_out(self.replica.on_applied_some())

    def tick(self, seconds: float) -> None:
        self.now_s += seconds
        self._carry_out(self.replica.on_tick(now_s=self.now_s))

    # -- both ----------------------------------------------------------------------------------------------

    def settle(self, *, ticks: bool = False) -> None:
        """Lets everything happen that can; without ``ticks`` no time passes."""
        for _ in range(10_000):
            if ticks:
                self.tick(0.25)
            busy = self.send()
            while self.to_replica:
                self.deliver()
                busy = True
            self.make_durable_there(1 << 30)
            if self.to_apply:
                self.apply(1 << 30)
            while self.to_primary:
                self.hear()
                busy = True
            done = self.primary.progress.applied_lsn == self.durable
            if (done and not self.to_replica) or (not busy and not ticks):
                return
        pytest.fail("it never comes to rest")

    def assert_equal(self) -> None:
        assert self.copy == self.log.data[: self.durable_offset]
        assert self.applied == self.copy_durable == self.durable
        assert self.primary.progress == Progress(
            durable_lsn=Lsn(self.durable), durable_offset=self.durable_offset, applied_lsn=Lsn(self.applied)
        )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and windows that a test's few entries fill."""
    monkeypatch.setattr(follower_session, "CHUNK_BYTES_MAX", 40)
    monkeypatch.setattr(follower_session, "WINDOW_BYTES", 150)


def filled() -> Pair:
    pair = Pair()
    pair.write(*PAYLOADS)
    pair.make_durable_here(100)
    return pair


# -- cut anywhere --------------------------------------------------------------------------------------------


def test_a_log_cut_at_every_byte_arrives_whole() -> None:
    """Wherever the stream is cut into two messages, the replica appends whole records only, all of them."""
    total = len(filled().log.data)
    for cut in range(total + 1):
        pair = filled()
        pair.send()
        chunk = pair.to_replica.popleft()
        for records in (chunk.records[:cut], chunk.records[cut:]):
            pair.to_replica.append(replace(chunk, records=records))
            pair.deliver()
            assert len(pair.copy) in pair.log.offsets
        pair.settle()
        pair.assert_equal()


@pytest.mark.parametrize("size", [1, 7, RECORD_HEADER_BYTES, 1000])
def test_chunks_of_every_size_will_do(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """An entry may span any number of chunks, down to chunks of one byte."""
    monkeypatch.setattr(follower_session, "CHUNK_BYTES_MAX", size)
    pair = filled()
    pair.settle()
    pair.assert_equal()


@pytest.mark.usefixtures("small")
def test_an_entry_larger_than_the_window_does_not_wait_for_a_clock() -> None:
    """An entry that does not fit into the window goes through at once: each part that arrives makes room."""
    pair = Pair()
    pair.write(bytes(2_000), b"and on")
    pair.make_durable_here(2)
    pair.settle()
    pair.assert_equal()


@pytest.mark.usefixtures("small")
def test_g9_no_more_than_the_window_is_ever_on_its_way() -> None:
    """G9: a replica that does not answer is sent a window's worth, and the rest when it does."""
    pair = filled()
    while pair.send():
        pass
    assert pair.primary.sent_offset == follower_session.WINDOW_BYTES
    while pair.to_replica:
        pair.deliver()
    pair.make_durable_there(1)
    assert not pair.send()  # nothing of it was heard yet
    while pair.to_primary:
        pair.hear()
    assert pair.send()


def test_g9_a_replica_that_cant_keep_up_reads_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: what is received and not applied is limited; there is room again as it is applied."""
    monkeypatch.setattr(follow_session, "BACKLOG_BYTES_MAX", 300)
    pair = filled()
    pair.send()
    assert pair.replica.has_room
    pair.deliver()
    assert not pair.replica.has_room
    pair.make_durable_there(100)
    assert not pair.replica.has_room
    pair.apply(3)
    assert pair.replica.has_room


# -- nothing is told that is not so ----------------------------------------------------------------------------


def test_g1_nothing_is_told_durable_before_it_is() -> None:
    """G1: what the replica has received counts with the primary only when it is durable there."""
    pair = filled()
    pair.send()
    pair.deliver()
    pair.tick(PROGRESS_S)
    pair.hear()
    assert pair.primary.progress.durable_lsn == 0
    assert pair.primary.received_offset == len(pair.log.data)
    pair.make_durable_there(2)
    pair.hear()
    assert pair.primary.progress == Progress(
        durable_lsn=Lsn(2), durable_offset=pair.log.offsets[2], applied_lsn=Lsn(0)
    )
    pair.apply(1)
    pair.hear()
    assert (pair.primary.progress.durable_lsn, pair.primary.progress.applied_lsn) == (2, 1)


def test_what_is_applied_at_once_is_told_in_one_message() -> None:
    """Where a small batch is applied as soon as it is durable, one message tells of both; otherwise of each."""
    pair = filled()
    pair.send()
    pair.deliver()
    pair.make_durable_there(2, applies_at_once=True)
    [told] = pair.to_primary
    assert (told.durable_lsn, told.applied_lsn) == (2, 2)
    pair.make_durable_there(2)
    assert pair.to_primary[-1].durable_lsn == 4
    assert pair.to_primary[-1].applied_lsn == 2


def test_the_replica_knows_how_far_behind_it_is() -> None:
    """Every chunk, and every heartbeat, tells the primary's head: so that the replica knows its lag."""
    pair = filled()
    pair.send()
    pair.write(b"more")
    pair.make_durable_here(1)
    pair.deliver()
    assert (pair.replica.head_lsn, pair.replica.head_offset) == (5, pair.log.offsets[5])
    pair.settle()
    assert (pair.replica.head_lsn, pair.replica.clock_us) == (6, 1)


GOOD = Progress(durable_lsn=Lsn(3), durable_offset=300, applied_lsn=Lsn(2))


@pytest.mark.parametrize(
    ("progress", "received"),
    [
        (replace(GOOD, durable_lsn=Lsn(2)), 400),  # backwards
        (replace(GOOD, durable_offset=299), 400),
        (replace(GOOD, applied_lsn=Lsn(1)), 400),
        (GOOD, 399),
        (replace(GOOD, durable_lsn=Lsn(11)), 400),  # never sent
        (GOOD, 501),
        (replace(GOOD, durable_offset=401), 400),  # durable before it was received
        (replace(GOOD, applied_lsn=Lsn(4)), 400),  # applied before it was durable
    ],
)
def test_g1_impossible_progress_is_refused(progress: Progress, received: int) -> None:
    """G1: a replica that takes back what it said, or claims what it can't have, is not believed."""
    session = FollowerSession(lsn=Lsn(0), offset=0, now_s=0.0)
    session.on_sending(500, now_s=0.0)
    session.on_progress(GOOD, received_offset=400, durable_lsn_here=Lsn(10), now_s=0.0)
    with pytest.raises(ProtocolError, match="impossible progress"):
        session.on_progress(progress, received_offset=received, durable_lsn_here=Lsn(10), now_s=0.0)
    assert session.progress == GOOD
    session.on_progress(GOOD, received_offset=400, durable_lsn_here=Lsn(10), now_s=0.0)


# -- damage ------------------------------------------------------------------------------------------------


def test_g3_a_corrupted_byte_is_refused_wherever_it_is() -> None:
    """G3: a byte changed on the way is found before anything of its message is appended, and a new connection
    brings the right ones.
    """
    total = len(filled().log.data)
    for at in range(0, total, 3):
        pair = filled()
        pair.send()

        def flip(data: bytes, at: int = at) -> bytes:
            return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]

        with pytest.raises(CorruptionError):
            pair.deliver(flip)
        assert pair.copy == b""
        pair.connect_again()
        pair.settle()
        pair.assert_equal()


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"\xff", id="no entry"),
        pytest.param(log_pb2.Entry(time_us=1).SerializeToString(), id="no kind"),
        pytest.param(log_pb2.Entry(time_us=1).SerializeToString() + b"\xfa\x3f\x01x", id="unknown kind"),
        pytest.param(entries.change_entry(1, b"\xff", b""), id="no change"),
        pytest.param(
            log_pb2.Entry(time_us=1, epoch_start=b"\xff").SerializeToString(), id="no epoch's start"
        ),
    ],
)
def test_g1_what_could_not_be_applied_never_gets_into_the_log(payload: bytes) -> None:
    """G1: an entry that this version can't read, though its digest is right, leaves a copy that can be promoted."""
    pair = filled()
    pair.settle()
    pair.log.append([payload])
    pair.make_durable_here(1)
    pair.send()
    before = pair.copy
    with pytest.raises(CorruptionError):
        pair.deliver()
    assert pair.copy == before


def test_records_of_two_epochs_are_appended_apart() -> None:
    """Each append is of one epoch, which is what a segment that begins with it is marked with."""
    pair = Pair()
    pair.log.append([_entry(b"a"), _epoch(2), _entry(b"b"), _entry(b"c"), _epoch(3), _epoch(4), _entry(b"d")])
    pair.make_durable_here(100)
    pair.settle()
    assert pair.epochs == [(1, 1), (4, 2), (5, 3), (7, 4)]
    pair.log.append([_entry(b"e")])
    pair.make_durable_here(1)
    pair.settle()
    assert pair.epochs[-1] == (8, 4)


def test_records_of_another_history_are_refused() -> None:
    """G3: entries that follow from another one than the replica's last are not appended, right as they are."""
    pair, other = filled(), Pair()
    other.write(b"another", *PAYLOADS)
    pair.settle()
    with pytest.raises(CorruptionError):
        pair.replica.on_chunk(
            other.log.data[other.log.offsets[5] :],
            head_lsn=Lsn(6),
            head_offset=0,
            clock_us=0,
            now_s=0.0,
        )


# -- silence -----------------------------------------------------------------------------------------------


def test_an_idle_pair_stays_connected() -> None:
    """With nothing to say, heartbeats one way and progress the other keep both sides from giving up."""
    pair = filled()
    pair.settle()
    heard = 0
    while pair.now_s < 20 * SILENCE_S_MAX:
        pair.tick(0.25)
        heard += pair.send()
        while pair.to_replica:
            pair.deliver()
        while pair.to_primary:
            pair.hear()
        assert pair.gave_up is None
    assert 0.7 * pair.now_s / HEARTBEAT_S <= heard <= 1.1 * pair.now_s / HEARTBEAT_S


def test_each_side_gives_up_on_a_silent_other() -> None:
    """After ten seconds without a word, a half-open connection is ended by whoever is left, and not before."""
    pair = filled()
    pair.now_s = SILENCE_S_MAX
    assert not isinstance(pair.primary.next_action(durable_offset=0, now_s=pair.now_s), GiveUp)
    pair.tick(0.0)
    assert pair.gave_up is None
    pair.tick(0.01)
    assert pair.gave_up is not None
    assert "10 s" in pair.gave_up
    assert isinstance(pair.primary.next_action(durable_offset=0, now_s=pair.now_s), GiveUp)


@pytest.mark.parametrize("idle_s", [0.0, 0.3, 5.0])
def test_there_is_something_to_do_at_every_deadline(idle_s: float) -> None:
    """Asked again when it said, the primary's session has something to do; asked before, it has not."""
    session = FollowerSession(lsn=Lsn(0), offset=0, now_s=0.0)
    session.on_sending(0, now_s=idle_s)
    for _ in range(20):
        deadline_s = session.next_deadline_s() + 1e-9
        assert session.next_action(durable_offset=0, now_s=deadline_s - 0.01) is None
        action = session.next_action(durable_offset=0, now_s=deadline_s)
        assert action is not None
        if isinstance(action, GiveUp):
            assert deadline_s > SILENCE_S_MAX
            return
        assert action == SendHeartbeat()
        session.on_sending(0, now_s=deadline_s)
    pytest.fail("it never gives up")


def test_tries_become_rarer_and_begin_anew_after_a_success() -> None:
    """Waits double up to a limit, spread by chance so that replicas don't come all at once."""
    backoff = Backoff(first_s=BACKOFF_S[0], last_s=BACKOFF_S[1])
    waits = [backoff.next_s(0.5) for _ in range(12)]
    assert waits[:4] == [BACKOFF_S[0] * 2**n for n in range(4)]
    assert waits[-1] == BACKOFF_S[1]
    assert backoff.next_s(0.0) == BACKOFF_S[1] / 2
    assert backoff.next_s(1.0) == BACKOFF_S[1] * 1.5
    backoff.reset()
    assert backoff.next_s(0.5) == BACKOFF_S[0]


# -- anything may happen -----------------------------------------------------------------------------------

STEPS = ["write", "durable", "send", "send", "deliver", "deliver", "sync", "apply", "hear", "tick", "cut"]


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(1, 5), st.booleans()), max_size=80),
    st.sampled_from([30, 200, 5_000]),
    st.sampled_from([13, 100, 5_000]),
)
def test_g2_whatever_happens_the_copy_is_a_prefix_and_becomes_the_whole(
    steps: list[tuple[str, int, bool]], window: int, chunk: int
) -> None:
    """G2: in every order of writing, sending, syncing, applying and losing the connection, the copy is a prefix of
    the log, progress is true, and in the end the copy is complete.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follower_session, "WINDOW_BYTES", window)
        patch.setattr(follower_session, "CHUNK_BYTES_MAX", chunk)
        pair = Pair()
        for step, number, flag in steps:
            match step:
                case "write":
                    pair.write(*[b"entry %d" % number * number * (9 if flag else 1)] * number)
                case "durable":
                    pair.make_durable_here(number)
                case "send":
                    pair.send()
                case "deliver" if pair.to_replica:
                    pair.deliver()
                case "sync":
                    pair.make_durable_there(number, applies_at_once=flag and not pair.to_apply)
                case "apply" if pair.to_apply:
                    pair.apply(number)
                case "hear" if pair.to_primary:
                    pair.hear()
                case "tick":
                    pair.tick(number / 10)
                case "cut" if flag:
                    pair.connect_again()
        if pair.gave_up:
            pair.connect_again()
        pair.make_durable_here(1 << 30)
        pair.settle()
        pair.assert_equal()
