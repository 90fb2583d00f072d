"""Tails of realms on their way here from clients: how many at one time, how large, and for how many there is room.

Pure. A tail takes room from its first piece until it has been taken in, or given up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from understudy.common.entries import with_hmacs
from understudy.common.errors import Overloaded, ProtocolError
from understudy.v1 import sync_pb2

# What a client may send of its tail; twice what ours keep.
TAIL_BYTES_MAX = 8 << 20
TAIL_CHANGES_MAX = 20_000
TAILS_MAX = 4  # being sent at one time by one client: more realms wait for their answer
ROOM_BYTES_MAX = 64 << 20  # of all clients together
TAIL_S_MAX = 300.0  # who sends for longer, or has stopped, must not keep the room that others need
_CHANGE_BYTES = 256  # that a change takes beside its own


class TailRoom:
    """What a server's clients share."""

    def __init__(self) -> None:
        self.bytes = 0

    def take(self, size: int) -> None:
        """Takes so many bytes.

        Raises:
            Overloaded: there is no room now.
        """
        if self.bytes + size > ROOM_BYTES_MAX:
            raise Overloaded(
                "too much comes home to this server at one time", remedy="it will be asked for again; wait"
            )
        self.bytes += size

    def give_back(self, size: int) -> None:
        """Lets so many bytes go."""
        self.bytes -= size


@dataclass(slots=True)
class _Incoming:
    """Invariant: ``room`` is what was taken for ``changes``."""

    changes: list[tuple[bytes, bytes]] = field(default_factory=list)
    bytes: int = 0
    room: int = 0
    seen_s: float | None = None  # when it was first found to have room


class IncomingTails:
    """One client's, by the reference of the binding that each belongs to."""

    def __init__(self, room: TailRoom) -> None:
        self._room = room
        self._sent: dict[int, _Incoming] = {}  # are being sent
        self._whole: dict[int, _Incoming] = {}  # are being taken in

    @property
    def is_full(self) -> bool:
        """Whether no other should be asked for now."""
        return len(self._sent) >= TAILS_MAX

    def expect(self, ref: int) -> None:
        """The client is asked for a tail."""
        self._sent[ref] = _Incoming()

    def receive(self, tail: sync_pb2.Tail) -> list[tuple[bytes, bytes]] | None:
        """Takes a piece; the whole tail if it was the last, which has room until :meth:`taken`.

        Raises:
            ProtocolError: nobody has asked for it, or it is too large.
            Overloaded: there is no room for it; it must be given up.
        """
        incoming = self._sent.get(tail.ref)
        if incoming is None:
            raise ProtocolError("a tail that nobody has asked for")
        self._add(incoming, tail)
        if not tail.last:
            return None
        self._whole[tail.ref] = self._sent.pop(tail.ref)
        return incoming.changes

    def _add(self, incoming: _Incoming, tail: sync_pb2.Tail) -> None:
        changes = with_hmacs(tail.changes, tail.hmacs)
        size = sum(map(len, tail.changes))
        count = len(incoming.changes) + len(changes)
        if incoming.bytes + size > TAIL_BYTES_MAX or count > TAIL_CHANGES_MAX:
            raise ProtocolError(
                f"a tail of more than {TAIL_CHANGES_MAX:,} changes or {TAIL_BYTES_MAX >> 20} MiB"
            )
        room = size + len(changes) * _CHANGE_BYTES
        self._room.take(room)
        incoming.changes += changes
        incoming.bytes += size
        incoming.room += room

    def check_time(self, now_s: float) -> None:
        """To be asked now and then.

        Raises:
            ProtocolError: a tail has had room for too long, and has not come to its end.
        """
        for incoming in self._sent.values():
            if incoming.room:
                incoming.seen_s = now_s if incoming.seen_s is None else incoming.seen_s
                if now_s - incoming.seen_s > TAIL_S_MAX:
                    raise ProtocolError(f"a tail has not come to its end within {TAIL_S_MAX:.0f} s")

    def give_up(self, ref: int) -> None:
        """Nothing more is awaited of what is being sent for this binding, if anything is."""
        incoming = self._sent.pop(ref, None)
        if incoming is not None:
            self._room.give_back(incoming.room)

    def taken(self, ref: int) -> None:
        """A whole tail has been taken in."""
        self._room.give_back(self._whole.pop(ref).room)

    def close(self) -> None:
        """Lets go of all of them."""
        for incoming in (*self._sent.values(), *self._whole.values()):
            self._room.give_back(incoming.room)
        self._sent.clear()
        self._whole.clear()
