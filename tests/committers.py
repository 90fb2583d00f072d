"""A committer with a real state and no network, for the tests of what is built on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from state_helpers import KEY, write_here

from understudy.common import entries
from understudy.common.memtable import Receipt
from understudy.common.operations import ADD
from understudy.common.records import ChainReader, Record
from understudy.common.state import State
from understudy.common.store import Store
from understudy.common.store_layout import Environment, history_key
from understudy.common.types import Durability, Lsn
from understudy.primary.committer import CommitPolicy, Committer
from understudy.v1 import data_pb2, log_pb2
from understudy.v1.store_pb2 import RealmRow

ANN, BOB = b"a" * 16, b"b" * 16
ADD_ONE = log_pb2.Operation(kind=ADD, key=b"n", amount=1)


@dataclass
class Applier:
    """Applies to a real state, and can be behind."""

    state: State
    is_behind: bool = False
    applied: list[Lsn] = field(default_factory=list)

    def apply(self, record: Record, entry: log_pb2.Entry | None = None) -> log_pb2.Entry:
        self.applied.append(record.lsn)
        return self.state.apply(record, entry)


class Server:
    """A committer with its state and log, and with what its callers were answered."""

    def __init__(self, store: Store, policy: CommitPolicy, *, log: list[Record] | None = None) -> None:
        self.log = log or []  # what the writer was given
        self.applier = Applier(State(store))
        for record in self.log:
            self.applier.state.apply(record)
        self.clock_us = 1_000
        self.now_s = 0.0
        self.answers: list[tuple[str, int, Receipt]] = []  # realm, number, receipt; in the order of answering
        self.committer = Committer(
            self.applier, policy=policy, history_key=KEY, clock_us=lambda: self.clock_us
        )
        self._reader = ChainReader(self.committer.position)

    @property
    def state(self) -> State:
        return self.applier.state

    def submit(
        self,
        number: int,
        realm: str = "/a",
        *,
        client: bytes = ANN,
        level: Durability | None = None,
        operations: list[log_pb2.Operation] | None = None,
    ) -> None:
        transaction = data_pb2.Transaction(
            number=number,
            realm=realm,
            durability=data_pb2.Durability.ValueType(level.value if level else 0),
            operations=[ADD_ONE] if operations is None else operations,
        )
        self.committer.submit(
            client, transaction, lambda receipt: self.answers.append((realm, number, receipt))
        )

    def write(self) -> None:
        """The writer takes what there is."""
        self.log += self._reader.feed(self.committer.take_batch())

    def durable(self, lsn: int | None = None) -> None:
        """Everything, or what there is up to an LSN, is durable here."""
        self.write()
        lsn = self.log[-1].lsn if lsn is None else lsn
        self.committer.on_durable(self.log[lsn - self.log[0].lsn].position)

    def replicas(self, *progress: tuple[int, int] | int, connected: int | None = None) -> None:
        """How far the replicas are, as (durable, applied) or as both in one."""
        pairs = [one if isinstance(one, tuple) else (one, one) for one in progress]
        self.committer.on_replicas(
            [(Lsn(durable), Lsn(applied)) for durable, applied in pairs],
            connected=len(pairs) if connected is None else connected,
            now_s=self.now_s,
        )

    def tick(self, seconds: float) -> None:
        self.now_s += seconds
        self.committer.on_tick(self.now_s)

    @property
    def answered(self) -> list[int]:
        return [number for _, number, _ in self.answers]

    @property
    def count(self) -> int:
        """How many transactions reads show, by what they added."""
        return int(self.state.get("/a", b"n") or b"0") if self.state.realm("/a") else 0

    def kinds(self) -> list[str | None]:
        return [entries.parse_entry(record.payload, record.lsn).WhichOneof("body") for record in self.log]


def policy(level: Durability, k: int = 1, degrade_after_s: float | None = None) -> CommitPolicy:
    return CommitPolicy(durability=level, sync_replicas=k, degrade_after_s=degrade_after_s)


def checkpoint(server: Server, environment: Environment) -> None:
    """All that the server has applied goes into the store."""
    server.committer.freeze()
    server.durable()
    while server.state.frozen:
        write_here(environment, server.state.frozen[-1])
        server.state.checkpointed()


def prune(environment: Environment, store: Store, path: str, upto: int) -> None:
    """A realm's oldest changes, which are in the store, go from it, as they do by age or size."""
    row = store.current.realm(path)
    assert row is not None
    with environment.env.begin(write=True) as txn:
        for version in range(row.history_first, upto + 1):
            assert txn.delete(history_key(row.id, version), db=environment.history)
        changed = RealmRow.FromString(txn.get(path.encode(), b"", db=environment.realms))
        changed.history_first = upto + 1
        txn.put(path.encode(), changed.SerializeToString(), db=environment.realms)
    store.refresh()
