"""What a realm sends: its queue, in order, within a window, again after a refusal; and the tail of its copy. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from understudy.client.local_types import ForeignChange, Queued
from understudy.client.sync_port import RealmPort
from understudy.common.backoff import Backoff
from understudy.common.errors import (
    NotPermitted,
    ProtocolError,
    ReceiptExpired,
    Unavailable,
    UnderstudyError,
    from_code,
)
from understudy.v1 import data_pb2, sync_pb2

# Sent and not yet come back: enough for a long fat network, bounded for the server's memory.
WINDOW_BYTES = 4 << 20
WINDOW_CHANGES = 4_000
MESSAGE_BYTES_TARGET = 1 << 20
MESSAGE_CHANGES_MAX = 256
TAIL_PIECE_BYTES = 1 << 20
BACKOFF_S = (0.2, 10.0)


class UnknownClient(Exception):
    """The queue holds changes of an id that the server was not told of."""


class Uploader:
    """A realm's uploads on one binding.

    Invariant: numbers in flight rise and are at most ``_cursor``; none above it was sent on this binding.
    """

    def __init__(
        self, realm: RealmPort, *, ref: int, last_numbers: Mapping[bytes, int], may_write: bool
    ) -> None:
        self._realm = realm
        self._ref = ref
        self._last_numbers = last_numbers
        self._may_write = may_write
        self._cursor = 0
        self._in_flight: deque[tuple[int, int]] = deque()  # number, bytes
        self._in_flight_bytes = 0
        self._backoff = Backoff(first_s=BACKOFF_S[0], last_s=BACKOFF_S[1])
        self.retry_at_s: float | None = None
        self.error: UnderstudyError | None = None  # why nothing more is sent

    def next(self) -> sync_pb2.Upload | None:
        """The next message, already noted as sent; None while there is nothing to send, or no room.

        Raises:
            UnknownClient: bind anew.
            ForeignChange: the server has had this number from somebody else.
        """
        changes = self._next_changes()
        if not changes:
            return None
        if not self._may_write:
            self.error = NotPermitted(
                f"the server takes no changes of {self._realm.path} from this client",
                remedy="they stay in the queue until an operator permits it: "
                f"understudy grant add --user NAME --level write {self._realm.path}",
            )
            return None
        self._check_unused(changes[0])
        self._note_sent(changes[-1].number)
        self._cursor = changes[-1].number
        for change in changes:
            self._in_flight.append((change.number, change.size))
            self._in_flight_bytes += change.size
        return sync_pb2.Upload(
            ref=self._ref,
            client=changes[0].client,
            transactions=[
                data_pb2.Transaction(number=change.number, operations=change.operations) for change in changes
            ],
        )

    @property
    def has_room(self) -> bool:
        """Whether a change that comes into the queue now, behind what was sent, can be sent at once."""
        is_stopped = self.error is not None or self.retry_at_s is not None
        return not is_stopped and self._room_bytes > 0 and self._room_changes > 0

    @property
    def _room_bytes(self) -> int:
        return WINDOW_BYTES - self._in_flight_bytes

    @property
    def _room_changes(self) -> int:
        return WINDOW_CHANGES - len(self._in_flight)

    def _next_changes(self) -> list[Queued]:
        if not self.has_room:
            return []
        found = self._queued(MESSAGE_CHANGES_MAX, MESSAGE_BYTES_TARGET)
        return found[: _same_client(found)]

    def _queued(self, count_max: int, bytes_max: int) -> list[Queued]:
        """What is to be sent next, within these limits and the window."""
        return self._realm.queued(
            self._cursor,
            count_max=min(self._room_changes, count_max),
            bytes_max=min(self._room_bytes, bytes_max),
        )

    def _note_sent(self, number: int) -> None:
        """Notes, durably, what goes out before it does: all messages that the window has room for at one time."""
        if number > self._realm.row.sent:
            self._realm.note_sent(self._queued(WINDOW_CHANGES, WINDOW_BYTES)[-1].number)

    def _check_unused(self, first: Queued) -> None:
        if first.client not in self._last_numbers:
            raise UnknownClient
        # Our copy holds all that the server had when it named these numbers. Were this change among it, it would have
        # left the queue.
        last = self._last_numbers[first.client]
        if first.number <= last:
            raise ForeignChange(
                f"change {first.number} was made elsewhere, too", first.client, first=first.number, last=last
            )

    def confirmed(self, number: int) -> None:
        """An own change came back; so have all before it."""
        while self._in_flight and self._in_flight[0][0] <= number:
            self._in_flight_bytes -= self._in_flight.popleft()[1]
        self._backoff.reset()

    def refused(self, client: bytes, refusals: Sequence[data_pb2.Refusal], *, now_s: float) -> None:
        """The server did not take these. What can be tried again will be, from the first of them on, in order."""
        for refusal in refusals:
            error = from_code(refusal.code, refusal.message, refusal.remedy)
            if isinstance(error, ReceiptExpired):
                # It was applied, perhaps under another name: it won't come back as this one.
                self._realm.leave_queue(client, [refusal.number])
                self.confirmed(refusal.number)
                continue
            if not any(number == refusal.number for number, _ in self._in_flight):
                continue  # it was sent with one before it that is to be sent again
            self._rewind(refusal.number)
            if isinstance(error, Unavailable):
                self.retry_at_s = now_s + self._backoff.next_s(0.5)
            else:
                self.error = error

    def _rewind(self, number: int) -> None:
        self._cursor = number - 1
        while self._in_flight and self._in_flight[-1][0] >= number:
            self._in_flight_bytes -= self._in_flight.pop()[1]

    def tick(self, *, now_s: float) -> None:
        """Time has passed."""
        if self.retry_at_s is not None and now_s >= self.retry_at_s:
            self.retry_at_s = None


class TailSender:
    """The raw changes that the server has lost, or may have, piece by piece."""

    def __init__(self, realm: RealmPort, *, ref: int, from_version: int) -> None:
        """Begins at ``from_version``.

        Raises:
            ProtocolError: the server asks for what is not kept, and was told so.
        """
        if not 0 < realm.row.tail_first <= from_version:
            raise ProtocolError(
                f"the server asked for changes of {realm.path} from version {from_version}; kept are those from "
                f"{realm.row.tail_first}"
            )
        self._realm = realm
        self._ref = ref
        self._next: int | None = from_version  # None: the last has gone

    def next(self) -> sync_pb2.Tail | None:
        """The next piece; None behind the last."""
        if self._next is None:
            return None
        changes = self._realm.tail(self._next, bytes_max=TAIL_PIECE_BYTES)
        self._next += len(changes)
        is_last = not changes or self._next > self._realm.row.copy.version
        if is_last:
            self._next = None
        return sync_pb2.Tail(
            ref=self._ref,
            changes=[change.raw for change in changes],
            hmacs=b"".join(change.hmac for change in changes),
            last=is_last,
        )


def _same_client(changes: Sequence[Queued]) -> int:
    """How many at the front were made under one id."""
    return next(
        (index for index, change in enumerate(changes) if change.client != changes[0].client), len(changes)
    )
