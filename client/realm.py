"""Synced realms: a local copy that is read and written at once, offline too, and kept in step with a server."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

from understudy.client import open_directory
from understudy.client.local_view import LocalView
from understudy.client.open_directory import DirectorySettings, OpenDirectory
from understudy.client.open_realm import OpenRealm, ResetPolicy
from understudy.client.realm_state import Change, ConnectionState, LoadProgress, RealmState, ResetState
from understudy.client.recovery import Recovery
from understudy.client.reset_table import MODES, reason_name
from understudy.client.sync_thread import SyncThread, check_not_callback
from understudy.common.arguments import check_bounds, check_limit, check_timeout_or_none, parse_addresses
from understudy.common.credentials import Credentials, Token
from understudy.common.errors import (
    BadOperation,
    OutcomeUnknown,
    PeerUnreachable,
    Unavailable,
    UnderstudyError,
    UsageError,
)
from understudy.common.operations import Operation, to_protos
from understudy.common.transaction import TransactionBuilder
from understudy.common.types import check_key, check_realm_path

TIMEOUT_S = 30.0

_T = TypeVar("_T")

ResetMode = Literal["recover_or_discard", "recover", "discard", "manual"]
LocalDurability = Literal["durable", "relaxed"]


class LocalTransaction(TransactionBuilder):
    """Collects operations, which take effect here when the ``with`` block ends; ``number`` is there afterwards.

    There is no receipt: version and digest are the server's to give.
    """

    _number: int | None = None

    @property
    def number(self) -> int:
        """This directory's number for it.

        Raises:
            BadOperation: it was not committed (yet).
        """
        if self._number is None:
            raise BadOperation("no number: the transaction was not committed")
        return self._number

    def queued(self, number: int) -> None:
        """Notes the number."""
        self._number = number


class Realm:
    """A realm's local copy, open. Any number of threads may share one; made by :meth:`open`.

    Reads see the copy and, on top of it, what was committed here and has not come back from the server yet. Writes take
    effect here at once. With a server, a thread in the background sends them and receives everybody's changes in the
    server's order.

    A fork of the process may not use it: all calls raise :class:`UsageError` there, as they do after :meth:`close`.
    """

    def __init__(self, directory: OpenDirectory, realm: OpenRealm) -> None:
        self._directory = directory
        self._open_realm = realm
        self._subscriptions: list[Callable[[], None]] = []
        self._closed = False

    @classmethod
    def open(
        cls,
        path: str,
        *,
        server: str | None,
        directory: str | os.PathLike[str],
        on_reset: ResetMode = "recover_or_discard",
        before_reset: Callable[[LocalView], None] | None = None,
        after_reset: Callable[[LocalView, LocalView, Recovery], None] | None = None,
        on_change: Callable[[Change], None] | None = None,
        on_error: Callable[[UnderstudyError], None] | None = None,
        local_durability: LocalDurability = "durable",
        ca: str | os.PathLike[str] | None = None,
        cert: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        token: Token | None = None,
        read_only: bool = False,
    ) -> Realm:
        """Opens a realm's local copy; one that is not there yet is made, empty, and loaded in the background.

        Args:
            path: the realm's; ``~`` in it stands for the user's id.
            server: ``"HOST:PORT"``, or several with commas between them; None: not synced.
            directory: where local copies are kept. Those of one directory share file, thread and connection.
            on_reset: what happens to the copy where it is not on the server's history: ``recover`` replays what was
                not uploaded over the server's state; ``discard`` does not; ``recover_or_discard`` does where it can;
                ``manual`` leaves everything as it is and raises :class:`ClientReset`.
            before_reset: called with a view of the copy before it is given up.
            after_reset: called with views of the old copy and of what takes its place, and with what of the queue was
                made again.
            on_change: see :meth:`on_change`.
            on_error: see :meth:`on_error`.
            local_durability: ``durable``: a transaction that was committed here survives a power loss; ``relaxed``: it
                survives the end of this process, and a power loss may take the last seconds.
            ca, cert, key, token: as for :func:`connect`.
            read_only: looks only, also while another process has the directory open; without a server.

        Raises:
            UsageError: a bad argument, or the directory is open in this process with others, or this is a callback.
            DirectoryInUse: another process has it open.
            DirectoryError, CorruptionError, DiskFull: it can't be used.
        """
        check_not_callback()
        _check_choice("on_reset", on_reset, MODES)
        _check_choice("local_durability", local_durability, ("durable", "relaxed"))
        if read_only and server is not None:
            raise UsageError("what is read only can't be synced", remedy="give server=None")
        settings = DirectorySettings(
            addresses=() if server is None else tuple(parse_addresses(server)),
            durability=local_durability,
            read_only=read_only,
            credentials=Credentials.given(ca=ca, cert=cert, key=key, token=token),
        )
        policy = ResetPolicy(mode=on_reset, before=before_reset, after=after_reset)
        opened, realm = open_directory.attach(directory, check_realm_path(path), settings, policy)
        found = cls(opened, realm)
        if on_change is not None:
            found.on_change(on_change)
        if on_error is not None:
            found.on_error(on_error)
        open_directory.start(opened, realm)  # only now, so that they miss nothing
        return found

    def close(self) -> None:
        """Lets go of the realm; the last one of a directory ends syncing there. What is queued stays.

        Raises:
            UsageError: this is a callback.
        """
        if self._closed or os.getpid() != self._directory.process:
            return
        check_not_callback()
        self._closed = True
        if self._directory.thread is not None:
            self._directory.thread.notify()
        open_directory.detach(self._directory, self._open_realm)
        for unsubscribe in self._subscriptions:
            unsubscribe()

    def __enter__(self) -> Realm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> str:
        """As it was opened."""
        return self._open_realm.path

    def _opened(self) -> OpenRealm:
        self._directory.check_process()
        if self._closed:
            raise UsageError(f"{self.path} is closed", remedy="open it again")
        return self._open_realm

    # -- writing -------------------------------------------------------------------------------------------------

    def commit(self, operations: Iterable[Operation]) -> int:
        """Commits one transaction here, to be uploaded later; returns this directory's number for it.

        Raises:
            UsageError: the transaction can't be.
            Overloaded: too much waits to be uploaded.
            DiskFull, StorageFailed.
        """
        realm = self._opened()
        if self._directory.settings.read_only:
            raise UsageError(f"{self.path} was opened to be read only")
        number = realm.realm.commit(to_protos(operations))
        if self._directory.thread is not None:
            self._directory.thread.local_change(realm.path)
        return number

    @contextlib.contextmanager
    def transaction(self) -> Iterator[LocalTransaction]:
        """Collects operations, and commits them when the block ends without an error."""
        builder = LocalTransaction()
        yield builder
        builder.queued(self.commit(builder.end()))

    # -- reading -------------------------------------------------------------------------------------------------

    def view(self) -> LocalView:
        """The realm as it is at this moment, for any number of reads. Must be closed."""
        return self._opened().realm.view()

    def get(self, key: bytes) -> bytes | None:
        """The value at ``key``, or None.

        Raises:
            BadKey.
        """
        check_key(key)
        with self.view() as view:
            return view.get(key)

    def scan(
        self, *, start: bytes = b"", end: bytes = b"", limit: int | None = None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Pairs from ``start`` to before ``end``, in key order, all as of the moment of the first one."""
        check_bounds(start, end)
        check_limit(limit)
        self._opened()
        return self._scan(start, end, limit, reverse)

    def _scan(
        self, start: bytes, end: bytes, limit: int | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        with self.view() as view:
            yield from view.scan(start, end, limit=limit, reverse=reverse)

    def count(self, *, start: bytes = b"", end: bytes = b"") -> int:
        """How many keys there are from ``start`` to before ``end``."""
        check_bounds(start, end)
        with self.view() as view:
            return view.count(start, end)

    # -- what happens in the background --------------------------------------------------------------------------

    def on_change(self, callback: Callable[[Change], None]) -> Callable[[], None]:
        """Calls ``callback`` for each change that comes from the server; returns what ends that.

        Callbacks run on the directory's thread, one after the other, when the change can be read here. They may read
        and commit; they may not open or close realms, or wait. What one raises is logged and given to :meth:`on_error`.
        """
        return self._subscribe(self._opened().on_change, callback)

    def on_error(self, callback: Callable[[UnderstudyError], None]) -> Callable[[], None]:
        """Calls ``callback`` when syncing meets something that does not mend itself; returns what ends that.

        That there is no connection is no error; :attr:`state` tells.
        """
        return self._subscribe(self._opened().on_error, callback)

    def _subscribe(self, callbacks: list[_T], callback: _T) -> Callable[[], None]:
        callbacks.append(callback)

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):  # a second time
                callbacks.remove(callback)

        self._subscriptions.append(unsubscribe)
        return unsubscribe

    @property
    def state(self) -> RealmState:
        """How the realm stands right now."""
        realm, thread = self._opened(), self._directory.thread
        row, incoming = realm.realm.row, realm.realm.row.incoming
        loading = LoadProgress(
            entries=incoming.entries,
            bytes=incoming.bytes,
            expected_entries=incoming.expected_entries,
            expected_bytes=incoming.expected_bytes,
        )
        reset = ResetState(reason=reason_name(row.reset.reason), attempted=row.reset.attempted)
        return RealmState(
            connection=thread.connection if thread is not None else ConnectionState.OFFLINE,
            address=thread.address if thread is not None else None,
            version=row.copy.version,
            server_version=realm.server_version,
            safe_version=row.safe_version,
            tail_dropped=row.tail_dropped,
            pending_changes=row.queue_count,
            pending_bytes=row.queue_bytes,
            loading=loading if incoming.id else None,
            reset=reset if row.HasField("reset") else None,
            error=realm.reset or realm.error or (thread.error if thread is not None else None),
        )

    def wait_for_upload(self, timeout_s: float | None = TIMEOUT_S) -> None:
        """Returns once all that has been committed here so far has been applied by the server, and has come back.

        A reset that is under way is complete then.

        What a reset has dropped is not waited for.

        Raises:
            OutcomeUnknown: not within ``timeout_s``; syncing goes on.
            ClientReset: the copy must be given up first.
            UnderstudyError: why the server takes no changes.
            UsageError: there is no server, or this is a callback.
        """
        realm, thread = self._waiting(timeout_s)
        last = realm.realm.row.next_number - 1

        def is_done() -> bool:
            if realm.realm.row.reset.swapped:
                return False  # complete, and forgotten, only when the copy is up to date as well
            first = realm.realm.queued(0, count_max=1, bytes_max=1)
            return not first or first[0].number > last

        if not self._wait(is_done, thread, timeout_s):
            raise OutcomeUnknown(
                f"{realm.realm.row.queue_count} changes of {self.path} have not come back from the server in time"
                f"{_why(thread)}",
                remedy="they stay in the queue, and go on being sent",
            )

    def wait_for_download(self, timeout_s: float | None = TIMEOUT_S) -> None:
        """Returns once the copy is where the server was when this was called, or later.

        Raises:
            PeerUnreachable: not within ``timeout_s``; syncing goes on.
            ClientReset: the copy must be given up first.
            UnderstudyError: why the server does not give it.
            UsageError: there is no server, or this is a callback.
        """
        realm, thread = self._waiting(timeout_s)
        wanted = thread.refresh(self.path)

        def is_done() -> bool:
            row = realm.realm.row
            if row.HasField("reset") and not row.reset.swapped:
                return False  # what has come is beside the copy that is read
            ticket, version = realm.head
            return ticket >= wanted and row.copy.version >= version

        if not self._wait(is_done, thread, timeout_s):
            raise PeerUnreachable(
                f"{self.path} has not come up to the server in time{_why(thread)}",
                remedy="is the server running, and is the address right?",
            )

    def _waiting(self, timeout_s: float | None) -> tuple[OpenRealm, SyncThread]:
        check_not_callback()
        check_timeout_or_none(timeout_s)
        realm, thread = self._opened(), self._directory.thread
        if thread is None:
            raise UsageError(
                f"{self.path} was opened without a server", remedy="give server= when opening it"
            )
        thread.hurry()
        return realm, thread

    def _wait(self, is_done: Callable[[], bool], thread: SyncThread, timeout_s: float | None) -> bool:
        realm = self._open_realm
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with thread.changed:
            while not is_done():
                error = realm.reset or realm.error or thread.failure or thread.refusal
                if error is not None and not isinstance(error, Unavailable):
                    raise error
                self._opened()
                left_s = None if deadline_s is None else deadline_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return False
                thread.changed.wait(left_s)
        return True

    # -- housekeeping --------------------------------------------------------------------------------------------

    def compact(self) -> tuple[int, int]:
        """Gives free space inside the directory's file back to the system; its size before and after, in bytes.

        Raises:
            UsageError: a view or a scan is open.
            DiskFull: there is no room for the smaller file beside the old one.
        """
        self._opened()
        return self._directory.store.compact()


def _why(thread: SyncThread) -> str:
    return f": {thread.error}" if thread.error is not None else ""


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"bad {name} {value!r:.200}", remedy=f"choose {', '.join(choices)}")
