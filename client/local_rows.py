"""A realm's rows, and what mirrors them in memory: its row, and the queue of own changes.

Whatever changes is one LMDB transaction; memory follows once that is through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, Self

from understudy.client import local_layout as layout
from understudy.client.local_changes import Checked
from understudy.client.local_file import Writing
from understudy.client.local_layout import Transaction, prefix, prefix_end
from understudy.client.local_queue import LocalQueue, is_meant
from understudy.client.local_types import ForeignChange, Queued
from understudy.common.errors import Overloaded, UnknownRealm, UsageError
from understudy.v1 import local_pb2, log_pb2

if TYPE_CHECKING:
    from understudy.client.local_store import LocalStore

# All of it is in memory as well, in objects several times as large.
QUEUE_BYTES_MAX: Final = 256 << 20


class RealmRows:
    """What :class:`understudy.client.local_realm.LocalRealm` is made of, as far as no server is concerned.

    Attributes:
        is_sending: what is committed now is sent at once. So it is noted as sent together with being queued: a
            transaction of its own for that would be as long as the commit, and the next commit would wait for it.
    """

    def __init__(
        self, store: LocalStore, path: str, row: local_pb2.LocalRealm, queue: Sequence[Queued] = ()
    ) -> None:
        self.path = path
        self.store = store
        self.is_sending = False
        self._file = store.file
        self._key = path.encode()
        self._prefix = prefix(row.id)
        self._row = row
        self._queue = LocalQueue(queue)
        # No row is written when a change is made, so the queue may know of more numbers than the row.
        self._next_number = max(row.next_number, row.confirmed + 1, row.sent + 1, self._queue.last + 1)
        self._is_row_stale = True
        self._contact_written_us = row.contact_us
        self._is_here = True
        # Those that came with the last page of the state beside the copy.
        self._loaded_changes: list[Checked] = []

    @classmethod
    def read(cls, store: LocalStore, path: str, raw: bytes, txn: Transaction) -> Self:
        """The realm that a row tells of, with its queue."""
        row = layout.parsed(local_pb2.LocalRealm, raw, store.directory)
        rows = layout.walk(txn.cursor(store.file.environment.queue), prefix(row.id), prefix_end(row.id))
        queue = []
        for key, value in rows:
            change = layout.parsed(local_pb2.QueuedChange, value, store.directory)
            number = int.from_bytes(key[layout.PREFIX_BYTES :], "big")
            queue.append(Queued(number, change.client, list(change.operations), len(value)))
        return cls(store, path, row, queue)

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def row(self) -> local_pb2.LocalRealm:
        """All numbers, as of now; not to be changed."""
        with self._file.lock:
            if self._is_row_stale:
                self._row, self._is_row_stale = self._copied_row(), False
            return self._row

    def _copied_row(self) -> local_pb2.LocalRealm:
        row = local_pb2.LocalRealm()
        row.CopyFrom(self._row)
        row.next_number = self._next_number
        row.queue_count, row.queue_bytes = len(self._queue), self._queue.bytes
        return row

    def clients(self) -> list[bytes]:
        """Who made the changes in the queue, after the present id."""
        with self._file.lock:
            return self._queue.clients(self.store.client)

    @contextlib.contextmanager
    def _moment(self) -> Iterator[tuple[Transaction, local_pb2.LocalRealm]]:
        """All rows at one moment, and this realm's own."""
        with contextlib.ExitStack() as stack:
            with self._file.lock:
                self._check_here()
                row, txn = self.row, stack.enter_context(self._file.reading())
            yield txn, row

    # -- changing its rows -----------------------------------------------------------------------------------

    def _changing(self) -> contextlib.AbstractContextManager[tuple[Writing, local_pb2.LocalRealm]]:
        """A transaction, and the row to change in it, which is written at the end of the block."""
        return self._row_in(self._file.writing())

    def _receiving(self) -> contextlib.AbstractContextManager[tuple[Writing, local_pb2.LocalRealm]]:
        """The same for what a server has sent, and sends again where a power loss has undone it."""
        return self._row_in(self._file.writing_again())

    @contextlib.contextmanager
    def _row_in(self, transaction: Writing) -> Iterator[tuple[Writing, local_pb2.LocalRealm]]:
        with layout.row_errors(self.store.directory), transaction as writing:
            self._check_here()
            row = self._copied_row()
            yield writing, row
            self._put_row(writing, row)

    def _put_row(self, writing: Writing, row: local_pb2.LocalRealm) -> None:
        writing.txn.put(self._key, row.SerializeToString(), db=writing.environment.realms)
        writing.then(lambda: self._set_row(row))

    def _set_row(self, row: local_pb2.LocalRealm) -> None:
        self._row, self._is_row_stale = row, False
        self._next_number = row.next_number
        self._contact_written_us = row.contact_us

    def _check_here(self) -> None:
        if not self._is_here:
            raise UnknownRealm(f"the local copy of {self.path} was forgotten", remedy="open the realm again")

    def delete(self, writing: Writing) -> None:
        """Removes all rows; those of copies are swept later."""
        environment = writing.environment
        for database in (environment.queue, environment.tail):
            layout.delete_rows(writing.txn.cursor(database), self._prefix, prefix_end(self._row.id))
        for copy in (self._row.copy, self._row.incoming):
            self._discard(writing, copy)
        writing.txn.delete(self._key, db=environment.realms)
        writing.then(lambda: setattr(self, "_is_here", False))

    @staticmethod
    def _discard(writing: Writing, copy: local_pb2.LocalCopy) -> None:
        if copy.entries:
            writing.txn.put(prefix(copy.id), b"", db=writing.environment.sweeping)

    # -- own changes -----------------------------------------------------------------------------------------

    def commit(self, operations: Sequence[log_pb2.Operation]) -> int:
        """Appends a change of operations that were checked to the queue; returns its number.

        Raises:
            Overloaded: the queue is full.
        """
        change = local_pb2.QueuedChange(operations=operations)
        with self._file.writing() as writing:
            self._check_here()
            number = self._next_number
            change.client = self.store.client
            raw = change.SerializeToString()
            self._check_room(len(raw))
            writing.txn.put(self._prefix + prefix(number), raw, db=writing.environment.queue)
            if self.is_sending and not self._file.is_relaxed:  # who is relaxed syncs before anything is sent
                self._note_committed_as_sent(writing, number)
            queued = Queued(number, change.client, list(change.operations), len(raw))
            writing.then(lambda: self._append(queued))
        return number

    def _note_committed_as_sent(self, writing: Writing, number: int) -> None:
        row = self._copied_row()
        row.sent, row.next_number = number, number + 1
        self._put_row(writing, row)

    def _check_room(self, size: int) -> None:
        if self._queue.bytes + size > QUEUE_BYTES_MAX:
            raise Overloaded(
                f"{len(self._queue):,} changes of {self.path} wait for being uploaded, "
                f"{QUEUE_BYTES_MAX >> 20} MiB are the most",
                remedy="connect to a server; writes go on as the queue gets shorter",
            )

    def _append(self, queued: Queued) -> None:
        self._queue.append(queued)
        self._next_number = queued.number + 1
        self._is_row_stale = True

    def queued(self, after_number: int, *, count_max: int, bytes_max: int) -> list[Queued]:
        """Changes behind ``after_number``, oldest first; the first one whatever its size."""
        with self._file.lock:
            return self._queue.after(after_number, count_max=count_max, bytes_max=bytes_max)

    def note_sent(self, number: int) -> None:
        """Notes that changes up to ``number`` are about to be sent; durable, and they are as well, on return.

        Otherwise a power loss could let other changes have their numbers.
        """
        if number <= self._row.sent:
            return
        with self._changing() as (_, row):
            row.sent = max(row.sent, number)
        self._file.sync_if_relaxed()

    def leave_queue(self, client: bytes, numbers: Sequence[int]) -> None:
        """Takes changes out of the queue that a server has applied, though they will not come back."""
        with self._changing() as (writing, row):
            queued = [self._queue.get(number) for number in numbers]
            self._unqueue(writing, row, [one.number for one in queued if one and one.client == client])

    def _unqueue(self, writing: Writing, row: local_pb2.LocalRealm, numbers: Sequence[int]) -> None:
        if not numbers:
            return
        for number in numbers:
            row.queue_bytes -= len(
                writing.txn.pop(self._prefix + prefix(number), db=writing.environment.queue) or b""
            )
        row.queue_count -= len(numbers)
        writing.then(lambda: self._queue.remove(numbers))

    def reidentify(self, client: bytes, foreign: ForeignChange) -> None:
        """Gives changes in the queue another client id: the server has others under the names that they have."""
        with self._changing() as (writing, row):
            queue = writing.environment.queue
            for key, raw in list(layout.walk(writing.txn.cursor(queue), self._prefix, prefix_end(row.id))):
                change = layout.parsed(local_pb2.QueuedChange, raw, self._file.path)
                if is_meant(change.client, int.from_bytes(key[layout.PREFIX_BYTES :], "big"), foreign):
                    change.client = client
                    writing.txn.put(key, change.SerializeToString(), db=queue)
            row.confirmed = row.sent = row.confirmed_us = 0
            writing.then(lambda: self._queue.reidentify(client, foreign))

    def begin_client(self, writing: Writing) -> None:
        """New changes get a new client id, of which nothing was sent or confirmed yet."""
        row = self._copied_row()
        row.confirmed = row.sent = row.confirmed_us = 0
        self._put_row(writing, row)

    def _requeue(
        self,
        writing: Writing,
        row: local_pb2.LocalRealm,
        queue: Sequence[tuple[int, bytes, Sequence[log_pb2.Operation]]],
    ) -> None:
        added = []
        for number, client, operations in queue:
            change = local_pb2.QueuedChange(client=client, operations=operations)
            raw = change.SerializeToString()
            key = self._prefix + prefix(number)
            if not writing.txn.put(key, raw, db=writing.environment.queue, overwrite=False):
                raise UsageError(f"change {number} of {self.path} is in the queue already")
            added.append(Queued(number, client, list(change.operations), len(raw)))
            row.queue_bytes += len(raw)
            row.next_number = max(row.next_number, number + 1)
        row.queue_count += len(added)
        writing.then(lambda: setattr(self, "_queue", self._queue.joined_by(added)))
