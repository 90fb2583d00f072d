"""What a checkpoint is to write, put together from the messages that the server hands to the checkpoint process.

Rows become bytes of their own and the messages go, so that a memtable's rows are in memory once while LMDB needs
memory for every page that they change.
"""

from __future__ import annotations

from collections.abc import Iterable

from understudy.v1.store_pb2 import CheckpointJob, CheckpointRow, EpochRow, RealmDelta


class Delta:
    """One realm's delta, put together from its pieces: bytes of its own, so that no message has to be kept."""

    __slots__ = (
        "clients", "created", "deleted_keys", "deleted_ranges", "head", "history", "history_first", "id", "path",
        "put_keys", "put_values", "version",
    )  # fmt: skip

    def __init__(self, piece: RealmDelta) -> None:
        self.path: str = piece.path
        self.id: int = piece.id
        self.version: int = piece.version
        self.head: bytes = piece.head
        self.created: bool = piece.created
        self.history_first: int = piece.history_first
        self.deleted_ranges: list[tuple[bytes, bytes]] = []
        self.deleted_keys: list[bytes] = []
        self.put_keys: list[bytes] = []
        self.put_values: list[bytes] = []
        self.history: list[bytes] = []
        self.clients: list[tuple[bytes, bytes]] = []  # ids and rows
        self.add(piece)

    def add(self, piece: RealmDelta) -> None:
        """Goes on with the next piece."""
        self.deleted_ranges += zip(piece.deleted_starts, piece.deleted_ends, strict=True)
        self.deleted_keys += piece.deleted_keys
        self.put_keys += piece.put_keys
        self.put_values += piece.put_values
        self.history += piece.history
        rows = [row.SerializeToString() for row in piece.client_rows]
        self.clients += zip(piece.clients, rows, strict=True)


class Job:
    """A job, put together from its parts; each is let go as soon as the next is taken."""

    def __init__(self, parts: Iterable[CheckpointJob]) -> None:
        self.checkpoint = CheckpointRow()
        self.epochs: list[EpochRow] = []
        self.dropped_realm_ids: list[int] = []
        self.dropped_realms: list[str] = []
        self.deltas: list[Delta] = []
        for part in parts:
            self.checkpoint.MergeFrom(part.checkpoint)
            self.epochs += part.epochs
            self.dropped_realm_ids += part.dropped_realm_ids
            self.dropped_realms += part.dropped_realms
            for piece in part.realms:
                if self.deltas and self.deltas[-1].path == piece.path:
                    self.deltas[-1].add(piece)
                else:
                    self.deltas.append(Delta(piece))
