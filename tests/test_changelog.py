"""The change-log as a whole: writing, segments, reading, look-ups, pruning, failures, threads."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from faulty_files import FaultyFiles
from hypothesis import given
from hypothesis import strategies as st
from log_helpers import CLUSTER, EPOCH, LOG, chain, new_log, open_log, payloads_of, small_segments, write

from understudy.common.changelog import ChangeLog
from understudy.common.errors import CorruptionError, DirectoryError, DiskFull, StorageFailed, UsageError
from understudy.common.files import FileSystem, OsFileSystem
from understudy.common.records import RECORD_HEADER_BYTES
from understudy.common.segment import RECORDS_START, SEGMENT_BYTES, SegmentHeader
from understudy.common.types import START, Digest, Epoch, Lsn, Position

PAYLOADS = [bytes([65 + i]) * (40 + 37 * i) for i in range(20)]  # about 8 KiB of records
CHECKPOINT = 14
CHECKPOINT_OFFSET = sum(RECORD_HEADER_BYTES + len(payload) for payload in PAYLOADS[:CHECKPOINT])


@pytest.fixture(params=["real", "faulty"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[FileSystem, Path]:
    """A file layer and a directory in it; the one that can fail must otherwise behave as the real one."""
    return (OsFileSystem(), tmp_path) if request.param == "real" else (FaultyFiles(), LOG)


@pytest.fixture
def small() -> Iterator[None]:
    """Segments of 2 KiB."""
    with small_segments():
        yield


def filled(files: FileSystem, directory: Path = LOG) -> tuple[ChangeLog, list[Position]]:
    """A log with ``PAYLOADS``, an entry a batch, and all its positions."""
    log = new_log(files, directory)
    return log, [START] + [write(log, payload)[0][1] for payload in PAYLOADS]


def shared(content: bytes) -> bytes:
    """What of a segment is the same on every node: all but the watermark and the zeros ahead."""
    return content[:512] + content[RECORDS_START:].rstrip(b"\0")


def test_file_layers_agree(place: tuple[FileSystem, Path]) -> None:
    """The file layer of the tests does what the real one does."""
    files, directory = place
    path = directory / "f"
    file = files.open(path, create=True)
    file.write_at(b"abc", 5)
    assert file.size() == 8
    assert file.read_at(10, 3) == b"\0\0abc"
    assert file.read_at(10, 8) == b""
    file.truncate(6)
    file.truncate(7)
    file.sync()
    assert file.read_at(10, 0) == b"\0\0\0\0\0a\0"
    assert files.names(directory) == ["f"]
    for missing, create in ((path, True), (directory / "g", False)):
        with pytest.raises(StorageFailed):
            files.open(missing, create=create)
    files.remove(path)
    files.sync_directory(directory)
    assert files.names(directory) == []
    file.close()


def test_entries_are_read_back_in_order_and_after_reopening(place: tuple[FileSystem, Path]) -> None:
    """What was written in batches is there, the same, at once and after closing and opening."""
    files, directory = place
    log = new_log(files, directory)
    write(log, *PAYLOADS[:5])
    write(log, *PAYLOADS[5:])
    end, end_offset = log.end, log.end_offset
    assert payloads_of(log.records(Lsn(0))) == PAYLOADS
    log.close()
    with open_log(files, directory) as again:
        assert payloads_of(again.records(Lsn(0))) == PAYLOADS
        assert (again.end, again.end_offset, again.torn_bytes) == (end, end_offset, 0)
        write(again, b"more")
        assert payloads_of(again.records(Lsn(len(PAYLOADS)))) == [b"more"]


def test_log_begins_where_it_is_told() -> None:
    """An empty log that goes on behind a snapshot knows that position and numbers from there."""
    after = Position(Lsn(100), Digest(b"d" * 32))
    log = new_log(FaultyFiles(), after=after, after_offset=5000)
    assert (log.end, log.end_offset, log.first_lsn, log.first_offset) == (after, 5000, 101, 5000)
    assert log.position_at(Lsn(100)) == after
    assert log.position_at(Lsn(99)) is None
    write(log, b"x")
    assert [record.lsn for record in log.records(Lsn(100))] == [101]
    assert log.retained_bytes == RECORD_HEADER_BYTES + 1


def test_log_is_not_made_over_something() -> None:
    """A directory that holds anything is refused."""
    files = FaultyFiles()
    files.put(LOG / "notes.txt", b"mine")
    with pytest.raises(DirectoryError, match="not empty"):
        new_log(files)


def test_records_that_do_not_follow_are_refused() -> None:
    """A batch with a gap before it is the caller's mistake and changes nothing."""
    files = FaultyFiles()
    log, positions = filled(files)
    before = files.content(log.segments()[0].path)
    for after in (positions[-2], Position(Lsn(30), START.digest)):
        data, last = chain(after, [b"x"])[0]
        with pytest.raises(ValueError, match="do not follow"):
            log.write_batch(data, last, epoch=EPOCH)
    assert files.content(log.segments()[0].path) == before


# -- segments --------------------------------------------------------------------------------------------------


def test_records_lie_in_the_segment_of_their_first_byte(small: None) -> None:
    """A record belongs to the stretch of log in which it begins; the next segment goes on right behind."""
    log, _ = filled(FaultyFiles())
    infos = log.segments()
    assert len(infos) > 3
    assert [info.sealed for info in infos] == [True] * (len(infos) - 1) + [False]
    offset = 0
    for info in infos:
        records = list(log.records(Lsn(info.first_lsn - 1)))
        assert info.path.name == f"{info.first_lsn:020d}.seg"
        assert info.first_offset == offset
        for record in records:
            if offset // 2048 != info.first_offset // 2048:
                break
            offset += record.encoded_bytes
        assert info.bytes == offset - info.first_offset


@given(
    payloads=st.lists(st.binary(min_size=1, max_size=900), min_size=1, max_size=30),
    batchings=st.tuples(*[st.lists(st.integers(min_value=1, max_value=8), min_size=1)] * 2),
)
def test_segments_do_not_depend_on_batches(
    payloads: list[bytes], batchings: tuple[list[int], list[int]]
) -> None:
    """Nodes with the same history have the same files, however it was cut into batches."""

    def written(sizes: list[int]) -> dict[str, bytes]:
        files, rest = FaultyFiles(), list(payloads)
        log = new_log(files)
        for size in sizes * len(payloads):
            if rest:
                write(log, *rest[:size])
                del rest[:size]
        return {info.path.name: shared(files.content(info.path)) for info in log.segments()}

    with small_segments():
        assert written(batchings[0]) == written(batchings[1])


def test_boundary_of_full_size_segments() -> None:
    """At the real size too, the boundary is a multiple of 64 MiB of log, and one batch may cross it."""
    files = FaultyFiles()
    log = new_log(files, after_offset=SEGMENT_BYTES - 100)
    write(log, b"a" * 50, b"b" * 50, b"c" * 50)
    assert [(info.first_lsn, info.first_offset, info.bytes) for info in log.segments()] == [
        (1, SEGMENT_BYTES - 100, 188),
        (3, SEGMENT_BYTES + 88, 94),
    ]
    assert payloads_of(log.records(Lsn(0))) == [b"a" * 50, b"b" * 50, b"c" * 50]


def test_header_tells_the_epoch_of_the_first_record(small: None) -> None:
    """A segment that begins in a later epoch says so."""
    files = FaultyFiles()
    log, _ = filled(files)
    earlier = len(log.segments())
    while len(log.segments()) == earlier:
        data, last = chain(log.end, [b"x" * 500])[0]
        log.write_batch(data, last, epoch=Epoch(9))
    paths = [info.path for info in log.segments()]
    headers = [SegmentHeader.decode(files.content(path)[:512], path) for path in paths]
    assert [header.epoch for header in headers] == [EPOCH] * earlier + [Epoch(9)]


# -- reading ---------------------------------------------------------------------------------------------------


def test_raw_bytes_are_read_from_any_offset(small: None) -> None:
    """Reading raw gives the bytes of all records, whatever the step, ending at segments and at the log's end."""
    log, _ = filled(FaultyFiles())
    whole = b"".join(data for data, _ in chain(START, PAYLOADS))
    for step in (1, 333, 1 << 20):
        offset, pieces = 0, []
        while piece := log.read(offset, step):
            assert len(piece) <= step
            pieces.append(piece)
            offset += len(piece)
        assert b"".join(pieces) == whole
    assert log.read(log.end_offset, 10) == b""
    assert log.read(log.end_offset - 5, 10) == whole[-5:]


def test_only_the_records_asked_for_are_given(small: None) -> None:
    """``after`` and ``upto`` bound what is read."""
    log, _ = filled(FaultyFiles())
    assert payloads_of(log.records(Lsn(3), Lsn(7))) == PAYLOADS[3:7]
    assert payloads_of(log.records(Lsn(18), Lsn(99))) == PAYLOADS[18:]
    assert list(log.records(Lsn(20))) == []
    assert list(log.records(Lsn(7), Lsn(3))) == []
    with pytest.raises(UsageError, match="holds LSN 1 to 20"):
        next(log.records(Lsn(21)))


def test_positions_and_offsets_of_all_entries_are_known(small: None) -> None:
    """Every entry's position and end is found, also after reopening when nothing is indexed yet."""
    files = FaultyFiles()
    log, positions = filled(files)
    log.close()
    for each in (log, open_log(files, after=positions[-1], after_offset=log.end_offset)):
        offset = 0
        for position, payload in zip(positions, [*PAYLOADS, b""], strict=True):
            assert each.position_at(position.lsn) == position
            assert each.offset_behind(position.lsn) == offset
            offset += RECORD_HEADER_BYTES + len(payload)
        assert each.position_at(Lsn(21)) is None
        assert each.offset_behind(Lsn(21)) is None


def test_damage_met_while_reading_is_named(small: None) -> None:
    """A bit that flips while the log is open is reported with file, byte and LSN by every way of reading."""
    files = FaultyFiles()
    log, _ = filled(files)
    target = log.segments()[1]
    content = bytearray(files.content(target.path))
    content[RECORDS_START + RECORD_HEADER_BYTES + 7] ^= 1
    files.put(target.path, bytes(content))
    place = f"{target.path}: entry {target.first_lsn}, at byte {RECORDS_START}, is damaged"
    with pytest.raises(CorruptionError, match=place):
        list(log.records(Lsn(0)))
    with pytest.raises(CorruptionError, match=place):
        log.position_at(target.first_lsn)
    files.put(target.path, bytes(content[:5000]))
    with pytest.raises(CorruptionError, match="too early"):
        log.read(log.segments()[1].first_offset, 4096)
    assert log.read(0, 10), "damage of one file does not stop the rest"


# -- pruning ---------------------------------------------------------------------------------------------------


def test_prune_removes_only_what_lies_wholly_below(small: None) -> None:
    """A segment goes when all its entries are below the LSN to keep, oldest first; the last one always stays."""
    files = FaultyFiles()
    log, positions = filled(files)
    infos = log.segments()
    assert log.prune(Lsn(infos[2].first_lsn - 1)) == [infos[0].path]
    assert log.prune(infos[2].first_lsn) == [infos[1].path]
    assert log.first_lsn == infos[2].first_lsn
    assert log.retained_bytes == log.end_offset - infos[2].first_offset
    assert payloads_of(log.records(Lsn(log.first_lsn - 1))) == PAYLOADS[log.first_lsn - 1 :]
    assert log.position_at(Lsn(log.first_lsn - 1)) == positions[log.first_lsn - 1]
    assert log.position_at(Lsn(log.first_lsn - 2)) is None
    with pytest.raises(UsageError, match="no longer holds"):
        log.read(log.first_offset - 1, 10)
    assert len(log.prune(Lsn(1000))) == len(infos) - 3
    assert files.names(LOG) == [infos[-1].path.name]


def test_g2_power_loss_while_pruning_leaves_no_gap(small: None, seed: int) -> None:
    """G2: however far the removal of old segments came, what is left goes on without a gap."""
    rng = Random(seed)
    for nth in range(1, 9):
        files = FaultyFiles()
        log, positions = filled(files)
        files.fail("remove" if nth % 2 else "sync directory", (nth + 1) // 2, errno.EIO)
        try:
            log.prune(Lsn(1000))
        except StorageFailed:
            log.close()
        files.lose_power(rng)
        open_log(files, after=positions[-1], after_offset=log.end_offset)


# -- failures --------------------------------------------------------------------------------------------------


def everything(files: FaultyFiles, acknowledged: list[Position]) -> ChangeLog:
    """Writes across segments and prunes; notes what was acknowledged."""
    log = new_log(files)
    for payload in PAYLOADS:
        acknowledged.append(write(log, payload)[0][1])
    log.prune(Lsn(CHECKPOINT + 1))
    return log


@pytest.mark.parametrize("action", ["write", "sync", "truncate", "create", "remove", "sync directory"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_g1_error_at_any_step_never_costs_what_was_acknowledged(small: None, action: str, code: int) -> None:
    """G1: whichever write, sync or other step fails, a restart and a power loss keep all that was acknowledged."""
    nth, seen = 0, 0
    while True:
        nth += 1
        files, acknowledged = FaultyFiles(), [START]
        files.fail(action, nth, code, written_bytes=nth * 97 % 2000)  # type: ignore[arg-type]
        try:
            everything(files, acknowledged)
        except (StorageFailed, DiskFull):
            seen += 1
        if files.fault_pending:
            break
        if len(acknowledged) > 1:
            after, offset = START, 0
            if len(acknowledged) > CHECKPOINT:
                after, offset = acknowledged[CHECKPOINT], CHECKPOINT_OFFSET
            reopened = open_log(files, after=after, after_offset=offset)
            assert reopened.end.lsn >= acknowledged[-1].lsn
            assert reopened.position_at(acknowledged[-1].lsn) == acknowledged[-1]
            files.lose_power(Random(nth))
            assert open_log(files, after=after, after_offset=offset).end == reopened.end
    assert seen


def calls(log: ChangeLog) -> list[Callable[[], object]]:
    data, last = chain(log.end, [b"x"])[0]
    return [
        lambda: log.write_batch(data, last, epoch=EPOCH),
        lambda: log.read(0, 10),
        lambda: list(log.records(Lsn(0))),
        lambda: log.position_at(Lsn(1)),
        lambda: log.offset_behind(Lsn(1)),
        lambda: log.prune(Lsn(1)),
    ]


@pytest.mark.parametrize(
    ("action", "code"), [("write", errno.EIO), ("sync", errno.EIO), ("sync", errno.ENOSPC)]
)
def test_g1_failed_write_or_sync_poisons_for_good(action: str, code: int) -> None:
    """G1: after one failed write or sync every call fails, nothing is written and no sync is tried again."""
    nth = 1
    while True:
        files = FaultyFiles()
        log, _ = filled(files)
        end = log.end
        files.fail(action, nth, code)  # type: ignore[arg-type]
        try:
            write(log, b"x")
        except StorageFailed:
            counts = dict(files.counts)
            for call in calls(log):
                with pytest.raises(StorageFailed, match="failed before"):
                    call()
            assert files.counts == counts
            assert log.end.lsn - end.lsn in (0, 1)
        log.close()
        assert files.open_count == 0
        if files.fault_pending:
            break
        nth += 1
    assert nth > 1


def test_a_failed_read_concerns_only_its_reader(small: None) -> None:
    """G9: a sector of an old segment that can't be read fails the call that needs it; writing goes on."""
    files = FaultyFiles()
    log, positions = filled(files)
    files.fail("read", 1, errno.EIO)
    with pytest.raises(StorageFailed):
        list(log.records(Lsn(0)))
    write(log, b"goes on")
    assert log.end.lsn == len(positions)
    assert [record.payload for record in log.records(Lsn(0))] == [*PAYLOADS, b"goes on"]


def write_rest(log: ChangeLog, files: FaultyFiles, payloads: list[bytes]) -> int:
    """Writes one batch, after each full disk with what is left of it; how often the disk was full."""
    made = chain(log.end, payloads)
    data, start, full = b"".join(data for data, _ in made), log.end_offset, 0
    while True:
        try:
            log.write_batch(data[log.end_offset - start :], made[-1][1], epoch=EPOCH)
        except DiskFull:
            full += 1
            assert payloads_of(log.records(Lsn(0), log.end.lsn)), "reads go on"
            files.space = None
        else:
            return full


def test_g9_full_disk_at_any_write_loses_nothing_and_writing_goes_on(small: None) -> None:
    """G9: a full disk at any write leaves a usable log, and the same bytes as if it had never been full."""
    expected = FaultyFiles()
    log = new_log(expected)
    write(log, PAYLOADS[0])
    write(log, *PAYLOADS[1:])
    write(log, b"last")
    nth = 0
    while True:
        nth += 1
        files = FaultyFiles()
        log = new_log(files)
        write(log, PAYLOADS[0])
        files.fail("write", nth, errno.ENOSPC, written_bytes=nth * 131 % 2000)
        full = write_rest(log, files, PAYLOADS[1:]) + write_rest(log, files, [b"last"])
        for name in files.names(LOG):
            assert shared(files.content(LOG / name)) == shared(expected.content(LOG / name))
        if files.fault_pending:
            break
        assert full <= 1
        log.close()
        assert open_log(files).end == log.end
    assert nth > 15


@given(space=st.integers(min_value=0, max_value=40_000))
def test_g9_full_disk_stops_writes_until_there_is_space(space: int) -> None:
    """G9: with any amount of space, what fits is written, the rest when there is space; a full disk can be opened."""
    with small_segments():
        files = FaultyFiles()
        log = new_log(files)
        write(log, PAYLOADS[0])
        files.space = len(files.content(log.segments()[0].path)) + space
        made = chain(log.end, PAYLOADS[1:])
        data, start = b"".join(data for data, _ in made), log.end_offset
        try:
            log.write_batch(data, made[-1][1], epoch=EPOCH)
        except DiskFull:
            log.close()
            log = open_log(files)
            files.space = None
            log.write_batch(data[log.end_offset - start :], made[-1][1], epoch=EPOCH)
        assert payloads_of(log.records(Lsn(0))) == PAYLOADS


# -- threads ---------------------------------------------------------------------------------------------------


def test_reading_and_pruning_go_on_while_another_thread_writes(tmp_path: Path) -> None:
    """Readers see whole, durable history while segments come at one end and go at the other."""
    made = chain(START, [bytes([i % 250 + 1]) * (i % 400 + 1) for i in range(3000)])
    whole = b"".join(data for data, _ in made)
    failures: list[BaseException] = []

    def write_all(log: ChangeLog) -> None:
        for start in range(0, len(made), 7):
            piece = made[start : start + 7]
            log.write_batch(b"".join(data for data, _ in piece), piece[-1][1], epoch=EPOCH)
            if start % 70 == 0:
                log.prune(Lsn(max(log.end.lsn - 400, 0)))

    def checked(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    def look(log: ChangeLog, lsn: Lsn) -> None:
        offset, position = log.offset_behind(lsn), log.position_at(lsn)
        assert position is None or position == made[lsn - 1][1]
        if offset is not None:
            try:
                data = log.read(offset, 5000)
            except UsageError:
                return  # pruned meanwhile
            assert data == whole[offset : offset + len(data)]

    with small_segments(segment_bytes=16384), new_log(OsFileSystem(), tmp_path) as log:
        writer = threading.Thread(target=checked, args=(lambda: write_all(log),))
        writer.start()
        rounds = 0
        while writer.is_alive() or rounds < 3:
            rounds += 1
            end = log.end.lsn
            for back in (1, 50, 200, 390, 450):
                if end > back:
                    checked(lambda: look(log, Lsn(end - back)))  # noqa: B023
        writer.join()
        assert not failures
        assert log.end == made[-1][1]
        assert rounds > 3


def test_foreign_file_in_the_directory_is_left_alone() -> None:
    """Files that are no segments are neither read nor removed."""
    files = FaultyFiles()
    log, _ = filled(files)
    log.close()
    files.put(LOG / "README", b"do not touch")
    assert payloads_of(open_log(files).records(Lsn(0))) == PAYLOADS
    assert "README" in files.names(LOG)


def test_cluster_is_that_of_the_log() -> None:
    """The log belongs to the cluster that it was made for."""
    files = FaultyFiles()
    log, _ = filled(files)
    path = log.segments()[0].path
    assert SegmentHeader.decode(files.content(path)[:512], path).cluster == CLUSTER
