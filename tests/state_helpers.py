"""Entries of a log as a primary would write them, and what they do, told by plain dictionaries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from understudy.common import entries
from understudy.common.checkpoint import apply_checkpoint
from understudy.common.memtable import Memtable, Receipt
from understudy.common.operations import Add, Delete, DeleteRange, Operation, Put, Update, to_protos
from understudy.common.realm_history import LastChange
from understudy.common.records import Record, encode_record
from understudy.common.state import State
from understudy.common.store import Store
from understudy.common.store_layout import Environment, HistoryRow
from understudy.common.types import START, ClusterId, Epoch, Lsn, NodeId, Position
from understudy.v1 import log_pb2

CLIENTS = [b"1" * 16, b"2" * 16]
CLUSTER = ClusterId(bytes(range(16)))
NODE = NodeId(b"n" * 16)
KEY = b"history key"
_COUNTER = re.compile(rb"0|-?[1-9][0-9]*")
_COUNTERS = range(-(2**63), 2**63)


def after_operation(pairs: dict[bytes, bytes], operation: Operation) -> dict[bytes, bytes]:
    """What a realm holds after one operation, as the design's table of terms says it."""
    pairs = dict(pairs)
    match operation:
        case Put(key, value):
            pairs[key] = value
        case Update(key, value):
            if key in pairs:
                pairs[key] = value
        case Delete(key):
            pairs.pop(key, None)
        case DeleteRange(start, end):
            pairs = {key: value for key, value in pairs.items() if key < start or (end and key >= end)}
        case Add(key, amount):
            old = pairs.get(key, b"0")
            if _COUNTER.fullmatch(old) and int(old) in _COUNTERS and int(old) + amount in _COUNTERS:
                pairs[key] = str(int(old) + amount).encode()
    return pairs


@dataclass
class RealmModel:
    """One realm, from its first transaction on."""

    path: str
    pairs: dict[bytes, bytes] = field(default_factory=dict)
    version: int = 0
    head: bytes = b""
    receipts: dict[tuple[bytes, int], Receipt] = field(default_factory=dict)
    history: list[HistoryRow] = field(default_factory=list)
    clients: dict[bytes, LastChange] = field(default_factory=dict)

    def last_number(self, client: bytes) -> int:
        """The highest number of that client."""
        return max((number for who, number in self.receipts if who == client), default=0)

    def between(self, start: bytes, end: bytes, *, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        """What a scan has to give."""
        found = [pair for pair in self.pairs.items() if pair[0] >= start and (not end or pair[0] < end)]
        return sorted(found, reverse=reverse)


class Author:
    """Writes entries, each behind the one before, and knows what the realms hold then."""

    def __init__(self, after: Position = START, *, offset: int = 0) -> None:
        self.position = after
        self.offset = offset
        self.time_us = 1_700_000_000_000_000
        self.epoch = 0
        self.realms: dict[str, RealmModel] = {}

    def _record(self, payload: bytes) -> Record:
        lsn = Lsn(self.position.lsn + 1)
        data, digest = encode_record(self.position.digest, lsn, payload)
        self.position = Position(lsn, digest)
        self.offset += len(data)
        return Record(lsn, digest, payload)

    def _now_us(self) -> int:
        self.time_us += 1_000
        return self.time_us

    def change(
        self,
        path: str,
        operations: Sequence[Operation],
        *,
        client: bytes = b"c" * 16,
        number: int | None = None,
    ) -> Record:
        """A transaction."""
        realm = self.realms.setdefault(path, RealmModel(path))
        number = realm.last_number(client) + 1 if number is None else number
        change = log_pb2.Change(
            realm=path,
            version=realm.version + 1,
            previous=realm.head,
            client=client,
            number=number,
            operations=to_protos(operations),
        ).SerializeToString()
        digest = entries.change_digest(change)
        hmac = entries.sign(KEY, digest)
        record = self._record(entries.change_entry(self._now_us(), change, hmac))
        for operation in operations:
            realm.pairs = after_operation(realm.pairs, operation)
        realm.version += 1
        realm.head = sha256(change).digest()
        realm.receipts[client, number] = Receipt(path, realm.version, record.lsn, record.digest)
        realm.history.append(HistoryRow(realm.version, record.lsn, record.digest, hmac, change))
        realm.clients[client] = LastChange(number, realm.version, self.time_us)
        return record

    def freeze(self) -> Record:
        """A freeze mark."""
        return self._record(entries.freeze_entry(self._now_us()))

    def digest_mark(self) -> Record:
        """A digest mark."""
        return self._record(entries.digest_entry(self._now_us(), log_pb2.DigestMark(freeze_lsn=1)))

    def drop(self, path: str) -> Record:
        """A realm goes, if it is there."""
        self.realms.pop(path, None)
        return self._record(entries.drop_entry(self._now_us(), path))

    def epoch_start(self) -> Record:
        """The next epoch begins."""
        self.epoch += 1
        payload = entries.epoch_entry(
            time_us=self._now_us(),
            cluster=CLUSTER,
            epoch=Epoch(self.epoch),
            after=self.position,
            node=NODE,
            key=KEY,
        )
        return self._record(payload)


def write_here(environment: Environment, table: Memtable) -> None:
    """Writes a checkpoint in this process."""
    apply_checkpoint(environment, table.parts())


class Layers:
    """A state over a store in this process, with an author for its log."""

    def __init__(self, environment: Environment, store: Store) -> None:
        self.environment = environment
        self.author = Author()
        self.state = State(store)

    def commit(
        self, path: str, *what: Operation, client: bytes = CLIENTS[0], number: int | None = None
    ) -> None:
        self.state.apply(self.author.change(path, what, client=client, number=number))

    def freeze(self) -> None:
        self.state.apply(self.author.freeze())

    def checkpoint(self) -> None:
        """Everything goes into the store."""
        self.freeze()
        while self.state.frozen:
            self.write_oldest()

    def write_oldest(self) -> None:
        """The oldest frozen memtable goes into the store."""
        write_here(self.environment, self.state.frozen[-1])
        self.state.checkpointed()
