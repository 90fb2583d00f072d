"""What a sync session needs of the local store, and what it asks of its shell. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from understudy.client.local_types import Applied, ForeignChange, Queued, Received
from understudy.common.errors import UnderstudyError
from understudy.v1 import local_pb2, sync_pb2


class RealmPort(Protocol):
    """One realm's local copy and queue; each method is one transaction.

    ``is_sending``: what is committed from now on is sent at once, and so is to be noted as sent with that.
    """

    is_sending: bool

    @property
    def path(self) -> str: ...

    @property
    def row(self) -> local_pb2.LocalRealm: ...

    def queued(self, after_number: int, *, count_max: int, bytes_max: int) -> list[Queued]: ...

    def clients(self) -> list[bytes]: ...

    def note_sent(self, number: int) -> None: ...

    def leave_queue(self, client: bytes, numbers: Sequence[int]) -> None: ...

    def locator(self) -> list[sync_pb2.RealmPosition]: ...

    def apply(
        self, changes: Sequence[Received], *, lsn: int, epoch: int, time_us: int, safe_version: int
    ) -> list[Applied]: ...

    def reidentify(self, client: bytes, foreign: ForeignChange) -> None: ...

    def note_bound(self, bound: sync_pb2.RealmBound, *, cluster: bytes) -> None: ...

    def begin_load(self, bound: sync_pb2.RealmBound, *, cluster: bytes) -> None: ...

    def load_page(self, page: sync_pb2.StatePage, *, epoch: int) -> None: ...

    def finish_load(
        self, page: sync_pb2.StatePage, last_numbers: Mapping[bytes, int], *, epoch: int
    ) -> None: ...

    def drop_incoming(self) -> None: ...

    def tail(self, from_version: int, *, bytes_max: int) -> list[Received]: ...

    def set_safe(self, version: int) -> None: ...

    def touch(self, time_us: int) -> None: ...

    def set_reset(self, record: local_pb2.ResetRecord | None) -> None: ...


class StorePort(Protocol):
    """A directory of local copies."""

    def new_client(self) -> bytes: ...

    def realm(self, path: str) -> RealmPort: ...


# -- actions and notices ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send this, in order, and tell :meth:`SyncSession.written` of ``size`` when it has gone."""

    request: sync_pb2.SyncRequest
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewId:
    """New changes of this directory are made under another client id from here on."""

    client: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadKnown:
    """The server's head as of a moment after all refreshes up to ``ticket`` were asked for."""

    path: str
    ticket: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RealmChanged:
    """These changes are in the copy that reads see."""

    path: str
    applied: list[Applied]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """More of a state that is being loaded has come; the realm's row says how much."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A state has come whole.

    ``fresh``: a reset had asked for it, and it waits beside the old copy; else it has taken the copy's place.
    """

    path: str
    last_numbers: Mapping[bytes, int]
    fresh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CaughtUp:
    """The copy is where the server was when it spoke last."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded:
    """Nothing is left in the queue."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetRequired:
    """The copy is not on the server's history; nothing is done with this realm until somebody says what.

    ``tail_taken``: what became of the tail, where the server had asked for it. ``fresh``: it said so to a reset that
    asked for its state.
    """

    path: str
    bound: sync_pb2.RealmBound
    tail_taken: sync_pb2.Homecoming | None
    fresh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RealmError:
    """The server refused a realm, or a change of it; nothing is dropped."""

    path: str
    error: UnderstudyError


# Of one realm.
Notice = HeadKnown | RealmChanged | Progress | Loaded | CaughtUp | Uploaded | ResetRequired | RealmError
Action = Send | NewId | Notice
