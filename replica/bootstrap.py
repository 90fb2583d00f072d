"""A copy of the primary's store, fetched range by range into ``incoming/``; cut off, it goes on where it was.

Used by a new replica (nothing to start from), one whose log was pruned, and by ``rewind`` (starting from the old
copy, so that only ranges that differ are fetched). Each range comes with its digest; the list of all of them is asked
for only where there is something to compare it with.

What the primary says of sizes and numbers is not believed: it may be damaged, or none of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio

from understudy.common.changelog import ChangeLog
from understudy.common.directory import DataDirectory
from understudy.common.errors import (
    CorruptionError,
    DiskFull,
    ForeignCluster,
    PeerUnreachable,
    ProtocolError,
)
from understudy.common.events import log
from understudy.common.files import OsFileSystem, publish, storage_errors, sync_tree
from understudy.common.snapshot import SnapshotCopy
from understudy.common.snapshot_ranges import RANGE_BYTES, RANGE_DIGEST_BYTES
from understudy.common.store import Store
from understudy.common.store_layout import MAP_BYTES
from understudy.common.types import DIGEST_BYTES, ID_BYTES, ClusterId, Digest, Epoch, Lsn, Position
from understudy.v1 import replication_pb2, replication_pb2_grpc

SNAPSHOT_FILE = "snapshot"
RANGES_PER_CALL = 64
# While one range is written, the next one of the other call comes in. Four are a tenth faster in twice the memory.
CALLS = 2
TRIES_MAX = 3  # a range that comes damaged so often is damaged at its source
# A primary with a slow disk and millions of free pages needs seconds for its first range.
SILENCE_S_MAX = 60.0

OnProgress = Callable[[int, int], None]
_Part = TypeVar("_Part")


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
        ForeignCluster: the snapshot belongs to another cluster than the directory.
        CorruptionError: a range comes damaged again and again, or the copy is not what was offered.
        ProtocolError, PeerUnreachable: the primary says what can't be, or nothing any more.
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
        ),
        timeout=SILENCE_S_MAX,
    )
    _check_info(info, store)
    if directory.has_copy and info.cluster != directory.cluster:
        # Whoever answers now is not who was asked before.
        raise ForeignCluster("the snapshot offered belongs to another cluster than this copy")
    publish(note, info.snapshot)
    target = store / "data.mdb"
    with SnapshotCopy.open(target, snapshot=info.snapshot, file_bytes=info.file_bytes) as copy:
        fetcher = _Fetcher(stub, info, copy, rate, progress)
        await fetcher.fetch(await _missing(stub, info, copy, base))
        await fetcher.finish()
    await asyncio.to_thread(_check_store, store, info)
    await asyncio.to_thread(_make_log, incoming, info)
    await stub.ReleaseSnapshot(
        replication_pb2.ReleaseSnapshotRequest(snapshot=info.snapshot), timeout=SILENCE_S_MAX
    )
    return Fetched(
        cluster=ClusterId(info.cluster),
        bytes_fetched=fetcher.bytes_fetched,
        bytes_total=info.file_bytes,
    )


def _check_info(info: replication_pb2.SnapshotInfo, folder: Path) -> None:
    """Refuses what no snapshot of ours is, before anything is made on disk or in memory for it."""
    lengths = (len(info.snapshot), len(info.cluster), len(info.position.digest))
    if lengths != (ID_BYTES, ID_BYTES, DIGEST_BYTES) or info.range_bytes != RANGE_BYTES:
        raise ProtocolError("the primary offers a snapshot of a kind that this version does not know")
    if not 0 < info.file_bytes <= MAP_BYTES:
        raise ProtocolError(
            f"the primary offers a snapshot of {info.file_bytes:,} bytes; no store has more than {MAP_BYTES:,}"
        )
    with storage_errors("look at", folder):
        room = shutil.disk_usage(folder).total
    if info.file_bytes > room:
        raise DiskFull(
            f"the primary's snapshot has {info.file_bytes:,} bytes, the file system of {folder} only {room:,}",
            remedy="put the data directory on a larger one",
        )


async def _missing(
    stub: replication_pb2_grpc.ReplicationAsyncStub,
    info: replication_pb2.SnapshotInfo,
    copy: SnapshotCopy,
    base: Path | None,
) -> Sequence[int]:
    """The ranges that are to be fetched: all of a new copy, else those that neither it nor ``base`` has."""
    if copy.is_new and base is None:
        return range(copy.ranges)
    digests = await _digests(stub, info, copy.ranges)
    if base is None:
        return await asyncio.to_thread(copy.missing, digests)
    return await asyncio.to_thread(copy.adopt, base, digests)


async def _digests(
    stub: replication_pb2_grpc.ReplicationAsyncStub, info: replication_pb2.SnapshotInfo, count: int
) -> list[bytes]:
    found: list[bytes] = []
    call = stub.DigestSnapshot(replication_pb2.DigestSnapshotRequest(snapshot=info.snapshot))
    async with contextlib.aclosing(_each(call)) as parts:
        async for part in parts:
            lengths = {len(digest) for digest in part.digests}
            if lengths != {RANGE_DIGEST_BYTES} or part.first_range != len(found):
                raise ProtocolError("the primary's list of digests is damaged")
            found += part.digests
            if len(found) > count:
                break
    if len(found) != count:
        raise ProtocolError(f"the primary's list of digests does not have the {count} that it must have")
    return found


async def _each(call: grpc.aio.UnaryStreamCall[Any, _Part]) -> AsyncGenerator[_Part, None]:
    """The messages of a call, which is cancelled when nobody wants more of them.

    Raises:
        PeerUnreachable: the next one has not come for too long.
    """
    parts = aiter(call)
    try:
        while True:
            async with asyncio.timeout(SILENCE_S_MAX):
                part = await anext(parts, None)
            if part is None:
                return
            yield part
    except TimeoutError:
        raise PeerUnreachable(f"the primary has sent nothing for {SILENCE_S_MAX:.0f} s") from None
    finally:
        call.cancel()


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
    """Fetches ranges in several calls at once, checks each, and asks again for what came damaged."""

    def __init__(
        self,
        stub: replication_pb2_grpc.ReplicationAsyncStub,
        info: replication_pb2.SnapshotInfo,
        copy: SnapshotCopy,
        rate: int | None,
        progress: OnProgress | None,
    ) -> None:
        self.bytes_fetched = 0
        self._stub = stub
        self._info = info
        self._copy = copy
        self._rate = rate
        self._progress = progress
        self._started_s = time.monotonic()
        self._in_place = 0

    async def fetch(self, missing: Sequence[int]) -> None:
        """Puts all of ``missing`` in place.

        Raises:
            CorruptionError: a range came damaged too often.
        """
        for _ in range(TRIES_MAX):
            if not missing:
                return
            self._in_place = max(self._info.file_bytes - len(missing) * RANGE_BYTES, 0)
            missing = await self._fetch_all(missing)
        if missing:
            raise CorruptionError(
                f"range {missing[0]} of the primary's snapshot came damaged {TRIES_MAX} times",
                remedy="run `understudy verify` on the primary, and check the network",
            )

    async def _fetch_all(self, missing: Sequence[int]) -> list[int]:
        """Fetches each range once. Returns those that came damaged, or not at all."""
        batches = (
            missing[start : start + RANGES_PER_CALL] for start in range(0, len(missing), RANGES_PER_CALL)
        )
        # With a rate, one call is enough, and none waits so long for its turn that the primary takes us for gone.
        count = CALLS if self._rate is None else 1
        calls = [asyncio.create_task(self._fetch_batches(batches)) for _ in range(count)]
        try:
            return sorted(itertools.chain.from_iterable(await asyncio.gather(*calls)))
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    async def _fetch_batches(self, batches: Iterator[Sequence[int]]) -> list[int]:
        left: list[int] = []
        for batch in batches:
            left += await self._fetch_batch(batch)
        return left

    async def _fetch_batch(self, batch: Sequence[int]) -> set[int]:
        left, to_come = set(batch), set(batch)
        request = replication_pb2.ReadSnapshotRequest(snapshot=self._info.snapshot, ranges=batch)
        async with contextlib.aclosing(_each(self._stub.ReadSnapshot(request))) as parts:
            async for part in parts:
                if part.range not in to_come:
                    raise ProtocolError(f"the primary sent range {part.range}, which was not asked for")
                to_come.remove(part.range)
                if await self._write(part):
                    left.remove(part.range)
                await self._throttle()
        return left

    async def _write(self, part: replication_pb2.RangeData) -> bool:
        """Puts a range in place; whether it was whole."""
        data = part.data  # a copy each time it is asked for
        self.bytes_fetched += len(data)
        try:
            await asyncio.to_thread(self._copy.write, part.range, data, part.digest)
        except CorruptionError as error:
            log.warning("range_damaged", range=part.range, error=str(error))
            return False
        self._in_place = min(self._in_place + RANGE_BYTES, self._info.file_bytes)
        if self._progress is not None:
            self._progress(self._in_place, self._info.file_bytes)
        return True

    async def finish(self) -> None:
        """Reads the whole copy back; what the disk did not keep is fetched once more.

        Raises:
            CorruptionError: nor did it keep that.
        """
        damaged = await asyncio.to_thread(self._copy.finish)
        if damaged:
            log.warning("copy_damaged", ranges=len(damaged), first=damaged[0])
            await self.fetch(damaged)
            damaged = await asyncio.to_thread(self._copy.finish)
        if damaged:
            raise CorruptionError(
                f"{len(damaged)} ranges of {self._copy.path} are not what was written there, the first at "
                f"{damaged[0] * RANGE_BYTES} bytes",
                remedy="check the disk",
            )

    async def _throttle(self) -> None:
        if self._rate is not None:
            due_s = self._started_s + self.bytes_fetched / self._rate
            await asyncio.sleep(max(due_s - time.monotonic(), 0))
