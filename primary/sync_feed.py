"""Who is told of which realm's changes, and which client is connected from where."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from understudy.primary.sync_session import SyncSession

# Streams with something to send are served together, and none more often than this for each of them: what is
# committed meanwhile goes out in one message. A message costs the same whatever is in it.
_PACE_A_STREAM_S = 0.001
_PACE_S_MAX = 0.1


@dataclass(eq=False, slots=True)
class SyncStream:
    """One client's stream."""

    client: bytes
    run: bytes
    previous_run: bytes
    task: asyncio.Task[None]
    user_id: str  # empty: an operator's
    secret: bytes  # of the client's directory
    replaced: bool = False  # by a newer one of the same directory
    session: SyncSession = field(init=False)
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Feed:
    """The streams of a server: by realm, and by client."""

    def __init__(self) -> None:
        self.streams: set[SyncStream] = set()
        self._followers: dict[str, set[SyncStream]] = {}
        self._seats: dict[bytes, SyncStream] = {}

    @property
    def pace_s(self) -> float:
        """How long a stream waits between two rounds of sending."""
        return min(len(self.streams) * _PACE_A_STREAM_S, _PACE_S_MAX)

    # -- realms ----------------------------------------------------------------------------------------------

    def follow(self, path: str, stream: SyncStream) -> None:
        """Tells the stream of changes to the realm."""
        self._followers.setdefault(path, set()).add(stream)

    def unfollow(self, path: str, stream: SyncStream) -> None:
        """No more."""
        followers = self._followers.get(path, set())
        followers.discard(stream)
        if not followers:
            self._followers.pop(path, None)

    def on_shown(self, path: str) -> None:
        """The realm has a change that others may see."""
        for stream in self._followers.get(path, ()):
            stream.session.on_shown(path)
            stream.wake.set()

    # -- clients ---------------------------------------------------------------------------------------------

    def count_of(self, user_id: str) -> int:
        """How many streams a user has."""
        return sum(stream.user_id == user_id for stream in self.streams)

    def seat(self, stream: SyncStream) -> bool:
        """Takes the stream for its client's; False where another device is connected with that client's id.

        The same opening of a directory, or the next one, takes the place of a connection that was lost without a
        word. Anything else is a copy of the directory, in use at the same time.
        """
        self.streams.add(stream)
        seated = self._seats.get(stream.client)
        if seated is not None and seated.run not in (stream.run, stream.previous_run):
            return False
        if seated is not None:
            seated.replaced = True
            seated.task.cancel()
        self._seats[stream.client] = stream
        return True

    def leave(self, stream: SyncStream) -> None:
        """The stream has ended."""
        self.streams.discard(stream)
        if self._seats.get(stream.client) is stream:
            del self._seats[stream.client]
