"""The store as it is read: creating, opening, refusing, and snapshots."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest
from store_helpers import (
    CLUSTER,
    Edit,
    Model,
    assert_equal,
    digest_at,
    fill_disk,
    make_store,
    open_both,
    small_disk,
)

from understudy.common.checkpoint import apply_checkpoint
from understudy.common.errors import (
    CorruptionError,
    DirectoryError,
    DiskFull,
    NewerFormat,
    NotADataDirectory,
    Overloaded,
    StorageFailed,
    UnderstudyError,
)
from understudy.common.store import Store
from understudy.common.store_layout import FORMAT_KEY, open_environment, translated
from understudy.common.types import START, ClusterId, Lsn, Position
from understudy.v1.replication_pb2 import EpochInfo, EpochProof
from understudy.v1.store_pb2 import CheckpointRow, EpochRow


@contextmanager
def filled(path: Path, *steps: list[Edit]) -> Iterator[tuple[Store, Model]]:
    """A store after a checkpoint for each step."""
    environment, store = open_both(make_store(path))
    with store:
        model = Model()
        for edits in steps:
            model, job = model.step(edits)
            apply_checkpoint(environment, [job])
        store.refresh()
        yield store, model


# -- creating and opening ----------------------------------------------------------------------------------


def test_a_new_store_is_empty_and_stands_where_it_was_told(tmp_path: Path) -> None:
    """A store just made has its cluster, checkpoint and epochs, and no realms."""
    epochs = [
        EpochRow(info=EpochInfo(epoch=number, first_lsn=number * 10), proof=EpochProof(entry=b"proof"))
        for number in (1, 2, 10)
    ]
    checkpoint = CheckpointRow(lsn=100, digest=digest_at(100), log_offset=5000, time_us=7)
    Store.create(tmp_path / "store", CLUSTER, checkpoint, epochs)
    with Store.open(tmp_path / "store", cluster=CLUSTER) as store:
        snapshot = store.current
        assert (snapshot.checkpoint.lsn, snapshot.checkpoint.log_offset) == (100, 5000)
        assert (snapshot.checkpoint.state_digest, snapshot.checkpoint.realms) == (bytes(16), 0)
        assert snapshot.cluster() == CLUSTER
        assert snapshot.epochs() == epochs
        assert list(snapshot.realms()) == []
        assert snapshot.marks() == [Position(Lsn(100), digest_at(100))]
        assert store.data_path.stat().st_mode & 0o077 == 0


def test_the_very_first_checkpoint_is_no_mark(tmp_path: Path) -> None:
    """LSN 0 is before the first entry: nobody can hold a position there that needs checking."""
    with Store.open(make_store(tmp_path)) as store:
        assert store.current.marks() == []
        assert store.current.mark(START.lsn) is None


def test_a_store_is_never_made_over_something_else(tmp_path: Path) -> None:
    """Creating a store in a directory that is not empty is refused, and what is there stays (G4)."""
    path = make_store(tmp_path)
    before = (path / "data.mdb").read_bytes()
    with pytest.raises(DirectoryError, match="not empty"):
        make_store(tmp_path)
    assert (path / "data.mdb").read_bytes() == before


def test_a_missing_store_is_named(tmp_path: Path) -> None:
    """Opening a directory without a store says so and makes none."""
    with pytest.raises(NotADataDirectory, match="no store"):
        Store.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_another_cluster_is_refused(tmp_path: Path) -> None:
    """A store that a mix-up brought into this data directory is not used."""
    path = make_store(tmp_path)
    with pytest.raises(DirectoryError, match="belongs to cluster 00010203"):
        Store.open(path, cluster=ClusterId(b"another cluster!"))
    Store.open(path, cluster=CLUSTER).close()


def _write_meta(path: Path, key: bytes, row: bytes) -> None:
    environment = open_environment(path, readonly=False)
    with environment.env.begin(environment.meta, write=True) as txn:
        txn.put(key, row)
    environment.close()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """A store whose format number is higher asks for a newer version."""
    path = make_store(tmp_path)
    _write_meta(path, FORMAT_KEY, b"\x02\0\0\0")
    with pytest.raises(NewerFormat, match=r"has format 2.*newer version"):
        Store.open(path)


@pytest.mark.parametrize("row", [b"", b"\0\0\0\0", b"\x01"])
def test_a_nonsensical_format_is_corruption(tmp_path: Path, row: bytes) -> None:
    """A format row that no version wrote is damage, not an old or a new format (G11)."""
    path = make_store(tmp_path)
    _write_meta(path, FORMAT_KEY, row)
    with pytest.raises(CorruptionError, match="format"):
        Store.open(path)


@pytest.mark.parametrize("content", [b"", b"not LMDB's" * 1000])
def test_a_file_of_another_kind_is_corruption(tmp_path: Path, content: bytes) -> None:
    """A data file that is empty or something else is reported with place and remedy (G11)."""
    path = make_store(tmp_path)
    (path / "data.mdb").write_bytes(content)
    with pytest.raises(CorruptionError, match=r"store.*make the copy anew"):
        Store.open(path)


def test_a_file_cut_off_anywhere_is_corruption(tmp_path: Path) -> None:
    """A data file that lost its end is refused when it is opened, not by a SIGBUS when it is read (G11)."""
    puts = {b"key %d" % number: bytes(1000) for number in range(100)}
    with filled(tmp_path, [Edit(path="/r", puts=puts)]):
        pass
    whole = (tmp_path / "store" / "data.mdb").read_bytes()
    for length in range(4096, len(whole), 4096):
        (tmp_path / "store" / "data.mdb").write_bytes(whole[:length])
        with pytest.raises(CorruptionError, match="make the copy anew"):
            Store.open(tmp_path / "store")


def test_other_damage_to_a_row_is_corruption(tmp_path: Path) -> None:
    """A row that can't be decoded is reported as damage when it is read (G11)."""
    with filled(tmp_path, [Edit(path="/r", puts={b"k": b"v"})]) as (store, _):
        environment = store.environment
        with environment.env.begin(environment.realms, write=True) as txn:
            txn.put(b"/r", b"\xff\xff")
        with environment.env.begin(environment.history, write=True) as txn:
            txn.put(bytes(7) + b"\x01" + bytes(7) + b"\x01", b"short")
        snapshot = store.refresh()
        with pytest.raises(CorruptionError, match="can't be read"):
            snapshot.realm("/r")
        with pytest.raises(CorruptionError, match="can't be read"):
            list(snapshot.realms())
        with pytest.raises(CorruptionError, match="version 1 has only 5 bytes"):
            list(snapshot.history(1, 0))


@pytest.mark.parametrize(
    ("error", "code", "expected", "says"),
    [
        (lmdb.CorruptedError, None, CorruptionError, "make the copy anew"),
        (lmdb.PageNotFoundError, None, CorruptionError, "make the copy anew"),
        (lmdb.VersionMismatchError, None, NewerFormat, "newer version"),
        (lmdb.MapFullError, None, DiskFull, "1 TiB"),
        (lmdb.ReadersFullError, None, Overloaded, "1024 snapshots"),
        (lmdb.MemoryError, errno.ENOMEM, StorageFailed, "ulimit -v"),
        (lmdb.ReadonlyError, errno.EACCES, DirectoryError, "chown"),
        (lmdb.DiskError, errno.ENOSPC, DiskFull, "free some space"),
        (lmdb.Error, errno.EDQUOT, DiskFull, "free some space"),
        (lmdb.Error, errno.EIO, StorageFailed, "can't test the store"),
        (lmdb.PanicError, None, StorageFailed, "can't test the store"),
    ],
)
def test_lmdbs_errors_become_ours(
    tmp_path: Path, error: type[lmdb.Error], code: int | None, expected: type[UnderstudyError], says: str
) -> None:
    """Each of LMDB's errors becomes the one that says who can mend it, with the place and the remedy."""
    raised = error("x")
    if code is not None:
        raised.code = code  # type: ignore[misc]
    found = translated(raised, "test", tmp_path)
    assert type(found) is expected
    assert says in str(found)
    assert str(tmp_path) in str(found)
    assert list(tmp_path.iterdir()) == []


def test_a_store_can_be_open_once_in_a_process(tmp_path: Path) -> None:
    """A second opening, whose closing would take the first one's locks away, is refused."""
    path = make_store(tmp_path)
    with Store.open(path), pytest.raises(StorageFailed, match="already open"):
        Store.open(path)
    Store.open(path).close()


# -- reading -----------------------------------------------------------------------------------------------


def test_pairs_are_found_one_by_one_and_many_at_once(tmp_path: Path) -> None:
    """Reading keys, present and absent, repeated and in any order, gives their values in that order."""
    with filled(tmp_path, [Edit(path="/a", puts={b"k": b"1"}), Edit(path="/b", puts={b"k": b"2"})]) as (
        store,
        model,
    ):
        first, second = model.realms["/a"].id, model.realms["/b"].id
        assert store.current.get(first, b"k") == b"1"
        assert store.current.get(second, b"k") == b"2"
        assert store.current.get(first, b"none") is None
        assert store.current.get(99, b"k") is None
        assert store.current.get_many(second, [b"z", b"k", b"a", b"k"]) == [None, b"2", None, b"2"]
        assert store.current.get_many(second, []) == []


BOUNDS = [b"", b"a", b"b", b"bb", b"c", b"z", b"\xff" * 3]


@pytest.mark.parametrize("start", BOUNDS)
@pytest.mark.parametrize("end", BOUNDS)
def test_scans_go_both_ways_between_any_bounds(tmp_path: Path, start: bytes, end: bytes) -> None:
    """A scan gives the pairs from start (included) to end (excluded) of its realm alone, in either order."""
    pairs = {b"a": b"1", b"b": b"2", b"c": b"3", b"\xff\xff": b"4"}
    neighbours = {b"a": b"other", b"\xff" * 4: b"other"}
    with filled(
        tmp_path,
        [Edit(path="/0", puts=neighbours)],
        [Edit(path="/1", puts=pairs)],
        [Edit(path="/2", puts=neighbours)],
    ) as (store, model):
        expected = [(k, v) for k, v in sorted(pairs.items()) if k >= start and (not end or k < end)]
        realm = model.realms["/1"].id
        assert list(store.current.scan(realm, start, end)) == expected
        assert list(store.current.scan(realm, start, end, reverse=True)) == expected[::-1]


def test_the_last_realm_is_scanned_backwards_too(tmp_path: Path) -> None:
    """A backward scan begins at the very last row of the store where nothing comes after the realm."""
    with filled(
        tmp_path, [Edit(path="/0", puts={b"a": b"1"}), Edit(path="/1", puts={b"a": b"1", b"b": b"2"})]
    ) as (
        store,
        model,
    ):
        realm = model.realms["/1"].id
        assert list(store.current.scan(realm, reverse=True)) == [(b"b", b"2"), (b"a", b"1")]
        assert list(store.current.scan(realm, b"", b"b", reverse=True)) == [(b"a", b"1")]
        assert list(store.current.scan(realm + 1, reverse=True)) == []


def test_realms_are_listed_page_by_page(tmp_path: Path) -> None:
    """Realms come ordered by path, beginning behind any path, existing or not."""
    edits = [Edit(path=path, puts={b"k": b"v"}) for path in ("/b", "/a", "/a/b", "/c")]
    with filled(tmp_path, edits) as (store, _):
        assert [path for path, _ in store.current.realms()] == ["/a", "/a/b", "/b", "/c"]
        assert [path for path, _ in store.current.realms("/a")] == ["/a/b", "/b", "/c"]
        assert [path for path, _ in store.current.realms("/a/z")] == ["/b", "/c"]
        assert list(store.current.realms("/c")) == []


def test_history_is_read_from_any_version_in_both_directions(tmp_path: Path) -> None:
    """A realm's changes come from a version on, upwards or downwards, and never those of another realm."""
    with filled(tmp_path, [Edit(path=f"/{n}", puts={b"k": b"v"}, changes=4) for n in range(3)]) as (
        store,
        model,
    ):
        realm = model.realms["/1"]
        for version in range(6):
            upwards = [row.version for row in store.current.history(realm.id, version)]
            downwards = [row.version for row in store.current.history(realm.id, version, reverse=True)]
            assert upwards == [number for number in (1, 2, 3, 4) if number >= version]
            assert downwards == [number for number in (4, 3, 2, 1) if number <= version]
        assert list(store.current.history(realm.id, 0)) == list(realm.history)


def test_clients_are_known_by_realm(tmp_path: Path) -> None:
    """What a client did last is found in the realm where it did it, and nowhere else."""
    client = bytes(15) + b"\x07"
    with filled(tmp_path, [Edit(path="/a", client=client, changes=3), Edit(path="/b")]) as (store, model):
        row = store.current.client(model.realms["/a"].id, client)
        assert row is not None
        assert (row.number, row.version) == (3, 3)
        assert store.current.client(model.realms["/b"].id, client) is None


def test_each_checkpoint_leaves_a_mark(tmp_path: Path) -> None:
    """The log's digest at every checkpoint is found by its LSN."""
    with filled(tmp_path, [Edit(path="/a")], [Edit(path="/a")]) as (store, model):
        assert store.current.marks() == [Position(Lsn(lsn), digest_at(lsn)) for lsn in model.lsns]
        assert store.current.mark(Lsn(model.lsns[0])) == digest_at(model.lsns[0])
        assert store.current.mark(Lsn(1)) is None


def test_the_cache_of_realm_rows_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for ever other paths, existing or not, keeps no more than so many rows (G9)."""
    monkeypatch.setattr("understudy.common.store._REALM_ROWS_CACHED", 3)
    with filled(tmp_path, [Edit(path=f"/{n}") for n in range(5)]) as (store, model):
        for _ in range(2):
            for path in [*model.realms, "/none"]:
                row = store.current.realm(path)
                assert (row.id if row else None) == (model.realms[path].id if path in model.realms else None)
        assert len(store.current._realms) == 3


# -- snapshots ---------------------------------------------------------------------------------------------


def test_a_snapshot_stays_as_it_was(tmp_path: Path) -> None:
    """Who holds a snapshot reads the old state, whole, through later checkpoints (G2)."""
    environment, store = open_both(make_store(tmp_path))
    with store:
        model, job = Model().step([Edit(path="/a", puts={b"k": b"old"})])
        apply_checkpoint(environment, [job])
        store.refresh()
        with store.hold() as held:
            later, job = model.step([Edit(path="/a", puts={b"k": b"new"}), Edit(path="/b")])
            apply_checkpoint(environment, [job])
            assert_equal(store.current, model)
            latest = store.refresh()
            assert_equal(held, model)
            assert_equal(latest, later)
            assert store.current is latest


def test_a_snapshot_closes_with_its_last_user(tmp_path: Path) -> None:
    """An old snapshot's reader slot is given back as soon as nobody uses it, and not before."""
    environment, store = open_both(make_store(tmp_path))
    with store:

        def readers() -> int:
            return environment.env.readers().count("\n") - 1

        old = store.current.acquire()
        store.refresh()
        assert readers() == 2
        assert old.get(1, b"k") is None
        old.release()
        assert readers() == 1
        with pytest.raises(RuntimeError, match="closed"):
            old.acquire()


def test_a_scan_keeps_its_snapshot_open(tmp_path: Path) -> None:
    """A scan that was begun goes on over the state that it began with, though everyone else let go of it."""
    puts = {b"%03d" % number: b"old" for number in range(300)}
    environment, store = open_both(make_store(tmp_path))
    with store:
        model, job = Model().step([Edit(path="/a", puts=puts)])
        apply_checkpoint(environment, [job])
        scan = store.refresh().scan(model.realms["/a"].id)
        first = next(scan)
        _, job = model.step([Edit(path="/a", ranges=((b"", b""),))])
        apply_checkpoint(environment, [job])
        store.refresh()
        assert [first, *scan] == sorted(puts.items())
        assert environment.env.readers().count("\n") - 1 == 1


def test_holding_and_refreshing_from_many_threads(tmp_path: Path) -> None:
    """Threads that hold snapshots while another refreshes always read from an open one."""
    environment, store = open_both(make_store(tmp_path))
    with store:
        done = threading.Event()
        errors: list[Exception] = []

        def hold() -> None:
            try:
                while not done.is_set():
                    with store.hold() as snapshot:
                        assert snapshot.checkpoint.lsn >= 0
            except Exception as error:  # anything at all is what the test is about
                errors.append(error)

        threads = [threading.Thread(target=hold) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(300):
            store.refresh()
        done.set()
        for thread in threads:
            thread.join()
        assert errors == []
        assert environment.env.readers().count("\n") - 1 == 1


def test_a_killed_readers_slot_is_freed(tmp_path: Path) -> None:
    """The next checkpoint frees the snapshot of a process that was killed, or its pages would stay for ever (G9)."""
    path = make_store(tmp_path)
    script = (
        "import sys; from pathlib import Path; from understudy.common.store import Store\n"
        "store = Store.open(Path(sys.argv[1])); print('reading', flush=True); sys.stdin.read()"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    environment = open_environment(path, readonly=False)
    try:
        with reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"reading\n"
            reader.kill()
        assert str(reader.pid) in environment.env.readers()
        apply_checkpoint(environment, [Model().step([])[1]])
        assert str(reader.pid) not in environment.env.readers()
    finally:
        environment.close()


# -- the lock file -----------------------------------------------------------------------------------------


def test_the_lock_file_has_all_its_blocks(tmp_path: Path) -> None:
    """LMDB's lock file is no hole, though LMDB would make it one: a full disk can't become a SIGBUS (G9)."""
    path = make_store(tmp_path)
    lock = path / "lock.mdb"
    lock.unlink()
    with open(lock, "wb") as file:
        file.truncate(70_000)
    Store.open(path).close()
    assert lock.stat().st_blocks * 512 >= lock.stat().st_size


def test_opening_on_a_full_disk_is_no_crash(tmp_path: Path) -> None:
    """A store whose lock file is gone can't be opened on a full disk, and the error says why (G9)."""
    script = (
        "import sys; from pathlib import Path; from understudy.common.store import Store\n"
        "from understudy.common.errors import DiskFull\n"
        "try:\n    Store.open(Path(sys.argv[1]))\nexcept DiskFull as error:\n    print(error)"
    )
    with small_disk(tmp_path / "disk", size="2m") as disk:
        path = make_store(disk)
        (path / "lock.mdb").unlink()
        fill = fill_disk(disk)
        run = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
        assert "free some space" in run.stdout
        fill.unlink()
        Store.open(path).close()
