"""A realm's past, read through store and memtables, against lists of what was applied."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_helpers import CLIENTS, CLUSTER, Layers, RealmModel
from store_helpers import open_both

from understudy.common import checkpoint
from understudy.common.errors import CorruptionError, UnknownRealm
from understudy.common.operations import Put
from understudy.common.store import Store
from understudy.common.store_layout import HistoryRow, history_key
from understudy.common.types import START
from understudy.v1.store_pb2 import CheckpointRow, RealmRow

KEPT = 4
ALL = 1 << 30


@contextlib.contextmanager
def open_layers() -> Iterator[Layers]:
    """An empty state over a store in this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        Store.create(path, CLUSTER, CheckpointRow(digest=START.digest))
        environment, store = open_both(path)
        with store:
            yield Layers(environment, store)


@pytest.fixture
def layers() -> Iterator[Layers]:
    """An empty state."""
    with open_layers() as opened:
        yield opened


def fill_three_layers(layers: Layers) -> list[HistoryRow]:
    """Three changes each in the store, a frozen memtable and the active one."""
    for number in range(9):
        layers.commit("/a", Put(b"k", b"v" * number), client=CLIENTS[number % 2])
        if number == 2:
            layers.checkpoint()
        elif number == 5:
            layers.freeze()
    return layers.author.realms["/a"].history


# -- against the model -------------------------------------------------------------------------------------

STEPS = st.lists(
    st.sampled_from(["/a", "/a", "/a", "/b", "drop", "freeze", "freeze", "checkpoint", "checkpoint all"]),
    max_size=40,
)


class Walk:
    """Takes steps, and knows what was pruned: the store keeps no more than the newest ``KEPT`` of a realm."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.first = {"/a": 1, "/b": 1}
        self._frozen_at: list[dict[str, RealmModel]] = []

    def step(self, what: str) -> None:
        if what in self.first:
            self.layers.commit(what, Put(b"k", b"v"))
        elif what == "drop":
            self.layers.state.apply(self.layers.author.drop("/a"))
            self.first["/a"] = 1
        elif what == "freeze" and len(self._frozen_at) < 3:
            self._freeze()
        elif what == "checkpoint" and self._frozen_at:
            self._checkpoint()
        elif what == "checkpoint all":
            self._freeze()
            while self._frozen_at:
                self._checkpoint()

    def _freeze(self) -> None:
        self.layers.freeze()
        realms = self.layers.author.realms
        self._frozen_at.append({path: replace(realm) for path, realm in realms.items()})

    def _checkpoint(self) -> None:
        self.layers.write_oldest()
        for path, then in self._frozen_at.pop(0).items():
            now = self.layers.author.realms.get(path)
            if now is not None and now.history is then.history:  # the same realm still
                self.first[path] = max(1, then.version + 1 - KEPT)

    def check(self) -> None:
        for path in self.first:
            realm = self.layers.author.realms.get(path)
            if realm is None:
                assert self.layers.state.digest_at(path, 1) is None
            else:
                self._check_realm(realm)

    def _check_realm(self, realm: RealmModel) -> None:
        state, path, history = self.layers.state, realm.path, realm.history
        first = self.first[path]
        assert state.history_first(path) == first
        assert state.head_lsn(path) == history[-1].lsn
        for version in range(len(history) + 3):
            found = state.history(path, version, count_max=3, bytes_max=ALL)
            assert found == (history[version - 1 :][:3] if version >= first else None)
            digest = sha256(history[version - 1].change).digest() if 0 < version <= len(history) else None
            known = version >= first - 1
            assert state.digest_at(path, version) == (b"" if not version else digest if known else None)


@given(steps=STEPS)
@settings(max_examples=150, deadline=None)
def test_the_past_shows_no_seam_between_layers(steps: list[str]) -> None:
    """Changes and digests are those that were applied, from the oldest kept on, wherever memtables end, checkpoints
    prune, or the realm was dropped and made anew.
    """
    with mock.patch.object(checkpoint, "HISTORY_VERSIONS_MAX", KEPT), open_layers() as layers:
        walk = Walk(layers)
        for step in steps:
            walk.step(step)
            walk.check()


# -- single cases ------------------------------------------------------------------------------------------


def test_what_is_read_at_once_is_limited(layers: Layers) -> None:
    """G9: a read ends at its count, or before the change that would pass its bytes; one change always fits."""
    history = fill_three_layers(layers)
    sizes = [len(row.change) for row in history]
    read = layers.state.history
    assert read("/a", 2, count_max=6, bytes_max=ALL) == history[1:7]
    assert read("/a", 2, count_max=ALL, bytes_max=sum(sizes[1:6])) == history[1:6]
    assert read("/a", 2, count_max=ALL, bytes_max=sum(sizes[1:6]) - 1) == history[1:5]
    assert read("/a", 8, count_max=ALL, bytes_max=1) == history[7:8]
    assert read("/a", 10, count_max=ALL, bytes_max=ALL) == []


def test_reading_the_live_tail_does_not_touch_the_store(layers: Layers) -> None:
    """What hundreds of clients read after each change comes from memory alone."""
    history = fill_three_layers(layers)
    with mock.patch.object(type(layers.state.store.current), "history", side_effect=AssertionError):
        assert layers.state.history("/a", 5, count_max=ALL, bytes_max=ALL) == history[4:]
        assert layers.state.head_lsn("/a") == history[-1].lsn


def test_a_read_lets_the_snapshot_go(layers: Layers) -> None:
    """A read that ends early pins nothing: the store must not grow for ever."""
    fill_three_layers(layers)
    snapshot = layers.state.store.current
    assert layers.state.history("/a", 1, count_max=1, bytes_max=ALL)
    layers.checkpoint()
    with pytest.raises(RuntimeError, match="closed"):
        snapshot.acquire()


def test_unknown_realms_have_no_past(layers: Layers) -> None:
    """A realm that was never there, or was dropped, is named; its digests are simply not known."""
    fill_three_layers(layers)
    layers.state.apply(layers.author.drop("/a"))
    for path in ("/a", "/none"):
        for read in (
            lambda path=path: layers.state.history(path, 1, count_max=1, bytes_max=1),
            lambda path=path: layers.state.history_first(path),
            lambda path=path: layers.state.head_lsn(path),
        ):
            with pytest.raises(UnknownRealm, match=f"no realm {path}"):
                read()
        assert layers.state.digest_at(path, 0) == b""
        assert layers.state.digest_at(path, 3) is None
        assert layers.state.client_row(path, CLIENTS[0]) is None


def test_a_change_missing_in_the_store_is_reported(layers: Layers) -> None:
    """G11: a gap in the store's history is said to be one, never passed over."""
    fill_three_layers(layers)
    with layers.environment.env.begin(layers.environment.history, write=True) as txn:
        assert txn.delete(history_key(1, 2))
    layers.state.store.refresh()
    with pytest.raises(CorruptionError, match="no version 2 of realm /a"):
        layers.state.history("/a", 1, count_max=ALL, bytes_max=ALL)


def test_the_head_of_a_realm_in_an_older_store_is_found_in_its_history(layers: Layers) -> None:
    """A row that an earlier version wrote does not name its head's LSN; the newest change does."""
    fill_three_layers(layers)
    layers.checkpoint()
    with layers.environment.env.begin(layers.environment.realms, write=True) as txn:
        row = RealmRow.FromString(txn.get(b"/a", b""))
        row.ClearField("head_lsn")
        txn.put(b"/a", row.SerializeToString())
    layers.state.store.refresh()
    assert layers.state.head_lsn("/a") == layers.author.realms["/a"].history[-1].lsn
