"""One replica that follows: what to send it next, and what its progress means. Pure; its shell does the sending.

Catch-up and live tail are the same: whatever is durable and not yet sent goes out, as far as the window allows.
"""

from __future__ import annotations

from dataclasses import dataclass

from understudy.common.errors import ProtocolError
from understudy.common.types import Lsn

CHUNK_BYTES_MAX = 1 << 20
# Sent and not yet received by the other side: enough for a long fat network, bounded for its memory and ours.
WINDOW_BYTES = 8 << 20
HEARTBEAT_S = 1.0
# A peer that says nothing for so long is gone, or cut off: half-open connections look healthy from here.
SILENCE_S_MAX = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SendRecords:
    """Send log bytes from ``offset``. They must be durable here first: at most up to the durable offset."""

    offset: int
    bytes_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SendHeartbeat:
    """Send the head and the clock without records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Close the connection; the replica will come again."""

    reason: str


Action = SendRecords | SendHeartbeat | GiveUp


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a replica is."""

    durable_lsn: Lsn
    durable_offset: int
    applied_lsn: Lsn


class FollowerSession:
    """The primary's side of a ``Follow`` that was answered with STREAM.

    Invariant: ``progress.durable_offset <= received_offset <= sent_offset <= durable offset here``.
    """

    def __init__(self, *, lsn: Lsn, offset: int, now_s: float) -> None:
        self.sent_offset = offset
        self.received_offset = offset
        self.progress = Progress(durable_lsn=lsn, durable_offset=offset, applied_lsn=Lsn(0))
        self._heard_s = now_s
        self._sent_s = now_s

    def next_action(self, *, durable_offset: int, now_s: float) -> Action | None:
        """What to do now; None: wait for progress, new entries, or :attr:`next_deadline_s`."""
        if now_s - self._heard_s > SILENCE_S_MAX:
            return GiveUp(reason=f"nothing heard from it for {SILENCE_S_MAX:.0f} s")
        room = WINDOW_BYTES - (self.sent_offset - self.received_offset)
        if self.sent_offset < durable_offset and room > 0:
            return SendRecords(offset=self.sent_offset, bytes_max=min(CHUNK_BYTES_MAX, room))
        if now_s - self._sent_s >= HEARTBEAT_S:
            return SendHeartbeat()
        return None

    def on_sending(self, record_bytes: int, *, now_s: float) -> None:
        """A chunk with so many bytes of records, or none, is going out."""
        self.sent_offset += record_bytes
        self._sent_s = now_s

    def on_progress(
        self, progress: Progress, *, received_offset: int, durable_lsn_here: Lsn, now_s: float
    ) -> None:
        """The replica tells how far it is.

        Raises:
            ProtocolError: it goes backwards, or claims what it was never sent.
        """
        known = self.progress
        in_order = (
            known.durable_offset <= progress.durable_offset <= received_offset <= self.sent_offset
            and self.received_offset <= received_offset
            and known.durable_lsn <= progress.durable_lsn <= durable_lsn_here
            and known.applied_lsn <= progress.applied_lsn <= progress.durable_lsn
        )
        if not in_order:
            raise ProtocolError(
                f"impossible progress: {progress}, received {received_offset}, after {known}, "
                f"sent {self.sent_offset}"
            )
        self.progress = progress
        self.received_offset = received_offset
        self._heard_s = now_s

    def next_deadline_s(self) -> float:
        """When :meth:`next_action` must be asked again even if nothing happens."""
        return min(self._sent_s + HEARTBEAT_S, self._heard_s + SILENCE_S_MAX + 0.001)
