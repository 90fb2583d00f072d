"""Rewind: an old primary, or a replica that diverged, becomes a replica of the new primary.

Nothing of the old copy is touched until the new one is complete: entries that only this node has are exported
first, then the new primary's snapshot is built beside, starting from the old store so that only what differs is
fetched, and then the two change places. Cut off anywhere, it can be run again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from understudy.common import entries
from understudy.common.changelog import ChangeLog
from understudy.common.credentials import ANONYMOUS, Credentials
from understudy.common.directory import DataDirectory, Role
from understudy.common.entry_json import entry_row
from understudy.common.errors import (
    Fenced,
    ForeignCluster,
    NotADataDirectory,
    NotPrimary,
    ProtocolError,
    UnderstudyError,
    WrongRole,
)
from understudy.common.events import log
from understudy.common.files import OsFileSystem, beside_ours, publishing, storage_errors
from understudy.common.follow_table import PROTOCOL_VERSION, Decision
from understudy.common.locator import EpochSpan, History, fork_position, lookup_in, make_locator, span_of
from understudy.common.records import Record
from understudy.common.rpc import open_channel, peer_errors
from understudy.common.store import Store
from understudy.common.types import Digest, Epoch, Lsn, Position, new_id
from understudy.replica import bootstrap
from understudy.replica.asking import Call, ask
from understudy.v1 import replication_pb2, replication_pb2_grpc

# Decisions after which this node can become a replica, whatever it gives up for that.
_REWINDABLE = (Decision.STREAM, Decision.BOOTSTRAP, Decision.DIVERGED, Decision.AHEAD_OF_PRIMARY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewind:
    """What came of it."""

    decision: str  # what the new primary said of our history
    common: Position | None  # the last position both share
    exported: Path | None  # entries that only this node had, as JSON lines
    entries_exported: int
    set_aside: Path | None  # the whole old copy
    bytes_fetched: int
    bytes_total: int


async def rewind(
    path: Path,
    *,
    to: str,
    replica_id: str | None = None,
    credentials: Credentials = ANONYMOUS,
    progress: Callable[[int, int], None] | None = None,
) -> Rewind:
    """Makes the stopped node in ``path`` a replica of the primary at ``to``.

    Args:
        path: its data directory; an old primary's, or a diverged replica's.
        to: ``HOST:PORT`` of the new primary.
        replica_id: names the slot there; the host's name if not given. Use the same for ``understudy replica``.
        credentials: whom to trust there, and what to show.
        progress: called with bytes in place and bytes in all.

    Raises:
        NotPermitted: the other side is not trusted, or does not let us in.
        WrongRole, NotADataDirectory, DirectoryInUse: the directory can't be rewound.
        PeerUnreachable, NotPrimary, Fenced, ForeignCluster, ProtocolError: ``to`` can't be followed.
        CorruptionError, DiskFull, StorageFailed.
    """
    with DataDirectory.open_existing(path) as directory:
        _check_role(directory)
        async with open_channel(to, credentials) as channel:
            with peer_errors(to):
                own = await asyncio.to_thread(_read_own, directory)
                try:
                    answer = await _ask(channel, directory, own, replica_id or socket.gethostname(), to)
                    _check_answer(answer, to)
                    if directory.role is Role.PRIMARY:
                        directory.set_role(Role.FENCED)  # from here on it must not reign again
                    return await _rewind(
                        channel, directory, own, answer, replica_id or socket.gethostname(), progress
                    )
                finally:
                    own.close()


@dataclass(frozen=True, slots=True)
class _Own:
    """What this node knows of its own history."""

    log: ChangeLog
    store: Store
    history: History
    proof: replication_pb2.EpochProof

    def close(self) -> None:
        self.log.close()
        self.store.close()


def _read_own(directory: DataDirectory) -> _Own:
    with contextlib.ExitStack() as opened:
        store = opened.enter_context(Store.open(directory.store, cluster=directory.cluster))
        row = store.current.checkpoint
        changelog = opened.enter_context(
            ChangeLog.open(
                directory.log,
                cluster=directory.cluster,
                after=Position(Lsn(row.lsn), Digest(row.digest)),
                after_offset=row.log_offset,
                files=OsFileSystem(),
            )
        )
        spans = [span_of(epoch_row.info) for epoch_row in store.current.epochs()]
        proof = store.current.epochs()[-1].proof if spans else replication_pb2.EpochProof()
        for record in changelog.records(Lsn(row.lsn)):
            parsed = entries.parse_epoch_start(record.payload)
            if parsed is not None:
                start = parsed[0]
                spans.append(
                    EpochSpan(epoch=Epoch(start.epoch), first_lsn=record.lsn, previous=Digest(start.previous))
                )
                proof = replication_pb2.EpochProof(entry=record.payload)
        lookup = lookup_in(changelog.position_at, {mark.lsn: mark.digest for mark in store.current.marks()})
        history = History(head=changelog.end, epochs=spans, first_held=changelog.first_lsn, lookup=lookup)
        opened.pop_all()
        return _Own(changelog, store, history, proof)


async def _ask(
    channel: grpc.aio.Channel, directory: DataDirectory, own: _Own, replica_id: str, to: str
) -> replication_pb2.Answer:
    hello = replication_pb2.Hello(
        protocol_version=PROTOCOL_VERSION,
        cluster=directory.cluster,
        node=directory.node,
        run=new_id(),
        replica_id=replica_id,
        epoch=own.history.epoch,
        proof=own.proof,
    )
    for position in make_locator(own.history.head, own.history.lookup, own.store.current.marks()):
        hello.locator.add(lsn=position.lsn, digest=position.digest)
    call: Call = replication_pb2_grpc.ReplicationStub(channel).Follow()
    try:
        return await ask(call, to, hello)
    finally:
        call.cancel()


def _check_role(directory: DataDirectory) -> None:
    if directory.role not in (Role.PRIMARY, Role.FENCED, Role.REPLICA):
        raise WrongRole(
            f"{directory.path} can't be rewound, its role is {directory.role.value}",
            remedy=f"finish what was begun: understudy promote {directory.path}",
        )
    if not directory.has_copy:
        raise NotADataDirectory(
            f"{directory.path} has no copy yet",
            remedy="start it with `understudy replica`: it will bootstrap",
        )


def _check_answer(answer: replication_pb2.Answer, to: str) -> None:
    if answer.decision in _REWINDABLE:
        return
    problems: dict[int, UnderstudyError] = {
        Decision.FOREIGN_CLUSTER: ForeignCluster(
            f"{to} belongs to another cluster", remedy="give the address of the new primary"
        ),
        Decision.FENCED: Fenced(
            f"{to} is fenced: this directory is of a higher epoch than it", remedy="rewind that one to this"
        ),
        Decision.NOT_PRIMARY: NotPrimary(
            f"{to} is not a primary", remedy="give the address of the new primary"
        ),
        Decision.DUPLICATE_ID: ProtocolError(
            f"another replica with this id follows {to}", remedy="give this node its own --id"
        ),
        Decision.UNPROVEN_EPOCH: ProtocolError(f"{to} does not believe this directory's epoch"),
        Decision.PROTOCOL_MISMATCH: ProtocolError(f"{to} speaks another protocol version"),
    }
    raise problems.get(answer.decision, ProtocolError(f"{to} answered {answer.decision}"))


async def _rewind(
    channel: grpc.aio.Channel,
    directory: DataDirectory,
    own: _Own,
    answer: replication_pb2.Answer,
    replica_id: str,
    progress: Callable[[int, int], None] | None,
) -> Rewind:
    decision = Decision.Name(answer.decision)
    common = _common(own, answer)
    if answer.decision == Decision.STREAM:
        directory.set_role(Role.REPLICA)
        return Rewind(
            decision=decision,
            common=common,
            exported=None,
            entries_exported=0,
            set_aside=None,
            bytes_fetched=0,
            bytes_total=0,
        )
    diverged = answer.decision in (Decision.DIVERGED, Decision.AHEAD_OF_PRIMARY)
    exported, count = None, 0
    if diverged:
        exported, count = await asyncio.to_thread(_export, directory, own, common)
    fetched = await bootstrap.fetch(
        channel, directory, replica_id=replica_id, base=directory.store / "data.mdb", progress=progress
    )
    own.close()
    set_aside = directory.install(fetched.cluster, keep_old=diverged)
    log.info("rewound", decision=decision, common_lsn=common.lsn if common else None, exported=count)
    return Rewind(
        decision=decision,
        common=common,
        exported=exported,
        entries_exported=count,
        set_aside=set_aside,
        bytes_fetched=fetched.bytes_fetched,
        bytes_total=fetched.bytes_total,
    )


def _common(own: _Own, answer: replication_pb2.Answer) -> Position:
    told = Position(Lsn(answer.common.lsn), Digest(answer.common.digest))
    if answer.decision in (Decision.STREAM, Decision.BOOTSTRAP):
        return own.history.head
    return fork_position(own.history, [span_of(info) for info in answer.epochs], told)


# -- exporting -----------------------------------------------------------------------------------------------


def _export(directory: DataDirectory, own: _Own, common: Position) -> tuple[Path, int]:
    """Writes what only this node has to ``set-aside/``, durably; returns the file and the number of entries.

    Entries that the log no longer holds are not in it; they are in the copy that is set aside.
    """
    with storage_errors("create", directory.set_aside):
        directory.set_aside.mkdir(exist_ok=True)
    after = Lsn(max(common.lsn, own.log.first_lsn - 1))
    head = own.history.head
    path = directory.set_aside / f"entries-{after + 1}-{head.lsn}-{head.digest.hex()[:12]}.jsonl"
    return path, _publish_lines(path, own.log.records(after))


def _publish_lines(path: Path, records: Iterable[Record]) -> int:
    """Writes a line for each record as it comes, there may be more than memory holds; returns how many."""
    count = 0
    with publishing(path, beside=beside_ours(path)) as file:
        for record in records:
            file.write(json.dumps(entry_row(record), ensure_ascii=False).encode() + b"\n")
            count += 1
    return count
