"""Reading a change-log beside the process that writes it: all that is whole, nothing that is not, no change made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from log_helpers import CLUSTER, new_log, payloads_of, small_segments, write

from understudy.common.changelog import ChangeLog
from understudy.common.errors import CorruptionError, StorageFailed, UsageError
from understudy.common.files import OsFileSystem
from understudy.common.log_reader import open_segments, read_records
from understudy.common.records import encode_record
from understudy.common.segment import RECORDS_START, SECTOR_BYTES, segment_name
from understudy.common.types import ClusterId, Lsn

PAYLOADS = [b"entry %d " % number * 30 for number in range(1, 41)]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[ChangeLog]:
    """A log of several segments, open for writing."""
    (tmp_path / "log").mkdir()
    with small_segments(), new_log(OsFileSystem(), tmp_path / "log") as log:
        for start in range(0, len(PAYLOADS), 4):
            write(log, *PAYLOADS[start : start + 4])
        assert len(log.segments()) >= 4
        yield log


def folder(log: ChangeLog) -> Path:
    """Where its files are."""
    return log.segments()[0].path.parent


def read(log: ChangeLog, after: int | None = None) -> list[bytes]:
    """The payloads that a reader finds."""
    return payloads_of(read_records(folder(log), CLUSTER, None if after is None else Lsn(after)))


def test_everything_is_read_while_the_log_is_open(log: ChangeLog) -> None:
    """A reader gets all entries in order, and those written later when it looks again."""
    assert read(log) == PAYLOADS
    write(log, b"one more")
    assert read(log)[-1] == b"one more"


@pytest.mark.parametrize("after", [0, 1, 7, 39, 40, 41, 1_000])
def test_reading_begins_behind_an_lsn(log: ChangeLog, after: int) -> None:
    """Whatever segment the first wanted entry is in, reading begins with it."""
    assert read(log, after) == PAYLOADS[after:]


def test_what_is_not_asked_for_is_not_read(log: ChangeLog) -> None:
    """Segments before the first wanted entry are passed over, so that damage there does not keep the rest away."""
    first = log.segments()[0].path
    first.write_bytes(first.read_bytes()[: RECORDS_START + 10])
    after = log.segments()[2].first_lsn
    assert read(log, after) == PAYLOADS[after:]


def test_what_is_being_written_is_not_there_yet(log: ChangeLog) -> None:
    """A record of which only a part has been written so far is not seen, whatever part that is."""
    last = log.segments()[-1].path
    record, _ = encode_record(log.end.digest, Lsn(log.end.lsn + 1), b"to come")
    sound = last.read_bytes()
    end = RECORDS_START + log.end_offset - log.segments()[-1].first_offset
    for length in range(len(record)):
        last.write_bytes(sound[:end] + record[:length] + sound[end + length :])
        assert read(log) == PAYLOADS
    last.write_bytes(sound[:end] + record + sound[end + len(record) :])
    assert read(log) == [*PAYLOADS, b"to come"]


def test_what_was_removed_can_not_be_asked_for(log: ChangeLog) -> None:
    """After pruning, reading begins with the oldest entry, and an older one is refused by naming that."""
    log.prune(Lsn(20))
    first = log.first_lsn
    assert 1 < first <= 20
    assert read(log) == PAYLOADS[first - 1 :]
    assert read(log, first - 1) == PAYLOADS[first - 1 :]
    with pytest.raises(UsageError, match=f"begins with LSN {first}"):
        read(log, first - 2)


def test_a_segment_that_is_being_made_is_no_segment_yet(log: ChangeLog) -> None:
    """A last file in which nothing was written yet is left out; one with other files behind it is damage."""
    new = folder(log) / segment_name(Lsn(41))
    for content in (b"", bytes(RECORDS_START)):
        new.write_bytes(content)
        assert read(log) == PAYLOADS
    log.segments()[1].path.write_bytes(b"")
    with pytest.raises(CorruptionError, match=log.segments()[1].path.name):
        read(log)


def test_damage_is_named_after_everything_before_it(log: ChangeLog) -> None:
    """The good entries before a damaged one are read, then file, byte and LSN are named."""
    segment = log.segments()[1]
    data = bytearray(segment.path.read_bytes())
    data[RECORDS_START + 100] ^= 1
    segment.path.write_bytes(data)
    records = read_records(folder(log), CLUSTER)
    assert [next(records).payload for _ in range(segment.first_lsn - 1)] == PAYLOADS[: segment.first_lsn - 1]
    where = f"{segment.path.name}: entry {segment.first_lsn}, at byte {RECORDS_START}"
    with pytest.raises(CorruptionError, match=where) as raised:
        next(records)
    assert raised.value.remedy


@pytest.mark.parametrize("index", [0, 2])
def test_a_missing_segment_is_noticed(log: ChangeLog, index: int) -> None:
    """A gap between two segments is damage; at the front it is what pruning leaves."""
    log.segments()[index].path.unlink()
    if index == 0:
        assert read(log) == PAYLOADS[log.segments()[1].first_lsn - 1 :]
        return
    with pytest.raises(CorruptionError, match="goes on behind entry"):
        read(log)


def test_durable_entries_that_are_gone_are_missed(log: ChangeLog) -> None:
    """Where the last segment ends before what its watermark calls durable, that is damage."""
    last = log.segments()[-1]
    data = last.path.read_bytes()
    last.path.write_bytes(data[:RECORDS_START])
    with pytest.raises(CorruptionError, match="entry"):
        read(log)


def test_files_of_others_are_refused(log: ChangeLog, tmp_path: Path) -> None:
    """A segment of another cluster or with another name is damage, a file that is none is not looked at."""
    (folder(log) / "notes.txt").write_text("mine")
    assert read(log) == PAYLOADS
    with pytest.raises(CorruptionError, match="of cluster"):
        list(read_records(folder(log), ClusterId(bytes(16))))
    last = log.segments()[-1].path
    last.rename(last.with_name(segment_name(Lsn(1_000))))
    with pytest.raises(CorruptionError, match="renamed"):
        read(log)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorruptionError, match="no segment"):
        list(read_records(tmp_path / "empty", CLUSTER))
    with pytest.raises(StorageFailed):
        list(read_records(tmp_path / "absent", CLUSTER))


def test_every_damaged_header_is_told_at_once(log: ChangeLog) -> None:
    """All files that should be segments and are none are named, and the others are still given."""
    for segment in log.segments()[:2]:
        data = bytearray(segment.path.read_bytes())
        data[SECTOR_BYTES - 1] ^= 1
        segment.path.write_bytes(data)
    segments, damaged = open_segments(folder(log), CLUSTER)
    assert [segment.path for segment in segments] == [segment.path for segment in log.segments()[2:]]
    assert [error.message.split(":")[0] for error in damaged] == [str(one.path) for one in log.segments()[:2]]


def test_a_segment_removed_while_it_is_read_is_an_error(log: ChangeLog) -> None:
    """When pruning overtakes a reader, it is told so, and does not take the gap for the end."""
    records = read_records(folder(log), CLUSTER)
    next(records)
    log.prune(Lsn(30))
    with pytest.raises(StorageFailed, match="No such file"):
        list(records)
