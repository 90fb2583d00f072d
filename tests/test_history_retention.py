"""History goes by age, too, of realms that don't change any more as well; heads and clients stay known."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_helpers import CLIENTS, CLUSTER, Layers
from store_helpers import SECOND_US, Edit, Model, make_store, open_both

from understudy.common import store_expiry
from understudy.common.checkpoint import apply_checkpoint
from understudy.common.entries import change_digest
from understudy.common.errors import CorruptionError
from understudy.common.memtable import MISSING
from understudy.common.operations import Put
from understudy.common.store import Store
from understudy.common.store_check import check_state
from understudy.common.store_layout import TIME_PREFIX, Environment, HistoryRow, history_key
from understudy.common.types import START
from understudy.v1.store_pb2 import CheckpointRow, RealmRow

HOUR_US = 3600 * SECOND_US
DAY_US = 24 * HOUR_US


class Node:
    """A store and a model that makes its jobs."""

    def __init__(self, environment: Environment, store: Store) -> None:
        self.environment = environment
        self.store = store
        self.model = Model()

    def step(self, *edits: Edit, later_us: int = SECOND_US) -> None:
        """One checkpoint, so much after the one before."""
        self.model, job = self.model.step(edits, later_us=later_us)
        apply_checkpoint(self.environment, [job])
        self.store.refresh()

    def row(self, path: str) -> RealmRow:
        row = self.store.current.realm(path)
        assert row is not None
        return row

    def kept(self, path: str) -> list[HistoryRow]:
        return list(self.store.current.history(self.row(path).id, 0))

    def dump(self) -> list[tuple[bytes, bytes]]:
        store = self.environment
        with store.env.begin() as txn:
            databases = (store.data, store.realms, store.history, store.clients, store.meta)
            return [row for database in databases for row in txn.cursor(database)]

    def change_row(self, path: str, change: Callable[[RealmRow], object]) -> None:
        with self.environment.env.begin(self.environment.realms, write=True) as txn:
            row = RealmRow.FromString(txn.get(path.encode(), b""))
            change(row)
            txn.put(path.encode(), row.SerializeToString())
        self.store.refresh()


@contextmanager
def open_node(path: Path) -> Iterator[Node]:
    """An empty store."""
    environment, store = open_both(make_store(path))
    with store:
        yield Node(environment, store)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """An empty store."""
    with open_node(tmp_path) as opened:
        yield opened


@contextmanager
def limits(**values: int) -> Iterator[None]:
    """Limits small enough to be met."""
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(mock.patch.object(store_expiry, name, value))
        yield


# -- what goes and what stays ------------------------------------------------------------------------------


def test_history_of_a_quiet_realm_goes_by_age_and_its_head_stays_known(node: Node) -> None:
    """G9: a realm that nobody changes any more loses all changes older than 30 days, and keeps its head."""
    node.step(Edit(path="/quiet", changes=5), Edit(path="/busy", changes=5))
    quiet, busy = node.kept("/quiet"), node.kept("/busy")
    node.step(Edit(path="/busy", changes=2), later_us=29 * DAY_US)
    assert (node.kept("/quiet"), node.kept("/busy")[:5]) == (quiet, busy)
    node.step(later_us=DAY_US)
    assert node.kept("/quiet") == quiet
    node.step()
    row = node.row("/quiet")
    assert node.kept("/quiet") == []
    assert (row.version, row.history_first, row.history_bytes) == (5, 6, 0)
    assert (row.head_lsn, row.head) == (quiet[-1].lsn, node.model.realms["/quiet"].head)
    assert [past.version for past in node.kept("/busy")] == [6, 7]
    assert check_state(node.store).problems == []


def test_a_realm_whose_history_is_gone_goes_on(node: Node) -> None:
    """The next change follows the last one's digest, and history begins anew with it."""
    node.step(Edit(path="/r", changes=3))
    node.step(later_us=31 * DAY_US)
    assert node.kept("/r") == []
    node.step(Edit(path="/r", changes=2))
    assert node.kept("/r") == list(node.model.realms["/r"].history[3:])
    assert node.row("/r").head_lsn == node.model.realms["/r"].history[-1].lsn
    assert check_state(node.store).problems == []


def test_a_client_is_known_longer_than_the_history(node: Node) -> None:
    """G6: half a year after its last transaction a client's number is known, its change long gone."""
    node.step(Edit(path="/r", client=CLIENTS[0]))
    for _ in range(2):
        node.step(later_us=89 * DAY_US)
    assert node.kept("/r") == []
    found = node.store.current.client(node.row("/r").id, CLIENTS[0])
    assert found is not None
    assert found.number == 1


def test_a_state_still_knows_where_a_realm_without_history_stands(tmp_path: Path) -> None:
    """G6: a client at the head is known to be there, and a number as applied, when no change is left to show."""
    Store.create(tmp_path / "store", CLUSTER, CheckpointRow(digest=START.digest))
    environment, store = open_both(tmp_path / "store")
    with store:
        layers = Layers(environment, store)
        for _ in range(3):
            layers.commit("/r", Put(b"k", b"v"))
        layers.checkpoint()
        layers.author.time_us += 31 * DAY_US
        layers.checkpoint()
        state, realm = layers.state, layers.author.realms["/r"]
        assert state.history("/r", 3, count_max=9, bytes_max=9) is None
        assert state.history("/r", 4, count_max=9, bytes_max=9) == []
        assert state.history_first("/r") == 4
        assert (state.head_lsn("/r"), state.digest_at("/r", 3)) == (realm.history[-1].lsn, realm.head)
        assert state.digest_at("/r", 2) is None
        assert state.client_row("/r", CLIENTS[0]) == realm.clients[CLIENTS[0]]
        assert state.receipt("/r", CLIENTS[0], 3) is MISSING
        layers.commit("/r", Put(b"k", b"w"))
        assert state.history("/r", 4, count_max=9, bytes_max=9) == realm.history[3:]
        assert (state.history_first("/r"), state.digest_at("/r", 3)) == (
            4,
            change_digest(realm.history[2].change),
        )


def test_equal_jobs_expire_equal_rows(tmp_path: Path) -> None:
    """G11: two nodes that get the same jobs hold the same rows, whatever has expired of them."""

    def dump_after_jobs(path: Path) -> list[tuple[bytes, bytes]]:
        path.mkdir()
        with open_node(path) as node:
            for number in range(40):
                node.step(Edit(path=f"/{number % 7}", changes=3), later_us=2 * DAY_US + number * HOUR_US)
            return node.dump()

    with limits(REALMS_CHECKED=2, EXPIRED_ROWS_MAX=2):
        assert dump_after_jobs(tmp_path / "one") == dump_after_jobs(tmp_path / "other")


STEPS = st.lists(
    st.tuples(
        st.lists(
            st.builds(
                Edit,
                path=st.sampled_from(["/a", "/b", "/c", "/d"]),
                drop=st.sampled_from([False, False, False, True]),
                changes=st.integers(0, 4),
                change_bytes=st.sampled_from([0, 40_000]),
            ),
            max_size=2,
            unique_by=lambda edit: edit.path,
        ),
        st.sampled_from([SECOND_US, HOUR_US // 2, HOUR_US, 5 * HOUR_US, DAY_US]),
    ),
    max_size=20,
)


@given(steps=STEPS)
@settings(max_examples=150, deadline=None)
def test_nothing_young_goes_and_nothing_old_stays(steps: list[tuple[list[Edit], int]]) -> None:
    """G9: whatever happens, no change goes before its age is reached; each has gone some checkpoints later, and the
    store is true to itself all the while.
    """
    small = limits(HISTORY_AGE_US=10 * HOUR_US, REALMS_CHECKED=2, EXPIRED_ROWS_MAX=3)
    with tempfile.TemporaryDirectory() as folder, small, open_node(Path(folder)) as node:
        times: dict[int, int] = {}  # of changes, by LSN

        def check(old_us: int | None = None) -> None:
            assert check_state(node.store).problems == []
            for path, realm in node.model.realms.items():
                kept = node.kept(path)
                assert kept == list(realm.history[len(realm.history) - len(kept) :])
                assert node.row(path).head_lsn == realm.history[-1].lsn
                for past in realm.history:
                    age_us = node.model.time_us - times.setdefault(past.lsn, node.model.time_us)
                    assert past in kept or age_us > 10 * HOUR_US
                    assert past not in kept or old_us is None or age_us <= old_us

        for edits, later_us in steps:
            node.step(
                *[edit for edit in edits if edit.changes or edit.path in node.model.realms], later_us=later_us
            )
            check()
        for _ in range(4 * (1 + sum(len(node.kept(path)) for path in node.model.realms))):
            node.step(
                later_us=SECOND_US
            )  # one of four realms at least is looked at, and one change of it goes
        check(old_us=11 * HOUR_US)  # times are noted that exactly


# -- bounds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("realms", "rows", "expected"),
    [
        (2, 6, [[0, 2, 4, 4, 4], [0, 2, 0, 2, 4], [0, 2, 0, 2, 0], [0, 0, 0, 2, 0]]),
        (3, 4, [[0, 4, 4, 4, 4], [0, 0, 4, 4, 4], [0, 0, 0, 4, 4], [0, 0, 0, 0, 4]]),
    ],
)
def test_a_checkpoint_expires_a_bounded_part_and_the_next_goes_on(
    node: Node, realms: int, rows: int, expected: list[list[int]]
) -> None:
    """G9: realms in turn, so many looked at and so many changes deleted by one checkpoint, and none left out."""
    names = [f"/{number}" for number in range(5)]
    node.step(*[Edit(path=name, changes=4) for name in names])
    left = []
    with limits(REALMS_CHECKED=realms, EXPIRED_ROWS_MAX=rows):
        node.step(later_us=31 * DAY_US)
        while any(map(node.kept, names)):
            left.append([len(node.kept(name)) for name in names])
            node.step()
    assert left == expected


def test_large_changes_count_for_more(node: Node) -> None:
    """G9: changes of many pages are deleted fewer at a time."""
    node.step(Edit(path="/r", changes=8, change_bytes=1 << 20))
    with limits(EXPIRED_ROWS_MAX=100):
        node.step(later_us=31 * DAY_US)
    assert len(node.kept("/r")) == 6


def test_times_of_checkpoints_are_few(node: Node) -> None:
    """G9: however many checkpoints there are, their times are kept only so densely that none is missing for an hour."""

    def times() -> int:
        return sum(key.startswith(TIME_PREFIX) for key, _ in node.dump())

    with limits(HISTORY_AGE_US=10 * HOUR_US):
        for _ in range(100):
            node.step(later_us=HOUR_US // 4)
            assert times() <= 23
        assert times() > 10
        for _ in range(20):
            node.step(later_us=20 * HOUR_US)
        assert times() == 2


# -- stores of earlier versions, and damage ----------------------------------------------------------------


def test_a_head_that_an_earlier_version_did_not_note_is_noted_before_it_expires(node: Node) -> None:
    """A row without the head's LSN has it from its newest change, when changes of the realm go."""
    node.step(Edit(path="/r", changes=3))
    newest = node.kept("/r")[-1]
    node.change_row("/r", lambda row: row.ClearField("head_lsn"))
    assert check_state(node.store).problems == []
    with limits(EXPIRED_ROWS_MAX=1):
        node.step(later_us=31 * DAY_US)
    assert [past.version for past in node.kept("/r")] == [2, 3]
    assert node.row("/r").head_lsn == newest.lsn


def test_a_gap_in_what_expires_is_reported(node: Node) -> None:
    """G11: a checkpoint that meets a missing change says so and changes nothing."""
    node.step(Edit(path="/r", changes=5))
    with node.environment.env.begin(node.environment.history, write=True) as txn:
        assert txn.delete(history_key(node.row("/r").id, 3))
    before = node.dump()
    with pytest.raises(CorruptionError, match="history of realm /r has gaps"):
        node.step(later_us=31 * DAY_US)
    assert node.dump() == before


@pytest.mark.parametrize(
    ("days", "change", "problem"),
    [
        (1, lambda row: setattr(row, "head_lsn", 2), "ends at LSN 3; the realm's row says 2"),
        (31, lambda row: row.ClearField("head_lsn"), "history of realm /r is gone"),
        (31, lambda row: setattr(row, "head_lsn", 99), "head at LSN 99, behind the checkpoint"),
        (31, lambda row: setattr(row, "history_first", 3), "history of realm /r is gone"),
        (31, lambda row: setattr(row, "history_bytes", 1), "history of realm /r is gone"),
    ],
)
def test_a_row_that_contradicts_the_history_is_found(
    node: Node, days: int, change: Callable[[RealmRow], object], problem: str
) -> None:
    """G11: where the head is, and from where on there is history, is checked, also where there is none left."""
    node.step(Edit(path="/r", changes=3))
    node.step(later_us=days * DAY_US)
    assert check_state(node.store).problems == []
    node.change_row("/r", change)
    [found] = check_state(node.store).problems
    assert problem in found
