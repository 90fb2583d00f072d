"""Copies that are not on their server's history, and what a reset has made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from harness import DEADLINE_S, Process, Processes, wait_until
from nodes import copy_node, put

from understudy.client import Add, Operation, Put, Realm, Update, connect
from understudy.client.local_store import LocalStore
from understudy.v1 import local_pb2

BASE = {b"base": b"1", b"doomed": b"1", b"count": b"10"}
# What is queued here while the server gets another history, and what is there afterwards.
QUEUED: list[Sequence[Operation]] = [
    [Put(b"mine", b"1"), Update(b"doomed", b"2")],
    [Add(b"count", 1)],
    [Update(b"base", b"2")],
]
THEIRS = {b"base": b"theirs", b"count": b"100"}
RECOVERED = {b"base": b"2", b"count": b"101", b"mine": b"1"}
READ_HERE = {b"base": b"2", b"doomed": b"2", b"count": b"11", b"mine": b"1"}


def seed(address: str, directory: Path, path: str = "/realm") -> None:
    """A copy that is in step with the server, with nothing in its queue."""
    with Realm.open(path, server=address, directory=directory, local_durability="relaxed") as realm:
        realm.commit([Put(key, value) for key, value in BASE.items()])
        realm.wait_for_upload(DEADLINE_S)


def queue(directory: Path, path: str = "/realm") -> None:
    """Own changes that are made offline."""
    with Realm.open(path, server=None, directory=directory, local_durability="relaxed") as realm:
        for operations in QUEUED:
            realm.commit(operations)


def recreate(address: str, path: str = "/realm") -> None:
    """Drops a realm on the server, and begins another one under its name."""
    with connect(address) as server:
        server.drop_realm(path)
    put(address, path, *THEIRS.items())


def needs_reset(address: str, directory: Path, path: str = "/realm") -> None:
    """A copy with a queue, of a realm that was dropped and begun anew."""
    seed(address, directory, path)
    queue(directory, path)
    recreate(address, path)


class Restored:
    """A primary in whose place an older copy of its data directory can be started."""

    def __init__(self, processes: Processes, folder: Path) -> None:
        self._processes = processes
        self._folder = folder
        self._data = folder / "data"
        self.process: Process = processes.primary(self._data)
        self.address = self.process.address

    def back_up(self) -> None:
        """Copies the directory as it is now, and goes on."""
        assert self.process.terminate() == 0
        copy_node(self._data, self._folder / "backup")
        self._start()

    def restore(self) -> None:
        """Forgets everything since :meth:`back_up`."""
        self.process.kill()
        self._data = self._folder / "backup"
        self._start()

    def _start(self) -> None:
        self.process = self._processes.primary(self._data, "--listen", self.address)


def change_row(
    directory: Path, change: Callable[[local_pb2.LocalRealm], object], path: str = "/realm"
) -> None:
    """Changes a realm's row by hand."""
    with LocalStore.open(directory) as store:
        local = store.realm(path, create=False)
        row = local_pb2.LocalRealm()
        row.CopyFrom(local.row)
        change(row)
        with store.file.writing() as writing:
            writing.txn.put(path.encode(), row.SerializeToString(), db=writing.environment.realms)


def row_of(directory: Path, path: str = "/realm") -> local_pb2.LocalRealm:
    """A realm's row in a directory that this process does not have open."""
    with LocalStore.open(directory, read_only=True) as store:
        return store.realm(path, create=False).row


def kept_in(directory: Path) -> list[Path]:
    """The copies that resets have kept, with whatever else is there."""
    folder = directory / "recovered"
    return sorted(folder.iterdir()) if folder.exists() else []


def read_kept(kept: Path, path: str = "/realm") -> tuple[dict[bytes, bytes], int]:
    """All that a kept copy shows to whoever opens it, and how many changes are in its queue."""
    with Realm.open(path, server=None, directory=kept, read_only=True) as realm:
        return dict(realm.scan()), realm.state.pending_changes


def read_local(directory: Path, path: str = "/realm") -> dict[bytes, bytes]:
    """All that a local copy shows."""
    with Realm.open(path, server=None, directory=directory, read_only=True) as realm:
        return dict(realm.scan())


def settled(realm: Realm) -> dict[bytes, bytes]:
    """All that the realm shows once it is in step with the server, and no reset is under way."""
    realm.wait_for_download(DEADLINE_S)
    realm.wait_for_upload(DEADLINE_S)
    wait_until(lambda: realm.state.reset is None)
    return dict(realm.scan())
