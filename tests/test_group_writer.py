"""The log's writer thread: grouping, order, back-pressure, full disks, failures, closing."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import pytest
from faulty_files import FaultyFiles
from log_helpers import EPOCH, chain, new_log, open_log, payloads_of, small_segments

from understudy.common import group_writer
from understudy.common.changelog import ChangeLog
from understudy.common.errors import CorruptionError, StorageFailed
from understudy.common.group_writer import GroupWriter
from understudy.common.segment import SegmentHeader
from understudy.common.types import Epoch, Lsn, Position

DEADLINE_S = 20.0


@dataclass
class Listener:
    """Notes what the writer reports, and lets a test wait for it."""

    durable: list[tuple[Position, int]] = field(default_factory=list)
    full: list[bool] = field(default_factory=list)
    failures: list[StorageFailed | CorruptionError] = field(default_factory=list)
    synced_bytes: list[int] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def _note(self, what: list[object], value: object) -> None:
        with self.changed:
            what.append(value)
            self.changed.notify_all()

    def on_durable(self, position: Position, offset: int) -> None:
        self._note(self.durable, (position, offset))  # type: ignore[arg-type]

    def on_disk_full(self, full: bool) -> None:
        self._note(self.full, full)  # type: ignore[arg-type]

    def on_failed(self, error: StorageFailed | CorruptionError) -> None:
        self._note(self.failures, error)  # type: ignore[arg-type]

    def on_sync(self, seconds: float, written: int) -> None:
        assert seconds >= 0
        self._note(self.synced_bytes, written)  # type: ignore[arg-type]

    def wait_until_durable(self, position: Position) -> None:
        with self.changed:
            assert self.changed.wait_for(
                lambda: bool(self.durable) and self.durable[-1][0] == position, DEADLINE_S
            )

    def wait_for_full(self, *, times: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.full) >= times, DEADLINE_S)

    def wait_for_failure(self) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: bool(self.failures), DEADLINE_S)


class Gate:
    """Holds each sync until it is let through."""

    def __init__(self, files: FaultyFiles) -> None:
        self.reached = threading.Semaphore(0)
        self._passes = threading.Semaphore(0)
        self._open = False
        files.before_sync = self._wait

    def _wait(self) -> None:
        self.reached.release()
        if not self._open:
            assert self._passes.acquire(timeout=DEADLINE_S)

    def wait_for_sync(self) -> None:
        assert self.reached.acquire(timeout=DEADLINE_S)

    def open(self) -> None:
        self._open = True
        self._passes.release()


class Node:
    """A log on files that can fail, its writer, and what was submitted."""

    def __init__(self) -> None:
        self.files = FaultyFiles()
        self.log = new_log(self.files)
        self.listener = Listener()
        self.submitted = self.log.end
        self.writer = GroupWriter(
            self.log,
            on_durable=self.listener.on_durable,
            on_disk_full=self.listener.on_disk_full,
            on_failed=self.listener.on_failed,
            on_sync=self.listener.on_sync,
        )

    def submit(self, *payloads: bytes, epoch: Epoch = EPOCH) -> int:
        made = chain(self.submitted, payloads)
        self.submitted = made[-1][1]
        data = b"".join(data for data, _ in made)
        self.writer.submit(data, self.submitted, epoch)
        return len(data)

    def wait(self) -> None:
        self.listener.wait_until_durable(self.submitted)


@pytest.fixture
def node() -> Iterator[Node]:
    """A node whose writer is closed in the end."""
    with small_segments():
        made = Node()
        yield made
        made.files.space = None
        made.writer.close()


def test_submitted_records_become_durable_in_order(node: Node) -> None:
    """All that is submitted comes into the log in order, and is reported with position and offset."""
    payloads = [b"%d" % i * 20 for i in range(50)]
    for payload in payloads:
        node.submit(payload)
    node.wait()
    assert payloads_of(node.log.records(Lsn(0))) == payloads
    assert node.listener.durable == sorted(node.listener.durable, key=lambda report: report[0].lsn)
    assert node.listener.durable[-1] == (node.log.end, node.log.end_offset)
    assert node.writer.pending_bytes == 0


def test_what_comes_during_a_sync_goes_out_as_one_batch(node: Node) -> None:
    """Whatever was submitted while one sync ran shares the next one."""
    gate = Gate(node.files)
    first = node.submit(b"first")
    gate.wait_for_sync()
    syncs = node.files.counts["sync"]
    rest = sum(node.submit(b"%d" % i) for i in range(30))
    assert node.listener.durable == []
    assert node.writer.pending_bytes == first + rest
    gate.open()
    node.wait()
    assert node.listener.synced_bytes == [first, rest]
    assert node.files.counts["sync"] - syncs == 2


def test_g1_nothing_is_reported_before_its_sync_returned(node: Node) -> None:
    """G1: records whose sync still runs are not durable to anybody."""
    gate = Gate(node.files)
    node.submit(b"first")
    gate.wait_for_sync()
    assert node.listener.durable == []
    assert node.log.end.lsn == 0
    assert node.log.read(0, 100) == b""
    gate.open()
    node.wait()


def test_g9_batches_are_limited_and_larger_submissions_go_alone(node: Node) -> None:
    """G9: one sync takes at most the limit, so that those behind it wait no longer; what is larger goes alone."""
    with mock.patch.object(group_writer, "BATCH_BYTES_MAX", 300):
        gate = Gate(node.files)
        sizes = [node.submit(b"first")]
        gate.wait_for_sync()
        sizes += [node.submit(bytes([65 + i]) * size) for i, size in enumerate((56, 156, 57, 400, 20, 20))]
        gate.open()
        node.wait()
    assert node.listener.synced_bytes == [
        sizes[0],
        sizes[1] + sizes[2],
        sizes[3],
        sizes[4],
        sizes[5] + sizes[6],
    ]


def test_epochs_are_not_mixed_in_a_batch(node: Node) -> None:
    """A segment that begins with the first record of a new epoch notes that epoch, on every node alike."""
    gate = Gate(node.files)
    node.submit(b"x" * 1000, epoch=Epoch(1))
    gate.wait_for_sync()
    node.submit(b"y" * 1000, epoch=Epoch(1))
    node.submit(b"new reign", epoch=Epoch(2))
    gate.open()
    node.wait()
    path = node.log.segments()[-1].path
    header = SegmentHeader.decode(node.files.content(path)[:512], path)
    assert (header.first_lsn, header.epoch) == (3, 2)


def test_g9_full_disk_is_reported_once_and_writing_goes_on_with_space(node: Node) -> None:
    """G9: a full disk stops writing, keeps what was submitted, and ends by itself when there is space."""
    node.submit(b"before")
    node.wait()
    node.files.space = 0
    payloads = [b"%d" % i * 300 for i in range(40)]
    for payload in payloads:
        node.submit(payload)
    node.listener.wait_for_full(times=1)
    tried = node.files.counts["write"]
    deadline = threading.Event()
    while node.files.counts["write"] < tried + 2:  # it goes on trying
        assert not deadline.wait(0.001)
    assert node.writer.pending_bytes > 0
    assert not node.listener.failures
    node.files.space = None
    node.wait()
    node.listener.wait_for_full(times=2)
    assert node.listener.full == [True, False]
    assert payloads_of(node.log.records(Lsn(0))) == [b"before", *payloads]


def test_g9_what_fitted_on_a_full_disk_is_reported(node: Node) -> None:
    """G9: the part of a batch that became durable before the disk was full is reported at once, the rest later."""
    gate = Gate(node.files)
    node.submit(b"first")
    gate.wait_for_sync()
    node.files.fail("create", 1, errno.ENOSPC)  # of the next segment
    for _ in range(4):
        node.submit(b"r" * 900)
    gate.open()
    node.wait()
    node.listener.wait_for_full(times=2)
    assert [position.lsn for position, _ in node.listener.durable] == [1, 4, 5]
    assert node.listener.full == [True, False]


def test_close_finishes_what_was_submitted() -> None:
    """Closing writes what is queued; afterwards nothing can be submitted."""
    node = Node()
    gate = Gate(node.files)
    for i in range(20):
        node.submit(b"%d" % i)
    gate.open()
    node.writer.close()
    assert node.log.end == node.submitted
    with pytest.raises(RuntimeError, match="closed"):
        node.submit(b"late")


def test_close_gives_up_on_a_full_disk() -> None:
    """Closing does not wait for space, and reports nothing that is not durable."""
    node = Node()
    node.files.space = 0
    node.submit(b"x" * (2 << 20))
    node.listener.wait_for_full(times=1)
    node.writer.close()
    assert node.listener.durable == []
    assert node.listener.full == [True]
    node.log.close()
    assert open_log(node.files).end.lsn == 0


def test_g1_failure_is_reported_once_and_nothing_is_acknowledged_any_more(node: Node) -> None:
    """G1: after a failed sync nothing is reported durable, and what is submitted is refused."""
    node.submit(b"good")
    node.wait()
    node.files.fail("sync", 1, errno.EIO)
    node.submit(b"bad")
    node.listener.wait_for_failure()
    with pytest.raises(StorageFailed):
        node.submit(b"later")
    node.writer.close()
    assert len(node.listener.failures) == 1
    assert isinstance(node.listener.failures[0], StorageFailed)
    assert [position.lsn for position, _ in node.listener.durable] == [1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_mistake_in_the_program_does_not_end_the_writer_silently(node: Node) -> None:
    """A writer that ends by an unforeseen error says so."""
    node.writer.submit(*chain(Position(Lsn(7), node.log.end.digest), [b"gap"])[0], EPOCH)
    node.listener.wait_for_failure()
    assert "do not follow" in str(node.listener.failures[0])


def test_many_threads_may_submit_while_log_is_read(node: Node) -> None:
    """Submissions of several threads, ordered by them, all arrive."""
    lock = threading.Lock()

    def submit_some() -> None:
        for _ in range(200):
            with lock:
                node.submit(b"payload")

    threads = [threading.Thread(target=submit_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    node.wait()
    assert len(list(node.log.records(Lsn(0)))) == 800


def test_observer_is_optional() -> None:
    """A writer without an observer of syncs writes all the same."""
    files = FaultyFiles()
    log: ChangeLog = new_log(files)
    listener = Listener()
    writer = GroupWriter(
        log,
        on_durable=listener.on_durable,
        on_disk_full=listener.on_disk_full,
        on_failed=listener.on_failed,
    )
    data, last = chain(log.end, [b"x"])[0]
    writer.submit(data, last, EPOCH)
    writer.close()
    assert log.end == last
