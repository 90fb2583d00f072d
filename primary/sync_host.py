"""What a session of a synced client needs of the server: the ports of :mod:`understudy.primary.sync_session`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from understudy.common.locator import EpochSpan
from understudy.primary.incoming_tails import TailRoom
from understudy.v1 import data_pb2


class Head(Protocol):
    """Where a realm stands."""

    @property
    def id(self) -> int: ...
    @property
    def version(self) -> int: ...
    @property
    def head(self) -> bytes: ...


class Change(Protocol):
    """A change of the past."""

    @property
    def version(self) -> int: ...
    @property
    def lsn(self) -> int: ...
    @property
    def hmac(self) -> bytes: ...
    @property
    def change(self) -> bytes: ...


class Pages(Protocol):
    """A scan under way."""

    def page(self, *, bytes_max: int, pairs_max: int) -> tuple[list[bytes], list[bytes], bool]:
        """The next keys and values, and whether that is all."""

    def close(self) -> None:
        """Lets go of what it pins."""


class Histories(Protocol):
    """What of :class:`~understudy.common.state.State` is needed."""

    @property
    def time_us(self) -> int: ...
    def realm(self, path: str) -> Head | None: ...
    def history(
        self, path: str, first_version: int, *, count_max: int, bytes_max: int
    ) -> Sequence[Change] | None: ...
    def history_first(self, path: str) -> int: ...
    def head_lsn(self, path: str) -> int: ...
    def digest_at(self, path: str, version: int) -> bytes | None: ...
    def last_number(self, path: str, client: bytes) -> int: ...


class Host(Protocol):
    """The server, as one client may see it."""

    @property
    def state(self) -> Histories: ...
    @property
    def cluster(self) -> bytes: ...
    @property
    def epochs(self) -> Sequence[EpochSpan]: ...
    @property
    def shown_lsn(self) -> int: ...
    @property
    def safe_lsn(self) -> int: ...
    @property
    def client_kept_us(self) -> int: ...
    @property
    def tail_room(self) -> TailRoom: ...
    def resolve(self, path: str) -> str:
        """The realm that this client means; refuses what it may not read."""

    def may_write(self, path: str) -> bool: ...
    def forbids_recovery(self, path: str) -> bool: ...
    def size(self, path: str) -> tuple[int, int]:
        """About how many keys and bytes there are."""

    def scan(self, path: str, after: bytes) -> Pages:
        """The state from behind a key on."""

    def submit(self, client: bytes, transaction: data_pb2.Transaction) -> None:
        """Takes a transaction in, or refuses it."""

    def follow(self, path: str) -> None:
        """Has the session's ``on_shown`` called when the realm changes."""

    def unfollow(self, path: str) -> None:
        """No more."""
