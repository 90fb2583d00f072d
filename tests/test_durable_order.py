"""What a power loss could undo: files are on disk before their names are, and both before anything counts on them."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from harness import DEADLINE_S, wait_until
from store_helpers import make_store
from test_bootstrap import FakePrimary, directory, fetch, primary, store

from understudy.common import entries
from understudy.common.directory import DataDirectory, Role
from understudy.common.files import publish
from understudy.common.memtable import Receipt
from understudy.common.operations import Put, to_protos
from understudy.common.records import Record
from understudy.common.settings import PrimarySettings
from understudy.common.store_layout import open_environment
from understudy.common.types import START, ClusterId, Lsn
from understudy.primary.server import serving_primary
from understudy.replica import rewind
from understudy.v1.data_pb2 import Transaction

__all__ = ["directory", "primary", "store"]  # fixtures

PUTS = to_protos([Put(b"key", b"value")])


class Steps:
    """What was synced and renamed, in order, by the names of files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: list[tuple[str, Path]] = []
        for name in ("fsync", "fdatasync", "rename"):
            monkeypatch.setattr(os, name, self._noting(name, getattr(os, name)))

    def _noting(self, name: str, function: Any) -> Any:
        def call(what: int | Path, *more: Path) -> None:
            if isinstance(what, int):
                self.all.append(("sync", Path(os.readlink(f"/proc/self/fd/{what}"))))
            else:
                self.all.append((name, more[0]))
            function(what, *more)

        return call

    def clear(self) -> None:
        """Forgets what was."""
        self.all.clear()

    @property
    def synced(self) -> set[Path]:
        """What was synced at least once."""
        return {path for what, path in self.all if what == "sync"}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Notes what the test does."""
    return Steps(monkeypatch)


def test_what_is_published_is_on_disk_before_it_has_its_name_and_its_name_before_it_counts(
    tmp_path: Path, steps: Steps
) -> None:
    """G1, G7: a role, a fence or a slot is the old or the new one after a power loss, the new one after publish."""
    publish(tmp_path / "file", b"content")
    assert steps.all == [
        ("sync", tmp_path / "file.new"),
        ("rename", tmp_path / "file"),
        ("sync", tmp_path),
    ]


def test_exported_entries_are_on_disk_before_anything_replaces_them(tmp_path: Path, steps: Steps) -> None:
    """G4: the file of entries that only this node has can't be lost with the power once the rewind goes on."""
    rewind._publish_lines(tmp_path / "entries.jsonl", [Record(Lsn(1), START.digest, entries.freeze_entry(1))])
    assert steps.all == [
        ("sync", tmp_path / "entries.jsonl.new"),
        ("rename", tmp_path / "entries.jsonl"),
        ("sync", tmp_path),
    ]


def test_an_installed_copy_has_its_place_on_disk_before_its_role(tmp_path: Path, steps: Steps) -> None:
    """G4: that the new copy is in place and the old one set aside is on disk before node.json says so."""
    with DataDirectory.open(tmp_path / "a") as directory:
        directory.begin(Role.FENCED, ClusterId(bytes(range(16))))
        for part in ("store", "log"):
            (directory.path / part).mkdir()
            (directory.incoming / part).mkdir(parents=True)
        steps.clear()
        kept = directory.install(directory.cluster, keep_old=True)
        assert kept is not None
        moved = max(at for at, (_, path) in enumerate(steps.all) if path.name in ("store", "log"))
        behind = [path for what, path in steps.all[moved + 1 :] if what == "sync"]
        said = behind.index(directory.path / "node.json.new")
        assert {directory.path, kept, directory.set_aside} <= set(behind[:said])


def test_a_fetched_copy_is_on_disk_before_it_is_installed(
    primary: FakePrimary, directory: DataDirectory, steps: Steps
) -> None:
    """G1: all files of a copy, and all their names, are durable when fetching it returns."""
    fetch(primary, directory)
    incoming = directory.incoming
    assert (incoming / "store" / "data.mdb").exists()
    assert {incoming, *incoming.rglob("*")} <= steps.synced


def test_each_checkpoint_is_synced_by_lmdb(tmp_path: Path) -> None:
    """G1, G2: LMDB is told neither to leave out a sync nor to write through the map."""
    environment = open_environment(make_store(tmp_path), readonly=False)
    try:
        flags = environment.env.flags()
        assert flags["sync"]
        assert flags["metasync"]
        assert not flags["writemap"]
    finally:
        environment.close()


def test_a_transaction_is_answered_and_shown_only_once_its_fdatasync_has_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1: a server asks the system for a sync of its log, and until that is over nobody hears of the transaction."""
    fdatasync, is_asked, is_over = os.fdatasync, threading.Event(), threading.Event()

    def wait_and_sync(fd: int) -> None:
        is_asked.set()
        assert is_over.wait(DEADLINE_S)
        fdatasync(fd)

    async def story() -> None:
        settings = PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")
        async with serving_primary(settings) as primary:
            node, answers = primary.node, list[Receipt]()
            monkeypatch.setattr(os, "fdatasync", wait_and_sync)
            node.submit(bytes(16), Transaction(realm="/realm", number=1, operations=PUTS), answers.append)
            await asyncio.to_thread(wait_until, lambda: answers or is_asked.is_set())
            assert is_asked.is_set()
            assert (answers, node.engine.state.realm("/realm")) == ([], None)
            is_over.set()
            await asyncio.to_thread(wait_until, lambda: answers)
            assert node.engine.state.get("/realm", b"key") == b"value"

    asyncio.run(story())
