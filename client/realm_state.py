"""What an application is told of a synced realm."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from understudy.common.errors import UnderstudyError


class ConnectionState(enum.StrEnum):
    """How a directory stands with its server."""

    OFFLINE = "offline"  # it will be tried again later
    CONNECTING = "connecting"
    ONLINE = "online"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A transaction that has come from the server into the local copy; or a whole state has.

    Attributes:
        version: the realm's, after it.
        keys: that it may have changed, in no particular order.
        ranges: that it may have emptied, each from a first key to before a second; empty means without bound. A state
            that took the copy's place is one range without bounds.
        client: whose change it was, in hexadecimal; empty for a whole state.
        is_own: whether it was made in this directory; reads had shown it before.
        number: its client's number for it, as :meth:`Realm.commit` returned it; 0 for a whole state.
    """

    version: int
    keys: tuple[bytes, ...]
    ranges: tuple[tuple[bytes, bytes], ...]
    client: str
    is_own: bool
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How much of a state has come; what is expected is an estimate."""

    entries: int
    bytes: int
    expected_entries: int
    expected_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetState:
    """A client reset that has not come to its end.

    Attributes:
        reason: name of a ``ResetReason``.
        attempted: what is being done, ``discard`` or ``recover``; empty: nothing, it is left to the application.
    """

    reason: str
    attempted: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RealmState:
    """How a realm stands.

    Attributes:
        address: of the server; None where there is no connection.
        version: of the local copy.
        server_version: the server's, as it was told last; 0: not in this process yet.
        safe_version: up to here the realm is known to be safe on a replica.
        tail_dropped: changes beyond that which were too many to be kept for bringing them home.
        pending_changes: own changes that are not confirmed yet.
        loading: a state that is being loaded.
        error: why syncing does not go on, or the connection's last failure.
    """

    connection: ConnectionState
    address: str | None
    version: int
    server_version: int
    safe_version: int
    tail_dropped: int
    pending_changes: int
    pending_bytes: int
    loading: LoadProgress | None
    reset: ResetState | None
    error: UnderstudyError | None
