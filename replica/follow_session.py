"""A replica's side of following: what to do with answers, chunks, durability and silence. Pure.

Records go through three stages, in LSN order: received (their chain is checked), durable here, applied. Progress
tells the primary of each, never of more than is true.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from understudy.common.entries import check_entry
from understudy.common.errors import (
    AheadOfPrimary,
    CorruptionError,
    Diverged,
    Fenced,
    ForeignCluster,
    NotPrimary,
    PeerUnreachable,
    ProtocolError,
    UnderstudyError,
)
from understudy.common.follow_table import Decision
from understudy.common.records import ChainReader, Record
from understudy.common.types import Epoch, Lsn, Position

PROGRESS_S = 1.0  # told at least so often, so that the primary knows we are there
SILENCE_S_MAX = 10.0  # the primary sends a heartbeat every second; so much silence means it is gone
# Received and not yet applied: a bound on memory. Beyond it nothing more is read from the connection.
BACKLOG_BYTES_MAX = 8 << 20
BACKOFF_S = (0.1, 5.0)
# So few records are applied before the primary is told that they are durable: it takes less than a message costs.
APPLIED_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """Write these whole records, all of one epoch, behind what is in the log."""

    data: bytes
    last: Position
    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Apply these records. They must be durable here first."""

    records: list[Record]


@dataclass(frozen=True, slots=True, kw_only=True)
class SendProgress:
    """Tell the primary how far we are. ``durable_lsn`` must be durable here first."""

    received_offset: int
    durable_lsn: Lsn
    durable_offset: int
    applied_lsn: Lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """Fetch a copy of the primary's store and begin anew from there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComeAgain:
    """Close the connection, and ask again later, perhaps elsewhere."""

    reason: UnderstudyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Stop following for good: an operator must decide."""

    error: UnderstudyError


Action = Append | Apply | SendProgress | Bootstrap | ComeAgain | Stop


def on_answer(
    decision: Decision.ValueType, *, directory: str, address: str
) -> Bootstrap | ComeAgain | Stop | None:
    """What the primary's answer to our hello means; None: stream."""
    rewind = f"understudy rewind {directory} --to {address}"
    match decision:
        case Decision.STREAM:
            return None
        case Decision.BOOTSTRAP:
            return Bootstrap()
        case Decision.FENCED:
            return ComeAgain(reason=Fenced(f"{address} is fenced: a higher epoch has begun elsewhere"))
        case Decision.NOT_PRIMARY:
            return ComeAgain(reason=NotPrimary(f"{address} is not a primary"))
        case Decision.DUPLICATE_ID:
            return ComeAgain(
                reason=ProtocolError(
                    f"another replica with this id follows {address}", remedy="give each replica its own --id"
                )
            )
        case Decision.FOREIGN_CLUSTER:
            return Stop(
                error=ForeignCluster(
                    f"{address} belongs to another cluster than {directory}",
                    remedy="give the right address, or an empty data directory",
                )
            )
        case Decision.AHEAD_OF_PRIMARY:
            return Stop(
                error=AheadOfPrimary(
                    f"this replica knows more than the primary at {address}",
                    remedy=f"promote it: understudy promote {directory}; or give up what only it has: {rewind}",
                )
            )
        case Decision.DIVERGED:
            return Stop(
                error=Diverged(
                    f"{directory} and {address} hold different histories", remedy=f"to join it: {rewind}"
                )
            )
        case Decision.UNPROVEN_EPOCH:
            return Stop(
                error=Diverged(
                    f"{directory} is of an epoch that {address} does not know and does not believe",
                    remedy=f"to join it: {rewind}",
                )
            )
        case _:
            return Stop(
                error=ProtocolError(
                    f"{address} speaks another protocol version", remedy="use the same version on both sides"
                )
            )


class FollowSession:
    """The stream that followed an answer of STREAM.

    Invariant: ``applied <= durable <= received``, as LSNs; offsets likewise.
    """

    def __init__(self, *, after: Position, epoch: Epoch, offset: int, now_s: float) -> None:
        self._reader = ChainReader(after)
        self._epoch = epoch
        self._tail = b""
        self._durable = after.lsn
        self._durable_offset = offset
        self._applied = after.lsn
        self._received_offset = offset
        self._waiting: deque[Record] = deque()  # received, not yet durable
        self._unapplied_bytes = 0
        self._heard_s = now_s
        self._told_s = now_s
        self.head_lsn = after.lsn
        self.head_offset = offset
        self.clock_us = 0

    @property
    def has_room(self) -> bool:
        """Whether more should be read from the connection."""
        return self._unapplied_bytes < BACKLOG_BYTES_MAX

    @property
    def next_lsn(self) -> Lsn:
        """The first entry that has not come whole."""
        return Lsn(self._reader.position.lsn + 1)

    def on_chunk(
        self, records: bytes, *, head_lsn: Lsn, head_offset: int, clock_us: int, now_s: float
    ) -> list[Action]:
        """Log bytes have come, or a heartbeat.

        Raises:
            CorruptionError: they do not continue what came before, are no whole records up to the head, or could
                not be applied. Nothing of them is used: what is in the log must be fit for a promotion.
        """
        self._heard_s = now_s
        self.head_lsn, self.head_offset, self.clock_us = head_lsn, head_offset, clock_us
        self._received_offset += len(records)
        whole = self._reader.feed(records)
        if self._received_offset == head_offset and self._reader.pending_bytes:
            # A length that was changed on the way would have us wait for bytes that nobody is going to send.
            raise CorruptionError(f"entry {self._reader.position.lsn + 1} is damaged: the log ends within it")
        if not whole:
            self._tail += records
            # Tells that it has come: an entry larger than the primary's window needs room for its next part.
            return [self._progress()] if records else []
        data = self._tail + records
        cut = len(data) - self._reader.pending_bytes
        self._tail = data[cut:]
        appends = self._appends(data[:cut], whole)
        self._waiting.extend(whole)
        self._unapplied_bytes += cut
        return appends

    def _appends(self, data: bytes, records: list[Record]) -> list[Action]:
        """One for each epoch in ``data``, nearly always one."""
        appends: list[Action] = []
        start = at = 0
        last = None
        for record in records:
            begun = check_entry(record.payload, record.lsn)
            if begun is not None:
                if last is not None:
                    appends.append(Append(data=data[start:at], last=last.position, epoch=self._epoch))
                self._epoch, start = begun, at
            at += record.encoded_bytes
            last = record
        appends.append(Append(data=data[start:], last=records[-1].position, epoch=self._epoch))
        return appends

    def on_durable(self, position: Position, offset: int, *, applies_at_once: bool) -> list[Action]:
        """Our log is durable up to ``position``.

        Args:
            position: the last durable entry.
            offset: the log offset behind it.
            applies_at_once: whether what is handed out now will be applied without having to wait.
        """
        ready = []
        while self._waiting and self._waiting[0].lsn <= position.lsn:
            ready.append(self._waiting.popleft())
        self._durable, self._durable_offset = position.lsn, offset
        if ready and applies_at_once and len(ready) <= APPLIED_AT_ONCE:
            return [Apply(records=ready)]  # and one message for both
        return [self._progress(), *([Apply(records=ready)] if ready else [])]

    def on_applied(self, record: Record) -> None:
        """One record was applied."""
        self._applied = record.lsn
        self._unapplied_bytes -= record.encoded_bytes

    def on_applied_some(self) -> list[Action]:
        """Some records were applied."""
        return [self._progress()]

    def on_tick(self, *, now_s: float) -> list[Action]:
        """Time has passed."""
        if not self.has_room:
            self._heard_s = now_s  # the primary may well speak: it is we who do not listen
        elif now_s - self._heard_s > SILENCE_S_MAX:
            return [ComeAgain(reason=PeerUnreachable(f"nothing heard from it for {SILENCE_S_MAX:.0f} s"))]
        if now_s - self._told_s >= PROGRESS_S:
            self._told_s = now_s
            return [self._progress()]
        return []

    def _progress(self) -> SendProgress:
        return SendProgress(
            received_offset=self._received_offset,
            durable_lsn=self._durable,
            durable_offset=self._durable_offset,
            applied_lsn=self._applied,
        )
