"""What rows share: prepared data directories, made once and copied for each row, so that rows don't disturb
each other and any of them can run alone."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import lmdb
from jobs import FillJob
from processes import Node, Processes, wait_for_replica
from scale import MIB, Scale

from understudy.common.store_layout import MARK_PREFIX

VALUE_BYTES = 100
# Four rows of the store fill a page: 16 bytes of key, 8 of realm id, 10 of LMDB's own, and this. So a store's keys
# are spread over as many pages as it can have, which is the hard case for random writes.
STORE_VALUE_BYTES = 980
STORE_BYTES_A_KEY = 1024
# A realm's history of changes is kept up to this size and is part of the store's file.
_HISTORY_BYTES_MAX = 64 * MIB
_SMALL_PUTS_EACH = 10_000
_LARGE_PUTS_EACH = 1_000
_NOT_COPIED = ("control.sock",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Data directories of a primary and of its replica, both stopped."""

    primary: Path
    replica: Path


@dataclass(slots=True, kw_only=True)
class Bench:
    """What a row is given."""

    scale: Scale
    folder: Path
    processes: Processes
    say: Callable[[str], None]  # what is being done, for who watches
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _pair: Pair | None = None
    _stores: dict[int, Path] = field(default_factory=dict)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for one row, removed at the end, after all processes that still run."""
        path = self.folder / f"row-{next(self._numbers)}"
        path.mkdir()
        try:
            yield path
        finally:
            self.processes.end_all()
            shutil.rmtree(path)

    def preloaded_pair(self, into: Path) -> Pair:
        """A fresh copy of a pair that is preloaded with all of ``scale.keys``, values of VALUE_BYTES."""
        if self._pair is None:
            self._pair = self._make_pair()
        return Pair(
            primary=copy_synced(self._pair.primary, into / "primary"),
            replica=copy_synced(self._pair.replica, into / "replica"),
        )

    def _make_pair(self) -> Pair:
        self.say(f"preloading {self.scale.keys:,} keys")
        made = Pair(primary=self.folder / "pair-primary", replica=self.folder / "pair-replica")
        primary = self.processes.primary(made.primary)
        self._fill(primary, self.scale.keys, VALUE_BYTES, _SMALL_PUTS_EACH)
        replica = self.processes.replica(made.replica, primary)
        wait_for_replica(primary, replica)
        replica.stop()
        primary.stop()
        return made

    def store_of(self, size: int) -> Path:
        """A stopped primary's directory whose store's file has about ``size`` bytes. Copy it before writing to it."""
        if size not in self._stores:
            self.say(f"making a store of {size / MIB:,.0f} MiB")
            path = self.folder / f"store-{size}"
            primary = self.processes.primary(path)
            data_bytes = max(size - _HISTORY_BYTES_MAX, size // 2)
            keys = data_bytes // STORE_BYTES_A_KEY
            self._fill(primary, keys, STORE_VALUE_BYTES, _LARGE_PUTS_EACH)
            primary.checkpoint()
            primary.stop()
            self._stores[size] = path
        return self._stores[size]

    def _fill(self, primary: Node, keys: int, value_bytes: int, puts_each: int) -> None:
        job = FillJob(address=primary.address, keys=keys, value_bytes=value_bytes, puts_each=puts_each)
        self.processes.run("writer.py", job)


def copy_synced(source: Path, target: Path) -> Path:
    """Copies a stopped node's directory and waits until it is on disk, so that no writing back disturbs later."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    os.sync()
    return target


def data_file(directory: Path) -> Path:
    """The LMDB file of a node."""
    return directory / "store" / "data.mdb"


def freeze_marks(directory: Path) -> list[int]:
    """LSNs of the freeze marks that a stopped node's store knows, in order: where its checkpoints ended."""
    with (
        lmdb.open(str(directory / "store"), max_dbs=16, readonly=True, lib_version=0) as env,
        env.begin(db=env.open_db(b"meta", create=False)) as txn,
    ):
        cursor = txn.cursor()
        cursor.set_range(MARK_PREFIX)
        keys = itertools.takewhile(lambda key: key.startswith(MARK_PREFIX), cursor.iternext(values=False))
        return [int(key.removeprefix(MARK_PREFIX)) for key in keys]
