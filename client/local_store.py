"""A client's directory: local copies of any number of realms, with the changes that are to be uploaded.

What belongs together changes in one LMDB transaction, so that whatever happens to process or machine, a copy, its
position and its queue fit together. Memory follows only once the transaction is through.
"""

from __future__ import annotations

from pathlib import Path

from understudy.client import local_layout as layout
from understudy.client import local_owner
from understudy.client.local_file import LocalFile, Writing
from understudy.client.local_layout import prefix, prefix_end
from understudy.client.local_realm import LocalRealm
from understudy.client.local_types import Applied, ForeignChange, Queued, Received
from understudy.client.local_view import LocalView
from understudy.common.client_ids import new_client_id
from understudy.common.errors import UnknownRealm, UsageError
from understudy.common.types import check_realm_path, new_id
from understudy.v1 import local_pb2, replication_pb2

__all__ = ["Applied", "ForeignChange", "LocalRealm", "LocalStore", "LocalView", "Queued", "Received"]


class LocalStore:
    """An open directory. May be used from any thread.

    Attributes:
        directory: where it is.
        lock: held while a commit becomes visible, and while a view begins.
        met: who makes new changes, and which cluster and epoch were met; never changed in place.
        run: this opening's id.
        previous_run: that of the opening before; empty at the first.
        was_copied: it lies elsewhere than when it was opened last, so new changes have got a new client id.
    """

    def __init__(self, file: LocalFile) -> None:
        self.file = file
        self.directory = file.path
        self.lock = file.lock
        with file.reading() as txn:
            raw = txn.get(layout.DIRECTORY_KEY, b"", db=file.environment.meta)
            self.met = layout.parsed(local_pb2.LocalDirectory, raw, file.path)
        self.run = self.met.run
        self.previous_run = b""
        self.was_copied = False
        self._realms: dict[str, LocalRealm] = {}

    @classmethod
    def open(cls, directory: Path, *, durability: str = "durable", read_only: bool = False) -> LocalStore:
        """Opens a directory; one that is absent or empty is made.

        Args:
            directory: where local copies are, or will be.
            durability: ``durable``: what was committed survives a power loss; ``relaxed``: it survives the end of
                the process, and a power loss may take the last seconds.
            read_only: nothing is changed, and another process may have it open at the same time.

        Raises:
            UsageError: there is no such durability.
            DirectoryInUse, NotADataDirectory, NewerFormat, DirectoryError, CorruptionError, DiskFull, StorageFailed.
        """
        if durability not in ("durable", "relaxed"):
            raise UsageError(f"no durability {durability!r}", remedy="choose durable or relaxed")
        file = (
            LocalFile.open_to_read(directory)
            if read_only
            else LocalFile.open(directory, sync=durability == "durable")
        )
        try:
            store = cls(file)
            if not read_only:
                store._begin_run()
        except BaseException:
            file.close()
            raise
        return store

    def _begin_run(self) -> None:
        self.previous_run, self.run = self.met.run, new_id()
        place = local_owner.place(self.directory)
        self.was_copied = self.met.place not in ("", place)
        met = self._met_copy()
        met.run, met.place = self.run, place
        with self.file.writing() as writing:
            if self.was_copied:
                self._change_client(writing, met)
            self._put_met(writing, met)
        self.sync()  # a server is told of it at once

    @staticmethod
    def is_in_use(directory: Path) -> int | None:
        """The id of the process that has the directory open (0: it does not say); None where none has."""
        return local_owner.owner_pid(directory)

    def close(self) -> None:
        """Closes all views, puts everything on disk, and gives the directory up."""
        self.file.close()

    def __enter__(self) -> LocalStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- who we are, and whom we have met --------------------------------------------------------------------

    @property
    def client(self) -> bytes:
        """Who makes new changes."""
        return self.met.client

    def set_met(self, cluster: bytes, epoch: int, proof: replication_pb2.EpochProof | None = None) -> None:
        """Notes the cluster that was met, and the highest epoch there."""
        with self.file.writing() as writing:
            met = self._met_copy()
            met.cluster, met.epoch = cluster, epoch
            met.ClearField("proof")
            if proof is not None:
                met.proof.CopyFrom(proof)
            self._put_met(writing, met)

    def new_client(self) -> bytes:
        """Takes a new id for new changes, of all realms; what is in queues keeps the id that it has."""
        with self.file.writing() as writing:
            met = self._met_copy()
            self._change_client(writing, met)
            self._put_met(writing, met)
        self.sync()
        return met.client

    def _change_client(self, writing: Writing, met: local_pb2.LocalDirectory) -> None:
        met.client = new_client_id(met.secret)
        for path in self.paths():
            self.realm(path).begin_client(writing)

    def _met_copy(self) -> local_pb2.LocalDirectory:
        met = local_pb2.LocalDirectory()
        met.CopyFrom(self.met)
        return met

    def _put_met(self, writing: Writing, met: local_pb2.LocalDirectory) -> None:
        writing.txn.put(layout.DIRECTORY_KEY, met.SerializeToString(), db=writing.environment.meta)
        writing.then(lambda: setattr(self, "met", met))

    def take_ids(self, writing: Writing, count: int) -> int:
        """The first of so many numbers in a row, for copies and realms, that were never used before."""
        met = self._met_copy()
        first = met.next_copy_id
        met.next_copy_id += count
        self._put_met(writing, met)
        return first

    # -- realms ----------------------------------------------------------------------------------------------

    def paths(self) -> list[str]:
        """All realms, as the application calls them, in order."""
        with layout.row_errors(self.directory), self.file.reading() as txn:
            return [key.decode() for key, _ in txn.cursor(self.file.environment.realms)]

    def realm(self, path: str, *, create: bool = True) -> LocalRealm:
        """The realm of that path, the same object each time.

        Raises:
            BadRealmPath: that is no path.
            UnknownRealm: there is none, and none is to be made.
        """
        found = self._realms.get(path)
        if found is not None:
            return found
        check_realm_path(path)
        with self.file.turn:
            if path not in self._realms:
                self._realms[path] = self._read_realm(path) or self._new_realm(path, create=create)
            return self._realms[path]

    def _read_realm(self, path: str) -> LocalRealm | None:
        with self.file.reading() as txn:
            raw = txn.get(path.encode(), db=self.file.environment.realms)
            return None if raw is None else LocalRealm.read(self, path, raw, txn)

    def _new_realm(self, path: str, *, create: bool) -> LocalRealm:
        if not create or self.file.is_read_only:
            raise UnknownRealm(f"there is no local copy of {path} in {self.directory}")
        with self.file.writing_again() as writing:  # an own change's commit, behind it, is synced
            number = self.take_ids(writing, 2)
            row = local_pb2.LocalRealm(
                id=number,
                copy=local_pb2.LocalCopy(id=number + 1, path="" if "~" in path else path),
                next_number=self._numbers_used(writing) + 1,
            )
            writing.txn.put(path.encode(), row.SerializeToString(), db=writing.environment.realms)
        return LocalRealm(self, path, row)

    @staticmethod
    def _numbers_used(writing: Writing) -> int:
        """The highest number that a realm may have used that is forgotten."""
        return int.from_bytes(writing.txn.get(layout.NUMBERS_KEY, b"", db=writing.environment.meta), "big")

    def forget(self, path: str) -> None:
        """Drops the local copy of a realm with all that is in its queue.

        Its numbers are not used again: the server has seen some, and would take new changes for old ones.

        Raises:
            UnknownRealm: there is none.
        """
        with self.file.turn:
            realm = self.realm(path, create=False)
            with self.file.writing() as writing:
                used = max(self._numbers_used(writing), realm.row.next_number - 1)
                writing.txn.put(layout.NUMBERS_KEY, prefix(used), db=writing.environment.meta)
                realm.delete(writing)
                writing.then(lambda: self._realms.pop(path))

    # -- housekeeping ----------------------------------------------------------------------------------------

    def sweep(self, rows_max: int = 10_000) -> bool:
        """Deletes up to ``rows_max`` rows of copies that were replaced; whether there are more."""
        self.file.check_writable()
        with self.file.reading() as txn:  # there is nothing behind nearly every load
            if not txn.cursor(self.file.environment.sweeping).first():
                return False
        with self.file.writing_again() as writing:
            copies = writing.txn.cursor(writing.environment.sweeping)
            copies.first()
            number = int.from_bytes(copies.key(), "big")
            cursor = writing.txn.cursor(writing.environment.data)
            rows, _ = layout.delete_rows(cursor, prefix(number), prefix_end(number), rows_max=rows_max)
            if rows == rows_max:
                return True
            copies.delete()
            return copies.first()

    def compact(self) -> tuple[int, int]:
        """Gives free space inside the file back to the system; returns its size before and after, in bytes.

        Raises:
            UsageError: a view is open.
            DirectoryInUse: another process reads the directory.
            DiskFull: there is no room for the smaller file beside the old one; nothing has changed.
        """
        with self.file.turn:
            met = self._met_copy()
            sizes = self.file.compact(met)
            self.met = met
            return sizes

    def sync(self) -> None:
        """Puts everything that was committed on disk."""
        self.file.sync()
