"""What lies in LMDB files: rows of the store and of a client's directory, pages, and a copy that is being fetched."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lmdb
from google.protobuf.message import DecodeError
from local_helpers import PATH, Server, open_realm, put, send
from state_helpers import CLIENTS, Layers, write_here
from store_helpers import make_store, open_both

from fuzz.target import Decode, Target, kept_folder
from understudy.client import local_layout
from understudy.client.local_realm import LocalRealm
from understudy.client.local_store import LocalStore
from understudy.common.errors import CorruptionError, UnderstudyError
from understudy.common.lmdb_check import check_structure
from understudy.common.lmdb_pages import free_pages, read_metas
from understudy.common.memtable import Memtable
from understudy.common.operations import Add, Delete, Put, to_protos
from understudy.common.snapshot import SnapshotCopy
from understudy.common.snapshot_ranges import RANGE_BYTES, open_newest, range_digest
from understudy.common.state import State
from understudy.common.store import StoreSnapshot
from understudy.common.store_check import check_state
from understudy.common.store_layout import Environment
from understudy.common.types import Lsn
from understudy.v1 import local_pb2, replication_pb2

_SNAPSHOT = b"s" * 16

_Environment = Environment | local_layout.Environment
_Rows = dict[str, list[tuple[bytes, bytes]]]

# -- rows --------------------------------------------------------------------------------------------------------
#
# An input is one row: a byte for the database, one for the key's length, the key, the value. It takes the place of
# the row with that key.


def _row_bytes(database: int, key: bytes, value: bytes) -> bytes:
    return bytes([database, len(key) & 255]) + key + value


def _databases(environment: _Environment) -> dict[str, Any]:
    names = sorted(set(environment.__dataclass_fields__) - {"path", "env"})
    return {name: getattr(environment, name) for name in names}


def _rows(environment: _Environment) -> _Rows:
    with environment.env.begin() as txn:
        return {name: list(txn.cursor(database)) for name, database in _databases(environment).items()}


def _samples(rows: _Rows) -> list[bytes]:
    return [
        _row_bytes(number, key, value)
        for number, pairs in enumerate(rows.values())
        for key, value in pairs
        if len(key) < 256
    ]


def _put_row(environment: _Environment, data: bytes) -> None:
    database, length = data[0], data[1]
    found = list(_databases(environment).values())
    with environment.env.begin(found[database % len(found)], write=True) as txn:
        txn.put(data[2 : 2 + length] or b"\0", data[2 + length :])


def _put_all(environment: _Environment, rows: _Rows) -> None:
    with environment.env.begin(write=True) as txn:
        for name, database in _databases(environment).items():
            txn.drop(database, delete=False)
            txn.cursor(database).putmulti(rows[name])


# -- the store ---------------------------------------------------------------------------------------------------


def _fill_store(layers: Layers) -> None:
    """Realms with history, some of them dropped, over a few checkpoints."""
    layers.state.apply(layers.author.epoch_start())
    for number in range(3):
        layers.commit("/a", Put(b"key %d" % number, b"value"), Add(b"n", 1))
        layers.commit("/b", Put(b"k" * 480, b"v"), client=CLIENTS[1])
        layers.checkpoint()
    layers.commit("/a", Delete(b"key 0"))
    layers.state.apply(layers.author.drop("/b"))
    layers.checkpoint()


@functools.cache
def _store_rows() -> _Rows:
    with tempfile.TemporaryDirectory() as folder:
        environment, store = open_both(make_store(Path(folder)))
        with store:
            _fill_store(Layers(environment, store))
            return _rows(environment)


def _read_snapshot(snapshot: StoreSnapshot) -> None:
    snapshot.cluster(), snapshot.epochs(), snapshot.marks(), snapshot.mark(Lsn(1))
    for path, row in snapshot.realms():
        snapshot.realm(path)
        list(snapshot.scan(row.id))
        list(snapshot.history(row.id, 0))
        snapshot.client(row.id, CLIENTS[0])


def _look_back(state: State) -> None:
    for path in ("/a", "/b"):
        with contextlib.suppress(UnderstudyError):
            state.history(path, state.history_first(path), count_max=10, bytes_max=1 << 20)
            state.head_lsn(path), state.digest_at(path, 1), state.receipt(path, CLIENTS[0], 1)


@contextlib.contextmanager
def _store_row(folder: Path) -> Iterator[Decode]:
    environment, store = open_both(make_store(folder))
    rows = _store_rows()

    def decode(data: bytes) -> None:
        _put_all(environment, rows)
        with contextlib.suppress(IndexError, lmdb.BadValsizeError):  # the input names no row
            _put_row(environment, data)
        uses: Sequence[Callable[[], object]] = (
            lambda: check_state(store),
            lambda: _read_snapshot(store.refresh()),
            lambda: _look_back(State(store)),
            lambda: _checkpoint(State(store)),
        )
        for use in uses:
            with contextlib.suppress(UnderstudyError):
                use()

    def _checkpoint(state: State) -> None:
        table = Memtable()
        table.freeze(state.applied._replace(lsn=Lsn(state.applied.lsn + 1)), state.offset, state.time_us)
        write_here(environment, table)

    with store:
        yield decode


# -- a client's directory ----------------------------------------------------------------------------------------


@functools.cache
def local_template() -> Path:
    """A directory with a copy, a queue, a tail, and a state that is being loaded."""
    folder = kept_folder() / "local"
    store, realm = open_realm(folder, durability="relaxed")
    with store:
        server = Server()
        bound = server.bound()
        realm.note_bound(bound, cluster=b"c" * 16)
        send(realm, [server.change(put(number)) for number in range(5)], safe_version=2)
        for number in range(3):
            realm.commit(to_protos(put(number)))
        other = store.realm("/other")
        other.begin_load(bound, cluster=b"c" * 16)
        other.load_page(server.page(b"", 2), epoch=1)
    forget_place(folder)
    return folder


def forget_place(folder: Path) -> None:
    """Has a directory forget where it lies: a copy of it is not taken for one, and keeps its client id."""
    environment = local_layout.open_environment(folder, readonly=False, sync=False)
    with environment.env, environment.env.begin(environment.meta, write=True) as txn:
        row = local_pb2.LocalDirectory.FromString(txn.get(local_layout.DIRECTORY_KEY))
        row.place = ""
        txn.put(local_layout.DIRECTORY_KEY, row.SerializeToString())


@functools.cache
def _local_rows() -> _Rows:
    environment = local_layout.open_environment(local_template(), readonly=True, sync=False)
    with environment.env:
        return _rows(environment)


def _use_realm(realm: LocalRealm, folder: Path) -> None:
    uses: Sequence[Callable[[], object]] = (
        lambda: (realm.row, realm.clients(), realm.locator()),
        lambda: realm.queued(0, count_max=100, bytes_max=1 << 20),
        lambda: realm.tail(1, bytes_max=1 << 20),
        lambda: _view(realm),
        lambda: realm.copy_to(folder / "recovered" / "copy"),
        lambda: realm.commit(to_protos(put(9))),
        lambda: realm.set_safe(4),
        lambda: realm.drop_incoming(),
        lambda: realm.touch(1 << 60),
    )
    for use in uses:
        with contextlib.suppress(UnderstudyError):
            use()


def _view(realm: LocalRealm) -> None:
    with realm.view() as view:
        list(view.scan()), view.count(), view.get(b"key 1")


@contextlib.contextmanager
def _local_row(folder: Path) -> Iterator[Decode]:
    template = local_template()
    here = folder / "local"

    def decode(data: bytes) -> None:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(template, here)
        environment = local_layout.open_environment(here, readonly=False, sync=False)
        with environment.env, contextlib.suppress(IndexError, lmdb.BadValsizeError):
            _put_row(environment, data)
        with LocalStore.open(here, durability="relaxed") as store:
            for path in {*store.paths(), PATH}:
                with contextlib.suppress(UnderstudyError):
                    _use_realm(store.realm(path), here)
            store.new_client()
            with contextlib.suppress(UnderstudyError):
                store.forget(PATH)

    yield decode


# -- pages and ranges ----------------------------------------------------------------------------------------------


@functools.cache
def _lmdb_files() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        environment, store = open_both(make_store(Path(folder)))
        with store:
            layers = Layers(environment, store)
            _fill_store(layers)
            layers.commit("/a", Put(b"long", bytes(9_000)))
            layers.checkpoint()
        filled = (Path(folder) / "store" / "data.mdb").read_bytes()
    return [filled, (local_template() / "data.mdb").read_bytes()]


@contextlib.contextmanager
def _lmdb_file(folder: Path) -> Iterator[Decode]:
    path = folder / "data.mdb"

    def decode(data: bytes) -> None:
        path.write_bytes(data)
        check_structure(path)
        with path.open("rb") as file:
            for meta, _ in read_metas(file.fileno(), path):
                with contextlib.suppress(CorruptionError):
                    free_pages(file.fileno(), meta, path)
        with open_newest(path) as ranges:
            ranges.read(0)

    yield decode


def _copy_file_bytes() -> int:
    return 2 * RANGE_BYTES + 5_000


@contextlib.contextmanager
def _side_file(folder: Path) -> Iterator[Decode]:
    path = folder / "copy"
    with SnapshotCopy.open(path, snapshot=_SNAPSHOT, file_bytes=_copy_file_bytes()):
        pass

    def decode(data: bytes) -> None:
        Path(f"{path}.ranges").write_bytes(data)
        with SnapshotCopy.open(path, snapshot=_SNAPSHOT, file_bytes=_copy_file_bytes()) as copy:
            copy.missing([range_digest(b"")] * copy.ranges)

    yield decode


@functools.cache
def _side_files() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "copy"
        with SnapshotCopy.open(path, snapshot=_SNAPSHOT, file_bytes=_copy_file_bytes()) as copy:
            copy.write(2, bytes(5_000), range_digest(bytes(5_000)))
            copy.flush()
            return [Path(f"{path}.ranges").read_bytes()]


@contextlib.contextmanager
def _range(folder: Path) -> Iterator[Decode]:
    """A range, and a list of digests, as a primary sends them."""
    with SnapshotCopy.open(folder / "copy", snapshot=_SNAPSHOT, file_bytes=_copy_file_bytes()) as copy:

        def decode(data: bytes) -> None:
            with contextlib.suppress(DecodeError):
                copy.missing(replication_pb2.RangeDigests.FromString(data).digests)
            with contextlib.suppress(DecodeError):
                part = replication_pb2.RangeData.FromString(data)
                copy.write(part.range, part.data, part.digest)

        yield decode


def _ranges() -> list[bytes]:
    data = b"d" * 5_000
    zeros = range_digest(bytes(RANGE_BYTES))
    return [
        replication_pb2.RangeData(range=2, digest=range_digest(data), data=data).SerializeToString(),
        replication_pb2.RangeData(range=1, digest=zeros).SerializeToString(),
        replication_pb2.RangeDigests(digests=[zeros, zeros, range_digest(data)]).SerializeToString(),
    ]


def targets() -> Sequence[Target]:
    """All that lies in LMDB, and its copies."""
    return (
        Target(name="store row", opened=_store_row, samples=lambda: _samples(_store_rows()), is_slow=True),
        Target(name="local row", opened=_local_row, samples=lambda: _samples(_local_rows()), is_slow=True),
        Target(name="LMDB file", opened=_lmdb_file, samples=_lmdb_files, is_slow=True),
        Target(name="side file of a copy", opened=_side_file, samples=_side_files, is_slow=True),
        Target(name="snapshot range", opened=_range, samples=_ranges),
    )
