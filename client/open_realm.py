"""A realm that is open in this process: what the :class:`Realm` objects of one path share. Used by several threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from understudy.client.local_store import LocalRealm
from understudy.client.local_types import Applied
from understudy.client.local_view import LocalView
from understudy.client.realm_state import Change
from understudy.client.recovery import Recovery
from understudy.client.sync_port import Loaded, ResetRequired
from understudy.common.errors import ClientReset, UnderstudyError
from understudy.common.events import log


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetPolicy:
    """What the application wants done when its copy must be given up.

    Attributes:
        mode: one of :data:`~understudy.client.reset_table.MODES`.
        before: called with a view of the copy that is about to be given up.
        after: called with views of that copy and of what takes its place, and with what became of the queue.
    """

    mode: str
    before: Callable[[LocalView], None] | None = None
    after: Callable[[LocalView, LocalView, Recovery], None] | None = None


class OpenRealm:
    """Local realm, callbacks, and how syncing stands.

    Attributes:
        error: why syncing of this realm does not go on; None while it does.
        reset: the same where its copy must be given up and nobody does.
        head: ticket and version of the last :class:`HeadKnown`.
    """

    def __init__(self, realm: LocalRealm, policy: ResetPolicy) -> None:
        self.realm = realm
        self.policy = policy
        self.users = 0
        self.is_started = False  # the thread knows of it
        self.error: UnderstudyError | None = None
        self.reset: ClientReset | None = None
        self.head = (0, 0)
        self.server_version = 0
        self._told: set[str] = set()
        self.on_change: list[Callable[[Change], None]] = []
        self.on_error: list[Callable[[UnderstudyError], None]] = []

    @property
    def path(self) -> str:
        """As the application calls it."""
        return self.realm.path

    def bound(self, ticket: int, version: int) -> None:
        """The server has taken the copy; its head is ``version``."""
        self.head = (ticket, version)
        self.error = self.reset = None

    # -- callbacks, on the directory's thread ----------------------------------------------------------------------

    def changed(self, applied: Sequence[Applied]) -> None:
        """Tells of changes that have come."""
        if not self.on_change:
            return
        for change in applied:
            self._tell_change(
                Change(
                    version=change.version,
                    keys=tuple(change.keys),
                    ranges=tuple(change.ranges),
                    client=change.client.hex(),
                    is_own=change.own,
                    number=change.number,
                )
            )

    def replaced(self) -> None:
        """Tells that another state has taken the copy's place."""
        version = self.realm.row.copy.version
        self._tell_change(
            Change(version=version, keys=(), ranges=((b"", b""),), client="", is_own=False, number=0)
        )

    def _tell_change(self, change: Change) -> None:
        for callback in list(self.on_change):
            try:
                callback(change)
            except Exception as error:
                log.error("callback_failed", realm=self.path, callback="on_change", exc_info=error)
                self._give(UnderstudyError(f"a callback for changes of {self.path} failed: {error!r}"))

    def tell(self, error: UnderstudyError) -> None:
        """Gives an error to whoever wants to hear of errors; once, however often it comes until all is well again."""
        if str(error) not in self._told:
            self._told.add(str(error))
            self._give(error)

    def caught_up(self) -> None:
        """All is well: what goes wrong from here on is told anew."""
        self._told.clear()

    def _give(self, error: UnderstudyError) -> None:
        for callback in list(self.on_error):
            try:
                callback(error)
            except Exception as mistake:
                log.error("callback_failed", realm=self.path, callback="on_error", exc_info=mistake)


class Resetter(Protocol):
    """Gives up copies that are not on the server's history. All calls come on the directory's thread.

    Where one answers no, it has said so to the realm: nothing of it is synced until the next connection.
    """

    def opened(self, realm: OpenRealm) -> None:
        """The realm was opened: a reset may have been cut off before that."""

    def required(self, realm: OpenRealm, required: ResetRequired) -> bool:
        """The copy must be given up: whether that was begun. If so, the server's state is loaded beside the copy."""

    def loaded(self, realm: OpenRealm, loaded: Loaded) -> bool:
        """That state has come, into ``incoming``: whether it has taken the copy's place."""

    def progressed(self, realm: OpenRealm, *, is_up_to_date: bool) -> None:
        """The copy or the queue has changed."""
