"""What a replica and its primary say to each other before anything flows: hello, answer, what a snapshot is like."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from faulty_files import FaultyFiles
from google.protobuf.message import DecodeError
from log_helpers import CLUSTER, new_log, write
from state_helpers import KEY, Author

from fuzz.target import Decode, Target, pure
from understudy.common import entries
from understudy.common.follow_table import PROTOCOL_VERSION
from understudy.common.locator import (
    EpochSpan,
    History,
    fork_position,
    last_common,
    lookup_in,
    relate,
    span_of,
)
from understudy.common.types import START, Digest, Epoch, Lsn, Position
from understudy.primary import replication_service
from understudy.replica import bootstrap
from understudy.replica.asking import ask
from understudy.replica.follow_session import on_answer
from understudy.v1 import replication_pb2


@contextlib.contextmanager
def _hello(_: Path) -> Iterator[Decode]:
    """What the primary makes of a hello, over a log."""
    with new_log(FaultyFiles()) as log:
        made = write(log, *(b"payload %d" % number for number in range(20)))
        spans = [
            EpochSpan(epoch=Epoch(epoch), first_lsn=Lsn(lsn), previous=Digest(bytes(32)))
            for epoch, lsn in ((1, 1), (3, 9))
        ]
        lookup = lookup_in(log.position_at, {Lsn(3): made[2][1].digest})
        ours = History(head=log.end, epochs=spans, first_held=log.first_lsn, lookup=lookup)

        def decode(data: bytes) -> None:
            with contextlib.suppress(DecodeError):
                hello = replication_service._checked(replication_pb2.Hello.FromString(data))
                locator = [Position(Lsn(one.lsn), Digest(one.digest)) for one in hello.locator]
                entries.proves_epoch(hello.proof.entry, epoch=Epoch(hello.epoch), cluster=CLUSTER, keys=[KEY])
                if locator:
                    relate(locator, Epoch(hello.epoch), ours)
                    last_common(locator, lookup)
                    log.offset_behind(locator[0].lsn)
                    list(log.records(locator[0].lsn, Lsn(hello.damaged_lsn)))

        yield decode


def _hellos() -> list[bytes]:
    with new_log(FaultyFiles()) as log:
        made = write(log, *(b"payload %d" % number for number in range(20)))
    locator = [
        replication_pb2.Position(lsn=made[at][1].lsn, digest=made[at][1].digest) for at in (19, 18, 10, 2)
    ]
    locator.append(replication_pb2.Position(digest=START.digest))
    proof = replication_pb2.EpochProof(entry=Author().epoch_start().payload)
    hello = replication_pb2.Hello(
        protocol_version=PROTOCOL_VERSION, cluster=CLUSTER, node=bytes(16), run=bytes(16), replica_id="r",
        epoch=3, locator=locator, proof=proof, damaged_lsn=20,
    )  # fmt: skip
    empty = replication_pb2.Hello(
        protocol_version=PROTOCOL_VERSION, node=bytes(16), run=bytes(16), replica_id="r"
    )
    return [hello.SerializeToString(), empty.SerializeToString()]


class _Call:
    """A call that is answered at once."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    async def write(self, message: object) -> None: ...

    async def read(self) -> object:
        return self._answer


def _answer(data: bytes) -> None:
    """What a replica, and a rewind, make of an answer."""
    with contextlib.suppress(DecodeError):
        response = replication_pb2.FollowResponse.FromString(data)
        answer = asyncio.run(ask(cast(Any, _Call(response)), "a:1", replication_pb2.Hello()))
        on_answer(answer.decision, directory="d", address="a:1")
        own = History(head=START, epochs=[], first_held=Lsn(1), lookup=lambda lsn: None)
        told = Position(Lsn(answer.common.lsn), Digest(answer.common.digest))
        fork_position(own, [span_of(info) for info in answer.epochs], told)


def _answers() -> list[bytes]:
    position = replication_pb2.Position(lsn=4, digest=bytes(32))
    info = replication_pb2.EpochInfo(epoch=2, first_lsn=3, previous=bytes(32))
    answer = replication_pb2.Answer(
        decision=replication_pb2.DIVERGED,
        cluster=CLUSTER,
        epoch=2,
        common=position,
        epochs=[info],
        head=position,
    )
    return [replication_pb2.FollowResponse(answer=answer).SerializeToString()]


@contextlib.contextmanager
def _snapshot_info(folder: Path) -> Iterator[Decode]:
    def decode(data: bytes) -> None:
        with contextlib.suppress(DecodeError):
            info = replication_pb2.SnapshotInfo.FromString(data)
            bootstrap._check_info(info, folder)
            bootstrap._make_log(folder, info)

    yield decode


def _snapshot_infos() -> list[bytes]:
    position = replication_pb2.Position(lsn=4, digest=bytes(32))
    info = replication_pb2.SnapshotInfo(
        snapshot=bytes(16), position=position, log_offset=400, cluster=CLUSTER, epoch=2, file_bytes=40_960,
        range_bytes=bootstrap.RANGE_BYTES,
    )  # fmt: skip
    return [info.SerializeToString()]


def targets() -> Sequence[Target]:
    """What the primary reads, then what the replica does."""
    return (
        Target(name="hello", opened=_hello, samples=_hellos),
        Target(name="answer", opened=pure(_answer), samples=_answers, is_slow=True),
        Target(name="snapshot info", opened=_snapshot_info, samples=_snapshot_infos, is_slow=True),
    )
