"""The check of a whole store: finds what is not as it was written, and nothing else (G11)."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_helpers import Edit, Model, assert_equal, make_store, open_both

from understudy.common.checkpoint import apply_checkpoint
from understudy.common.errors import CorruptionError, NewerFormat
from understudy.common.lmdb_check import check_structure
from understudy.common.store import Store
from understudy.common.store_check import PROBLEMS_MAX, RealmState, check_state
from understudy.common.store_layout import (
    CHECKPOINT_KEY,
    Environment,
    dropping_key,
    history_key,
    realm_prefix,
)
from understudy.v1.log_pb2 import Change
from understudy.v1.store_pb2 import CheckpointRow, RealmRow

PUTS = {b"key %03d" % number: b"value %03d" % number * 5 for number in range(200)}


def two_realms(path: Path) -> list[Model]:
    """A store with realms /a (id 1) and /b, after two checkpoints; the model after each."""
    environment, store = open_both(make_store(path))
    with store:
        first, job = Model().step([Edit(path="/a", puts=PUTS, changes=20), Edit(path="/b", puts=PUTS)])
        apply_checkpoint(environment, [job])
        edit = Edit(path="/a", ranges=((b"key 1", b"key 15"),), puts={b"key 003": b"new"}, changes=5)
        second, job = first.step([edit])
        apply_checkpoint(environment, [job])
    return [first, second]


def test_a_sound_store_has_no_problems(tmp_path: Path) -> None:
    """A check of a store as checkpoints left it counts everything and finds nothing."""
    model = two_realms(tmp_path)[-1]
    with Store.open(tmp_path / "store") as store:
        read: list[int] = []
        states: list[RealmState] = []
        found = check_state(store, progress=read.append, on_realm=states.append)
        assert found.problems == []
        assert (found.lsn, found.state_digest) == (model.lsn, model.state_digest)
        assert (found.realms_checked, found.entries_checked) == (2, 350)
        assert [state.path for state in states] == ["/a", "/b"]
        for state in states:
            realm = model.realms[state.path]
            assert (state.version, state.entries) == (realm.version, len(realm.pairs))
            assert state.state_digest == realm.state_digest
        assert read == []
    assert check_structure(tmp_path / "store") == []


@pytest.mark.parametrize("sorted_at_once", [1, 3, 7, 100])
def test_any_number_of_realms_is_checked_a_few_at_a_time(
    tmp_path: Path, sorted_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: realms are taken in the order of their ids, which is not that of their paths, and each of them once."""
    monkeypatch.setattr("understudy.common.store_check._REALMS_SORTED_AT_ONCE", sorted_at_once)
    environment, store = open_both(make_store(tmp_path))
    with store:
        edits = [
            Edit(path=path, puts={b"key": path.encode()})
            for path in ("/e", "/b", "/g", "/a", "/f", "/c", "/d")
        ]
        model, job = Model().step(edits)
        apply_checkpoint(environment, [job])
        states: list[RealmState] = []
        found = check_state(store, on_realm=states.append)
        assert [state.path for state in states] == [edit.path for edit in edits]
        assert (found.problems, found.state_digest, found.realms_checked) == ([], model.state_digest, 7)


def test_progress_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of pairs read so far is reported at regular steps."""
    monkeypatch.setattr("understudy.common.store_check._PROGRESS_ROWS", 100)
    two_realms(tmp_path)
    with Store.open(tmp_path / "store") as store:
        read: list[int] = []
        check_state(store, progress=read.append)
        assert read == [100, 200, 300]


def test_no_flipped_byte_goes_unnoticed(tmp_path: Path, seed: int) -> None:
    """Wherever a byte of the file is flipped, either it is reported, or what is read is a state that was.

    That can be the state before the last checkpoint, where the flipped byte was in LMDB's newest meta page.
    """
    models = two_realms(tmp_path)
    length = (tmp_path / "store" / "data.mdb").stat().st_size
    chance = random.Random(seed)
    flips = [(chance.randrange(length), 1 << chance.randrange(8)) for _ in range(400)]
    assert sum(1 for _ in noticed(tmp_path / "store", flips, models)) > 50


def test_no_flipped_byte_in_a_branch_page_goes_unnoticed(tmp_path: Path) -> None:
    """A key that only leads the way to the rows, and is no row itself, is found damaged by searching the rows."""
    models = two_realms(tmp_path)
    whole = (tmp_path / "store" / "data.mdb").read_bytes()
    offsets = list(branch_keys(whole))
    assert len(offsets) > 50
    found = list(noticed(tmp_path / "store", [(offset, 0x10) for offset in offsets], models))
    assert any("a search does not find it" in problem for problem in found)


def noticed(path: Path, flips: list[tuple[int, int]], models: list[Model]) -> Iterator[str]:
    """Flips each byte, one after another, and gives the first problem found with each that is found.

    Fails the test where none is, and yet the store does not read as one of the models.
    """
    expected = {model.lsn: model for model in models}
    data = path / "data.mdb"
    whole = data.read_bytes()
    for offset, bits in flips:
        data.write_bytes(whole[:offset] + bytes([whole[offset] ^ bits]) + whole[offset + 1 :])
        problems = problems_of(path)
        if problems:
            yield problems[0]
            continue
        with Store.open(path) as store:
            assert_reads_as(store, expected[store.current.checkpoint.lsn], offset)
    data.write_bytes(whole)


def assert_reads_as(store: Store, model: Model, offset: int) -> None:
    """Everything that a digest covers is the model's, for scans as for searches."""
    for name, realm in model.realms.items():
        row = store.current.realm(name)
        assert row is not None, offset
        assert row.head == realm.head, offset
        assert list(store.current.scan(realm.id)) == sorted(realm.pairs.items()), offset
        assert store.current.get_many(realm.id, realm.pairs) == list(realm.pairs.values()), offset
        changes = [past.change for past in store.current.history(realm.id, 0)]
        assert changes == [past.change for past in realm.history], offset


def branch_keys(whole: bytes) -> Iterator[int]:
    """Offsets of the bytes of all keys in branch pages; the first node of each has none."""
    for page in range(0, len(whole), 4096):
        flags, lower = struct.unpack_from("<HH", whole, page + 10)
        if flags == 1:
            for (node,) in struct.iter_unpack("<H", whole[page + 16 : page + lower]):
                (key_bytes,) = struct.unpack_from("<H", whole, page + node + 6)
                yield from range(page + node + 8, page + node + 8 + key_bytes)


def problems_of(path: Path) -> list[str]:
    """What is found wrong with a store, as an operator would look for it: structure first."""
    problems = check_structure(path)
    if not problems:
        try:
            with Store.open(path) as store:
                problems = check_state(store).problems
        except (CorruptionError, NewerFormat) as error:
            problems = [str(error)]
    return problems


def _value(environment: Environment) -> None:
    _put(environment, environment.data, realm_prefix(1) + b"key 003", b"neW")


def _missing_pair(environment: Environment) -> None:
    with environment.env.begin(environment.data, write=True) as txn:
        txn.delete(realm_prefix(1) + b"key 003")


def _moved_byte(environment: Environment) -> None:
    _missing_pair(environment)
    _put(environment, environment.data, realm_prefix(1) + b"key 003n", b"ew")


def _foreign_pair(environment: Environment) -> None:
    _put(environment, environment.data, realm_prefix(77) + b"key", b"value")


def _foreign_client(environment: Environment) -> None:
    _put(environment, environment.clients, realm_prefix(77) + bytes(16), b"")


def _short_client(environment: Environment) -> None:
    _put(environment, environment.clients, realm_prefix(1) + bytes(3), b"")


def _bad_client(environment: Environment) -> None:
    _put(environment, environment.clients, realm_prefix(1) + bytes(16), b"\xff")


def _realm_row(environment: Environment) -> None:
    _change_row(environment, lambda row: setattr(row, "entries", row.entries + 1))


def _realm_version(environment: Environment) -> None:
    _change_row(environment, lambda row: setattr(row, "version", row.version + 1))


def _history_bytes(environment: Environment) -> None:
    _change_row(environment, lambda row: setattr(row, "history_bytes", 1))


def _unreadable_realm_row(environment: Environment) -> None:
    _put(environment, environment.realms, b"/a", b"\xff\xff")


def _realm_gone(environment: Environment) -> None:
    with environment.env.begin(environment.realms, write=True) as txn:
        txn.delete(b"/a")


def _same_id(environment: Environment) -> None:
    with environment.env.begin(environment.realms, write=True) as txn:
        txn.put(b"/c", txn.get(b"/a", b""))


def _history_gap(environment: Environment) -> None:
    with environment.env.begin(environment.history, write=True) as txn:
        txn.delete(history_key(1, 7))


def _history_end(environment: Environment) -> None:
    with environment.env.begin(environment.history, write=True) as txn:
        txn.delete(history_key(1, 25))


def _no_history(environment: Environment) -> None:
    with environment.env.begin(environment.history, write=True) as txn:
        for version in range(1, 26):
            txn.delete(history_key(1, version))


def _history_change(environment: Environment) -> None:
    with environment.env.begin(environment.history, write=True) as txn:
        row = txn.get(history_key(1, 7), b"")
        change = Change.FromString(row[72:])
        change.number += 1
        txn.put(history_key(1, 7), row[:72] + change.SerializeToString())


def _history_of_another_realm(environment: Environment) -> None:
    with environment.env.begin(environment.history, write=True) as txn:
        row = txn.get(history_key(1, 7), b"")
        change = Change.FromString(row[72:])
        change.realm = "/z"
        txn.put(history_key(1, 7), row[:72] + change.SerializeToString())


def _history_order(environment: Environment) -> None:
    with environment.env.begin(environment.history, write=True) as txn:
        row = txn.get(history_key(1, 7), b"")
        txn.put(history_key(1, 7), bytes(8) + row[8:])


def _short_history_row(environment: Environment) -> None:
    _put(environment, environment.history, history_key(1, 7), b"short")


def _combined_digest(environment: Environment) -> None:
    with environment.env.begin(environment.meta, write=True) as txn:
        row = CheckpointRow.FromString(txn.get(CHECKPOINT_KEY, b""))
        row.state_digest = bytes(16)
        txn.put(CHECKPOINT_KEY, row.SerializeToString())


def _put(environment: Environment, database: object, key: bytes, row: bytes) -> None:
    with environment.env.begin(write=True) as txn:
        txn.put(key, row, db=database)  # type: ignore[arg-type]


def _change_row(environment: Environment, change: Callable[[RealmRow], None]) -> None:
    with environment.env.begin(environment.realms, write=True) as txn:
        row = RealmRow.FromString(txn.get(b"/a", b""))
        change(row)
        txn.put(b"/a", row.SerializeToString())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_value, "realm /a has state digest"),
        (_missing_pair, "realm /a holds 149 entries"),
        (_moved_byte, "realm /a has state digest"),
        (_foreign_pair, "rows in data of a realm with id 77"),
        (_foreign_client, "rows in clients of a realm with id 77"),
        (_short_client, "a client's row of /a has a key of 11 bytes"),
        (_bad_client, "a client's row of /a can't be read"),
        (_realm_row, "realm /a holds 150 entries"),
        (_realm_version, "the history of realm /a ends at version 25"),
        (_history_bytes, "bytes, the realm's row says 1"),
        (_unreadable_realm_row, "the row of realm b'/a' can't be read"),
        (_realm_gone, "rows in data of a realm with id 1, and no such realm"),
        (_same_id, "realms /c and /a have the same id 1"),
        (_history_gap, "the history of realm /a has no version 7"),
        (_history_end, "the history of realm /a ends at version 24"),
        (_no_history, "the history of realm /a is gone"),
        (_history_change, "is no chain: version 8 does not follow"),
        (_history_of_another_realm, "has version 7 of realm /z in the place of version 7"),
        (_history_order, "has version 7 at LSN 0, after one at 6"),
        (_short_history_row, "can't be read at version 7"),
        (_combined_digest, "names 2 realms with state digest 00000000"),
    ],
)
@pytest.mark.parametrize("sorted_at_once", [1, 100])
def test_each_kind_of_damage_is_reported_with_its_place(
    tmp_path: Path,
    spoil: Callable[[Environment], None],
    says: str,
    sorted_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that were changed behind the store's back are found, and the report says where; with many realms, too."""
    monkeypatch.setattr("understudy.common.store_check._REALMS_SORTED_AT_ONCE", sorted_at_once)
    two_realms(tmp_path)
    environment, store = open_both(tmp_path / "store")
    with store:
        assert check_state(store).problems == []
        spoil(environment)
        problems = check_state(store).problems
        assert any(says in problem for problem in problems), problems


def test_rows_of_a_dropped_realm_are_expected(tmp_path: Path) -> None:
    """What is left of a realm that is being deleted bit by bit is no damage."""
    two_realms(tmp_path)
    environment, store = open_both(tmp_path / "store")
    with store:
        for database in (environment.data, environment.history):
            _put(environment, database, realm_prefix(77) + bytes(16), b"v")
        _put(environment, environment.meta, dropping_key(77), b"")
        assert check_state(store).problems == []


def test_the_list_of_problems_is_bounded(tmp_path: Path) -> None:
    """A store that is wrong everywhere is described by no more than so many sentences (G9)."""
    two_realms(tmp_path)
    environment, store = open_both(tmp_path / "store")
    with store:
        for number in range(PROBLEMS_MAX + 10):
            _put(environment, environment.data, realm_prefix(1000 + number) + b"k", b"v")
        assert len(check_state(store).problems) == PROBLEMS_MAX


def test_a_check_sees_one_state_while_checkpoints_go_on(tmp_path: Path) -> None:
    """A checkpoint written in the middle of a check changes nothing for it."""
    environment, store = open_both(make_store(tmp_path))
    with store:
        model, job = Model().step([Edit(path="/a", puts={b"%05d" % n: b"v" for n in range(10_000)})])
        apply_checkpoint(environment, [job])
        later, job = model.step([Edit(path="/a", ranges=((b"", b""),)), Edit(path="/b")])
        found = check_state(store, progress=lambda _: apply_checkpoint(environment, [job]) and None)
        assert found.problems == []
        assert (found.lsn, found.entries_checked) == (model.lsn, 10_000)
        assert_equal(store.refresh(), later)
