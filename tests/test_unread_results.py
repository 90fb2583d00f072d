"""Clients that do not read their results."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from understudy.client import Put, aconnect
from understudy.common.access import LOCAL, set_caller
from understudy.common.operations import to_protos
from understudy.common.settings import PrimarySettings
from understudy.primary import data_service
from understudy.primary.data_service import PrimaryDataService, _Answers
from understudy.primary.server import serving_primary
from understudy.v1 import data_pb2

_MESSAGES = 30


class _Writer:
    """gRPC's side of a stream whose peer sends one transaction a message and takes results when it is told to."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self._numbers = iter(range(1, _MESSAGES + 1))

    async def read(self) -> object:
        """The next message."""
        number = next(self._numbers, None)
        if number is None:
            return grpc.aio.EOF
        transaction = data_pb2.Transaction(
            realm="/realm", number=number, operations=to_protos([Put(b"key", b"%d" % number)])
        )
        return data_pb2.CommitRequest(transactions=data_pb2.Transactions(transactions=[transaction]))

    async def write(self, message: data_pb2.CommitResponse) -> None:
        """Takes results."""
        self.taken.append(len(message.results.numbers))


def test_g9_a_client_that_takes_no_results_is_read_from_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: results that nobody takes are bounded, and all transactions are answered once they are taken."""
    monkeypatch.setattr(data_service, "UNREAD_RESULTS_MAX", 3)
    monkeypatch.setattr("understudy.primary.committer.PENDING_ENTRIES_MAX", 1)

    async def story() -> None:
        settings = PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")
        async with serving_primary(settings) as primary:
            context: Any = _Writer()
            answers = _Answers(primary.node)
            set_caller(LOCAL)
            service = PrimaryDataService(primary.node, primary.authority)
            taking = asyncio.create_task(service._take_in(bytes(16), context, answers))
            async with aconnect(primary.address) as other:
                for _ in range(2 * _MESSAGES):  # time enough to read everything
                    await other.commit("/other", [Put(b"key", b"value")])
            assert not taking.done()
            assert answers.owed == 3
            sending = asyncio.create_task(answers.send_forever(context))
            await taking
            await answers.drained()
            sending.cancel()
            assert sum(context.taken) == _MESSAGES
            assert max(context.taken) <= 3

    asyncio.run(story())
