"""Checkpoints: what a job does to the store, compared with a model in plain dictionaries."""

from __future__ import annotations

import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_helpers import SECOND_US, Edit, Model, assert_equal, digest_at, make_store, open_both

from understudy.common import checkpoint, store_expiry
from understudy.common.checkpoint import JobRefused, apply_checkpoint
from understudy.common.errors import CorruptionError
from understudy.common.state_digest import encode, sum_pairs
from understudy.common.store import Store
from understudy.common.store_check import check_state
from understudy.common.store_layout import Environment, history_key
from understudy.common.types import Lsn, Position
from understudy.v1.store_pb2 import CheckpointJob, CheckpointRow, EpochRow

DAY_US = 24 * 3600 * SECOND_US


@contextmanager
def stores(path: Path) -> Iterator[tuple[Environment, Store]]:
    """An empty store, open for checkpoints and for reading."""
    environment, store = open_both(make_store(path))
    with store:
        yield environment, store


@contextmanager
def limits(**values: int) -> Iterator[None]:
    """Limits of checkpoints, small enough to be met."""
    with ExitStack() as stack:
        for name, value in values.items():
            module = checkpoint if hasattr(checkpoint, name) else store_expiry
            stack.enter_context(mock.patch.object(module, name, value))
        yield


# -- against the model -------------------------------------------------------------------------------------

KEYS = st.one_of(
    st.sampled_from([b"a", b"b", b"b\0", b"c", b"\xff", b"\xff\xff", b"k" * 480]),
    st.binary(min_size=1, max_size=3),
)
VALUES = st.one_of(st.just(b""), st.binary(max_size=20), st.just(b"large" * 1000))


@st.composite
def range_sets(draw: st.DrawFn) -> tuple[tuple[bytes, bytes], ...]:
    """Disjoint, sorted ranges; the last may go to the end."""
    bounds = sorted(draw(st.sets(st.one_of(st.just(b""), KEYS), max_size=5)))
    if len(bounds) % 2:
        bounds.append(b"")
    return tuple(zip(bounds[::2], bounds[1::2], strict=True))


@st.composite
def edits(draw: st.DrawFn, path: str) -> Edit:
    """Anything that can happen to one realm between two freeze marks."""
    puts = draw(st.dictionaries(KEYS, VALUES, max_size=8))
    changes = draw(st.integers(0, 5))
    return Edit(
        path=path,
        drop=draw(st.booleans()) and draw(st.booleans()),
        ranges=draw(range_sets()),
        puts=puts,
        deletes=frozenset(draw(st.sets(KEYS, max_size=5)) - puts.keys()),
        changes=changes,
        change_bytes=draw(st.integers(0, 60)),
        client=bytes(15) + bytes([draw(st.integers(0, 2))]),
    )


STEPS = st.lists(
    st.lists(st.sampled_from(["/a", "/b", "/c/d"]), unique=True).flatmap(
        lambda paths: st.tuples(*(edits(path) for path in paths))
    ),
    max_size=8,
)


@given(steps=STEPS)
@settings(max_examples=150)
def test_any_sequence_of_jobs_leaves_what_the_model_says(steps: list[tuple[Edit, ...]]) -> None:
    """Contents, counts, bytes, digests, history, clients and marks are the model's after every job (G11)."""
    small = limits(
        HISTORY_VERSIONS_MAX=6, HISTORY_BYTES_MAX=1500, CLIENTS_CHECKED=2, DROPPED_ROWS_MAX=4, _ROWS_AT_ONCE=3
    )
    with tempfile.TemporaryDirectory() as folder, small, stores(Path(folder)) as (environment, store):
        model = Model()
        for step in steps:
            model, job = model.step(step)
            result = apply_checkpoint(environment, [job])
            assert_equal(store.refresh(), model)
            assert result.checkpoint == store.current.checkpoint
            assert [changed.realm for changed in result.changed] == sorted(delta.path for delta in job.realms)
            assert all(
                changed.state_digest == model.realms[changed.realm].state_digest for changed in result.changed
            )
            found = check_state(store)
            assert found.problems == []
            assert found.entries_checked == sum(len(realm.pairs) for realm in model.realms.values())
            assert found.state_digest == model.state_digest
        assert [mark.lsn for mark in store.current.marks()] == list(model.lsns)


def test_a_large_job_over_a_large_realm(tmp_path: Path) -> None:
    """Thousands of rows, in many pages, put and deleted one by one and by range, come out as in the model."""
    first = {b"%06d" % number: b"value %d" % number for number in range(20_000)}
    with stores(tmp_path) as (environment, store):
        model, job = Model().step([Edit(path="/r", puts=first, changes=3000)])
        apply_checkpoint(environment, [job])
        assert_equal(store.refresh(), model)
        edit = Edit(
            path="/r",
            ranges=((b"002000", b"009000"), (b"015000", b"")),
            puts={b"%06d" % number: b"second" for number in range(19_999, 0, -3)},
            deletes=frozenset(b"%06d" % number for number in range(2, 20_000, 3)),
            changes=5000,
        )
        model, job = model.step([edit])
        apply_checkpoint(environment, [job])
        assert_equal(store.refresh(), model)
        assert check_state(store).problems == []


def test_equal_jobs_make_equal_stores(tmp_path: Path) -> None:
    """Two nodes that start from the same state and get the same jobs hold the same rows, meta included (G11)."""

    def dump_after_jobs(path: Path) -> list[tuple[bytes, bytes]]:
        path.mkdir()
        model = Model()
        with stores(path) as (environment, _):
            for number in range(10):
                puts = {b"%d" % number: b"v"}
                dropped = Edit(path=f"/{number}", drop=True, changes=0)
                changed = [Edit(path=f"/{n}", puts=puts, changes=2) for n in range(4) if n != number]
                model, job = model.step([dropped, *changed])
                apply_checkpoint(environment, [job])
            return _dump(environment)

    with limits(MARKS_MAX=4, DROPPED_ROWS_MAX=3, HISTORY_VERSIONS_MAX=5, CLIENTS_CHECKED=2):
        dump = dump_after_jobs(tmp_path / "one")
        assert dump == dump_after_jobs(tmp_path / "other")
    assert len(dump) > 30


def _dump(environment: Environment) -> list[tuple[bytes, bytes]]:
    with environment.env.begin() as txn:
        return [
            row
            for database in (
                environment.data,
                environment.realms,
                environment.history,
                environment.clients,
                environment.meta,
            )
            for row in txn.cursor(database)
        ]


# -- history -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "new", "first"), [(10, 0, 1), (10, 1, 2), (4, 3, 1), (10, 10, 11), (10, 15, 16), (0, 25, 16)]
)
def test_history_is_pruned_by_versions(tmp_path: Path, stored: int, new: int, first: int) -> None:
    """The oldest changes go when there are too many, be they stored or of the job itself (G9)."""
    with limits(HISTORY_VERSIONS_MAX=10), stores(tmp_path) as (environment, store):
        model = Model()
        for changes in (stored, new):
            if changes:
                model, job = model.step([Edit(path="/r", changes=changes), Edit(path="/other", changes=2)])
                apply_checkpoint(environment, [job])
        assert_equal(store.refresh(), model)
        row = store.current.realm("/r")
        assert row is not None
        assert row.history_first == first


@pytest.mark.parametrize(("rows", "less", "first"), [(5, 0, 1), (5, 1, 2), (4, 0, 2), (4, 1, 3)])
def test_history_fills_its_bytes_to_the_last(tmp_path: Path, rows: int, less: int, first: int) -> None:
    """Where the newest changes have exactly as many bytes as are allowed they all stay; one byte less, one goes."""
    steps = [[Edit(path="/r", changes=4)], [Edit(path="/r", changes=1)]]
    whole = Model()
    for step in steps:
        whole, _ = whole.step(step)
    newest = replace(whole.realms["/r"], history=whole.realms["/r"].history[-rows:])
    with limits(HISTORY_BYTES_MAX=newest.history_bytes - less), stores(tmp_path) as (environment, store):
        model = Model()
        for step in steps:
            model, job = model.step(step)
            apply_checkpoint(environment, [job])
        assert_equal(store.refresh(), model)
        assert next(store.current.history(1, 0)).version == first


def test_history_is_pruned_by_bytes(tmp_path: Path) -> None:
    """A few large changes push out many small ones, and the newest always stays (G9)."""
    with limits(HISTORY_BYTES_MAX=10_000), stores(tmp_path) as (environment, store):
        model = Model()
        for changes, size in ((20, 10), (1, 9_000), (3, 10), (1, 9_800)):
            model, job = model.step([Edit(path="/r", changes=changes, change_bytes=size)])
            apply_checkpoint(environment, [job])
            assert_equal(store.refresh(), model)
        assert [row.version for row in store.current.history(1, 0)] == [25]


def test_a_gap_in_the_history_is_reported(tmp_path: Path) -> None:
    """Pruning that meets a missing change says so and changes nothing (G11)."""
    with limits(HISTORY_VERSIONS_MAX=10), stores(tmp_path) as (environment, store):
        model, job = Model().step([Edit(path="/r", changes=10)])
        apply_checkpoint(environment, [job])
        with environment.env.begin(environment.history, write=True) as txn:
            assert txn.delete(history_key(1, 2))
        before = _dump(environment)
        _, job = model.step([Edit(path="/r", changes=5)])
        with pytest.raises(CorruptionError, match="history of realm /r has gaps"):
            apply_checkpoint(environment, [job])
        assert _dump(environment) == before
        assert "has no version 2" in check_state(store).problems[0]


# -- clients, dropped realms, marks, epochs ----------------------------------------------------------------


def test_silent_clients_are_forgotten_after_half_a_year(tmp_path: Path) -> None:
    """A client's row goes once its last change is 180 days old, a few rows looked at with each checkpoint (G9)."""
    clients = [bytes(15) + bytes([number]) for number in range(7)]
    with limits(CLIENTS_CHECKED=3), stores(tmp_path) as (environment, store):
        model = Model()
        for client in clients:
            model, job = model.step([Edit(path="/r", client=client)])
            apply_checkpoint(environment, [job])

        def known() -> list[int]:
            store.refresh()
            return [number for number, client in enumerate(clients) if store.current.client(1, client)]

        model, job = model.step([], later_us=179 * DAY_US)
        apply_checkpoint(environment, [job])
        # More of them than are looked at by one checkpoint, and before the others: they are not all it looks at.
        for client in clients[:4]:
            model, job = model.step([Edit(path="/r", client=client)])
            apply_checkpoint(environment, [job])
        assert known() == list(range(7))
        model, job = model.step([], later_us=DAY_US)
        for _ in range(4):
            apply_checkpoint(environment, [job])
            model, job = model.step([])
        assert known() == [0, 1, 2, 3]


def test_a_dropped_realm_goes_bit_by_bit(tmp_path: Path) -> None:
    """A drop takes effect at once, its rows go a limited number at a time, and none is left in the end (G9)."""
    puts = {b"%d" % number: b"v" for number in range(20)}
    with limits(DROPPED_ROWS_MAX=10), stores(tmp_path) as (environment, store):
        model, job = Model().step([Edit(path="/big", puts=puts, changes=15), Edit(path="/kept", puts=puts)])
        apply_checkpoint(environment, [job])
        model, job = model.step([Edit(path="/big", drop=True, changes=0)])
        left = []
        while True:
            apply_checkpoint(environment, [job])
            assert_equal(store.refresh(), model)
            assert check_state(store).problems == []
            left.append(sum(key.startswith(bytes(7) + b"\x01") for key, _ in _dump(environment)))
            if not left[-1]:
                break
            model, job = model.step([])
        assert left == [26, 16, 6, 0]
        with environment.env.begin(environment.meta) as txn:
            assert [key for key, _ in txn.cursor() if key.startswith(b"dropping/")] == []


def test_large_values_of_a_dropped_realm_count_for_more(tmp_path: Path) -> None:
    """Values of many pages are deleted fewer at a time (G9)."""
    puts = {b"%d" % number: bytes(1 << 20) for number in range(8)}
    with limits(DROPPED_ROWS_MAX=100), stores(tmp_path) as (environment, _):
        model, job = Model().step([Edit(path="/big", puts=puts)])
        apply_checkpoint(environment, [job])
        _, job = model.step([Edit(path="/big", drop=True, changes=0)])
        apply_checkpoint(environment, [job])
        with environment.env.begin(environment.data) as txn:
            assert txn.stat(environment.data)["entries"] == 6


def test_a_realm_dropped_and_made_again_starts_anew(tmp_path: Path) -> None:
    """In one job or in two, the new realm has nothing of the old one, and the old rows go."""
    with stores(tmp_path) as (environment, store):
        model, job = Model().step([Edit(path="/r", puts={b"old": b"1"}, changes=3)])
        apply_checkpoint(environment, [job])
        for _ in range(2):
            model, job = model.step([Edit(path="/r", drop=True, puts={b"new": b"2"})])
            apply_checkpoint(environment, [job])
            assert_equal(store.refresh(), model)
            row = store.current.realm("/r")
            assert row is not None
            assert row.version == 1
            with environment.env.begin() as txn:
                assert txn.stat(environment.data)["entries"] == 1
                assert txn.stat(environment.history)["entries"] == 1


def test_marks_become_sparser_towards_the_beginning(tmp_path: Path) -> None:
    """Beyond the limit every second mark of the older half goes; the first and the newer ones stay (G9)."""
    with limits(MARKS_MAX=8), stores(tmp_path) as (environment, store):
        model = Model()
        for _ in range(8):
            model, job = model.step([])
            apply_checkpoint(environment, [job])
        assert [mark.lsn for mark in store.refresh().marks()] == [1, 2, 3, 4, 5, 6, 7, 8]
        model, job = model.step([])
        apply_checkpoint(environment, [job])
        assert [mark.lsn for mark in store.refresh().marks()] == [1, 3, 5, 6, 7, 8, 9]
        for _ in range(100):
            model, job = model.step([])
            apply_checkpoint(environment, [job])
            marks = store.refresh().marks()
            assert len(marks) <= 8
            assert marks[0].lsn == 1
            assert marks[-1] == Position(Lsn(model.lsn), digest_at(model.lsn))


def test_epochs_are_kept_in_order(tmp_path: Path) -> None:
    """Epochs that began since the last checkpoint join those that the store has."""
    rows = [EpochRow() for _ in range(12)]
    for number, row in enumerate(rows, 1):
        row.info.epoch, row.info.first_lsn = number, number
    Store.create(tmp_path / "store", b"c" * 16, CheckpointRow(), rows[:1])
    environment, store = open_both(tmp_path / "store")
    with store:
        _, job = Model().step([])
        job.epochs.extend(rows[1:])
        apply_checkpoint(environment, [job])
        assert store.refresh().epochs() == rows


# -- jobs that do not follow -------------------------------------------------------------------------------


def _older(job: CheckpointJob) -> None:
    job.checkpoint.lsn = 1


def _gap(job: CheckpointJob) -> None:
    job.realms[0].history_first += 1
    job.realms[0].version += 1


def _too_few_changes(job: CheckpointJob) -> None:
    del job.realms[0].history[0]


def _unknown_realm(job: CheckpointJob) -> None:
    job.realms[0].path = "/none"


def _other_id(job: CheckpointJob) -> None:
    job.realms[0].id += 1


def _made_again(job: CheckpointJob) -> None:
    job.realms[0].created = True
    job.realms[0].id = job.checkpoint.lsn


def _made_long_ago(job: CheckpointJob) -> None:
    job.realms[1].created = True
    job.realms[1].id = 1


def _same_realm_twice(job: CheckpointJob) -> None:
    job.realms.append(job.realms[0])


def _same_key_twice(job: CheckpointJob) -> None:
    job.realms[0].put_keys.append(b"new")
    job.realms[0].put_values.append(b"")


def _put_and_deleted(job: CheckpointJob) -> None:
    job.realms[0].deleted_keys.append(b"new")


def _overlapping_ranges(job: CheckpointJob) -> None:
    job.realms[0].deleted_starts.extend([b"", b"k"])
    job.realms[0].deleted_ends.extend([b"z", b""])


def _drop_by_id_alone(job: CheckpointJob) -> None:
    job.dropped_realm_ids.append(1)


def _drop_by_path_alone(job: CheckpointJob) -> None:
    job.dropped_realms.append("/other")


@pytest.mark.parametrize(
    "spoil",
    [
        _older,
        _gap,
        _too_few_changes,
        _unknown_realm,
        _other_id,
        _made_again,
        _made_long_ago,
        _same_realm_twice,
        _same_key_twice,
        _put_and_deleted,
        _overlapping_ranges,
        _drop_by_id_alone,
        _drop_by_path_alone,
    ],
)
def test_a_job_that_does_not_follow_is_refused_whole(
    tmp_path: Path, spoil: Callable[[CheckpointJob], None]
) -> None:
    """A job made by mistake changes nothing, and the right one can still be written (G2)."""
    with stores(tmp_path) as (environment, store):
        puts = {b"k": b"v", b"y": b"v"}
        model, job = Model().step([Edit(path="/r", puts=puts), Edit(path="/other", puts=puts)])
        apply_checkpoint(environment, [job])
        before = _dump(environment)
        later, job = model.step([Edit(path="/r", puts={b"new": b"v"}, changes=2), Edit(path="/made")])
        spoiled = CheckpointJob.FromString(job.SerializeToString())
        spoil(spoiled)
        with pytest.raises(JobRefused):
            apply_checkpoint(environment, [spoiled])
        assert _dump(environment) == before
        apply_checkpoint(environment, [job])
        assert_equal(store.refresh(), later)


def test_old_values_are_read_without_copies(tmp_path: Path) -> None:
    """Overwriting many large values takes no memory for the old ones beyond one at a time (G9)."""
    values = {b"%d" % number: bytes(1 << 20) for number in range(40)}
    with stores(tmp_path) as (environment, store):
        model, job = Model().step([Edit(path="/r", puts=values)])
        apply_checkpoint(environment, [job])
        _, job = model.step([Edit(path="/r", puts=dict.fromkeys(values, b"small"))])
        tracemalloc.start()
        apply_checkpoint(environment, [job])
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 4 << 20
        row = store.refresh().realm("/r")
        assert row is not None
        assert row.state_digest == encode(sum_pairs(values, [b"small"] * 40))
