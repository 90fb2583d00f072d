"""Puts the product into a universe: what it asks of Python and the system, it gets from there.

Everything else is the product as it is: servers, nodes, engine, log, recovery, sessions, clients. What is exchanged:
time and chance, the event loop's executor and the log's writer thread, gRPC, the file layer of the change-log, and the
checkpoint process, whose work is done in the same process at one moment. LMDB is real, on a file system in memory.
"""

from __future__ import annotations

import asyncio
import os
import queue
import random
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import lmdb
import structlog  # noqa: F401  # here, as importing it takes from a story's chance
from sim.disk import Disk
from sim.grpc_client import Channel
from sim.grpc_server import Server
from sim.loop import number_of
from sim.network import Network
from sim.threads import Future, Local, RLock, SimpleQueue, Threading
from sim.universe import START_US, Process, Universe

import understudy.common.checkpoint_process
import understudy.common.directory
import understudy.common.engine
import understudy.common.files
import understudy.common.group_writer
import understudy.primary.new_cluster
import understudy.primary.server
import understudy.replica.bootstrap
import understudy.replica.rewind
import understudy.replica.server
from understudy.client import local_file, local_owner, open_directory, sync_thread
from understudy.common import memtable, portal, segment
from understudy.common.checkpoint import apply_checkpoint
from understudy.common.store_layout import open_environment
from understudy.primary import sync_feed
from understudy.v1.store_pb2 import CheckpointJob, CheckpointResult

SEGMENT_BYTES = 16 << 10  # small, so that short histories have many
MEMTABLE_BYTES = 6 << 10

_REAL_OPEN = lmdb.open
_REAL_LOCK = understudy.common.directory._lock
_REAL_LOCK_LOCAL = local_owner._lock
_REAL_OPEN_DIRECTORY = open_directory.OpenDirectory.__init__


class Lab:
    """A universe with machines that the product runs on. One at a time in a process, and never taken apart."""

    def __init__(self, universe: Universe, root: Path) -> None:
        self.universe = universe
        self.network = Network(universe)
        self.disks: dict[str, Disk] = {}
        self.root = root
        self.skew_us: dict[str, int] = {}  # of each machine's clock
        self._stores: dict[tuple[str, str], _SharedStore] = {}
        self._install()

    def machine(self, name: str) -> Path:
        """A new machine; the root of its disk."""
        root = self.root / name
        root.mkdir()
        self.disks[name] = Disk(self.universe, root)
        self.skew_us[name] = self.universe.rng.randrange(-2_000_000, 2_000_000)
        return root

    def start(self, name: str, machine: str, main: Callable[[], Any]) -> Process:
        """A process that runs the coroutine function ``main``."""
        process = Process(self.universe, name, machine)
        process.tell_peers = lambda: self.network.lose(process)

        def begin() -> None:
            task = process.loop.create_task(_until_ended(process, main))
            task.set_name(name)

        self.universe.at(0.0, begin, process)
        return process

    # -- what is exchanged -------------------------------------------------------------------------------------

    def _install(self) -> None:
        self._set_time()
        self._set_chance()
        asyncio.Event.__hash__ = number_of  # type: ignore[method-assign, assignment]
        sync_feed.SyncStream.__hash__ = lambda stream: number_of(stream.task)  # type: ignore[method-assign]
        understudy.common.group_writer.threading = Threading(lambda: self.universe)  # type: ignore[assignment]
        grpc.aio.insecure_channel = lambda target, options=None: Channel(self.network, target)  # type: ignore
        grpc.aio.server = lambda interceptors=(), options=None: Server(self.network, interceptors)  # type: ignore
        for module in (
            understudy.common.engine,
            understudy.primary.new_cluster,
            understudy.replica.bootstrap,
            understudy.replica.rewind,
        ):
            module.OsFileSystem = self._files  # type: ignore[attr-defined]
        for server in (understudy.primary.server, understudy.replica.server):
            server.check_free = lambda address: None  # type: ignore[attr-defined]
        understudy.common.engine.Checkpointer = lambda: _Checkpointer()  # type: ignore
        understudy.common.directory._lock = self._lock
        self._install_client()
        lmdb.open = self._open_store  # type: ignore[assignment]
        segment.SEGMENT_BYTES = SEGMENT_BYTES
        memtable.MEMTABLE_BYTES = MEMTABLE_BYTES

    def _install_client(self) -> None:
        """A synced client's threads, and the loop that its connections share."""
        threading = Threading(lambda: self.universe)
        sync_thread.threading = threading  # type: ignore[assignment]
        sync_thread._here = Local(lambda: self.universe)  # type: ignore[assignment]
        sync_thread.queue = SimpleNamespace(  # type: ignore[assignment]
            SimpleQueue=lambda: SimpleQueue(self.universe), Empty=queue.Empty
        )
        sync_thread.Future = lambda: Future(self.universe)  # type: ignore
        local_file.threading = threading  # type: ignore[assignment]
        open_directory._lock = _LockOfProcess(self._current)  # type: ignore[assignment]

        def opened(directory: Any, place: Path, settings: Any) -> None:
            self._current().at_end.append(lambda: open_directory._open.pop(place, None))
            _REAL_OPEN_DIRECTORY(directory, place, settings)

        open_directory.OpenDirectory.__init__ = opened  # type: ignore[method-assign, assignment]

        def locked(path: Path, fd: int) -> None:
            _REAL_LOCK_LOCAL(path, fd)
            self._current().at_end.append(lambda: _close_if_locked(fd, path / local_owner.OWNER_FILE))

        local_owner._lock = locked
        portal.call = self._portal_call  # type: ignore[assignment]
        portal.post = lambda work: self._portal_call_soon(work)  # type: ignore[assignment]

    def _portal_call(self, work: Coroutine[Any, Any, Any]) -> Any:
        future = Future(self.universe)

        async def done() -> None:
            try:
                future.set_result(await work)
            except BaseException as error:
                future.set_exception(error)

        self._portal_call_soon(done())
        return future.result()

    def _portal_call_soon(self, work: Coroutine[Any, Any, Any]) -> None:
        loop = self._current().loop
        loop.call_soon_threadsafe(lambda: loop.create_task(work))

    def _set_time(self) -> None:
        universe = self.universe

        def wall_us() -> int:
            machine = universe.current.machine if universe.current else ""
            return START_US + int(universe.now_s * 1e6) + self.skew_us.get(machine, 0)

        time.monotonic = time.perf_counter = lambda: universe.now_s  # type: ignore[assignment]
        time.time = lambda: wall_us() / 1e6  # type: ignore[assignment]
        time.time_ns = lambda: wall_us() * 1_000  # type: ignore[assignment]

    def _set_chance(self) -> None:
        rng = self.universe.rng
        random.seed(rng.random())
        os.urandom = rng.randbytes  # type: ignore[assignment]
        random._urandom = rng.randbytes  # type: ignore[attr-defined]
        secrets.token_bytes = lambda count=32: rng.randbytes(count)  # type: ignore[assignment]

    def _current(self) -> Process:
        assert self.universe.current is not None
        return self.universe.current

    def _files(self) -> Disk:
        return self.disks[self._current().machine]

    def _lock(self, path: Path) -> int:
        fd = _REAL_LOCK(path)
        process = self._current()
        process.at_end.append(lambda: _close_if_locked(fd, path / "lock"))
        return fd

    # -- LMDB: a process can have an environment open once, and ours has all -----------------------------------

    def _open_store(self, path: str, **options: Any) -> _SharedStore:
        process = self._current()
        key = process.name, os.path.realpath(path)
        shared = self._stores.get(key)
        if shared is None or not shared.is_open:
            options |= {"readonly": False, "sync": False, "metasync": False}
            shared = self._stores[key] = _SharedStore(_REAL_OPEN(path, **options))
            process.at_end.append(shared.end)
        shared.users += 1
        return shared


async def _until_ended(process: Process, main: Callable[[], Any]) -> None:
    try:
        await main()
    except Exception as error:
        process.universe.note_end(process.name, error)
    else:
        process.universe.trace("ended", process.name)
    process.kill()


class _LockOfProcess:
    """A lock of a module, of which each process has its own."""

    def __init__(self, current: Callable[[], Process]) -> None:
        self._current = current

    def _of(self) -> RLock:
        process = self._current()
        lock: RLock = process.__dict__.setdefault("module_lock", RLock(process.universe))
        return lock

    def __enter__(self) -> RLock:
        return self._of().__enter__()

    def __exit__(self, *_: object) -> None:
        self._of().__exit__()


def _close_if_locked(fd: int, path: Path) -> None:
    """Closes a descriptor that a killed process has left open, unless it was closed and is somebody else's now."""
    try:
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            os.close(fd)
    except OSError:
        pass


class _SharedStore:
    """An LMDB environment that several parts of a process have open, as several processes would."""

    def __init__(self, env: lmdb.Environment) -> None:
        self._env = env
        self.users = 0
        self.is_open = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def __enter__(self) -> _SharedStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """One of them is done."""
        self.users -= 1
        if self.users <= 0:
            self.end()

    def end(self) -> None:
        """All are."""
        if self.is_open:
            self.is_open = False
            self._env.close()


class _Checkpointer:
    """In the place of :class:`understudy.common.checkpoint_process.Checkpointer`."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self._store = Path()

    def start(self, store: Path, lock_fd: int | None) -> None:
        """Is ready."""
        self.pid, self._store = 1, store

    def run(self, parts: Iterable[CheckpointJob]) -> CheckpointResult:
        """Writes one, at one moment."""
        environment = open_environment(self._store, readonly=False)
        try:
            job = [CheckpointJob.FromString(part.SerializeToString()) for part in parts]
            return apply_checkpoint(environment, iter(job))
        finally:
            environment.close()

    def close(self) -> None:
        """Nothing to do."""
        self.pid = None
