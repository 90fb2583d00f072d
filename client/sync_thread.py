"""The thread of a directory that is synced: owns its session, does what the session says, calls the application back.

The shell around :mod:`~understudy.client.sync_session`: the clock, the connection, callbacks. Whatever concerns the
session comes through one inbox, in order.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from understudy.client.local_store import LocalStore
from understudy.client.open_realm import OpenRealm, Resetter
from understudy.client.realm_state import ConnectionState
from understudy.client.sync_connection import (
    Came,
    Connected,
    Event,
    Failed,
    Link,
    Lost,
    SyncConnection,
    Written,
)
from understudy.client.sync_port import (
    Action,
    CaughtUp,
    HeadKnown,
    Loaded,
    NewId,
    Notice,
    RealmChanged,
    RealmError,
    ResetRequired,
    Send,
)
from understudy.client.sync_session import SyncSession
from understudy.common import portal
from understudy.common.credentials import Credentials
from understudy.common.errors import (
    CorruptionError,
    NotPermitted,
    NotPrimary,
    PeerUnreachable,
    StorageFailed,
    Unavailable,
    UnderstudyError,
    UsageError,
)
from understudy.common.events import log
from understudy.v1 import sync_pb2

_Work = Callable[[], None]
_T = TypeVar("_T")

_here = threading.local()

# Told in the realm's state only: to be offline is nothing out of the ordinary, nor is a failover.
_ORDINARY = (PeerUnreachable, NotPrimary, Unavailable)
_FATAL = (CorruptionError, StorageFailed)


def check_not_callback() -> None:
    """Refuses to wait on a thread that others may wait for at this very time.

    Raises:
        UsageError: this is one of the threads that sync, and so a callback.
    """
    if getattr(_here, "is_sync_thread", False):
        raise UsageError(
            "a callback can't open or close realms, or wait for syncing, which waits for it",
            remedy="let another thread do it",
        )


class SyncThread:
    """Syncs the realms of a directory that are open, until it is stopped.

    Attributes:
        changed: notified when something has happened that somebody may wait for.
        error: of the last attempt to connect since one succeeded; for good where the directory itself has failed.
    """

    def __init__(
        self,
        store: LocalStore,
        addresses: Sequence[str],
        *,
        credentials: Credentials,
        resetter: Resetter,
    ) -> None:
        self.changed = threading.Condition()
        self.error: UnderstudyError | None = None
        self._store = store
        self._resetter = resetter
        self._session = SyncSession(store)
        self._realms: dict[str, OpenRealm] = {}
        self._inbox: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        # Realms with something new in their queue of which the session knows nothing.
        self._dirty: set[str] = set()
        self._link: Link | None = None
        self._told: set[str] = set()  # errors logged since the last success, each once
        self._has_failed = False
        self._sweeps = True  # what was left over when the directory was open last
        self._thread = threading.Thread(
            target=self._run, name=f"understudy-sync {store.directory}", daemon=True
        )
        self._connection = portal.call(self._connect(addresses, credentials))
        self._thread.start()

    async def _connect(self, addresses: Sequence[str], credentials: Credentials) -> SyncConnection:
        return SyncConnection(
            addresses,
            met=self._store.met,
            hello=self._hello,
            hand_over=self._hand_over,
            credentials=credentials,
        )

    def _hello(self) -> sync_pb2.SyncHello:
        store = self._store
        return sync_pb2.SyncHello(
            client=store.client, secret=store.met.secret, run=store.run, previous_run=store.previous_run
        )

    # -- for other threads -----------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ends syncing; what is queued stays there."""
        portal.call(self._connection.close())
        self._inbox.put(None)
        self._thread.join()

    @property
    def failure(self) -> UnderstudyError | None:
        """Why it does not go on at all."""
        return self.error if self._has_failed else None

    @property
    def refusal(self) -> NotPermitted | None:
        """Why the server, or our own caution, lets us not connect; it is tried again, and may have been mended."""
        error = self.error
        return error if isinstance(error, NotPermitted) and self._link is None else None

    @property
    def connection(self) -> ConnectionState:
        """Whether there is one."""
        return self._connection.state

    @property
    def address(self) -> str | None:
        """Of the server, while there is a connection."""
        link = self._link
        return link.address if link is not None else None

    def local_change(self, path: str) -> None:
        """Something was queued. Does not wait, and costs next to nothing where nothing needs to be done."""
        # While there is no link nobody needs to be told: a realm that is bound later looks into its queue.
        if self._link is not None and path not in self._dirty:
            self._dirty.add(path)
            self._inbox.put(lambda: self._on_local_change(path))

    def open(self, realm: OpenRealm) -> None:
        """Syncs this realm, too."""
        self._inbox.put(lambda: self._open(realm))

    def close(self, path: str) -> None:
        """Syncs this realm no longer; no callback for it runs once this has returned."""
        self._ask(lambda: self._close(path))

    def refresh(self, path: str) -> int:
        """Asks for the server's head as of now; the realm's ``head`` tells, once it has this ticket or a later one."""
        return self._ask(lambda: self._refresh(path))

    def hurry(self) -> None:
        """Somebody waits: tries to connect at once."""
        self._connection.hurry()

    def _ask(self, work: Callable[[], _T]) -> _T:
        future: Future[_T] = Future()

        def do() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
                raise

        self._inbox.put(do)
        return future.result()

    def _hand_over(self, event: Event, done: Callable[[], None]) -> None:
        def take() -> None:
            try:
                self._on_event(event)
            finally:
                done()

        self._inbox.put(take)

    # -- on the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        _here.is_sync_thread = True
        while True:
            work = self._next_work()
            if work is None:
                return
            self._guarded(work)

    def _next_work(self) -> _Work | None:
        try:
            return self._inbox.get_nowait()
        except queue.Empty:
            pass
        try:  # only now: to find out how long there is time means to ask every realm
            return self._inbox.get(timeout=self._pause_s())
        except queue.Empty:
            return self._idle

    def _pause_s(self) -> float | None:
        if self._has_failed:
            return None
        if self._sweeps:
            return 0.0
        tick_s = self._session.next_tick_s if self._link is not None else None
        return None if tick_s is None else max(tick_s - time.monotonic(), 0.0)

    def _idle(self) -> None:
        tick_s, now_s = self._session.next_tick_s, time.monotonic()
        if self._link is not None and tick_s is not None and tick_s <= now_s:
            self._do(self._session.tick(now_s=now_s))
        if self._sweeps and self._inbox.empty():
            self._sweeps = False  # also where it fails: what is left waits for the next opening
            self._sweeps = self._store.sweep()

    def _guarded(self, work: _Work) -> None:
        """Nothing that goes wrong ends the thread: the connection is dropped and tried again, or no more."""
        try:
            work()
        except UnderstudyError as error:
            self._drop(error)
        except Exception as error:
            mistake = UnderstudyError(f"internal error: {error!r}")
            if str(mistake) not in self._told:
                log.error("sync_failed", directory=str(self._store.directory), exc_info=error)
            self._drop(mistake)

    def _drop(self, error: UnderstudyError) -> None:
        """Ends the connection: what we know of it is worth nothing after an error."""
        if isinstance(error, _FATAL):
            self._has_failed, self._sweeps = True, False
        link = self._link
        self._lose()
        if link is not None:
            link.drop(error)
        self._trouble(error)

    def _lose(self) -> None:
        self._link = None
        self._session.lost()
        self.notify()

    def _trouble(self, error: UnderstudyError) -> None:
        self.error = error
        if type(error) not in _ORDINARY and str(error) not in self._told:
            self._told.add(str(error))
            log.warning("not_syncing", directory=str(self._store.directory), error=str(error))
        for realm in list(self._realms.values()):
            self._tell(realm)
        self.notify()

    def _tell(self, realm: OpenRealm) -> None:
        if self.error is not None and type(self.error) not in _ORDINARY:
            realm.tell(self.error)

    def notify(self) -> None:
        """Has everybody who waits look again."""
        with self.changed:
            self.changed.notify_all()

    # -- what happens ------------------------------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        match event:
            case Connected():
                self._on_connected(event)
            case Came() if event.link is self._link:
                self._do(self._session.received(event.response, now_s=time.monotonic()))
            case Written() if event.link is self._link:
                self._do(self._session.written(event.size))
            case Lost() if event.link is self._link:
                self._lose()
            case Failed() if not self._has_failed and event.error is not self.error:
                self._trouble(event.error)

    def _on_connected(self, event: Connected) -> None:
        if self._has_failed:
            event.link.drop(UsageError("the directory has failed"))
            return
        met = event.met
        if (met.cluster, met.epoch) != (self._store.met.cluster, self._store.met.epoch):
            self._store.set_met(met.cluster, met.epoch, met.proof)
        self._dirty.clear()
        self._link, self.error = event.link, None
        self._do(self._session.connected(event.welcome))

    def _on_local_change(self, path: str) -> None:
        self._dirty.discard(path)  # first: what comes from here on may be too late for this look
        if self._link is not None:
            self._do(self._session.local_change(path))

    def _open(self, realm: OpenRealm) -> None:
        self._realms[realm.path] = realm
        try:
            self._resetter.opened(realm)
        finally:  # whatever goes wrong there, the server will say again that a reset is needed
            self._do(self._session.opened(realm.path))
        self._tell(realm)

    def _close(self, path: str) -> None:
        del self._realms[path]
        self._do(self._session.closed(path))

    def _refresh(self, path: str) -> int:
        ticket, actions = self._session.refresh(path)
        self._do(actions)
        return ticket

    # -- what is to be done --------------------------------------------------------------------------------------------

    def _do(self, actions: Sequence[Action]) -> None:
        sends = [action for action in actions if isinstance(action, Send)]
        if sends and self._link is not None:
            self._link.send(sends)
        for action in actions:
            if isinstance(action, NewId):
                client = action.client.hex()
                log.warning("client_id_changed", directory=str(self._store.directory), client=client)
            elif not isinstance(action, Send):
                self._note(action)
        self.notify()

    def _note(self, action: Notice) -> None:
        realm = self._realms.get(action.path)
        if realm is None:
            return  # closed by a callback of an action before
        realm.server_version = self._session.server_version(action.path)
        match action:
            case HeadKnown():
                realm.bound(action.ticket, action.version)
            case CaughtUp():
                self._told.clear()
                realm.caught_up()
                if self._link is not None:
                    self._link.was_of_use = True
            case RealmChanged():
                realm.changed(action.applied)
            case Loaded():
                self._on_loaded(realm, action)
            case ResetRequired():
                self._on_reset(realm, action)
            case RealmError():
                realm.error = action.error
                realm.tell(action.error)
        is_up_to_date = action.path in self._realms and self._session.is_up_to_date(action.path)
        self._resetter.progressed(realm, is_up_to_date=is_up_to_date)

    def _on_loaded(self, realm: OpenRealm, loaded: Loaded) -> None:
        if loaded.fresh:
            is_done = self._resetter.loaded(realm, loaded)
            self._do((self._session.resume if is_done else self._session.stop)(realm.path))
            if not is_done:
                return
        self._sweeps = True  # the copy that was replaced
        realm.replaced()

    def _on_reset(self, realm: OpenRealm, required: ResetRequired) -> None:
        is_begun = self._resetter.required(realm, required)
        self._do((self._session.load_fresh if is_begun else self._session.stop)(realm.path))
