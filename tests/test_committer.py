"""The commit pipeline: nothing is acknowledged, shown or applied that could still be lost, and nothing twice."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from committers import ADD_ONE, ANN, BOB, Server, policy
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from state_helpers import CLUSTER, KEY

from understudy.common import entries, memtable
from understudy.common.errors import (
    BadKey,
    BadOperation,
    BadRealmPath,
    DiskFull,
    Fenced,
    NotPermitted,
    ReceiptExpired,
    TransactionTooLarge,
    UnderstudyError,
)
from understudy.common.memtable import MISSING, Receipt
from understudy.common.operations import PUT
from understudy.common.records import Record
from understudy.common.state import State
from understudy.common.store import Store
from understudy.common.types import START, TRANSACTION_BYTES_MAX, Durability, Epoch
from understudy.primary import committer as committer_module
from understudy.primary.committer import BUSY_CHECKPOINT_AGE_S, CHECKPOINT_AGE_S
from understudy.v1 import data_pb2, log_pb2
from understudy.v1.store_pb2 import CheckpointRow

LOCAL, REPLICA, APPLIED = Durability


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """An empty store for all tests here: none of them writes a checkpoint."""
    path = tmp_path_factory.mktemp("committer") / "store"
    Store.create(path, CLUSTER, CheckpointRow(digest=START.digest))
    with Store.open(path) as opened:
        yield opened


# -- levels --------------------------------------------------------------------------------------------------


def test_g1_nothing_is_acknowledged_or_shown_before_it_is_durable(store: Store) -> None:
    """G1: at level local a transaction is answered and shown when it is durable, in order, not a moment before."""
    server = Server(store, policy(LOCAL))
    for number in (1, 2, 3):
        server.submit(number)
    assert (server.answered, server.count) == ([], 0)
    server.write()
    assert (server.answered, server.count) == ([], 0)
    server.durable(2)
    assert (server.answered, server.count) == ([1, 2], 2)
    server.submit(4)
    server.durable()
    assert (server.answered, server.count) == ([1, 2, 3, 4], 4)
    assert server.applier.applied == [1, 2, 3, 4]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_g1_at_level_replica_k_replicas_must_have_it(store: Store, k: int) -> None:
    """G1: at level replica a transaction is answered and shown once k replicas have made it durable, and not
    before it is durable here.
    """
    server = Server(store, policy(REPLICA, k))
    server.submit(1)
    server.submit(2)
    server.durable()
    assert (server.answered, server.count) == ([], 0)
    for having in range(1, k):
        server.replicas(*[2] * having, *[0] * (3 - having))
        assert (server.answered, server.count) == ([], 0)
    server.replicas(*[2] * (k - 1), 1, *[0] * (3 - k))
    assert (server.answered, server.count) == ([1], 1)
    server.replicas(*[2] * k)
    assert (server.answered, server.count) == ([1, 2], 2)


def test_g1_what_replicas_have_is_not_enough_without_this_disk(store: Store) -> None:
    """G1: should a replica be durable first, the answer still waits for the disk here."""
    server = Server(store, policy(REPLICA))
    server.submit(1)
    server.write()
    server.replicas(1)
    assert server.answered == []
    server.durable()
    assert server.answered == [1]


def test_at_level_applied_the_replica_must_show_it(store: Store) -> None:
    """At level applied a transaction is shown here when a replica has it, and answered when that one shows it."""
    server = Server(store, policy(APPLIED))
    server.submit(1)
    server.submit(2)
    server.durable()
    server.replicas((2, 0))
    assert (server.answered, server.count) == ([], 2)
    server.replicas((2, 1))
    assert server.answered == [1]
    server.replicas((2, 2))
    assert server.answered == [1, 2]


def test_at_level_applied_k_replicas_must_show_it(store: Store) -> None:
    """At level applied with two replicas asked for, one that shows a transaction is not enough."""
    server = Server(store, policy(APPLIED, 2))
    server.submit(1)
    server.durable()
    server.replicas((1, 1), (1, 0))
    assert server.answered == []
    server.replicas((1, 1), (1, 0), (1, 1))
    assert server.answered == [1]


def test_a_transaction_may_ask_for_more_not_for_less(store: Store) -> None:
    """A transaction that asks for more than the server's level waits for that; asking for less changes nothing."""
    server = Server(store, policy(LOCAL))
    for number, level in ((1, APPLIED), (2, REPLICA), (3, LOCAL), (4, None)):
        server.submit(number, level=level)
    server.durable()
    assert server.answered == [3, 4]
    server.replicas((4, 0))
    assert server.answered == [3, 4, 2]
    server.replicas((4, 1))
    assert server.answered == [3, 4, 2, 1]
    strict = Server(store, policy(APPLIED))
    strict.submit(1, level=LOCAL)
    strict.durable()
    strict.replicas((1, 0))
    assert strict.answered == []


def test_a_replica_that_goes_keeps_what_it_made_durable(store: Store) -> None:
    """What a replica had when it left still counts; what came after waits, as long as it takes."""
    server = Server(store, policy(REPLICA))
    server.submit(1)
    server.durable()
    server.replicas(1, connected=0)
    server.submit(2)
    server.durable()
    for _ in range(100):
        server.tick(1_000.0)
    assert server.answered == [1]
    server.replicas(server.committer.position.lsn)
    assert server.answered == [1, 2]


def test_a_replica_that_begins_anew_takes_nothing_back(store: Store) -> None:
    """What was acknowledged stays so when a replica is replaced by one that has nothing yet."""
    server = Server(store, policy(REPLICA))
    server.submit(1)
    server.durable()
    server.replicas(1)
    server.replicas(0)
    assert (server.answered, server.count) == ([1], 1)
    server.submit(1)  # again: its answer was lost
    assert server.answered == [1, 1]


# -- exactly once ----------------------------------------------------------------------------------------------


def test_g6_a_retry_is_answered_with_the_first_receipt_wherever_it_is(store: Store) -> None:
    """G6: a number sent again while it is in flight, while it waits for its level, once it is answered, and after
    a restart is not applied again and gets the receipt of the first time.
    """
    server = Server(store, policy(REPLICA))
    for number in (1, 2, 3):
        server.submit(number)
    server.submit(2)  # not written yet
    server.write()
    server.submit(1)  # written
    server.durable()
    server.submit(3)  # durable
    assert len(server.log) == 3
    server.replicas(3)
    server.submit(1)  # answered before
    assert Counter(server.answered) == {1: 3, 2: 2, 3: 2}
    again = Server(store, policy(REPLICA), log=server.log)
    for number in (1, 2, 3):
        again.submit(number)
    assert again.answered == []  # it can't know how far the replicas are
    again.replicas(3)
    assert len(again.log) == 3
    assert again.committer.take_batch() == b""
    receipts = {number: receipt for _, number, receipt in server.answers}
    assert all(receipt == receipts[number] for _, number, receipt in [*server.answers, *again.answers])
    assert {number: receipt.version for number, receipt in receipts.items()} == {1: 1, 2: 2, 3: 3}
    assert again.count == 3


def test_g1_a_retry_of_what_a_restart_found_waits_for_its_level(store: Store) -> None:
    """G1: an entry that was in the log when the server started again is acknowledged no earlier than any other."""
    first = Server(store, policy(REPLICA))
    for number in (1, 2, 3):
        first.submit(number)
    first.durable()
    server = Server(store, policy(REPLICA), log=first.log)
    for number in (3, 1, 2):
        server.submit(number, level=APPLIED if number == 1 else None)
    server.submit(4)
    server.durable()
    assert server.answered == []
    server.replicas((2, 0))
    assert server.answered == [2]
    server.replicas((4, 3))
    assert server.answered == [2, 3, 4, 1]


def test_g6_numbers_are_a_clients_own_in_each_realm(store: Store) -> None:
    """G6: the same number of another client, or on another realm, is another transaction."""
    server = Server(store, policy(LOCAL))
    server.submit(1)
    server.submit(1, client=BOB)
    server.submit(1, "/b")
    server.durable()
    assert server.count == 2
    assert [(realm, receipt.version) for realm, _, receipt in server.answers] == [
        ("/a", 1),
        ("/a", 2),
        ("/b", 1),
    ]


@pytest.mark.parametrize("when", ["in flight", "applied", "after a restart"])
def test_g6_a_number_that_was_passed_over_is_refused(store: Store, when: str) -> None:
    """G6: a number below one that is known already can't be told from one that was applied and forgotten, and so
    it never enters the log.
    """
    server = Server(store, policy(LOCAL))
    for number in (2, 5):
        server.submit(number)
    server.write()
    if when != "in flight":
        server.durable()
    if when == "after a restart":
        server = Server(store, policy(LOCAL), log=server.log)
    for number in (1, 3, 4):
        with pytest.raises(BadOperation, match="higher number"):
            server.submit(number)
    server.write()
    assert len(server.log) == 2
    server.submit(6)
    server.durable()
    assert server.count == 3


def test_g6_a_number_below_one_in_flight_is_looked_up_in_what_is_applied(store: Store) -> None:
    """G6: while a later transaction is in flight, an earlier one still finds its receipt."""
    server = Server(store, policy(LOCAL))
    server.submit(1)
    server.durable()
    server.submit(2)
    server.submit(1)
    assert server.answered == [1, 1]
    assert server.answers[0] == server.answers[1]


def test_a_receipt_no_longer_known_is_said_to_be_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry after so long that nobody knows its receipt is not applied again, and not called a mistake."""
    server = Server(store, policy(LOCAL))
    server.submit(9)
    server.durable()
    monkeypatch.setattr(State, "receipt", lambda *_: MISSING)
    with pytest.raises(ReceiptExpired, match="not applied again"):
        server.submit(3)
    assert server.committer.take_batch() == b""


# -- what does not enter the log -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("realm", "number", "operations", "error"),
    [
        ("/a", 0, None, BadOperation),
        ("/a", 1, [], BadOperation),
        ("/a", 1, [log_pb2.Operation(kind=PUT)], BadKey),
        ("/a", 1, [log_pb2.Operation(kind=PUT, key=b"k" * 481)], BadKey),
        ("/a", 1, [log_pb2.Operation(key=b"k")], BadOperation),
        ("/a", 1, [ADD_ONE] * 100_001, TransactionTooLarge),
        (
            "/a",
            1,
            [log_pb2.Operation(kind=PUT, key=b"k", value=bytes(TRANSACTION_BYTES_MAX))],
            TransactionTooLarge,
        ),
        ("", 1, None, BadRealmPath),
        ("a", 1, None, BadRealmPath),
        ("/.a", 1, None, BadRealmPath),
        ("/" + "x" * 600, 1, None, BadRealmPath),
        ("/__system", 1, None, NotPermitted),
        ("/a/__keys", 1, None, NotPermitted),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_transaction_leaves_no_trace(
    store: Store,
    realm: str,
    number: int,
    operations: list[log_pb2.Operation] | None,
    error: type[UnderstudyError],
) -> None:
    """What can't be is refused before it is given an LSN, and what comes next does not notice."""
    server = Server(store, policy(LOCAL))
    for _ in range(2):
        with pytest.raises(error):
            server.submit(number, realm, operations=operations)
    server.submit(1)
    server.durable()
    assert [record.lsn for record in server.log] == [1]
    assert server.answered == [1]


# -- too few replicas --------------------------------------------------------------------------------------------


def test_without_degrading_transactions_wait_and_the_next_are_held_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: under the policy to wait, what is not on a replica stays unacknowledged, and there is room for only so
    much of it.
    """
    monkeypatch.setattr(committer_module, "PENDING_ENTRIES_MAX", 10)
    server = Server(store, policy(REPLICA))
    number = 0
    while server.committer.has_room and number < 100:
        number += 1
        server.submit(number)
        server.durable()
        server.replicas(connected=0)
        server.tick(100.0)
    assert 5 <= number <= 10
    assert (server.answered, server.committer.degraded) == ([], False)
    server.replicas(server.committer.position.lsn)
    assert server.committer.has_room
    assert server.answered == list(range(1, number + 1))


def test_degrading_after_a_while_alone_and_coming_back(store: Store) -> None:
    """Under the policy to degrade, transactions are answered locally once too few replicas have been there for
    the time given, and wait for a replica again when one has caught up.
    """
    server = Server(store, policy(REPLICA, degrade_after_s=5.0))
    server.replicas(0)
    server.submit(1)
    server.durable()
    server.tick(100.0)  # it is connected, though slow
    assert server.answered == []
    server.replicas(0, connected=0)
    server.tick(4.9)
    assert (server.answered, server.committer.degraded) == ([], False)
    server.tick(0.2)
    assert (server.answered, server.committer.degraded) == ([1], True)
    server.submit(2)
    server.durable()
    assert server.answered == [1, 2]
    server.replicas(server.committer.position.lsn)
    assert not server.committer.degraded
    server.submit(3)
    server.durable()
    assert server.answered == [1, 2]
    server.replicas(server.committer.position.lsn)
    assert server.answered == [1, 2, 3]


def test_a_replica_back_in_time_prevents_degrading(store: Store) -> None:
    """The time alone counts from the last replica's leaving, not from the first's."""
    server = Server(store, policy(REPLICA, degrade_after_s=5.0))
    for _ in range(5):
        server.replicas(0, connected=0)
        server.tick(4.0)
        server.replicas(0, connected=1)
        server.tick(4.0)
    assert not server.committer.degraded


def test_what_asks_for_more_than_the_server_is_not_degraded(store: Store) -> None:
    """Degrading lowers the server's own level; a transaction that asked for more goes on waiting for it."""
    server = Server(store, policy(REPLICA, degrade_after_s=0.0))
    server.submit(1, level=APPLIED)
    server.submit(2)
    server.durable()
    server.replicas(connected=0)
    server.tick(1.0)
    assert server.committer.degraded
    assert server.answered == [2]
    server.replicas((2, 2))
    assert server.answered == [2, 1]


def test_a_degraded_server_returns_to_its_level_under_load(store: Store) -> None:
    """A replica that keeps up, always a few entries behind what was written this moment, ends the degraded state."""
    server = Server(store, policy(REPLICA, degrade_after_s=0.0))
    server.replicas(connected=0)
    server.tick(1.0)
    assert server.committer.degraded
    for number in range(1, 30):
        server.submit(number)
        server.durable()
        server.replicas(number - 1)
    assert not server.committer.degraded
    assert server.answered == list(range(1, 29))


def test_a_degraded_server_does_not_wait_for_a_replica_far_behind(store: Store) -> None:
    """A replica that is only just connected again has to catch up first; until then the server stays degraded."""
    server = Server(store, policy(REPLICA, degrade_after_s=0.0))
    server.replicas(connected=0)
    server.tick(1.0)
    for number in range(1, 5_001):
        server.submit(number)
    server.durable()
    server.replicas(10)
    assert server.committer.degraded
    server.replicas(server.committer.position.lsn)
    assert not server.committer.degraded


# -- fenced ------------------------------------------------------------------------------------------------------


def test_g7_a_fenced_server_acknowledges_nothing_more(store: Store) -> None:
    """G7: after the fence nothing is taken in and nothing answered, whatever becomes durable, here or on replicas,
    and whatever the disk says; nor does anything more become visible.
    """
    server = Server(store, policy(REPLICA, degrade_after_s=1.0))
    for number in (1, 2, 3):
        server.submit(number, level=APPLIED if number == 2 else None)
    server.durable()
    server.replicas((2, 1))
    assert server.answered == [1]
    server.committer.fence(Epoch(7))
    server.durable()
    server.replicas(3)
    server.committer.on_disk_full(True, "/data")
    server.committer.on_disk_full(False, "/data")
    server.replicas(3, connected=0)
    server.tick(1_000.0)
    for number in (2, 3, 4):
        with pytest.raises(Fenced, match=r"epoch 7.*rewind"):
            server.submit(number)
    with pytest.raises(Fenced):
        server.committer.drop_realm("/a", lambda _: None)
    with pytest.raises(Fenced):
        server.committer.submit_mark(entries.freeze_entry)
    server.committer.freeze()
    assert server.committer.take_batch() == b""
    assert (server.answered, server.count) == ([1], 2)


# -- disk full ---------------------------------------------------------------------------------------------------


def test_g9_a_full_disk_stops_new_transactions_and_loses_none(store: Store) -> None:
    """G9: while the disk is full new transactions are refused with that, those taken in wait for space, and when
    it returns so do writes.
    """
    server = Server(store, policy(LOCAL))
    server.submit(1)
    server.write()
    server.committer.on_disk_full(True, "/data")
    with pytest.raises(DiskFull, match=r"no space left in /data.*free some space"):
        server.submit(2)
    with pytest.raises(DiskFull):
        server.committer.submit_mark(entries.freeze_entry)
    server.tick(CHECKPOINT_AGE_S + 1)
    server.committer.on_disk_full(False, "/data")
    server.submit(3)
    server.durable()
    assert server.answered == [1, 3]
    assert server.count == 2


def test_g6_a_retry_on_a_full_disk_is_not_called_refused(store: Store) -> None:
    """G6: while the disk is full, a transaction that is applied already or waits for space is answered as such:
    a refusal says that it was not applied, and the caller would send it again as a new one.
    """
    server = Server(store, policy(LOCAL))
    server.submit(1)
    server.durable()
    server.submit(2)
    server.write()
    server.committer.on_disk_full(True, "/data")
    server.submit(1)
    assert server.answered == [1, 1]
    server.submit(2)
    server.durable()
    assert Counter(server.answered) == {1: 2, 2: 2}
    assert server.count == 2


# -- time and room -----------------------------------------------------------------------------------------------


def test_time_in_the_log_never_goes_back(store: Store) -> None:
    """A clock that jumps back does not make a later entry older; after a restart neither."""
    server = Server(store, policy(LOCAL))
    for number, clock_us in enumerate((1_000, 5_000, 2_000, 0, 5_001), 1):
        server.clock_us = clock_us
        server.submit(number)
    server.durable()
    again = Server(store, policy(LOCAL), log=server.log)
    again.clock_us = 7
    again.submit(6)
    again.durable()
    times = [entries.parse_entry(record.payload, record.lsn).time_us for record in again.log]
    assert times == [1_000, 5_000, 5_000, 5_000, 5_001, 5_001]


def test_g9_there_is_room_for_so_many_bytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: what is made and not committed is limited in bytes, and commits make room again."""
    monkeypatch.setattr(committer_module, "PENDING_BYTES_MAX", 10_000)
    server = Server(store, policy(LOCAL))
    number = 0
    while server.committer.has_room and number < 100:
        number += 1
        server.submit(number, operations=[log_pb2.Operation(kind=PUT, key=b"k", value=bytes(1_000))])
    assert 5 <= number <= 10
    server.durable()
    assert server.committer.has_room
    assert server.committer.pending_bytes == 0


def test_g9_answers_that_wait_take_room_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: what is applied but waits for its level still counts: its number is limited as well."""
    monkeypatch.setattr(committer_module, "PENDING_ENTRIES_MAX", 3)
    server = Server(store, policy(LOCAL))
    for number in (1, 2, 3):
        assert server.committer.has_room
        server.submit(number, level=REPLICA)
        server.durable()
    assert not server.committer.has_room
    server.replicas(3)
    assert server.committer.has_room


def test_nothing_is_applied_while_checkpoints_are_behind(store: Store) -> None:
    """While nothing more should be applied, nothing is answered either; afterwards all of it is, in order."""
    server = Server(store, policy(LOCAL))
    server.applier.is_behind = True
    server.submit(1)
    server.submit(2)
    server.durable()
    assert (server.answered, server.applier.applied) == ([], [])
    server.applier.is_behind = False
    server.committer.advance()
    assert server.answered == [1, 2]


# -- marks -------------------------------------------------------------------------------------------------------


def test_g9_a_full_memtable_gets_one_freeze_mark(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: when the memtable is full, a freeze mark is set behind what is under way, and only one; the next full one
    gets one, too, while the first is being written, unless checkpoints are behind.
    """
    monkeypatch.setattr(memtable, "MEMTABLE_OPERATIONS", 3)
    server = Server(store, policy(LOCAL))
    for number in range(1, 6):
        server.submit(number)
    server.durable()
    server.committer.advance()
    assert len(server.state.frozen) == 0
    server.durable()
    assert (server.kinds(), len(server.state.frozen)) == (["change"] * 5 + ["freeze"], 1)
    for number in range(6, 9):
        server.submit(number)
        server.durable()
    server.durable()
    assert (server.kinds()[6:], len(server.state.frozen)) == (["change"] * 3 + ["freeze"], 2)
    server.applier.is_behind = True
    for number in range(9, 15):
        server.submit(number)
        server.durable()
    assert server.kinds()[10:] == ["change"] * 6
    assert server.answered[-1] == 8
    server.applier.is_behind = False
    server.committer.advance()
    server.durable()
    assert server.kinds()[16:] == ["freeze"]


def test_an_old_memtable_is_frozen_and_an_empty_one_is_not(store: Store) -> None:
    """A memtable that has had changes in it for a minute is written out; one without changes never."""
    server = Server(store, policy(LOCAL))
    for _ in range(10):
        server.tick(CHECKPOINT_AGE_S)
    assert server.committer.take_batch() == b""
    server.submit(1)
    server.durable()
    server.tick(1.0)
    server.tick(CHECKPOINT_AGE_S - 1)
    assert server.committer.take_batch() == b""
    server.tick(1.0)
    server.tick(CHECKPOINT_AGE_S * 2)
    server.durable()
    assert server.kinds() == ["change", "freeze"]
    for _ in range(10):
        server.tick(CHECKPOINT_AGE_S)
    assert server.committer.take_batch() == b""


def test_a_busy_memtable_is_frozen_after_a_few_seconds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: with enough operations in it a memtable does not wait for a minute; with one less it does."""
    monkeypatch.setattr(committer_module, "BUSY_OPERATIONS", 3)
    server = Server(store, policy(LOCAL))
    for number in (1, 2, 3):
        server.submit(number)
        server.durable()
        server.tick(BUSY_CHECKPOINT_AGE_S - 1)
        server.tick(1.0)
        server.durable()
        assert server.kinds() == ["change"] * number + ["freeze"] * (number == 3)


def test_a_mark_is_answered_as_a_transaction_is(store: Store) -> None:
    """A realm is dropped, and the caller told, when that is as durable as the server asks for; what is committed
    behind it begins a new realm, even while the drop is under way.
    """
    server = Server(store, policy(REPLICA))
    dropped: list[Receipt] = []
    server.submit(1)
    server.durable()
    server.replicas(1)
    server.committer.drop_realm("/a", dropped.append)
    server.submit(2)
    server.submit(3)
    server.durable()
    assert (dropped, server.count) == ([], 1)
    server.replicas(2)
    assert [receipt.lsn for receipt in dropped] == [2]
    assert server.state.realm("/a") is None
    server.replicas(4)
    assert [(number, receipt.version) for _, number, receipt in server.answers] == [(1, 1), (2, 1), (3, 2)]
    assert server.count == 2
    server.submit(4)
    server.durable()
    server.replicas(5)
    assert server.answers[-1][2].version == 3


def test_a_drop_behind_changes_still_in_flight_ends_their_realm(store: Store) -> None:
    """A realm dropped while changes to it are under way begins anew behind them, at version 1."""
    server = Server(store, policy(LOCAL))
    server.submit(1)
    server.submit(2)
    server.committer.drop_realm("/a", lambda _: None)
    server.submit(3)
    server.committer.drop_realm("/a", lambda _: None)
    server.submit(4)
    server.durable()
    assert [receipt.version for _, _, receipt in server.answers] == [1, 2, 1, 1]
    assert server.count == 1


def test_the_systems_own_realms_are_not_dropped(store: Store) -> None:
    """The key that history is signed with, and what else the system keeps, can't be dropped by anyone."""
    server = Server(store, policy(LOCAL))
    with pytest.raises(NotPermitted):
        server.committer.drop_realm("/__system", lambda _: None)
    assert server.committer.take_batch() == b""


def test_every_change_is_signed_and_chained_in_its_realm(store: Store) -> None:
    """Each change carries its realm's version, the digest of the change before, and the key's HMAC."""
    server = Server(store, policy(LOCAL))
    for number in range(1, 7):
        server.submit(number, "/a" if number % 2 else "/b")
        if number == 3:
            server.durable()
    server.durable()
    heads: dict[str, tuple[int, bytes]] = {}
    for record in server.log:
        entry = entries.parse_entry(record.payload, record.lsn)
        change = entries.parse_change(entry.change, record.lsn)
        digest = entries.change_digest(entry.change)
        assert entry.hmac == entries.sign(KEY, digest)
        assert (change.version - 1, change.previous) == heads.get(change.realm, (0, b""))
        heads[change.realm] = (change.version, digest)
    assert {path: head.version for path, head in server.state.realms().items()} == {"/a": 3, "/b": 3}


# -- against an oracle -------------------------------------------------------------------------------------------


@dataclass
class Sent:
    """A transaction that a client has sent and not been answered yet."""

    realm: str
    level: Durability
    number: int
    client: bytes


@dataclass
class Follower:
    """A replica, as it really is; what the primary knows of it is in ``reported``."""

    durable: int = 0
    applied: int = 0
    connected: bool = False


class CommitMachine(RuleBasedStateMachine):
    """Clients that retry, three replicas, a slow and sometimes full disk, crashes, failovers and fences."""

    store: Store

    def __init__(self) -> None:
        super().__init__()
        self.numbers = {ANN: 0, BOB: 0}
        self.unanswered: dict[tuple[bytes, int], Sent] = {}
        self.acknowledged: dict[tuple[bytes, int], tuple[Receipt, bool]] = {}  # the flag: safe on k replicas
        self.followers = [Follower() for _ in range(3)]
        self.fenced = self.full = False

    @initialize(
        level=st.sampled_from(list(Durability)),
        k=st.integers(1, 2),
        degrade_after_s=st.sampled_from([None, None, 5.0]),
    )
    def begin(self, level: Durability, k: int, degrade_after_s: float | None) -> None:
        self.policy = policy(level, k, degrade_after_s)
        self._start([])

    def _start(self, log: list[Record]) -> None:
        self.server = Server(self.store, self.policy, log=list(log))
        self.durable_lsn = self.shown_lsn = len(log)  # what a start finds is shown at once
        self.reported: dict[int, tuple[int, int]] = {}
        for follower in self.followers:
            follower.connected = False
        self.fenced = self.full = False
        for key in sorted(self.unanswered):
            self._send(self.unanswered[key])

    # -- clients -----------------------------------------------------------------------------------------

    def _send(self, sent: Sent) -> None:
        transaction = data_pb2.Transaction(
            number=sent.number,
            realm=sent.realm,
            durability=data_pb2.Durability.ValueType(sent.level.value),
            operations=[ADD_ONE],
        )
        self.unanswered[sent.client, sent.number] = sent
        server = self.server
        try:
            server.committer.submit(
                sent.client, transaction, lambda receipt: self._done(server, sent, receipt)
            )
        except DiskFull:
            assert self.full
            server.write()
            assert (sent.client, sent.number) not in self._in_log()
            del self.unanswered[sent.client, sent.number]

    def _done(self, server: Server, sent: Sent, receipt: Receipt) -> None:
        assert server is self.server
        assert not self.fenced
        assert receipt.lsn <= self.durable_lsn
        level = max(sent.level, self.policy.durability)
        having = [one for one in self.followers if one.durable >= receipt.lsn]
        showing = [one for one in having if one.applied >= receipt.lsn]
        if not (server.committer.degraded and level <= self.policy.durability):
            assert level < REPLICA or len(having) >= self.policy.sync_replicas
            assert level < APPLIED or len(showing) >= self.policy.sync_replicas
        key = (sent.client, sent.number)
        self.unanswered.pop(key, None)
        first, _ = self.acknowledged.setdefault(key, (receipt, bool(having)))
        assert first == receipt

    @rule(
        client=st.sampled_from([ANN, BOB]),
        realm=st.sampled_from(["/a", "/b"]),
        level=st.sampled_from([LOCAL, LOCAL, REPLICA, APPLIED]),
        count=st.integers(1, 3),
    )
    @precondition(lambda self: not self.fenced)
    def send(self, client: bytes, realm: str, level: Durability, count: int) -> None:
        for _ in range(count):
            self.numbers[client] += 1
            self._send(Sent(realm, level, self.numbers[client], client))

    @precondition(lambda self: self.unanswered and not self.fenced)
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        self._send(self.unanswered[data.draw(st.sampled_from(sorted(self.unanswered)))])

    # -- disks and replicas --------------------------------------------------------------------------------

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        """All of it goes to the disk, and some or all of that becomes durable."""
        self.server.write()
        if len(self.server.log) > self.durable_lsn:
            self.durable_lsn = data.draw(st.integers(self.durable_lsn + 1, len(self.server.log)))
            self.server.durable(self.durable_lsn)

    @rule(full=st.sampled_from([True, False, False]))
    def disk_full(self, full: bool) -> None:
        self.full = full and not self.fenced
        self.server.committer.on_disk_full(full, "/data")

    @rule(index=st.integers(0, 2), data=st.data(), told=st.booleans())
    def replicate(self, index: int, data: st.DataObject, told: bool) -> None:
        follower = self.followers[index]
        follower.connected = True
        follower.durable = data.draw(st.integers(follower.durable, self.durable_lsn))
        follower.applied = data.draw(st.integers(follower.applied, follower.durable))
        if told:
            self.reported[index] = (follower.durable, follower.applied)
        self._report()

    @rule(index=st.integers(0, 2))
    def lose_connection(self, index: int) -> None:
        self.followers[index].connected = False
        self._report()

    def _report(self) -> None:
        connected = sum(follower.connected for follower in self.followers)
        self.server.replicas(*self.reported.values(), connected=connected)

    @rule(seconds=st.sampled_from([0.5, 6.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self._report()
        self.server.tick(seconds)

    # -- disasters -----------------------------------------------------------------------------------------

    @rule(what=st.sampled_from(["nothing"] * 6 + ["crash", "fail over", "fence"]), data=st.data())
    def disaster(self, what: str, data: st.DataObject) -> None:
        """Rare, so that there is something to lose."""
        if what == "crash":
            self._crash(data.draw(st.integers(self.durable_lsn, len(self.server.log))))
        elif what == "fail over" or (what == "nothing" and self.fenced):
            self._fail_over()
        elif what == "fence" and not self.fenced:
            self.fenced, self.full = True, False
            self.server.committer.fence(Epoch(2))

    def _crash(self, found: int) -> None:
        """The server starts again; of what was not durable yet, some may have reached the disk all the same."""
        self._start(self.server.log[:found])

    def _fail_over(self) -> None:
        """The machine is gone, and the replica that is furthest goes on."""
        head = max(follower.durable for follower in self.followers)
        for key, (receipt, safe) in list(self.acknowledged.items()):
            if receipt.lsn > head:
                assert not safe
                del self.acknowledged[key]  # acknowledged by one disk alone, and lost with it
        self._start(self.server.log[:head])

    # -- what must hold at all times -----------------------------------------------------------------------

    def _in_log(self) -> Counter[tuple[bytes, int]]:
        changes = [
            entries.parse_change(entry.change, record.lsn)
            for record in self.server.log
            if (entry := entries.parse_entry(record.payload, record.lsn)).HasField("change")
        ]
        return Counter((change.client, change.number) for change in changes)

    def _kth(self, what: int) -> int:
        found = sorted((one[what] for one in self.reported.values()), reverse=True)
        return found[self.policy.sync_replicas - 1] if len(found) >= self.policy.sync_replicas else 0

    @invariant()
    def g6_no_transaction_is_in_the_log_twice(self) -> None:
        found = self._in_log()
        assert all(count == 1 for count in found.values())
        assert all(key in found for key in self.acknowledged)

    @invariant()
    def g5_reads_show_what_is_committed_and_nothing_else(self) -> None:
        server = self.server
        alone = self.policy.durability is LOCAL or server.committer.degraded
        committed = self.durable_lsn if alone else min(self.durable_lsn, self._kth(0))
        if not self.fenced:
            self.shown_lsn = max(self.shown_lsn, committed)
        assert server.state.applied.lsn == self.shown_lsn
        shown = Counter(
            entries.parse_change(entry.change, record.lsn).realm
            for record in server.log[: self.shown_lsn]
            if (entry := entries.parse_entry(record.payload, record.lsn)).HasField("change")
        )
        for path in ("/a", "/b"):
            found = server.state.get(path, b"n") if server.state.realm(path) else b"0"
            assert found == b"%d" % shown[path]

    @invariant()
    def whoever_can_be_answered_is(self) -> None:
        server = self.server
        for (client, number), sent in self.unanswered.items():
            level = max(sent.level, self.policy.durability)
            receipt = server.state.receipt(sent.realm, client, number)
            if self.fenced or not isinstance(receipt, Receipt):
                continue
            degraded = server.committer.degraded and level <= self.policy.durability
            waits = not degraded and (
                (level >= REPLICA and receipt.lsn > self._kth(0))
                or (level is APPLIED and receipt.lsn > self._kth(1))
            )
            assert waits, (sent, receipt)


class TestCommitting(CommitMachine.TestCase):  # type: ignore[valid-type, misc]
    """The machine as a test."""

    settings = settings(max_examples=80, stateful_step_count=40, deadline=None)

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.TemporaryDirectory()
        path = Path(cls.folder.name) / "store"
        Store.create(path, CLUSTER, CheckpointRow(digest=START.digest))
        CommitMachine.store = Store.open(path)

    @classmethod
    def tearDownClass(cls) -> None:
        CommitMachine.store.close()
        cls.folder.cleanup()
