"""Fetching a copy of the primary's store: what is fetched again, what is refused, and what a rewind exports."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest
from store_helpers import CLUSTER, digest_at

from understudy.common import entries, portal
from understudy.common.directory import DataDirectory, Role
from understudy.common.entry_json import entry_row
from understudy.common.errors import (
    CorruptionError,
    DirectoryError,
    DiskFull,
    ForeignCluster,
    PeerUnreachable,
    ProtocolError,
)
from understudy.common.records import Record
from understudy.common.rpc import open_channel, peer_errors
from understudy.common.snapshot_ranges import RANGE_BYTES, digest_of_zeros, open_newest, range_digest
from understudy.common.store import Store
from understudy.common.store_layout import open_environment
from understudy.common.types import ClusterId, Lsn
from understudy.replica import bootstrap, rewind
from understudy.v1 import log_pb2, replication_pb2, replication_pb2_grpc
from understudy.v1.store_pb2 import CheckpointRow

CHECKPOINT = CheckpointRow(lsn=7, digest=digest_at(7), log_offset=4096)
NAME, OTHER_CLUSTER = bytes(range(16)), ClusterId(bytes(16 * [9]))
DEADLINE_S = 60.0

Parts = AsyncIterator[replication_pb2.RangeData]
Digests = AsyncIterator[replication_pb2.RangeDigests]


# -- a primary that says what a test wants ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of some 15 ranges, of which a few are nothing but free pages; nobody has it open."""
    path = tmp_path_factory.mktemp("source") / "store"
    Store.create(path, CLUSTER, CHECKPOINT)
    environment = open_environment(path, readonly=False)
    with environment.env.begin(environment.data, write=True) as txn:
        for number in range(10):
            txn.put(b"%d" % number, random.Random(number).randbytes(900_000))
        txn.put(b"free", bytes(3 * RANGE_BYTES))
        txn.put(b"last", random.Random(10).randbytes(900_000))
    with environment.env.begin(environment.data, write=True) as txn:
        txn.delete(b"free")
    environment.close()
    return path


@dataclass(slots=True)
class FakePrimary(replication_pb2_grpc.ReplicationServicer):
    """Serves one snapshot; a test changes what it says, and sees what it was asked."""

    info: replication_pb2.SnapshotInfo
    ranges: list[bytes]
    asked: list[int] = field(default_factory=list)  # every range, as often as it was asked for
    digest_calls: int = 0
    released: int = 0
    change: Callable[[replication_pb2.RangeData], replication_pb2.RangeData] = lambda part: part
    parts: Callable[[FakePrimary, list[int]], Parts] | None = None
    digests: Callable[[FakePrimary], Digests] | None = None

    async def PinSnapshot(self, _: object, __: object) -> replication_pb2.SnapshotInfo:
        """Offers the snapshot."""
        return self.info

    async def DigestSnapshot(self, _: object, __: object) -> Digests:
        """All digests in one message, or what the test wants."""
        self.digest_calls += 1
        async for part in (self.digests or FakePrimary.true_digests)(self):
            yield part

    async def ReadSnapshot(self, request: replication_pb2.ReadSnapshotRequest, _: object) -> Parts:
        """What was asked for, or what the test wants."""
        self.asked += request.ranges
        async for part in (self.parts or FakePrimary.true_parts)(self, list(request.ranges)):
            yield self.change(part)

    async def ReleaseSnapshot(self, _: object, __: object) -> replication_pb2.ReleaseSnapshotResponse:
        """Counts."""
        self.released += 1
        return replication_pb2.ReleaseSnapshotResponse()

    async def true_digests(self) -> Digests:
        """As a primary says them."""
        yield replication_pb2.RangeDigests(digests=[range_digest(data) for data in self.ranges])

    async def true_parts(self, indexes: list[int]) -> Parts:
        """As a primary sends them."""
        for index in indexes:
            yield self.part(index)

    def part(self, index: int) -> replication_pb2.RangeData:
        """One range as a primary sends it."""
        data = self.ranges[index]
        return replication_pb2.RangeData(
            range=index, digest=range_digest(data), data=data if any(data) else b""
        )

    @property
    def empty(self) -> list[int]:
        """The ranges that are nothing but zeros."""
        return [index for index, data in enumerate(self.ranges) if not any(data)]


@pytest.fixture
def primary(store: Path) -> FakePrimary:
    """One that tells the truth."""
    with open_newest(store / "data.mdb") as source:
        ranges = [source.read(index) for index in range(source.count)]
    info = replication_pb2.SnapshotInfo(
        snapshot=NAME,
        position=replication_pb2.Position(lsn=CHECKPOINT.lsn, digest=CHECKPOINT.digest),
        log_offset=CHECKPOINT.log_offset,
        cluster=CLUSTER,
        epoch=1,
        file_bytes=sum(map(len, ranges)),
        range_bytes=RANGE_BYTES,
    )
    return FakePrimary(info, ranges)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[DataDirectory]:
    """A new replica's."""
    with DataDirectory.open(tmp_path / "replica") as opened:
        opened.begin(Role.REPLICA, ClusterId(b""))
        yield opened


@pytest.fixture
def small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranges a call, so that a small store takes several."""
    monkeypatch.setattr(bootstrap, "RANGES_PER_CALL", 2)


def fetch(primary: FakePrimary, directory: DataDirectory, **options: Any) -> bootstrap.Fetched:
    """Fetches from a primary that serves on a port of its own meanwhile."""

    async def served() -> bootstrap.Fetched:
        server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
        replication_pb2_grpc.add_ReplicationServicer_to_server(primary, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            async with asyncio.timeout(DEADLINE_S), open_channel(address) as channel:
                with peer_errors(address):
                    return await bootstrap.fetch(channel, directory, replica_id="b", **options)
        finally:
            await server.stop(None)

    return run(served())


def run(coroutine: Coroutine[Any, Any, bootstrap.Fetched]) -> bootstrap.Fetched:
    """Runs it on the one loop that gRPC serves well."""
    return portal.call(coroutine)


def copied(directory: DataDirectory) -> bytes:
    """The copy that was fetched."""
    return (directory.incoming / "store" / "data.mdb").read_bytes()


def flipped(part: replication_pb2.RangeData) -> replication_pb2.RangeData:
    """With one wrong bit in its data."""
    data = bytearray(part.data)
    data[77] ^= 4
    return replication_pb2.RangeData(range=part.range, digest=part.digest, data=bytes(data))


# -- a first copy ----------------------------------------------------------------------------------------------


def test_a_first_copy_is_fetched_once_and_without_a_list_of_digests(
    primary: FakePrimary, directory: DataDirectory
) -> None:
    """G11: each range is asked for once, zeros are not sent, and the copy is the snapshot, byte for byte."""
    fetched = fetch(primary, directory)
    assert copied(directory) == b"".join(primary.ranges)
    assert sorted(primary.asked) == list(range(len(primary.ranges)))
    assert (primary.digest_calls, primary.released) == (0, 1)
    assert len(primary.empty) >= 2
    assert fetched.bytes_total == primary.info.file_bytes
    assert fetched.bytes_fetched == fetched.bytes_total - len(primary.empty) * RANGE_BYTES
    assert not list(directory.incoming.glob("store/*.ranges"))
    assert not directory.has_copy  # until it is installed


def test_a_copy_that_broke_off_goes_on_with_what_is_missing(
    primary: FakePrimary, directory: DataDirectory, small_calls: None
) -> None:
    """After a lost connection the next try asks for the digests, and for no range that is in place."""
    limit = 7

    async def cut_off(self: FakePrimary, indexes: list[int]) -> Parts:
        for index in indexes:
            if index >= limit:
                raise ConnectionError("gone")
            yield self.part(index)

    primary.parts = cut_off
    with pytest.raises(ProtocolError):
        fetch(primary, directory)
    primary.parts, primary.asked = None, []
    fetch(primary, directory)
    assert primary.digest_calls == 1
    assert set(primary.asked) >= set(range(limit, len(primary.ranges))) - set(primary.empty)
    assert len(primary.asked) < len(primary.ranges) - 4
    assert copied(directory) == b"".join(primary.ranges)


def test_zeros_overwrite_what_an_earlier_snapshot_had_there(
    primary: FakePrimary, directory: DataDirectory
) -> None:
    """A range that has become free is zeros in the copy, though nothing is sent for it."""
    target = directory.incoming / "store"
    target.mkdir(parents=True)
    (target / "data.mdb").write_bytes(b"\xff" * primary.info.file_bytes)
    fetch(primary, directory)
    assert copied(directory) == b"".join(primary.ranges)


def test_progress_ends_with_all_bytes(primary: FakePrimary, directory: DataDirectory) -> None:
    """Whoever watches sees it grow up to the file's length, and never beyond."""
    seen: list[tuple[int, int]] = []
    fetch(primary, directory, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (primary.info.file_bytes, primary.info.file_bytes)


def test_a_rate_holds_back_what_is_fetched(
    primary: FakePrimary, directory: DataDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still while nobody waits, the copy takes as long as its bytes at that rate."""
    clock = [100.0]
    yield_once = asyncio.sleep

    async def sleep(seconds: float) -> None:
        clock[0] += seconds
        await yield_once(0)

    monkeypatch.setattr(bootstrap, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(asyncio, "sleep", sleep)
    fetched = fetch(primary, directory, rate=1 << 20)
    assert clock[0] - 100 == pytest.approx(fetched.bytes_fetched / (1 << 20))


# -- damage ----------------------------------------------------------------------------------------------------


def test_a_damaged_range_is_fetched_again(
    primary: FakePrimary, directory: DataDirectory, small_calls: None
) -> None:
    """G11: a bit that flips on the way costs one more range, and shows nowhere."""
    flips = [3, 3, 8]

    def damage(part: replication_pb2.RangeData) -> replication_pb2.RangeData:
        if part.range in flips:
            flips.remove(part.range)
            return flipped(part)
        return part

    primary.change = damage
    fetch(primary, directory)
    assert flips == []
    assert [primary.asked.count(index) for index in (2, 3, 8)] == [1, 3, 2]
    assert copied(directory) == b"".join(primary.ranges)


@pytest.mark.parametrize("way", ["flipped", "short", "long", "emptied", "no digest", "left out"])
def test_a_range_that_is_damaged_at_its_source_ends_the_fetch(
    primary: FakePrimary, directory: DataDirectory, way: str
) -> None:
    """G4, G11: after three tries the error names the range and the remedy, and there is no copy to install."""

    def damage(part: replication_pb2.RangeData) -> replication_pb2.RangeData:
        if part.range != 3:
            return part
        data, digest = part.data, part.digest
        changed = {
            "flipped": (flipped(part).data, digest),
            "short": (data[:-1], range_digest(data[:-1])),
            "long": (data + b"\0", range_digest(data + b"\0")),
            "emptied": (b"", digest),
            "no digest": (data, b""),
        }[way]
        return replication_pb2.RangeData(range=3, data=changed[0], digest=changed[1])

    async def all_but_one(self: FakePrimary, indexes: list[int]) -> Parts:
        for index in indexes:
            if index != 3:
                yield self.part(index)

    if way == "left out":
        primary.parts = all_but_one
    else:
        primary.change = damage
    with pytest.raises(CorruptionError, match=r"range 3 .* damaged 3 times .*understudy verify"):
        fetch(primary, directory)
    assert primary.asked.count(3) == 3
    assert not (directory.incoming / "log").exists()


def test_what_the_disk_did_not_keep_is_fetched_again(
    primary: FakePrimary, directory: DataDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G11: reading the copy back finds it; where it happens twice the disk is named, and nothing is installed."""
    finish = bootstrap.SnapshotCopy.finish
    damages = [5]

    def damage_and_finish(copy: bootstrap.SnapshotCopy) -> list[int]:
        if damages:
            copy.flush()
            with copy.path.open("r+b") as file:
                file.seek(damages.pop() * RANGE_BYTES + 1)
                file.write(b"rotten")
        return finish(copy)

    monkeypatch.setattr(bootstrap.SnapshotCopy, "finish", damage_and_finish)
    fetch(primary, directory)
    assert primary.asked.count(5) == 2
    assert copied(directory) == b"".join(primary.ranges)
    damages += [5, 5]
    with pytest.raises(CorruptionError, match=r"1 ranges .* first at 5242880 bytes .*check the disk"):
        fetch(primary, directory)


# -- another snapshot than the one that was asked for ----------------------------------------------------------


def test_another_clusters_snapshot_replaces_no_copy(primary: FakePrimary, directory: DataDirectory) -> None:
    """G4: a directory that has a copy takes none of another cluster, and does not even begin one."""
    directory.install(OTHER_CLUSTER, keep_old=False)
    before = sorted(directory.path.rglob("*"))
    with pytest.raises(ForeignCluster, match="another cluster than this copy"):
        fetch(primary, directory)
    assert primary.asked == []
    created = set(directory.path.rglob("*")) - set(before)
    assert created == {directory.incoming, directory.incoming / "store"}
    assert directory.cluster == OTHER_CLUSTER


@pytest.mark.parametrize("field_name", ["lsn", "digest", "log_offset"])
def test_a_snapshot_at_another_position_than_offered_is_refused(
    primary: FakePrimary, directory: DataDirectory, field_name: str
) -> None:
    """G3, G4: the store that came must stand where the log goes on, or it is never installed."""
    match field_name:
        case "lsn":
            primary.info.position.lsn += 1
        case "digest":
            primary.info.position.digest = digest_at(8)
        case "log_offset":
            primary.info.log_offset += 1
    for _ in range(2):  # and it stays so when the complete copy is found there
        with pytest.raises(CorruptionError, match="the snapshot was offered at"):
            fetch(primary, directory)
    assert not (directory.incoming / "log").exists()
    assert not directory.has_copy


def test_a_snapshot_of_another_cluster_than_offered_is_refused(
    primary: FakePrimary, directory: DataDirectory
) -> None:
    """G4: what the store itself says counts, not what its sender said."""
    primary.info.cluster = OTHER_CLUSTER
    with pytest.raises(DirectoryError, match="belongs to cluster"):
        fetch(primary, directory)
    assert not (directory.incoming / "log").exists()
    assert not directory.has_copy


# -- a primary that is none ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"file_bytes": 1 << 60}, ProtocolError, "1,152,921,504,606,846,976 bytes"),
        ({"file_bytes": (1 << 64) - 1}, ProtocolError, "no store has more than"),
        ({"file_bytes": 0}, ProtocolError, "a snapshot of 0 bytes"),
        ({"file_bytes": 1 << 40}, DiskFull, "larger one"),
        ({"range_bytes": 4096}, ProtocolError, "does not know"),
        ({"snapshot": b"short"}, ProtocolError, "does not know"),
        ({"snapshot": bytes(1 << 20)}, ProtocolError, "does not know"),
        ({"cluster": b""}, ProtocolError, "does not know"),
    ],
)
def test_absurd_offers_are_refused_before_anything_is_made_for_them(
    primary: FakePrimary,
    directory: DataDirectory,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    """G9: neither disk nor memory is taken for a size that can't be true."""
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 39))
    for name, value in changes.items():
        setattr(primary.info, name, value)
    with pytest.raises(error, match=message):
        fetch(primary, directory)
    assert list(directory.incoming.rglob("*")) == [directory.incoming / "store"]


@pytest.mark.parametrize("wrong", [10_000, (1 << 64) - 1, 0])
def test_a_range_that_was_not_asked_for_ends_the_fetch(
    primary: FakePrimary, directory: DataDirectory, wrong: int
) -> None:
    """G9: numbers beyond the file, and the same range for ever: nothing is written for them."""

    async def endless(self: FakePrimary, _: list[int]) -> Parts:
        while True:
            yield replication_pb2.RangeData(
                range=wrong, digest=range_digest(self.ranges[0]), data=self.ranges[0]
            )

    primary.parts = endless
    with pytest.raises(ProtocolError, match=f"range {wrong}, which was not asked for"):
        fetch(primary, directory)
    assert (directory.incoming / "store" / "data.mdb").stat().st_size == primary.info.file_bytes


def list_of_digests(way: str) -> Callable[[FakePrimary], Digests]:
    """A list of digests that is none."""

    async def wrong(self: FakePrimary) -> Digests:
        digests = [range_digest(data) for data in self.ranges]
        match way:
            case "too short":
                yield replication_pb2.RangeDigests(digests=digests[:-1])
            case "too long":
                yield replication_pb2.RangeDigests(digests=[*digests, digest_of_zeros(1)])
            case "none":
                return
            case "odd digests":
                yield replication_pb2.RangeDigests(digests=[digest[1:] for digest in digests])
            case "out of order":
                yield replication_pb2.RangeDigests(first_range=1, digests=digests)
            case "endless":
                while True:
                    yield replication_pb2.RangeDigests(first_range=0, digests=digests)
            case "endless and in order":
                for first in range(0, 1 << 62, len(digests)):
                    yield replication_pb2.RangeDigests(first_range=first, digests=digests)
            case "endless and empty":
                while True:
                    yield replication_pb2.RangeDigests()

    return wrong


@pytest.mark.parametrize(
    "way",
    ["too short", "too long", "none", "odd digests", "out of order", "endless", "endless and in order",
     "endless and empty"],
)  # fmt: skip
def test_a_wrong_list_of_digests_is_refused(
    primary: FakePrimary, directory: DataDirectory, store: Path, way: str
) -> None:
    """G9, G11: whatever is wrong with it, no range is judged by it, and it is not waited for without end."""
    primary.digests = list_of_digests(way)
    with pytest.raises(ProtocolError, match="the primary's list of digests"):
        fetch(primary, directory, base=store / "data.mdb")
    assert primary.asked == []


def test_a_primary_that_falls_silent_is_given_up(
    primary: FakePrimary, directory: DataDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: a stream that neither ends nor goes on does not hold a replica for ever."""
    monkeypatch.setattr(bootstrap, "SILENCE_S_MAX", 0.2)

    async def silent(self: FakePrimary, indexes: list[int]) -> Parts:
        yield self.part(indexes[0])
        await asyncio.Event().wait()

    primary.parts = silent
    with pytest.raises(PeerUnreachable, match="has sent nothing for"):
        fetch(primary, directory)


# -- what a rewind exports -------------------------------------------------------------------------------------


def long_records(count: int) -> Iterator[Record]:
    """Entries of some 100 kB each."""
    for number in range(1, count + 1):
        change = log_pb2.Change(realm="/r", version=number)
        change.operations.add(kind=log_pb2.Operation.PUT, key=b"k", value=bytes(100_000))
        payload = entries.change_entry(number, change.SerializeToString(), b"")
        yield Record(Lsn(number), digest_at(number), payload)


def test_an_export_takes_no_more_memory_than_its_longest_entry_needs(tmp_path: Path) -> None:
    """G4, G9: entries go to the file one by one, however many only this node has."""
    path = tmp_path / "entries.jsonl"
    tracemalloc.start()
    try:
        assert rewind._publish_lines(path, long_records(100)) == 100
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 20_000_000
    assert peak < 5_000_000
    assert [child.name for child in tmp_path.iterdir()] == [path.name]
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [entry_row(record) for record in long_records(100)]


def test_an_export_that_fails_is_not_there(tmp_path: Path) -> None:
    """G4: an entry that can't be read leaves no file that looks whole."""

    def damaged() -> Iterator[Record]:
        yield from long_records(3)
        raise CorruptionError("the log is damaged")

    with pytest.raises(CorruptionError):
        rewind._publish_lines(tmp_path / "entries.jsonl", damaged())
    assert list(tmp_path.iterdir()) == []


def test_g9_an_export_that_fills_the_disk_gives_the_space_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4, G9: where entries find no space, the error says so and nothing of the file is left; what an export that was
    killed has left is overwritten by the next.
    """

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "entries.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFull, match="entries"):
            rewind._publish_lines(path, long_records(3))
    assert list(tmp_path.iterdir()) == []
    path.with_name(path.name + ".new").write_bytes(bytes(1_000_000))
    assert rewind._publish_lines(path, long_records(3)) == 3
    assert list(tmp_path.iterdir()) == [path]
