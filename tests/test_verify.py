"""Offline verification: a sound directory is sound, and every kind of damage is found and named (G11)."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from log_helpers import small_segments

from understudy.common import entries
from understudy.common.changelog import ChangeLog
from understudy.common.directory import DataDirectory, Role
from understudy.common.engine import HISTORY_KEY
from understudy.common.errors import DirectoryInUse, NotADataDirectory
from understudy.common.files import OsFileSystem
from understudy.common.log_reader import read_records
from understudy.common.metrics import EngineMetrics
from understudy.common.records import HEADER, RECORD_HEADER_BYTES, encode_record
from understudy.common.segment import RECORDS_START, SECTOR_BYTES, SegmentHeader, Watermark
from understudy.common.settings import PrimarySettings
from understudy.common.store import Store
from understudy.common.store_layout import open_environment, realm_prefix
from understudy.common.types import SYSTEM_REALM, ClusterId, Digest, Epoch, Lsn, Position
from understudy.common.verify import PROBLEMS_MAX, VerifyReport, verify_directory
from understudy.primary.node import PrimaryNode
from understudy.v1 import data_pb2, log_pb2
from understudy.v1.store_pb2 import RealmRow

CLIENT = bytes(range(16))
REALMS = ("/apples", "/pears", "/~/notes")
TRANSACTIONS = 90
CHECKPOINT_AFTER = 60


@dataclass(frozen=True)
class Sample:
    """A primary's directory with several log segments, a checkpoint, and entries behind it."""

    path: Path
    end: Position
    key: bytes

    @property
    def segments(self) -> list[Path]:
        """Its log files, oldest first."""
        return sorted((self.path / "log").glob("*.seg"))

    def verify(self) -> VerifyReport:
        """What offline verification finds."""
        return verify_directory(self.path)

    def problem(self) -> str:
        """The one problem that verification finds."""
        report = self.verify()
        assert not report.ok
        (problem,) = report.problems
        return problem


async def run_primary(
    path: Path, work: Callable[[PrimaryNode], None], *, checkpoint: bool
) -> tuple[Position, bytes]:
    """Opens a primary on ``path``, lets ``work`` submit, then takes a checkpoint if asked to; its end and key."""
    with DataDirectory.open(path) as directory:
        node = PrimaryNode.open(directory, PrimarySettings(data_dir=path), EngineMetrics())
        await node.start()
        key = node.engine.history_key
        try:
            work(node)
            node.flush()
            if checkpoint:
                node.committer.freeze()
                freeze_lsn = node.committer.position.lsn
                node.flush()
                await node.engine.wait_for_checkpoint(freeze_lsn)
        finally:
            await node.close()
        return node.engine.log.end, key


def submit(node: PrimaryNode, number: int) -> None:
    """One transaction of two operations."""
    transaction = data_pb2.Transaction(number=number, realm=REALMS[number % len(REALMS)])
    transaction.operations.add(
        kind=log_pb2.Operation.PUT, key=b"key %d" % number, value=b"value %d " % number * 9
    )
    transaction.operations.add(kind=log_pb2.Operation.ADD, key=b"count", amount=number)
    node.submit(CLIENT, transaction, lambda receipt: None)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Made once; tests work on copies."""
    path = tmp_path_factory.mktemp("verify") / "data"

    def first(node: PrimaryNode) -> None:
        for number in range(1, CHECKPOINT_AFTER + 1):
            submit(node, number)

    def rest(node: PrimaryNode) -> None:
        for number in range(CHECKPOINT_AFTER + 1, TRANSACTIONS + 1):
            submit(node, number)

    with small_segments():
        asyncio.run(run_primary(path, first, checkpoint=True))
        end, key = asyncio.run(run_primary(path, rest, checkpoint=False))
    return Sample(path, end, key)


@pytest.fixture
def sample(template: Sample, tmp_path: Path) -> Iterator[Sample]:
    """A copy that a test may damage."""
    shutil.copytree(template.path, tmp_path / "data", ignore=shutil.ignore_patterns("control.sock"))
    with small_segments():
        yield Sample(tmp_path / "data", template.end, template.key)


def flip(path: Path, at: int) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


def append(sample: Sample, *payloads: bytes) -> Position:
    """Writes entries behind the log's end, as a primary would, whatever they say."""
    with DataDirectory.open(sample.path) as directory:
        with Store.open(directory.store) as store:
            row = store.current.checkpoint
        with ChangeLog.open(
            directory.log,
            cluster=directory.cluster,
            after=Position(Lsn(row.lsn), Digest(row.digest)),
            after_offset=row.log_offset,
            files=OsFileSystem(),
        ) as log:
            for payload in payloads:
                lsn = Lsn(log.end.lsn + 1)
                data, digest = encode_record(log.end.digest, lsn, payload)
                log.write_batch(data, Position(lsn, digest), epoch=Epoch(1))
            return log.end


def change_payload(sample: Sample, *, version: int, previous: bytes, key: bytes) -> bytes:
    """An entry with a change of the first realm, signed with ``key``."""
    change = log_pb2.Change(realm=REALMS[0], version=version, previous=previous, client=CLIENT, number=1_000)
    change.operations.add(kind=log_pb2.Operation.DELETE, key=b"count")
    raw = change.SerializeToString()
    return entries.change_entry(1, raw, entries.sign(key, entries.change_digest(raw)))


def head_of(sample: Sample) -> tuple[int, bytes]:
    """Version and digest of the first realm's last change, from the log."""
    with DataDirectory.open(sample.path) as directory:
        head = (0, b"")
        for record in read_records(directory.log, directory.cluster):
            entry = entries.parse_entry(record.payload, record.lsn)
            if entry.HasField("change"):
                change = entries.parse_change(entry.change, record.lsn)
                if change.realm == REALMS[0]:
                    head = (change.version, entries.change_digest(entry.change))
    return head


# -- sound -----------------------------------------------------------------------------------------------------


def test_a_sound_directory_is_sound(sample: Sample) -> None:
    """All entries and realms are counted, and the position is the log's end."""
    counted: list[int] = []
    report = verify_directory(sample.path, counted.append)
    assert report.problems == []
    assert report.ok
    assert Position(report.lsn, report.digest) == sample.end
    assert report.entries_checked == sample.end.lsn
    assert (report.realms_checked, report.realms_in_log_only) == (len(REALMS) + 1, 0)
    assert len(sample.segments) >= 4


def test_verifying_changes_nothing(sample: Sample) -> None:
    """No file has other bytes afterwards, not even a torn tail that the next start would cut off."""
    with sample.segments[-1].open("ab") as file:
        file.write(b"torn")

    def content() -> dict[Path, bytes]:
        files = (
            path
            for path in sample.path.rglob("*")
            if path.is_file() and path.name not in ("lock", "lock.mdb")
        )
        return {path: sha256(path.read_bytes()).digest() for path in files}

    before = content()
    assert sample.verify().ok
    assert content() == before


def test_a_directory_that_has_only_a_log_yet_is_sound(tmp_path: Path) -> None:
    """Before the first checkpoint the history key is only in the log, and is taken from there."""
    asyncio.run(run_primary(tmp_path / "data", lambda node: submit(node, 1), checkpoint=False))
    report = verify_directory(tmp_path / "data")
    assert (report.problems, report.entries_checked, report.realms_checked) == ([], 3, 0)
    assert report.realms_in_log_only == 2  # with the system's own


def test_a_dropped_realm_may_begin_again(sample: Sample) -> None:
    """After a realm was dropped, version 1 of a new realm of that name follows."""

    async def drop_and_begin_again() -> None:
        with DataDirectory.open(sample.path) as directory:
            node = PrimaryNode.open(directory, PrimarySettings(data_dir=sample.path), EngineMetrics())
            await node.start()
            await node.drop_realm(REALMS[0])
            submit(node, 3 * TRANSACTIONS)
            node.flush()
            await node.close()

    asyncio.run(drop_and_begin_again())
    assert sample.verify().problems == []


# -- what can't be checked -------------------------------------------------------------------------------------


def test_a_directory_in_use_is_left_alone(sample: Sample) -> None:
    """Verification needs the directory for itself, since a log that grows would look damaged."""
    with DataDirectory.open(sample.path), pytest.raises(DirectoryInUse):
        sample.verify()


def test_a_replica_without_a_copy_is_not_called_sound(tmp_path: Path) -> None:
    """An empty copy is an error of its own: nothing was verified."""
    with DataDirectory.open(tmp_path / "data") as directory:
        directory.begin(Role.REPLICA, ClusterId(b""))
    with pytest.raises(NotADataDirectory, match="no data yet"):
        verify_directory(tmp_path / "data")


# -- the log ---------------------------------------------------------------------------------------------------


def test_a_torn_tail_is_no_damage(sample: Sample) -> None:
    """What a crash leaves of a batch that was never acknowledged is not reported."""
    record, _ = encode_record(sample.end.digest, Lsn(sample.end.lsn + 1), b"never acknowledged")
    last = sample.segments[-1]
    written = last.read_bytes().rstrip(b"\0")
    last.write_bytes(written + record[:-5])
    assert sample.verify().problems == []


def test_any_flipped_bit_in_the_log_is_found(sample: Sample, seed: int) -> None:
    """G11: a bit flipped in a segment's header or in any record is reported with file and remedy."""
    chance = random.Random(seed)
    for _ in range(60):
        segment = chance.choice(sample.segments)
        sound = segment.read_bytes()
        used = len(sound.rstrip(b"\0"))
        at = chance.choice([chance.randrange(SECTOR_BYTES), chance.randrange(RECORDS_START, used)])
        flip(segment, at)
        report = sample.verify()
        assert report.problems, f"{segment.name} at byte {at}"
        assert any(segment.name in problem and "(" in problem for problem in report.problems), report.problems
        segment.write_bytes(sound)
    assert sample.verify().ok


def test_one_damage_is_one_problem(sample: Sample) -> None:
    """Wherever in the log an entry is damaged, what comes behind it is not called wrong because of it."""
    for segment in sample.segments[:-1]:
        sound = segment.read_bytes()
        flip(segment, RECORDS_START + 60)
        assert segment.name in sample.problem()
        segment.write_bytes(sound)


def test_the_check_goes_on_behind_damage(sample: Sample) -> None:
    """Damage in the middle of one segment does not hide damage in a later one, and what is between is checked."""
    first, later = sample.segments[1], sample.segments[3]
    for segment in (first, later):
        flip(segment, RECORDS_START + 60)
    report = sample.verify()
    assert [
        segment.name in problem for segment, problem in zip((first, later), report.problems, strict=True)
    ] == [
        True,
        True,
    ]
    assert "entry" in report.problems[0]
    assert report.lsn == sample.end.lsn
    assert report.entries_checked < sample.end.lsn


def test_a_watermark_that_is_damaged_is_found(sample: Sample) -> None:
    """The last segment's second sector is checked too."""
    flip(sample.segments[-1], SECTOR_BYTES + 10)
    assert "watermark" in sample.problem()


def test_a_batch_that_another_followed_is_not_taken_for_torn(sample: Sample) -> None:
    """G11: an entry of the batch that the watermark names was durable, if anything stands behind that batch."""
    last = sample.segments[-1]
    data = bytearray(last.read_bytes().rstrip(b"\0"))
    header = SegmentHeader.decode(bytes(data[:SECTOR_BYTES]), last)
    first, second = _last_two_records(bytes(data))
    start = header.first_offset - RECORDS_START
    watermark = Watermark(
        first_lsn=Lsn(sample.end.lsn - 1),
        last_lsn=Lsn(sample.end.lsn - 1),
        start_offset=start + first,
        end_offset=start + second,
    )
    data[SECTOR_BYTES : 2 * SECTOR_BYTES] = watermark.encode()
    last.write_bytes(data)
    assert sample.verify().ok
    flip(last, first + 50)
    assert f"entry {sample.end.lsn - 1}" in sample.problem()
    last.write_bytes(last.read_bytes()[:second])
    assert sample.verify().ok  # nothing behind it: cut off by a crash


def _last_two_records(data: bytes) -> tuple[int, int]:
    """Where in a segment file its last two records begin."""
    starts, at = [], RECORDS_START
    while at < len(data):
        starts.append(at)
        at += RECORD_HEADER_BYTES + HEADER.unpack_from(data, at)[0]
    return starts[-2], starts[-1]


def test_bytes_behind_a_sealed_segment_are_found(sample: Sample) -> None:
    """A segment that another follows ends with its last record; even zeros behind it are none of our doing."""
    with sample.segments[0].open("ab") as file:
        file.write(bytes(100))
    assert sample.segments[0].name in sample.problem()


def test_acknowledged_entries_that_are_gone_are_missed(sample: Sample) -> None:
    """G11: a log cut off before what its watermark says was durable is damaged, not torn."""
    last = sample.segments[-1]
    data = bytearray(last.read_bytes())
    used = len(data.rstrip(b"\0"))
    data[used - 20 :] = bytes(len(data) - used + 20)
    last.write_bytes(data)
    report = sample.verify()
    assert last.name in report.problems[0]
    assert report.lsn == sample.end.lsn - 1


def test_a_missing_segment_is_found(sample: Sample) -> None:
    """A segment that someone removed is noticed by its neighbours."""
    sample.segments[2].unlink()
    assert sample.segments[2].name in sample.problem()


def test_a_missing_log_is_found(sample: Sample) -> None:
    """Without any segment there is one problem, and nothing counts as checked."""
    for segment in sample.segments:
        segment.unlink()
    report = sample.verify()
    assert "no segment" in report.problems[0]
    assert report.entries_checked == 0


def test_a_log_that_begins_behind_the_checkpoint_is_found(sample: Sample) -> None:
    """When the oldest entries that the store needs are gone, the gap is named."""
    for segment in sample.segments[:-1]:
        segment.unlink()
    assert "checkpoint" in sample.problem()


# -- entries ---------------------------------------------------------------------------------------------------


def test_a_change_signed_with_another_key_is_found(sample: Sample) -> None:
    """G3: a change whose chain is right but whose signature is not was not made by this cluster."""
    version, head = head_of(sample)
    append(sample, change_payload(sample, version=version + 1, previous=head, key=bytes(32)))
    problem = sample.problem()
    assert f"entry {sample.end.lsn + 1} is not signed" in problem
    assert sample.segments[-1].name in problem


def test_a_change_that_does_not_follow_is_found(sample: Sample) -> None:
    """Each change must carry its realm's next version and the digest of the one before."""
    version, head = head_of(sample)
    append(sample, change_payload(sample, version=version + 2, previous=head, key=sample.key))
    assert "does not follow" in sample.problem()


def test_a_log_of_very_many_realms_is_checked_as_any(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: where not all realms' heads fit into memory, a sound log is sound and what does not follow is found."""
    monkeypatch.setattr("understudy.common.realm_heads._IN_MEMORY_MAX", 1)
    assert sample.verify().ok
    version, head = head_of(sample)
    append(sample, change_payload(sample, version=version + 2, previous=head, key=sample.key))
    assert "does not follow" in sample.problem()


def test_a_change_with_another_predecessor_is_found(sample: Sample) -> None:
    """The right version is not enough: the predecessor's digest must agree too."""
    version, _ = head_of(sample)
    append(sample, change_payload(sample, version=version + 1, previous=bytes(32), key=sample.key))
    assert "does not follow" in sample.problem()


def test_a_signed_change_that_follows_is_sound(sample: Sample) -> None:
    """The helper of the tests above makes changes that are sound but for what each test changes."""
    version, head = head_of(sample)
    append(sample, change_payload(sample, version=version + 1, previous=head, key=sample.key))
    assert sample.verify().problems == []


def test_an_entry_of_an_unknown_kind_is_found(sample: Sample) -> None:
    """An entry that this version can't read is reported, and the ones behind it are still checked."""
    version, head = head_of(sample)
    unknown = log_pb2.Entry(time_us=1).SerializeToString()
    end = append(sample, unknown, change_payload(sample, version=version + 1, previous=head, key=bytes(32)))
    report = sample.verify()
    assert [text.split(" (")[0].rpartition(": ")[2][:20] for text in report.problems] == [
        f"entry {end.lsn - 1} is of a kin"[:20],
        f"entry {end.lsn} is not signed"[:20],
    ]


def test_an_epoch_that_began_elsewhere_is_found(sample: Sample) -> None:
    """An epoch's start names its own LSN and predecessor; one copied from elsewhere does not fit."""
    elsewhere = Position(Lsn(5), Digest(bytes(32)))
    with DataDirectory.open(sample.path) as directory:
        payload = entries.epoch_entry(
            time_us=1,
            cluster=directory.cluster,
            epoch=Epoch(2),
            after=elsewhere,
            node=directory.node,
            key=sample.key,
        )
    append(sample, payload)
    assert "epoch 2 at another place" in sample.problem()


def test_a_digest_mark_that_disagrees_is_found(sample: Sample) -> None:
    """G11: a mark in the log that says another state digest than the store has for that LSN is reported."""
    with DataDirectory.open(sample.path) as directory, Store.open(directory.store) as store:
        lsn = store.current.checkpoint.lsn
    append(
        sample, entries.digest_entry(1, log_pb2.DigestMark(freeze_lsn=lsn, state_digest=bytes(16), realms=4))
    )
    assert f"the state at LSN {lsn}" in sample.problem()


# -- the store -------------------------------------------------------------------------------------------------


def change_store(sample: Sample, database: str, change: Callable[[bytes, bytes], bytes]) -> None:
    """Puts other values into a named database, past everything that keeps digests right."""
    environment = open_environment(sample.path / "store", readonly=False)
    try:
        with environment.env.begin(getattr(environment, database), write=True) as txn:
            for key, value in list(txn.cursor()):
                txn.put(key, change(key, value))
    finally:
        environment.close()


def realm_id(sample: Sample, path: str) -> int:
    """A realm's id in the store."""
    with Store.open(sample.path / "store") as store:
        row = store.current.realm(path)
        assert row is not None
        return row.id


def test_a_value_that_was_not_written_is_found(sample: Sample) -> None:
    """G11: one other byte in one value is found by the realm's state digest, and the realm is named."""
    prefix = realm_prefix(realm_id(sample, "/pears"))
    change_store(sample, "data", lambda key, value: b"x" + value[1:] if key == prefix + b"count" else value)
    assert any("realm /pears has state digest" in problem for problem in sample.verify().problems)


def test_a_realm_that_stands_elsewhere_than_the_log_is_found(sample: Sample) -> None:
    """At the checkpoint, the store's version and head of each realm must be what the log has brought it to."""

    def older(key: bytes, raw: bytes) -> bytes:
        row = RealmRow.FromString(raw)
        row.version -= key == b"/pears"
        return row.SerializeToString()

    change_store(sample, "realms", older)
    assert any(
        "the log has realm /pears at version 20, the store at 19" in problem
        for problem in sample.verify().problems
    )


def test_a_damaged_page_does_not_end_the_check(sample: Sample) -> None:
    """G11: LMDB's file is checked without LMDB, which could crash on it; the log is checked all the same."""
    store = sample.path / "store" / "data.mdb"
    data = bytearray(store.read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 + 10 : page * 4096 + 24] = b"\xff" * 14
    store.write_bytes(data)
    report = sample.verify()
    assert report.problems
    assert all(str(store) in problem and "make the copy anew" in problem for problem in report.problems)
    assert report.entries_checked == sample.end.lsn
    assert Position(report.lsn, report.digest) == sample.end


def test_a_store_of_another_history_is_found(sample: Sample, tmp_path: Path) -> None:
    """G3: a store whose checkpoint is not on the log's chain is reported, though the LSNs fit."""
    other = Sample(tmp_path / "other", sample.end, sample.key)
    shutil.copytree(sample.path, other.path)

    def write(numbers: range) -> Callable[[PrimaryNode], None]:
        return lambda node: [submit(node, number) for number in numbers] and None

    asyncio.run(run_primary(sample.path, write(range(1_000, 1_010)), checkpoint=False))
    asyncio.run(run_primary(other.path, write(range(2_000, 2_005)), checkpoint=True))
    shutil.rmtree(sample.path / "store")
    shutil.copytree(other.path / "store", sample.path / "store")
    assert any("not of one history" in problem for problem in sample.verify().problems)


def test_a_store_ahead_of_its_log_is_found(sample: Sample, tmp_path: Path) -> None:
    """A store whose checkpoint lies behind the end of the log is reported."""
    other = tmp_path / "other"
    shutil.copytree(sample.path, other)
    asyncio.run(run_primary(other, lambda node: submit(node, 1_000), checkpoint=True))
    shutil.rmtree(sample.path / "store")
    shutil.copytree(other / "store", sample.path / "store")
    assert any("but the log goes from" in problem for problem in sample.verify().problems)


def test_problems_are_bounded(sample: Sample) -> None:
    """However much is wrong, a report stays readable."""
    version, _ = head_of(sample)
    wrong = change_payload(sample, version=version + 7, previous=b"", key=bytes(32))
    append(sample, *[wrong] * (PROBLEMS_MAX + 20))
    assert len(sample.verify().problems) == PROBLEMS_MAX


def test_the_history_key_is_not_in_a_report(sample: Sample) -> None:
    """G10: no problem's text holds the key that it was found with."""
    append(sample, change_payload(sample, version=1, previous=b"", key=bytes(32)))
    text = " ".join(sample.verify().problems)
    assert HISTORY_KEY.decode() not in text
    assert sample.key.hex() not in text
    assert SYSTEM_REALM not in text
