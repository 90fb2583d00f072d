"""Pinned snapshots that peers fetch: opened on demand, dropped when nobody has asked for so long."""

from __future__ import annotations

import time
from dataclasses import dataclass

from understudy.common.engine import Engine
from understudy.common.errors import Overloaded, ProtocolError, Unavailable
from understudy.common.events import log
from understudy.common.pinned_snapshot import PinnedSnapshot, checkpoint_of
from understudy.common.types import new_id
from understudy.v1 import replication_pb2, store_pb2

# What is pinned can't be reused, so the store grows with every write meanwhile: few at a time, none for ever.
PINS_MAX = 8
IDLE_S_MAX = 120.0


@dataclass(slots=True)
class Pin:
    """A snapshot that a peer is fetching."""

    id: bytes
    replica_id: str
    node: bytes
    snapshot: PinnedSnapshot
    checkpoint: store_pb2.CheckpointRow
    used_s: float


class PinBoard:
    """All pinned snapshots."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pins: dict[bytes, Pin] = {}

    def pin(self, replica_id: str, node: bytes, resume: bytes) -> Pin:
        """Pins the present checkpoint for a replica, or takes up again what it had pinned.

        Raises:
            ProtocolError: another node bootstraps under this name.
            Overloaded: too many are pinned already.
            CorruptionError: the store is damaged.
        """
        owned = [pin for pin in self._pins.values() if pin.replica_id == replica_id]
        if any(pin.node != node for pin in owned):
            raise ProtocolError(
                f"another replica bootstraps as {replica_id!r}",
                remedy=f"give each its own --id; one that is gone is forgotten after {IDLE_S_MAX:.0f} s",
            )
        for pin in owned:
            if pin.id == resume:
                pin.used_s = time.monotonic()
                return pin
            self.release(pin.id)
        if len(self._pins) >= PINS_MAX:
            raise Overloaded(f"{PINS_MAX} snapshots are pinned already", remedy="try again when one is done")
        store = self._engine.state.store
        snapshot = PinnedSnapshot.open(store.env, self._engine.directory.store / "data.mdb")
        try:
            checkpoint = checkpoint_of(store, snapshot)
        except BaseException:
            snapshot.close()
            raise
        pin = Pin(new_id(), replica_id, node, snapshot, checkpoint, time.monotonic())
        self._pins[pin.id] = pin
        log.info("snapshot_pinned", replica=replica_id, lsn=pin.checkpoint.lsn, bytes=snapshot.file_bytes)
        return pin

    def get(self, snapshot_id: bytes) -> Pin:
        """The pin of that name.

        Raises:
            Unavailable: there is none, or no longer.
        """
        pin = self._pins.get(snapshot_id)
        if pin is None:
            raise Unavailable("that snapshot is not pinned any more", remedy="pin a new one")
        pin.used_s = time.monotonic()
        return pin

    def release(self, snapshot_id: bytes) -> None:
        """Lets a snapshot go."""
        pin = self._pins.pop(snapshot_id, None)
        if pin is not None:
            pin.snapshot.close()

    def expire(self) -> None:
        """Lets go what nobody has asked for lately."""
        for pin in list(self._pins.values()):
            if time.monotonic() - pin.used_s > IDLE_S_MAX:
                log.warning("snapshot_expired", replica=pin.replica_id)
                self.release(pin.id)

    def info(self, pin: Pin, *, epoch: int) -> replication_pb2.SnapshotInfo:
        """What the peer is told."""
        row = pin.checkpoint
        return replication_pb2.SnapshotInfo(
            snapshot=pin.id,
            position=replication_pb2.Position(lsn=row.lsn, digest=row.digest),
            log_offset=row.log_offset,
            cluster=self._engine.directory.cluster,
            epoch=epoch,
            file_bytes=pin.snapshot.file_bytes,
            range_bytes=pin.snapshot.range_bytes,
        )

    def close(self) -> None:
        """Lets everything go."""
        for snapshot_id in list(self._pins):
            self.release(snapshot_id)
