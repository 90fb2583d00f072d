"""One realm of a client's directory: the copy of the server's state, and the own changes on top of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from understudy.client import local_load, local_tail
from understudy.client.local_changes import Checked, checked, go_on, look_back, write_changes
from understudy.client.local_export import export
from understudy.client.local_file import Writing
from understudy.client.local_rows import RealmRows
from understudy.client.local_types import Applied, ForeignChange, Received
from understudy.client.local_view import LocalView
from understudy.client.overlay import Overlay
from understudy.common.errors import UsageError
from understudy.common.operations import DELETE_RANGE
from understudy.v1 import local_pb2, log_pb2, sync_pb2

_CONTACT_WRITTEN_EVERY_US: Final = 60_000_000


class LocalRealm(RealmRows):
    """A realm, from :meth:`LocalStore.realm`. May be used from any thread.

    Everything that changes it is one LMDB transaction, and raises :class:`DiskFull` (nothing has changed; it can be
    tried again), :class:`StorageFailed` (the directory can't be written to until it is opened anew), or
    :class:`UnknownRealm` once the realm was forgotten.
    """

    # -- what it is ------------------------------------------------------------------------------------------

    def locator(self) -> list[sync_pb2.RealmPosition]:
        """The copy's head and positions receding from it; none where nothing was received."""
        copy = self._row.copy
        if not copy.version:
            return []
        return [sync_pb2.RealmPosition(version=copy.version, digest=copy.head), *copy.earlier]

    def view(self) -> LocalView:
        """What an application sees at this moment; must be closed."""
        return self._file.view(self._open_view)

    def _open_view(self) -> LocalView:
        overlay = self._queue.overlay_for_view()
        try:
            return self._view_of(self._row.copy, overlay, len(self._queue))
        except BaseException:
            self._queue.view_closed(overlay)
            raise

    def incoming_view(self) -> LocalView:
        """What was loaded beside the copy, without the queue; must be closed."""
        return self._file.view(lambda: self._view_of(self._row.incoming, Overlay(), 0))

    def _view_of(self, copy: local_pb2.LocalCopy, overlay: Overlay, pending: int) -> LocalView:
        self._check_here()
        return LocalView(
            self._file.environment, self.path, copy, overlay, pending=pending, on_close=self._view_closed
        )

    def _view_closed(self, view: LocalView) -> None:
        with self._file.lock:
            self._file.forget_view(view)
            self._queue.view_closed(view.overlay)

    # -- what a server sends -----------------------------------------------------------------------------------

    def note_bound(self, bound: sync_pb2.RealmBound, *, cluster: bytes) -> None:
        """Notes what a server said of a realm whose changes follow: of one without changes, whose copy this will be."""
        with self._file.turn:
            row = self._copied_row()
            if not row.copy.version:
                row.copy.cluster, row.copy.path = cluster, bound.path
            # A realm that came home has another id and other LSNs than before, and the server goes by its own.
            row.copy.realm_id = bound.realm_id
            if row.copy.version and bound.lsn:
                row.copy.lsn, row.copy.epoch = bound.lsn, bound.epoch
            if row != self.row:
                with self._file.writing_again() as writing:
                    self._check_here()
                    self._put_row(writing, row)
        self.touch(bound.time_us)

    def apply(
        self, changes: Sequence[Received], *, lsn: int, epoch: int, time_us: int, safe_version: int
    ) -> list[Applied]:
        """Applies consecutive changes: to the state that is being loaded, if one is, else to the copy.

        Own changes leave the queue, unless a state is being loaded: until it takes the copy's place they are nowhere
        else.

        Args:
            changes: what follows the copy's head.
            lsn: of the last one.
            epoch: of the server that sent them.
            time_us: the log's time.
            safe_version: up to here the realm is safe on a replica.

        Raises:
            ProtocolError: they don't follow; nothing has changed.
            ForeignChange: one has an own name and is not ours; nothing has changed.
        """
        with self._receiving() as (writing, row):
            is_loading = bool(row.incoming.id)
            copy = row.incoming if is_loading else row.copy
            follow = checked(changes, copy)
            ours = self._ours(follow, row.next_number)
            write_changes(writing.txn, writing.environment.data, copy, follow)
            if follow:
                go_on(copy, follow, lsn=lsn, epoch=epoch)
            if not is_loading:
                self._unqueue(writing, row, sorted({number for number in ours if number}))
                self._confirm(row, follow, time_us)
                local_tail.note_safe(writing.txn, writing.environment.tail, row, safe_version)
                local_tail.keep(writing.txn, writing.environment.tail, row, follow)
            _heard(row, time_us)
        return [
            _applied(one.change, own=bool(number) and not is_loading)
            for one, number in zip(follow, ours, strict=True)
        ]

    def _ours(self, follow: Sequence[Checked], next_number: int) -> list[int]:
        """The changes' numbers in the queue; 0 for one that is not there."""
        client = self.store.client
        return [
            one.change.number if self._queue.matches(one.change, client, next_number) else 0 for one in follow
        ]

    def _confirm(self, row: local_pb2.LocalRealm, follow: Sequence[Checked], time_us: int) -> None:
        client = self.store.client
        number = max((one.change.number for one in follow if one.change.client == client), default=0)
        if number > row.confirmed:
            row.confirmed, row.confirmed_us = number, time_us

    def begin_load(self, bound: sync_pb2.RealmBound, *, cluster: bytes) -> None:
        """Begins to load a state beside the copy; what was loaded before goes."""
        with self._receiving() as (writing, row):
            self._discard(writing, row.incoming)
            number = self.store.take_ids(writing, 1)
            row.incoming.CopyFrom(local_load.begun(number, bound, cluster))
            _heard(row, bound.time_us)

    def load_page(self, page: sync_pb2.StatePage, *, epoch: int) -> None:
        """Adds a page to the state that is being loaded, and leaves it beside the copy.

        Raises:
            ProtocolError: it does not go on where the state ends; nothing has changed.
        """
        with self._receiving() as (writing, row):
            changes = self._add_page(writing, row, page, epoch)
            # Not on disk: until the state takes the copy's place, another opening is sent a last page again.
            writing.then(lambda: setattr(self, "_loaded_changes", changes))

    def _add_page(
        self, writing: Writing, row: local_pb2.LocalRealm, page: sync_pb2.StatePage, epoch: int
    ) -> list[Checked]:
        """Adds a page; returns the signed changes that came with the last one."""
        local_load.add_page(writing.txn, writing.environment.data, row.incoming, page, epoch)
        _heard(row, page.time_us)
        return local_load.last_changes(row.incoming, page) if page.last else []

    def finish_load(self, page: sync_pb2.StatePage, last_numbers: Mapping[bytes, int], *, epoch: int) -> None:
        """Adds the last page, and has the loaded state take the copy's place, unless a reset waits to do that.

        Args:
            page: the last one.
            last_numbers: by client id, up to where own changes are in that state; they leave the queue.
            epoch: of the server that sent it.

        Raises:
            UsageError: it is not the last page.
            ProtocolError: it does not go on where the state ends; nothing has changed.
            ForeignChange: more changes of the present id are in it than were made; nothing has changed.
        """
        with self._file.turn:
            if _is_reset_due(self._row):
                self.load_page(page, epoch=epoch)
                return
            last = last_numbers.get(self.store.client, 0)
            if last >= self._next_number:
                raise ForeignChange(
                    f"the server has change {last}, made elsewhere with the id that we use",
                    self.store.client,
                    first=1,
                    last=last,
                )
            with self._changing() as (writing, row):
                changes = self._add_page(writing, row, page, epoch)
                self._swap(writing, row, changes)
                self._unqueue(writing, row, self._queue.numbers_up_to(last_numbers))
                if last > row.confirmed:
                    row.confirmed, row.confirmed_us = last, row.contact_us

    def _swap(self, writing: Writing, row: local_pb2.LocalRealm, changes: Sequence[Checked]) -> None:
        """Puts the loaded state in the copy's place, and the changes that came with it in that of its tail."""
        if not local_load.is_complete(row.incoming):
            raise UsageError(f"the state of {self.path} is not loaded yet")
        self._discard(writing, row.copy)
        row.copy.CopyFrom(row.incoming)
        row.copy.loading = False
        row.copy.frontier = b""
        row.ClearField("incoming")
        local_tail.clear(writing.txn, writing.environment.tail, row)
        if changes and changes[-1].digest == row.copy.head:  # else others have come behind them
            look_back(row.copy, changes)
            local_tail.keep(writing.txn, writing.environment.tail, row, changes)
        writing.then(lambda: setattr(self, "_loaded_changes", []))

    def drop_incoming(self) -> None:
        """Gives up the state that is being loaded."""
        with self._changing() as (writing, row):
            self._discard(writing, row.incoming)
            row.ClearField("incoming")

    def touch(self, time_us: int) -> None:
        """Notes that a server was heard at that time of the log; written once a minute."""
        with self._file.turn:
            if _is_reset_due(self._row):
                return
            if time_us - self._contact_written_us >= _CONTACT_WRITTEN_EVERY_US:
                with self._receiving() as (_, row):
                    row.contact_us = time_us
            elif time_us > self._row.contact_us:
                row = self._copied_row()
                row.contact_us = time_us
                with self._file.lock:
                    self._row = row

    # -- the tail ----------------------------------------------------------------------------------------------

    def tail(self, from_version: int, *, bytes_max: int) -> list[Received]:
        """Kept changes from that version on, oldest first; none where it is not kept."""
        with self._moment() as (txn, row):
            return local_tail.read(txn, self._file.environment.tail, row, from_version, bytes_max)

    def set_safe(self, version: int) -> None:
        """Notes that the realm is safe on a replica up to that version."""
        if version <= self._row.safe_version:
            return
        with self._receiving() as (writing, row):
            local_tail.note_safe(writing.txn, writing.environment.tail, row, version)

    # -- a reset -----------------------------------------------------------------------------------------------

    def set_reset(self, record: local_pb2.ResetRecord | None) -> None:
        """Notes how far a reset has come; None: to its end."""
        with self._changing() as (_, row):
            row.ClearField("reset")
            if record is not None:
                row.reset.CopyFrom(record)

    def swap_reset(
        self,
        queue: Sequence[tuple[int, bytes, Sequence[log_pb2.Operation]]],
        record: local_pb2.ResetRecord,
        *,
        replaced_to: int,
    ) -> None:
        """Ends a reset: the loaded state takes the copy's place, with another queue on top.

        Args:
            queue: number, client and operations of each change, by rising numbers.
            record: what is noted of the reset now.
            replaced_to: changes in the queue up to this number go; what was made since stays.

        Raises:
            UsageError: the last page has not come, or a number is that of a change which stays.
        """
        with self._changing() as (writing, row):
            # Of another history, of which this one knows nothing.
            row.confirmed = row.sent = row.confirmed_us = row.safe_version = 0
            self._swap(writing, row, self._loaded_changes)
            old = [one.number for one in self._queue.all() if one.number <= replaced_to]
            self._unqueue(writing, row, old)
            self._requeue(writing, row, queue)
            row.reset.CopyFrom(record)

    def copy_to(self, directory: Path) -> None:
        """Writes copy and queue of this realm to a directory of its own, unless it was done before."""
        with self._moment() as (txn, row):
            export(self._file.environment, txn, self.store.met, self.path, row, directory)


def _is_reset_due(row: local_pb2.LocalRealm) -> bool:
    return row.HasField("reset") and not row.reset.swapped


def _heard(row: local_pb2.LocalRealm, time_us: int) -> None:
    """Notes contact, but not while a copy is to be given up: a server that has forgotten us has to see that again."""
    if not _is_reset_due(row):
        row.contact_us = max(row.contact_us, time_us)


def _applied(change: log_pb2.Change, *, own: bool) -> Applied:
    keys, ranges = [], []
    for operation in change.operations:
        if operation.kind == DELETE_RANGE:
            ranges.append((operation.key, operation.end))
        else:
            keys.append(operation.key)
    return Applied(change.client, change.number, own, change.version, keys, ranges)
