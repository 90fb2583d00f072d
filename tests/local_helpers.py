"""A server as far as a local copy can tell, told by plain dictionaries, and what a directory must hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from state_helpers import after_operation

from understudy.client.local_realm import LocalRealm
from understudy.client.local_store import LocalStore
from understudy.client.local_types import Received
from understudy.client.local_view import LocalView
from understudy.common.operations import Operation, Put, to_protos
from understudy.v1 import local_pb2, log_pb2, sync_pb2

PATH = "/notes"
CLUSTER = b"cluster of 16 by"
OTHER = b"another client's"
REALM_ID = 7
START_US = 1_700_000_000_000_000


@dataclass
class Server:
    """One realm's history."""

    path: str = PATH
    version: int = 0
    head: bytes = b""
    pairs: dict[bytes, bytes] = field(default_factory=dict)
    last_numbers: dict[bytes, int] = field(default_factory=dict)
    changes: list[Received] = field(default_factory=list)
    history: list[Sequence[Operation]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=lambda: [b""])  # by version

    def change(
        self, operations: Sequence[Operation], *, client: bytes = OTHER, number: int | None = None
    ) -> Received:
        """Applies a change, and returns it as clients get it."""
        number = self.last_numbers.get(client, 0) + 1 if number is None else number
        self.last_numbers[client] = number
        for operation in operations:
            self.pairs = after_operation(self.pairs, operation)
        self.version += 1
        change = log_pb2.Change(
            realm=self.path,
            version=self.version,
            previous=self.head,
            client=client,
            number=number,
            operations=to_protos(operations),
        )
        received = Received(change.SerializeToString(), sha256(b"hmac %d" % self.version).digest())
        self.head = sha256(received.raw).digest()
        self.digests.append(self.head)
        self.changes.append(received)
        self.history.append(operations)
        return received

    def last_numbers_at(self, version: int) -> dict[bytes, int]:
        """Each client's highest number up to that version."""
        changes = [log_pb2.Change.FromString(received.raw) for received in self.changes[:version]]
        return {change.client: change.number for change in changes}

    def bound(self) -> sync_pb2.RealmBound:
        """The answer to a bind."""
        return sync_pb2.RealmBound(
            decision=sync_pb2.SYNC_LOAD,
            path=self.path,
            realm_id=REALM_ID,
            head=self.position(),
            epoch=3,
            time_us=START_US,
            entries=len(self.pairs),
        )

    def position(self) -> sync_pb2.RealmPosition:
        """The head."""
        return sync_pb2.RealmPosition(version=self.version, digest=self.head)

    def page(self, frontier: bytes, count: int) -> sync_pb2.StatePage:
        """So many keys from behind ``frontier``."""
        behind = sorted(key for key in self.pairs if key > frontier)
        keys = behind[:count]
        return sync_pb2.StatePage(
            position=self.position(),
            realm_id=REALM_ID,
            lsn=self.version,
            keys=keys,
            values=[self.pairs[key] for key in keys],
            last=len(behind) <= count,
            time_us=START_US,
        )


def put(number: int) -> list[Operation]:
    """Any change."""
    return [Put(b"key %d" % number, b"value %d" % number)]


def send(realm: LocalRealm, changes: Sequence[Received], *, safe_version: int = 0) -> list[tuple[int, bool]]:
    """Has changes applied; version and ``own`` of each."""
    version = realm.row.incoming.version if realm.row.incoming.id else realm.row.copy.version
    applied = realm.apply(
        changes, lsn=version + len(changes), epoch=3, time_us=START_US + version, safe_version=safe_version
    )
    return [(one.version, one.own) for one in applied]


def last_page(realm: LocalRealm, changes: Sequence[Received] = ()) -> sync_pb2.StatePage:
    """What is sent to somebody who has all pages already, with the changes that a server adds to the last one."""
    incoming = realm.row.incoming
    return sync_pb2.StatePage(
        position=sync_pb2.RealmPosition(version=incoming.version, digest=incoming.head),
        realm_id=REALM_ID,
        lsn=incoming.version,
        last=True,
        time_us=START_US,
        changes=[change.raw for change in changes],
        hmacs=b"".join(change.hmac for change in changes),
    )


def held(realm: LocalRealm) -> dict[bytes, bytes]:
    """What an application reads."""
    with realm.view() as view:
        return pairs_of(view)


def pairs_of(view: LocalView) -> dict[bytes, bytes]:
    """All that a view shows, told by every way of reading."""
    pairs = dict(view.scan())
    assert list(view.scan(reverse=True)) == sorted(pairs.items(), reverse=True)
    assert view.count() == len(pairs)
    assert all(view.get(key) == value for key, value in pairs.items())
    return pairs


def check_sound(store: LocalStore, realm: LocalRealm) -> None:
    """Rows and what the realm's row says of them agree, and so does memory with the disk."""
    row, environment = realm.row, store.file.environment
    with environment.env.begin() as txn:
        for copy in (row.copy, row.incoming):
            start = copy.id.to_bytes(8, "big")
            pairs = [(k, v) for k, v in txn.cursor(environment.data) if copy.id and k[:8] == start]
            assert copy.entries == len(pairs)
            assert copy.bytes == sum(len(key) - 8 + len(value) for key, value in pairs)
        prefix = row.id.to_bytes(8, "big")
        queue = [(k, v) for k, v in txn.cursor(environment.queue) if k[:8] == prefix]
        tail = [(k, v) for k, v in txn.cursor(environment.tail) if k[:8] == prefix]
        raw = txn.get(realm.path.encode(), b"", db=environment.realms)
        again = LocalRealm.read(store, realm.path, raw, txn)
    assert (row.queue_count, row.queue_bytes) == (len(queue), sum(len(value) for _, value in queue))
    kept = [int.from_bytes(key[8:], "big") for key, _ in tail]
    assert kept == (list(range(row.tail_first, row.copy.version + 1)) if row.tail_first else [])
    assert row.tail_bytes == sum(len(value) for _, value in tail)
    assert _but_contact(again.row) == _but_contact(row)  # written once a minute
    everything = realm.queued(0, count_max=1 << 30, bytes_max=1 << 60)
    assert again.queued(0, count_max=1 << 30, bytes_max=1 << 60) == everything
    assert all(change.number < row.next_number for change in everything)


def _but_contact(row: local_pb2.LocalRealm) -> local_pb2.LocalRealm:
    copy = local_pb2.LocalRealm()
    copy.CopyFrom(row)
    copy.contact_us = 0
    return copy


def open_realm(directory: Path, *, durability: str = "durable") -> tuple[LocalStore, LocalRealm]:
    """A directory and its realm."""
    store = LocalStore.open(directory, durability=durability)
    return store, store.realm(PATH)
