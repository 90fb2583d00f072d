"""The LMDB environment of a client's directory while it is open: who writes, who reads, and when both agree.

Two locks. Writers take turns, for as long as an LMDB transaction lasts. :attr:`LocalFile.lock` is held just while a
commit becomes visible, in the file and in memory at once, and while a view begins, so that no view sees one without
the other.

A commit of LMDB's takes two syncs, of its pages and of the page that points to them. What a server will send again does
without the second. That is safe, because commits are undone from the last one on or not at all: the pages of each are
synced before it is pointed to, and with them, as they are in the same file, what points to the one before. So a power
loss can undo one such commit, whole, with what left the queue in it and what it put in the copy; nothing that was
committed before it; and nothing at all once a commit that is synced, such as an own change's, has come behind it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import lmdb

from understudy.client import local_layout as layout
from understudy.client import local_owner
from understudy.client.local_layout import Environment, Transaction, local_error, local_errors
from understudy.client.local_view import LocalView
from understudy.common.errors import DirectoryInUse, StorageFailed, UnderstudyError, UsageError
from understudy.common.files import storage_errors, sync_directory
from understudy.common.store_layout import DATA_FILE, LOCK_FILE
from understudy.v1 import local_pb2

_T = TypeVar("_T")


class LocalFile:
    """An open environment. May be used from any thread.

    After an error of the disk other than a full one nothing more is written: what the kernel has dropped nobody
    knows, and the next commit would succeed as if nothing had been.
    """

    def __init__(self, environment: Environment, owner: local_owner.Owner | None, *, sync: bool) -> None:
        self.environment = environment
        self.lock = threading.RLock()
        self.turn = threading.RLock()
        self.path = environment.path
        self.failed: StorageFailed | None = None
        self._owner = owner
        self._sync = sync
        self._reads = 0  # that have begun and not ended, beside views
        self._no_reads = threading.Condition(self.lock)
        self._views: weakref.WeakSet[LocalView] = weakref.WeakSet()
        self._closed = False
        self._reading = contextlib.ExitStack()

    @classmethod
    def open(cls, path: Path, *, sync: bool) -> LocalFile:
        """Takes the directory and opens its environment, which is made if there is none.

        Raises:
            DirectoryInUse, NotADataDirectory, NewerFormat, DirectoryError, CorruptionError, DiskFull, StorageFailed.
        """
        layout.prepare(path)
        owner = local_owner.take(path)
        try:
            if not (path / DATA_FILE).exists():
                layout.create(path)
            elif owner.may_be_damaged:
                layout.check(path)
            file = cls(layout.open_environment(path, readonly=False, sync=sync), owner, sync=sync)
        except BaseException:
            owner.release(clean=False)
            raise
        try:
            file._settle(owner)
        except BaseException:
            file.environment.env.close()
            owner.release(clean=False)
            raise
        return file

    def _settle(self, owner: local_owner.Owner) -> None:
        """Makes good what the last owner, or a reader that was killed, has left."""
        if owner.was_relaxed:
            self._sync_environment()
        with storage_errors("write", self.path):
            owner.declare(relaxed=not self._sync)
        with local_errors("read", self.path):
            self.environment.env.reader_check()

    @classmethod
    def open_to_read(cls, path: Path) -> LocalFile:
        """Opens the environment without changing it; another process may have the directory.

        Raises:
            NotADataDirectory, NewerFormat, DirectoryError, CorruptionError, StorageFailed.
        """
        with contextlib.ExitStack() as stack:
            with storage_errors("read", path):
                if not (path / DATA_FILE).is_file():
                    raise layout.not_ours(path)
                if local_owner.owner_pid(path) == os.getpid():  # LMDB could not tell whose locks are whose
                    raise DirectoryInUse(f"{path} is open in this process", remedy="use what is open already")
                stack.enter_context(local_owner.reading(path))
            file = cls(layout.open_environment(path, readonly=True, sync=True), None, sync=True)
            file._reading = stack.pop_all()
            return file

    @property
    def is_relaxed(self) -> bool:
        """Whether a power loss may take the last seconds."""
        return not self._sync

    @property
    def is_read_only(self) -> bool:
        """Whether nothing can be written."""
        return self._owner is None

    def close(self) -> None:
        """Closes all views, puts everything on disk, and gives the directory up."""
        with self.turn, self.lock:
            if self._closed:
                return
            self._closed = True
            self._no_reads.wait_for(lambda: not self._reads)
            for view in list(self._views):
                view.close()
            try:
                if self._owner is not None and self.failed is None:
                    self._sync_environment()
            finally:
                self.environment.env.close()
                self._reading.close()
                if self._owner is not None:
                    self._owner.release(clean=self.failed is None)

    # -- reading and writing ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        """Keeps the environment open in the block."""
        with self.lock:
            self.check_open()
            self._reads += 1
        try:
            yield
        finally:
            with self._no_reads:
                self._reads -= 1
                self._no_reads.notify_all()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Transaction]:
        """One moment of the environment."""
        with self._using(), local_errors("read", self.path), self.environment.env.begin() as txn:
            yield txn

    def writing(self) -> Writing:
        """One LMDB transaction, on disk at its end unless the directory is relaxed; see :class:`Writing`."""
        return Writing(self, synced=self._sync)

    def writing_again(self) -> Writing:
        """One LMDB transaction which a power loss may undo, of what would simply be done again."""
        return Writing(self, synced=False)

    def view(self, opened: Callable[[], LocalView]) -> LocalView:
        """Opens a view, and closes it with the file if nobody has done so before."""
        with self.lock:
            self.check_open()
            view = opened()
            self._views.add(view)
            return view

    def forget_view(self, view: LocalView) -> None:
        """A view was closed."""
        self._views.discard(view)

    def check_open(self) -> None:
        """Raises UsageError once the file is closed."""
        if self._closed:
            raise UsageError(f"{self.path} was closed", remedy="open it again")

    def check_writable(self) -> None:
        """Refuses to write where nothing may be written, or nothing that is written can be trusted.

        Raises:
            UsageError: it is closed, or opened for reading.
            StorageFailed: an earlier write failed.
        """
        self.check_open()
        if self._owner is None:
            raise UsageError(f"{self.path} is open for reading only", remedy="open it without read_only")
        if self.failed is not None:
            raise StorageFailed(
                self.failed.message, remedy="find out what is wrong with the disk, and restart"
            )

    def translated(self, error: lmdb.Error) -> UnderstudyError:
        """Our error for one that ended a transaction; nothing is written after one of the disk."""
        ours = local_error(error, "write to", self.path)
        if isinstance(ours, StorageFailed):
            self.failed = ours
        return ours

    # -- housekeeping ----------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Puts everything that was committed on disk."""
        with self.turn:
            self.check_writable()
            self._sync_environment()

    def sync_if_relaxed(self) -> None:
        """As :meth:`sync`, where commits don't do that by themselves. Who writes meanwhile does not wait for it."""
        if not self._sync:
            with self._using():
                self.check_writable()
                self._sync_environment()

    def _sync_environment(self) -> None:
        try:
            self.environment.env.sync(True)
        except lmdb.Error as error:
            raise self.translated(error) from error

    def compact(self, directory_row: local_pb2.LocalDirectory) -> tuple[int, int]:
        """Gives free space back to the system; returns the file's size before and after, in bytes.

        Args:
            directory_row: as it is; the place is changed to the new file's.

        Raises:
            UsageError: a view is open.
            DirectoryInUse: another process reads the directory.
            DiskFull: there is no room for the smaller file beside the old one; nothing has changed.
        """
        file = self.path / DATA_FILE
        with self.turn, self.lock:
            self.check_writable()
            self._no_reads.wait_for(lambda: not self._reads)
            if self._views:
                raise UsageError(f"{len(self._views)} views are open", remedy="close them first")
            with storage_errors("compact", file), local_owner.alone(self.path):
                before = file.stat().st_size
                beside = layout.new_beside(self.path)
                try:
                    self._copy(directory_row, beside)
                    self._replace(beside)
                finally:
                    shutil.rmtree(beside, ignore_errors=True)
                return before, file.stat().st_size

    def _copy(self, directory_row: local_pb2.LocalDirectory, beside: Path) -> None:
        with local_errors("compact", self.path):
            self.environment.env.copy(os.fspath(beside), compact=True)
        os.chmod(beside / DATA_FILE, 0o600)
        environment = layout.open_environment(beside, readonly=False, sync=True)
        directory_row.place = local_owner.place(beside)
        with local_errors("compact", self.path), environment.env as env:
            with env.begin(write=True) as txn:
                txn.put(layout.DIRECTORY_KEY, directory_row.SerializeToString(), db=environment.meta)
            env.sync(True)

    def _replace(self, beside: Path) -> None:
        self.environment.env.close()
        try:
            # It counts the old environment's transactions, and would go on doing so for as long as anybody has it
            # open, be it a tool that knows nothing of our locks.
            (self.path / LOCK_FILE).unlink()
            os.rename(beside / DATA_FILE, self.path / DATA_FILE)
            sync_directory(self.path)
        finally:
            self.environment = layout.open_environment(self.path, readonly=False, sync=self._sync)


class Writing:
    """One LMDB transaction, and what changes in memory once it is through.

    A block that raises changes neither.

    Raises:
        UsageError: the file is closed, or opened for reading only.
        DiskFull: nothing has changed, and it can be tried again.
        StorageFailed: it can't, now or later.
    """

    __slots__ = ("_file", "_steps", "_synced", "environment", "txn")

    txn: Transaction

    def __init__(self, file: LocalFile, *, synced: bool) -> None:
        self._file = file
        self._synced = synced
        self._steps: list[Callable[[], object]] = []

    def then(self, step: Callable[[], object]) -> None:
        """Has ``step`` done once everything is committed, before anybody can see it."""
        self._steps.append(step)

    def __enter__(self) -> Writing:
        file = self._file
        file.turn.acquire()
        try:
            file.check_writable()
            self.environment = file.environment
            self.txn = file.environment.env.begin(write=True)
        except lmdb.Error as error:
            file.turn.release()
            raise file.translated(error) from error
        except BaseException:
            file.turn.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        file = self._file
        try:
            if error is None:
                with file.lock:
                    self.txn.commit()
                    if self._synced:
                        self.environment.env.sync(True)
                    for step in self._steps:
                        step()
                return
            self.txn.abort()
            if isinstance(error, lmdb.Error):
                raise file.translated(error) from error
        except lmdb.Error as failed:
            raise file.translated(failed) from failed
        finally:
            file.turn.release()
