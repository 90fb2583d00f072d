"""What is kept for later is bounded, at both ends of a commit stream."""

from __future__ import annotations

import asyncio

import pytest
from test_committer import LOCAL, Server, policy, store

from understudy.client import stream
from understudy.client.peers import Peers
from understudy.client.stream import CommitStream
from understudy.common.errors import TransactionTooLarge
from understudy.common.memtable import Receipt
from understudy.common.records import PAYLOAD_BYTES_MAX
from understudy.common.store import Store
from understudy.common.types import START, Lsn

__all__ = ["store"]  # fixture


def test_g9_no_entry_gets_into_the_log_that_a_reader_would_take_for_damage(store: Store) -> None:
    """G9: an entry of any kind that is larger than a record may be is refused, and the log goes on without it."""
    server = Server(store, policy(LOCAL))
    before = server.committer.position
    with pytest.raises(TransactionTooLarge):
        server.committer.submit_mark(lambda _: bytes(PAYLOAD_BYTES_MAX + 1))
    assert server.committer.position == before
    server.submit(1)
    server.durable()
    assert server.answered == [1]


def test_g9_outcomes_that_nobody_asks_for_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: of transactions whose callers gave up, the latest outcomes are kept."""
    monkeypatch.setattr(stream, "_LATE_MAX", 2)

    async def story() -> None:
        peers = Peers(["127.0.0.1:1"])
        commits = CommitStream(peers)
        for number in range(1, 5):
            commits._note_late(number, Receipt("/realm", number, Lsn(number), START.digest))
        assert list(commits._late) == [3, 4]
        await peers.close()

    asyncio.run(story())
