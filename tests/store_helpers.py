"""A model of the store, in plain dictionaries: makes checkpoint jobs and says what must be in the store then."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import pytest

from understudy.common import checkpoint as checkpoint_module
from understudy.common.state_digest import encode, realm_hash, sum_pairs
from understudy.common.store import Store, StoreSnapshot
from understudy.common.store_layout import (
    HISTORY_HEADER_BYTES,
    Environment,
    HistoryRow,
    encode_history_row,
    open_environment,
)
from understudy.common.types import ClusterId, Digest, Lsn
from understudy.v1.log_pb2 import Change, Operation
from understudy.v1.store_pb2 import CheckpointJob, CheckpointRow, ClientRow, RealmDelta

CLUSTER = ClusterId(bytes(range(16)))
START_US = 1_700_000_000_000_000
SECOND_US = 1_000_000


def make_store(path: Path) -> Path:
    """An empty store in ``path/store``; returns that."""
    Store.create(path / "store", CLUSTER, CheckpointRow())
    return path / "store"


def open_both(path: Path) -> tuple[Environment, Store]:
    """The store, open for checkpoints and, through the same handle, for reading: LMDB allows one a process."""
    environment = open_environment(path, readonly=False)
    return environment, Store(environment)


def digest_at(lsn: int) -> Digest:
    """Stands for the log's digest at an LSN."""
    return Digest(sha256(b"log %d" % lsn).digest())


@contextlib.contextmanager
def small_disk(path: Path, *, size: str) -> Iterator[Path]:
    """A file system of its own that is soon full; skips the test where none can be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk takes root and a kernel that lets it mount: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def fill_disk(folder: Path) -> Path:
    """Takes all space that is left; removing the returned file gives it back."""
    fill = folder / "fill"
    with open(fill, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return fill


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What happens to one realm between two freeze marks: drop, then deleted ranges, then puts and deletes."""

    path: str
    drop: bool = False
    ranges: tuple[tuple[bytes, bytes], ...] = ()
    puts: Mapping[bytes, bytes] = field(default_factory=dict)
    deletes: frozenset[bytes] = frozenset()
    changes: int = 1  # 0: nothing but the drop
    change_bytes: int = 10
    client: bytes = bytes(16)


@dataclass(frozen=True)
class RealmModel:
    """One realm."""

    id: int
    version: int = 0
    head: bytes = b""
    pairs: dict[bytes, bytes] = field(default_factory=dict)
    history: tuple[HistoryRow, ...] = ()
    clients: dict[bytes, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all keys and values."""
        return sum(len(key) + len(value) for key, value in self.pairs.items())

    @property
    def state_digest(self) -> bytes:
        """Recomputed from all pairs."""
        return encode(sum_pairs(self.pairs.keys(), self.pairs.values()))

    @property
    def history_bytes(self) -> int:
        """Of all rows."""
        return sum(HISTORY_HEADER_BYTES + len(row.change) for row in self.history)


@dataclass(frozen=True)
class Model:
    """The whole store. :meth:`step` makes the next one, so that an earlier one can still be compared with."""

    lsn: int = 0
    time_us: int = START_US
    realms: dict[str, RealmModel] = field(default_factory=dict)
    lsns: tuple[int, ...] = ()  # of all checkpoints

    def step(self, edits: Iterable[Edit], *, later_us: int = SECOND_US) -> tuple[Model, CheckpointJob]:
        """The job that carries out ``edits``, one for each realm at most, and the model afterwards."""
        lsn, time_us = self.lsn, self.time_us + later_us
        realms = dict(self.realms)
        job = CheckpointJob()
        for edit in edits:
            if edit.drop and edit.path in realms:
                job.dropped_realm_ids.append(realms.pop(edit.path).id)
                if not edit.changes:
                    job.dropped_realms.append(edit.path)
            if edit.changes:
                before = realms.get(edit.path)
                realm = before or RealmModel(lsn + 1)
                realm, lsn = _change(realm, edit, lsn, time_us)
                realms[edit.path] = realm
                job.realms.append(_delta(realm, edit, created=before is None))
        lsn += 1  # the freeze mark
        job.checkpoint.lsn, job.checkpoint.digest = lsn, digest_at(lsn)
        job.checkpoint.time_us, job.checkpoint.log_offset = time_us, 1000 * lsn
        kept = {path: _pruned(realm) for path, realm in realms.items()}
        return replace(self, lsn=lsn, time_us=time_us, realms=kept, lsns=(*self.lsns, lsn)), job

    @property
    def state_digest(self) -> bytes:
        """Recomputed over all realms."""
        return encode(
            sum(
                realm_hash(path, realm.version, len(realm.pairs), realm.state_digest)
                for path, realm in self.realms.items()
            )
        )


def _change(realm: RealmModel, edit: Edit, lsn: int, time_us: int) -> tuple[RealmModel, int]:
    pairs, history, head, version = dict(realm.pairs), list(realm.history), realm.head, realm.version
    for start, end in edit.ranges:
        pairs = {key: value for key, value in pairs.items() if key < start or (end and key >= end)}
    pairs.update(edit.puts)
    pairs = {key: value for key, value in pairs.items() if key not in edit.deletes}
    for _ in range(edit.changes):
        lsn, version = lsn + 1, version + 1
        change = Change(
            realm=edit.path,
            version=version,
            previous=head,
            client=edit.client,
            number=version,
            operations=[Operation(kind=Operation.PUT, key=b"k", value=bytes(edit.change_bytes))],
        ).SerializeToString()
        head = sha256(change).digest()
        history.append(
            HistoryRow(version, Lsn(lsn), digest_at(lsn), sha256(b"hmac %d" % lsn).digest(), change)
        )
    clients = {**realm.clients, edit.client: (version, version, time_us)}
    return RealmModel(realm.id, version, head, pairs, tuple(history), clients), lsn


def _delta(realm: RealmModel, edit: Edit, *, created: bool) -> RealmDelta:
    new = realm.history[-edit.changes :]
    number, version, time_us = realm.clients[edit.client]
    return RealmDelta(
        path=edit.path,
        id=realm.id,
        version=realm.version,
        head=realm.head,
        created=created,
        deleted_starts=[start for start, _ in edit.ranges],
        deleted_ends=[end for _, end in edit.ranges],
        put_keys=list(edit.puts),
        put_values=list(edit.puts.values()),
        deleted_keys=list(edit.deletes),
        history=[encode_history_row(row.lsn, row.digest, row.hmac, row.change) for row in new],
        history_first=new[0].version,
        clients=[edit.client],
        client_rows=[ClientRow(number=number, version=version, time_us=time_us)],
    )


def _pruned(realm: RealmModel) -> RealmModel:
    while (
        len(realm.history) > checkpoint_module.HISTORY_VERSIONS_MAX
        or realm.history_bytes > checkpoint_module.HISTORY_BYTES_MAX
    ):
        realm = replace(realm, history=realm.history[1:])
    return realm


def assert_equal(snapshot: StoreSnapshot, model: Model, *, clients: bool = True) -> None:
    """The snapshot holds what the model says, row for row."""
    row = snapshot.checkpoint
    assert (row.lsn, row.digest, row.time_us) == (model.lsn, digest_at(model.lsn), model.time_us)
    assert (row.realms, row.state_digest) == (len(model.realms), model.state_digest)
    assert [path for path, _ in snapshot.realms()] == sorted(model.realms)
    for path, realm in model.realms.items():
        found = snapshot.realm(path)
        assert found is not None
        assert (found.id, found.version, found.head) == (realm.id, realm.version, realm.head)
        assert found.head_lsn == realm.history[-1].lsn
        assert (found.entries, found.bytes) == (len(realm.pairs), realm.bytes)
        assert found.state_digest == realm.state_digest
        assert list(snapshot.scan(realm.id)) == sorted(realm.pairs.items())
        assert list(snapshot.history(realm.id, 0)) == list(realm.history)
        assert (found.history_first, found.history_bytes) == (
            realm.history[0].version,
            realm.history_bytes,
        )
        if clients:
            for client, expected in realm.clients.items():
                stored = snapshot.client(realm.id, client)
                assert stored is not None
                assert (stored.number, stored.version, stored.time_us) == expected
