"""Where realms stand: the same however few of them are in memory."""

from __future__ import annotations

import random

import pytest

from understudy.common import realm_heads
from understudy.common.errors import StorageFailed
from understudy.common.realm_heads import Head, RealmHeads


@pytest.mark.parametrize("in_memory", [0, 5, 1_000])
def test_heads_are_what_was_set_last(in_memory: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each realm's head is the one set last, for searches and walks, however many are in memory at a time."""
    monkeypatch.setattr(realm_heads, "_IN_MEMORY_MAX", in_memory)
    chance = random.Random(seed)
    known: dict[str, Head] = {}
    with RealmHeads() as heads:
        assert not heads
        for step in range(500):
            path = f"/realm/{chance.randrange(40)}/\N{SNOWMAN}"
            assert heads[path] == known.get(path)
            heads[path] = known[path] = (chance.randrange(1 << 64), chance.randbytes(32) * (step % 2))
        assert heads
        assert dict(heads.items()) == known
        assert all(heads[path] == head for path, head in known.items())
        heads.clear()
        assert not heads
        assert dict(heads.items()) == {}
        assert heads["/realm"] is None


def test_a_full_folder_for_temporary_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not all fit into memory and the file can't grow, the error says what to do."""
    monkeypatch.setattr(realm_heads, "_IN_MEMORY_MAX", 0)
    with RealmHeads() as heads:
        heads["/realm"] = (1, b"")
        assert heads._others is not None
        heads._others.execute("PRAGMA max_page_count = 10")
        with pytest.raises(StorageFailed, match="TMPDIR="):
            heads["/other"] = (1, bytes(1 << 20))
