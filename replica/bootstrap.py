"""A copy of the primary's store, fetched range by range into ``incoming/``; cut off, it goes on where it was.

Used by a new replica (nothing to start from), one whose log was pruned, and by ``rewind`` (starting from the old
copy, so that only ranges that differ are fetched).
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from understudy.common.changelog import ChangeLog
from understudy.common.directory import DataDirectory
from understudy.common.errors import CorruptionError, ForeignCluster, ProtocolError
from understudy.common.events import log
from understudy.common.files import OsFileSystem, publish, storage_errors, sync_tree
from understudy.common.snapshot import SnapshotCopy
from understudy.common.store import Store
from understudy.common.types import ClusterId, Digest, Epoch, Lsn, Position
from understudy.v1 import replication_pb2, replication_pb2_grpc

SNAPSHOT_FILE = "snapshot"
RANGES_PER_CALL = 64
DAMAGED_TRIES_MAX = 3  # a range that comes damaged so often is damaged at its source


OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A complete copy in ``incoming/``."""

    cluster: ClusterId
    bytes_fetched: int
    bytes_total: int


async def fetch(
    channel: grpc.aio.Channel,
    directory: DataDirectory,
    *,
    replica_id: str,
    rate: int | None = None,
    base: Path | None = None,
    progress: OnProgress | None = None,
) -> Fetched:
    """Fetches a snapshot of the primary into ``incoming/`` and makes it complete, verified and durable.

    Args:
        channel: to the primary.
        directory: the replica's own; nothing but ``incoming/`` in it is touched.
        replica_id: names the slot that keeps the log from the snapshot on.
        rate: bytes a second at the most.
        base: a ``data.mdb`` to start from, of which only what differs is fetched.
        progress: called with bytes in place and bytes in all.

    Raises:
        CorruptionError: a range comes damaged again and again.
        DiskFull, StorageFailed; grpc errors as they are.
    """
    stub = replication_pb2_grpc.ReplicationStub(channel)
    incoming = directory.incoming
    store = incoming / "store"
    with storage_errors("create", store):
        store.mkdir(parents=True, exist_ok=True)
    note = incoming / SNAPSHOT_FILE
    info = await stub.PinSnapshot(
        replication_pb2.PinSnapshotRequest(
            replica_id=replica_id,
            node=directory.node,
            resume=note.read_bytes() if note.exists() else b"",
        )
    )
    if (
        directory.has_copy and info.cluster != directory.cluster
    ):  # whoever answers now is not who was asked before
        raise ForeignCluster("the snapshot offered belongs to another cluster than this copy")
    publish(note, info.snapshot)
    target = store / "data.mdb"
    with SnapshotCopy.open(target, snapshot=info.snapshot, file_bytes=info.file_bytes) as copy:
        expected = await _digests(stub, info)
        fetcher = _Fetcher(stub, info, copy, expected, rate, progress)
        if base is not None:
            await fetcher.fetch(await asyncio.to_thread(copy.adopt, base, expected))
        else:
            await fetcher.fetch(await asyncio.to_thread(copy.missing, expected))
        await fetcher.finish()
    await asyncio.to_thread(_check_store, store, info)
    await asyncio.to_thread(_make_log, incoming, info)
    await stub.ReleaseSnapshot(replication_pb2.ReleaseSnapshotRequest(snapshot=info.snapshot))
    return Fetched(
        cluster=ClusterId(info.cluster),
        bytes_fetched=fetcher.bytes_fetched,
        bytes_total=info.file_bytes,
    )


async def _digests(
    stub: replication_pb2_grpc.ReplicationAsyncStub, info: replication_pb2.SnapshotInfo
) -> list[bytes]:
    found: list[bytes] = []
    async for part in stub.DigestSnapshot(replication_pb2.DigestSnapshotRequest(snapshot=info.snapshot)):
        found += part.digests
    return found


def _check_store(path: Path, info: replication_pb2.SnapshotInfo) -> None:
    """Opens what was fetched: it must be the store, of that cluster and at that position, that was offered.

    Raises:
        CorruptionError, DirectoryError: it is not.
    """
    with Store.open(path, cluster=ClusterId(info.cluster)) as store:
        found = store.current.checkpoint
        if (found.lsn, found.digest, found.log_offset) != (
            info.position.lsn,
            info.position.digest,
            info.log_offset,
        ):
            raise CorruptionError(
                f"the snapshot was offered at LSN {info.position.lsn} and is at {found.lsn}"
            )


def _make_log(incoming: Path, info: replication_pb2.SnapshotInfo) -> None:
    """An empty log that goes on behind the snapshot, and everything in ``incoming/`` durable."""
    folder = incoming / "log"
    shutil.rmtree(folder, ignore_errors=True)
    with storage_errors("create", folder):
        folder.mkdir()
    ChangeLog.create(
        folder,
        cluster=ClusterId(info.cluster),
        epoch=Epoch(info.epoch),
        after=Position(Lsn(info.position.lsn), Digest(info.position.digest)),
        after_offset=info.log_offset,
        files=OsFileSystem(),
    ).close()
    sync_tree(incoming)


class _Fetcher:
    """Fetches ranges in batches, checks each, and asks again for what came damaged."""

    def __init__(
        self,
        stub: replication_pb2_grpc.ReplicationAsyncStub,
        info: replication_pb2.SnapshotInfo,
        copy: SnapshotCopy,
        expected: list[bytes],
        rate: int | None,
        progress: OnProgress | None,
    ) -> None:
        self.bytes_fetched = 0
        self._stub = stub
        self._info = info
        self._copy = copy
        self._expected = expected
        self._rate = rate
        self._progress = progress
        self._started_s = time.monotonic()
        self._in_place = 0

    async def fetch(self, missing: list[int]) -> None:
        """Puts all of ``missing`` in place."""
        self._in_place = self._info.file_bytes - len(missing) * self._info.range_bytes
        tries: dict[int, int] = {}
        while missing:
            damaged: list[int] = []
            for start in range(0, len(missing), RANGES_PER_CALL):
                damaged += await self._fetch_batch(missing[start : start + RANGES_PER_CALL])
            for index in damaged:
                tries[index] = tries.get(index, 0) + 1
                if tries[index] >= DAMAGED_TRIES_MAX:
                    raise CorruptionError(
                        f"range {index} of the primary's snapshot came damaged {DAMAGED_TRIES_MAX} times",
                        remedy="run `understudy verify` on the primary, and check the network",
                    )
            missing = damaged

    async def _fetch_batch(self, indexes: list[int]) -> list[int]:
        """Fetches ranges; each is written while the next one comes in. Returns those that came damaged."""
        damaged: list[int] = []
        writing: asyncio.Task[None] | None = None
        request = replication_pb2.ReadSnapshotRequest(snapshot=self._info.snapshot, ranges=indexes)
        try:
            async for part in self._stub.ReadSnapshot(request):
                if writing is not None:
                    await writing
                writing = asyncio.create_task(self._write(part, damaged))
                await self._throttle()
        finally:
            if writing is not None:
                await writing
        return damaged

    async def _write(self, part: replication_pb2.RangeData, damaged: list[int]) -> None:
        if part.range >= len(self._expected):
            raise ProtocolError(f"the primary sent range {part.range}, which was not asked for")
        try:
            await asyncio.to_thread(self._copy.write, part.range, part.data, self._expected[part.range])
        except CorruptionError as error:
            log.warning("range_damaged", range=part.range, error=str(error))
            damaged.append(part.range)
        self.bytes_fetched += len(part.data)
        self._in_place += len(part.data)
        if self._progress is not None:
            self._progress(max(self._in_place, 0), self._info.file_bytes)

    async def finish(self) -> None:
        """Reads the whole copy back; what the disk did not keep is fetched once more."""
        try:
            await asyncio.to_thread(self._copy.finish, self._expected)
        except CorruptionError as error:
            log.warning("copy_damaged", error=str(error))
            await self.fetch(await asyncio.to_thread(self._copy.missing, self._expected))
            await asyncio.to_thread(self._copy.finish, self._expected)

    async def _throttle(self) -> None:
        if self._rate is not None:
            due_s = self._started_s + self.bytes_fetched / self._rate
            await asyncio.sleep(max(due_s - time.monotonic(), 0))
