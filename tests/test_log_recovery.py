"""Opening a log after crashes, power losses and damage: what is cut off, what is refused, and what is said."""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from random import Random
from unittest import mock

import pytest
from faulty_files import FaultyFiles, PowerCut
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from log_helpers import EPOCH, LOG, chain, new_log, open_log, payloads_of, small_segments, write

from understudy.common import log_recovery
from understudy.common.changelog import ChangeLog
from understudy.common.errors import CorruptionError, DiskFull, NewerFormat, StorageFailed
from understudy.common.log_recovery import is_torn
from understudy.common.records import RECORD_HEADER_BYTES
from understudy.common.segment import RECORDS_START, SECTOR_BYTES, SegmentHeader, Watermark
from understudy.common.types import START, ClusterId, Digest, Lsn, Position

FIRST = LOG / "00000000000000000001.seg"
BATCHES = [[b"a" * 30, b"b" * 5], [b"c" * 40], [b"d" * 10, b"e" * 20, b"f" * 300], [b"g" * 7, b"h" * 60]]
PAYLOADS = list(itertools.chain.from_iterable(BATCHES))
STARTS = list(itertools.accumulate((RECORD_HEADER_BYTES + len(p) for p in PAYLOADS), initial=RECORDS_START))


@pytest.fixture(autouse=True)
def little_room() -> Iterator[None]:
    """One segment, and little to write ahead of its records, since every file here is written many times."""
    with small_segments(segment_bytes=1 << 20):
        yield


@pytest.fixture
def small(little_room: None) -> Iterator[None]:
    """Segments of 2 KiB."""
    with small_segments():
        yield


def flipped(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def entry_at(byte: int) -> int:
    """The LSN of the entry in which that byte of the file is."""
    return sum(start <= byte for start in STARTS)


def during_sync(batches: int) -> bytes:
    """What the file holds when the power goes in the last batch's sync and everything got to the disk."""
    files, contents = FaultyFiles(), list[bytes]()
    log = new_log(files)
    files.before_sync = lambda: contents.append(files.content(FIRST))
    for batch in BATCHES[:batches]:
        write(log, *batch)
    return contents[-1]


def with_watermark_of(content: bytes, other: bytes) -> bytes:
    return content[:SECTOR_BYTES] + other[SECTOR_BYTES : 2 * SECTOR_BYTES] + content[2 * SECTOR_BYTES :]


def opened(content: bytes) -> ChangeLog:
    files = FaultyFiles()
    files.put(FIRST, content)
    return open_log(files)


def assert_goes_on(log: ChangeLog, kept: int) -> None:
    """The log holds the first ``kept`` payloads, takes more, and holds them after another crash."""
    files = log._files
    assert isinstance(files, FaultyFiles)
    assert payloads_of(log.records(Lsn(0))) == PAYLOADS[:kept]
    files.lose_power(Random(kept))
    log = open_log(files)
    assert log.end.lsn == kept
    assert log.torn_bytes == 0
    write(log, b"new")
    files.lose_power(Random(kept))
    assert payloads_of(open_log(files).records(Lsn(0))) == [*PAYLOADS[:kept], b"new"]


# -- the end of the log ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lsn", "written_behind", "torn"),
    [
        (4, False, False),
        (4, True, False),
        (5, False, True),
        (5, True, False),
        (7, False, True),
        (7, True, False),
        (8, False, True),
        (8, True, True),
    ],
)
def test_g2_torn_or_damaged_is_decided_by_the_watermark(lsn: int, written_behind: bool, torn: bool) -> None:
    """G2: before the last batch it is damage, in it only if another batch was begun, behind it never."""
    batch = Watermark(first_lsn=Lsn(5), last_lsn=Lsn(7), start_offset=500, end_offset=800)
    assert is_torn(batch, lsn, written_behind=written_behind) is torn


@pytest.mark.parametrize("watermark_arrived", [False, True])
def test_g2_tail_torn_at_any_byte_is_cut_off(watermark_arrived: bool) -> None:
    """G2: a last batch cut at any byte leaves its whole entries, and how much was cut off is told."""
    before, after = during_sync(3), during_sync(4)
    start, end = STARTS[6], STARTS[8]
    for cut in range(start, end):
        content = after if watermark_arrived else with_watermark_of(after, before)
        content = content[:cut] + bytes(len(content) - cut)
        log = opened(content)
        kept = entry_at(cut) - 1
        assert log.end.lsn == kept
        assert log.torn_bytes == len(content[STARTS[kept] :].rstrip(b"\0"))
        assert_goes_on(log, kept)
        # And where the file itself ends there.
        assert opened(content[:cut]).end.lsn == kept


def test_g1_entry_before_the_last_batch_is_never_taken_for_torn() -> None:
    """G1: any bit flipped in a batch that is followed by another is damage, named with file, byte and LSN."""
    content = during_sync(3)
    for byte, bit in itertools.product(range(RECORDS_START, STARTS[3]), (0, 7)):
        place = f"{FIRST}: entry {entry_at(byte)}, at byte {STARTS[entry_at(byte) - 1]}, is damaged"
        with pytest.raises(CorruptionError, match=re.escape(place)) as caught:
            opened(flipped(content, byte, bit))
        assert "understudy replica" in caught.value.remedy


def test_g2_flipped_bit_in_a_batch_that_was_being_synced_is_torn() -> None:
    """G2: in a batch that nothing shows to have been durable, a bad entry and what follows it are cut off."""
    content = during_sync(3)
    for byte, bit in itertools.product(range(STARTS[3], STARTS[6]), (0, 7)):
        log = opened(flipped(content, byte, bit))
        assert log.end.lsn == entry_at(byte) - 1
        assert log.torn_bytes > 0
    assert_goes_on(log, 5)


def test_g1_flipped_bit_in_a_batch_with_bytes_behind_it_is_damage() -> None:
    """G1: what stands behind a batch shows that it was durable, so that a bad entry in it is damage."""
    content = with_watermark_of(during_sync(4), during_sync(3))
    for byte in range(STARTS[3], STARTS[6]):
        with pytest.raises(CorruptionError, match=f"entry {entry_at(byte)}, at byte"):
            opened(flipped(content, byte, byte % 8))


def test_g1_flipped_bit_anywhere_is_damage_once_the_log_is_at_rest() -> None:
    """G1: when no batch was under way, no entry is taken for torn, not even the last."""
    files = FaultyFiles()
    log = new_log(files)
    for batch in BATCHES:
        write(log, *batch)
    log.close()
    content = files.content(FIRST)
    for byte in range(RECORDS_START, STARTS[-1]):
        with pytest.raises(CorruptionError, match=f"entry {entry_at(byte)}, at byte"):
            opened(flipped(content, byte, byte % 8))
        with pytest.raises(CorruptionError, match=f"entry {entry_at(byte)}, at byte"):
            opened(content[:byte])


def test_damaged_log_is_left_as_it_is() -> None:
    """Opening a damaged log changes no byte of it and keeps no file open."""
    files = FaultyFiles()
    content = flipped(during_sync(3), STARTS[1], 3)
    files.put(FIRST, content)
    for _ in range(2):
        with pytest.raises(CorruptionError):
            open_log(files)
    assert files.content(FIRST) == content
    assert files.open_count == 0


def test_flipped_bit_in_header_or_watermark_is_damage() -> None:
    """The two sectors before the records are checked, each with its own message."""
    content = during_sync(4)
    for byte in range(2 * SECTOR_BYTES):
        with pytest.raises(CorruptionError, match="header" if byte < SECTOR_BYTES else "watermark"):
            opened(flipped(content, byte, byte % 8))


def test_g1_what_was_read_after_a_crash_is_durable_once_open() -> None:
    """G1: entries found in the kernel's memory, never synced, are on disk before they are counted as durable."""
    files = FaultyFiles()
    log = new_log(files)
    write(log, b"one")
    files.cut_power(2)  # the records and the watermark are written, the sync does not come
    with pytest.raises(PowerCut):
        write(log, b"two" * 1000, b"three")
    files.restore_power()  # only the process was killed
    assert open_log(files).end.lsn == 3
    for seed in range(30):
        files.lose_power(Random(seed))
        assert open_log(files).end.lsn == 3


def test_g1_entries_of_a_failed_sync_are_written_again() -> None:
    """G1: after a failed sync the kernel takes pages for clean; opening must not count them as durable."""
    files = FaultyFiles()
    log = new_log(files)
    write(log, b"one")
    files.fail("sync", 1, errno.EIO)
    with pytest.raises(StorageFailed):
        write(log, b"two" * 1000, b"three")
    reopened = open_log(files)
    files.lose_power(Random(1))
    assert open_log(files).end == reopened.end


def killed_in_a_sync() -> FaultyFiles:
    """A batch is in the kernel's memory with its watermark; nothing of it need be on disk."""
    files = FaultyFiles()
    log = new_log(files)
    write(log, b"one")
    files.cut_power(2)
    with pytest.raises(PowerCut):
        write(log, b"two" * 1000, b"three")
    files.restore_power()
    return files


def test_g2_power_loss_at_any_step_of_opening_leaves_a_log_that_opens() -> None:
    """G2: the watermark never claims entries before they are on disk, while opening neither."""
    for actions, seed in itertools.product(range(12), range(30)):
        files = killed_in_a_sync()
        files.cut_power(actions)
        with contextlib.suppress(PowerCut):
            open_log(files)
        files.lose_power(Random(seed))
        assert open_log(files).end.lsn in (1, 2, 3)


def test_g2_batch_that_found_no_space_is_gone_for_good() -> None:
    """G2: what was taken back is not mistaken for a batch behind a shorter one that was torn."""
    for seed in range(200):
        files = FaultyFiles()
        log = new_log(files)
        files.fail("write", 2, errno.ENOSPC, written_bytes=100_000)
        with pytest.raises(DiskFull):
            write(log, *[b"x" * 100] * 30)
        files.cut_power(3)  # the room that was cut off, records, watermark
        with pytest.raises(PowerCut):
            write(log, *[b"y" * 700] * 2)
        files.lose_power(Random(seed))
        open_log(files)


def test_g2_length_of_a_segment_is_durable_before_the_next_one_is_made(small: None) -> None:
    """G2: zeros written ahead of a segment's last record can't come back once there is a next segment."""
    after = Position(Lsn(7), Digest(b"x" * 32))
    for seed in range(40):
        files = FaultyFiles()
        log = new_log(files, after=after, after_offset=2000)  # 48 bytes before a boundary, so little is used
        write(log, b"y" * 10, b"z")
        files.lose_power(Random(seed))
        assert open_log(files, after=after, after_offset=2000).end.lsn == 9


def test_g1_name_of_a_new_segment_is_durable_before_anything_counts_on_it(small: None) -> None:
    """G1: a segment found after a kill may be unknown to the disk; opening makes its name durable too."""
    for seed in range(10):
        files = FaultyFiles()
        log = new_log(files)
        write(log, b"x" * 2100)
        files.cut_power(len(["truncate", "sync", "create", "write", "sync"]))  # the directory's sync is next
        with pytest.raises(PowerCut):
            write(log, b"y")
        files.restore_power()
        assert len(files.names(LOG)) == 2
        write(open_log(files), b"z")
        files.lose_power(Random(seed))
        assert open_log(files).end.lsn == 2


# -- the checkpoint --------------------------------------------------------------------------------------------


def test_checkpoint_beyond_the_end_is_damage() -> None:
    """A store that is ahead of its log means that entries of the log are gone."""
    after = chain(START, PAYLOADS)
    files = FaultyFiles()
    files.put(FIRST, during_sync(2)[: STARTS[3]])
    with pytest.raises(CorruptionError, match="checkpoint at LSN 6 is not in the change-log"):
        open_log(files, after=after[5][1], after_offset=STARTS[6] - RECORDS_START)


def test_g3_checkpoint_of_another_history_is_refused() -> None:
    """G3: a checkpoint at an LSN that the log holds, with another digest or place, is not of this log."""
    at, place = chain(START, PAYLOADS)[3][1], STARTS[4] - RECORDS_START
    for after, offset in (
        (Position(at.lsn, Digest(b"x" * 32)), place),
        (at, place + 1),
        (Position(Lsn(0), Digest(b"x" * 32)), 0),
        (START, 1),
    ):
        files = FaultyFiles()
        files.put(FIRST, during_sync(4))
        with pytest.raises(CorruptionError, match="not of one history"):
            open_log(files, after=after, after_offset=offset)


def test_checkpoint_before_the_first_segment_is_refused() -> None:
    """When the entries right behind the checkpoint are gone, the state can't be made from this log."""
    files = FaultyFiles()
    new_log(files, after=Position(Lsn(9), Digest(b"x" * 32)), after_offset=700).close()
    with pytest.raises(CorruptionError, match="begins with LSN 10, but the store's checkpoint is at LSN 0"):
        open_log(files)


# -- the files -------------------------------------------------------------------------------------------------


def segmented() -> tuple[FaultyFiles, list[Position]]:
    """A log of several segments, closed."""
    files = FaultyFiles()
    log = new_log(files)
    positions = [START] + [write(log, bytes([65 + i]) * 300)[0][1] for i in range(30)]
    log.close()
    assert len(files.names(LOG)) > 3
    return files, positions


def test_missing_segment_is_named(small: None) -> None:
    """A segment missing in the middle is reported with the file before the gap and the LSN behind it."""
    files, _ = segmented()
    before, missing, behind = (LOG / name for name in files.names(LOG)[:3])
    files.drop(missing)
    with pytest.raises(CorruptionError, match=f"{before}: ends .* missing before LSN {int(behind.stem)}"):
        open_log(files)


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c + b"\0", lambda c: c[:100], lambda c: b""])
def test_sealed_segment_of_another_length_is_refused(small: None, change: object) -> None:
    """A segment that is not the last one must be as long as the next one's header says."""
    files, _ = segmented()
    path = LOG / files.names(LOG)[1]
    files.put(path, change(files.content(path)))  # type: ignore[operator]
    with pytest.raises(CorruptionError, match=str(path)):
        open_log(files)


def test_g2_sealed_segment_is_never_taken_for_torn(small: None) -> None:
    """G2: damage in a segment that is not the last one is damage, even at its end."""
    files, _ = segmented()
    path = LOG / files.names(LOG)[1]
    content = files.content(path)
    last_record = content.rindex(b"\x2c\x01\0\0")  # its length, 300
    for byte in (RECORDS_START, last_record, len(content) - 1):
        files.put(path, flipped(content, byte, 1))
        with pytest.raises(CorruptionError, match=rf"{path}: entry \d+, at byte \d+, is damaged"):
            open_log(files)


def rewritten(content: bytes, header: SegmentHeader) -> bytes:
    return header.encode() + content[SECTOR_BYTES:]


@pytest.mark.parametrize("index", [0, 1, -1])
def test_segment_of_another_cluster_is_refused(small: None, index: int) -> None:
    """A file that was copied here from another cluster's log is noticed wherever it stands."""
    files, _ = segmented()
    path = LOG / files.names(LOG)[index]
    content = files.content(path)
    header = replace(SegmentHeader.decode(content[:SECTOR_BYTES], path), cluster=ClusterId(b"x" * 16))
    files.put(path, rewritten(content, header))
    with pytest.raises(CorruptionError, match=f"{path}: of cluster 78787878-"):
        open_log(files)


def test_segment_of_another_history_is_refused(small: None) -> None:
    """G3: a segment that fits by LSN and length, but follows another digest, is not taken."""
    files, _ = segmented()
    path = LOG / files.names(LOG)[2]
    content = files.content(path)
    header = replace(SegmentHeader.decode(content[:SECTOR_BYTES], path), previous=Digest(b"x" * 32))
    files.put(path, rewritten(content, header))
    with pytest.raises(CorruptionError, match=f"{path}: goes on behind entry"):
        open_log(files)


def test_renamed_segment_is_refused(small: None) -> None:
    """A file whose name and header disagree is named with what it begins with."""
    files, _ = segmented()
    path = LOG / files.names(LOG)[-1]
    content = files.content(path)
    files.drop(path)
    files.put(LOG / "00000000000000000999.seg", content)
    with pytest.raises(CorruptionError, match=f"renamed, it begins with LSN {int(path.stem)}"):
        open_log(files)


@pytest.mark.parametrize("index", [0, -1])
def test_newer_format_is_refused_and_kept(small: None, index: int) -> None:
    """A segment of a later version asks for an upgrade and is not touched."""
    files, _ = segmented()
    path = LOG / files.names(LOG)[index]
    content = files.content(path)
    newer = content[:8] + (2).to_bytes(4, "little") + content[12:480]
    newer += sha256(newer).digest() + content[SECTOR_BYTES:]
    files.put(path, newer)
    with pytest.raises(NewerFormat, match=f"{path}: format 2"):
        open_log(files)
    assert files.content(path) == newer


def unfinished() -> list[bytes]:
    """States in which a crash can leave a segment that was being made."""
    files = FaultyFiles()
    new_log(files, after=Position(Lsn(30), Digest(b"x" * 32)), after_offset=1).close()
    block = files.content(LOG / "00000000000000000031.seg")
    header, watermark, zeros = (
        block[:SECTOR_BYTES],
        block[SECTOR_BYTES : 2 * SECTOR_BYTES],
        bytes(SECTOR_BYTES),
    )
    return [b"", zeros, bytes(9000), header, header + zeros + bytes(5000), zeros + watermark + bytes(3072)]


def test_segment_that_never_came_to_be_is_removed(small: None) -> None:
    """A last segment whose block was not yet durable holds nothing and is removed; the log goes on."""
    files, positions = segmented()
    path = LOG / "00000000000000000031.seg"
    for content in unfinished():
        files.put(path, content)
        log = open_log(files)
        assert log.end == positions[-1]
        assert path.name not in files.names(LOG)
        log.close()
    files.lose_power(Random(1))
    assert write(open_log(files), b"next")[0][1].lsn == 31


def test_segment_without_a_header_but_with_records_is_damage(small: None) -> None:
    """A lost header is damage when there is something behind it."""
    files, _ = segmented()
    path = LOG / files.names(LOG)[-1]
    files.put(path, bytes(SECTOR_BYTES) + files.content(path)[SECTOR_BYTES:])
    with pytest.raises(CorruptionError, match="bytes 0 to 511 are not a segment's header"):
        open_log(files)


def test_empty_directory_is_no_log() -> None:
    """A log whose files are all gone is not a new one."""
    with pytest.raises(CorruptionError, match="holds no segment"):
        open_log(FaultyFiles())


def test_large_records_are_scanned_across_reads() -> None:
    """A record that is longer than one read is checked as any other."""
    files = FaultyFiles()
    log = new_log(files)
    write(log, b"x" * 5000, b"y", b"z" * 3000)
    log.close()
    with mock.patch.object(log_recovery, "_READ_BYTES", 600):
        assert open_log(files).end == log.end


# -- any history -----------------------------------------------------------------------------------------------


class CrashingLog(RuleBasedStateMachine):
    """A log that is written, pruned, cut off and reopened in any order, against a list of what was written.

    G1 and G2: after every crash it holds a prefix of what was written, at or after what was acknowledged.
    """

    @initialize(seed=st.integers(min_value=0, max_value=2**32))
    def begin(self, seed: int) -> None:
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(small_segments(3000, 1500))
        self.rng = Random(seed)
        self.files = FaultyFiles()
        self.written: list[tuple[bytes, Position]] = []
        self.acknowledged = 0
        self.checkpoint = 0
        self.log = new_log(self.files)

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()

    @invariant()
    def nothing_acknowledged_is_missing(self) -> None:
        if hasattr(self, "log"):
            assert self.log.end == (self.written[self.log.end.lsn - 1][1] if self.log.end.lsn else START)
            assert self.log.end.lsn >= self.acknowledged

    @rule(sizes=st.lists(st.integers(min_value=1, max_value=1800), min_size=1, max_size=6))
    def write(self, sizes: list[int]) -> None:
        payloads = [self.rng.randbytes(size) if size % 3 else bytes(size) for size in sizes]
        made = chain(self.log.end, payloads)
        self.written += made
        self.log.write_batch(b"".join(data for data, _ in made), made[-1][1], epoch=EPOCH)
        self.acknowledged = len(self.written)

    @rule()
    def advance_the_checkpoint(self) -> None:
        self.checkpoint = self.rng.randint(self.checkpoint, self.acknowledged)

    @rule()
    def prune(self) -> None:
        self.log.prune(Lsn(self.checkpoint + 1))

    @rule(sizes=st.lists(st.integers(min_value=1, max_value=1800), min_size=1, max_size=6))
    def write_until_the_power_goes(self, sizes: list[int]) -> None:
        self.files.cut_power(self.rng.randint(0, 8), written_bytes=self.rng.randint(0, 9000))
        with contextlib.suppress(PowerCut):
            self.write(sizes)
        self.lose_power()

    @rule()
    def prune_until_the_power_goes(self) -> None:
        self.files.cut_power(self.rng.randint(0, 4))
        with contextlib.suppress(PowerCut):
            self.prune()
        self.lose_power()

    @rule(sizes=st.lists(st.integers(min_value=1, max_value=1800), min_size=1, max_size=6))
    def write_until_a_sync_fails(self, sizes: list[int]) -> None:
        self.files.fail("sync", self.rng.randint(1, 3), errno.EIO)
        with contextlib.suppress(StorageFailed):
            self.write(sizes)
        self.reopen()

    @rule(sizes=st.lists(st.integers(min_value=1, max_value=1800), min_size=1, max_size=6))
    def write_until_killed(self, sizes: list[int]) -> None:
        self.files.cut_power(self.rng.randint(0, 8), written_bytes=self.rng.randint(0, 9000))
        with contextlib.suppress(PowerCut):
            self.write(sizes)
        self.reopen()

    @rule(sizes=st.lists(st.integers(min_value=1, max_value=1800), min_size=1, max_size=6))
    def write_until_the_disk_is_full(self, sizes: list[int]) -> None:
        self.files.fail(
            "write", self.rng.randint(1, 5), errno.ENOSPC, written_bytes=self.rng.randint(0, 9000)
        )
        try:
            self.write(sizes)
        except DiskFull:
            self.acknowledged = self.log.end.lsn
            del self.written[self.acknowledged :]
        self.files.restore_power()

    @rule()
    def lose_power(self) -> None:
        self.files.lose_power(self.rng)
        self.reopen()

    @rule()
    def lose_power_while_opening(self) -> None:
        for actions in range(self.rng.randint(1, 30)):
            self.files.cut_power(actions)
            with contextlib.suppress(PowerCut):
                self.log = self._opened()
            self.files.lose_power(self.rng)
        self.reopen()

    @rule()
    def reopen(self) -> None:
        self.files.restore_power()
        self.log = self._opened()
        # What opening found is durable from now on.
        self.acknowledged = self.log.end.lsn
        del self.written[self.acknowledged :]

    @precondition(lambda self: hasattr(self, "log"))
    @rule()
    def read_all(self) -> None:
        first = self.log.first_lsn
        whole = b"".join(data for data, _ in self.written)
        records = list(self.log.records(Lsn(first - 1)))
        assert [record.position for record in records] == [position for _, position in self.written][
            first - 1 :
        ]
        assert (
            self.log.read(self.log.first_offset, 1 << 30)
            == whole[self.log.first_offset :][: self.log.segments()[0].bytes]
        )

    def _opened(self) -> ChangeLog:
        after = self.written[self.checkpoint - 1][1] if self.checkpoint else START
        offset = sum(len(data) for data, _ in self.written[: self.checkpoint])
        return open_log(self.files, after=after, after_offset=offset)


TestCrashingLog = CrashingLog.TestCase
TestCrashingLog.settings = settings(max_examples=200, stateful_step_count=25, deadline=None)
