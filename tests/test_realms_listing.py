"""The list of all realms, in pages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from state_helpers import Layers
from store_helpers import make_store, open_both

from understudy.client import Put, UsageError, aconnect
from understudy.common import reader
from understudy.common.reader import Reader
from understudy.common.types import RealmInfo
from understudy.primary import Primary


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PAGE_PAIRS", 2)


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[Layers]:
    """A state over an empty store."""
    environment, store = open_both(make_store(tmp_path))
    with store:
        yield Layers(environment, store)


def listed(layers: Layers, between: Callable[[], None] = lambda: None) -> list[RealmInfo]:
    """All realms; ``between`` is called behind the first page."""

    async def collect() -> AsyncIterator[list[RealmInfo]]:
        pages = Reader(lambda: layers.state).realms()
        yield await anext(pages)
        between()
        async for page in pages:
            assert len(page) <= 2
            yield page

    async def run() -> list[RealmInfo]:
        return [realm async for page in collect() for realm in page]

    return asyncio.run(run())


def make(layers: Layers, *paths: str) -> None:
    for path in paths:
        layers.commit(path, Put(b"key", b"value"))


def test_all_realms_are_listed_wherever_they_are(layers: Layers) -> None:
    """In order of their paths: those in the store, in memory or both, with what the store counts; no dropped ones."""
    assert listed(layers) == []
    make(layers, "/g", "/c", "/e", "/a")
    layers.checkpoint()
    make(layers, "/b", "/c", "/h", "/i", "/j")
    layers.state.apply(layers.author.drop("/e"))
    assert [(one.path, one.version, one.entries) for one in listed(layers)] == [
        ("/a", 1, 1), ("/b", 1, 0), ("/c", 2, 1), ("/g", 1, 1), ("/h", 1, 0), ("/i", 1, 0), ("/j", 1, 0)
    ]  # fmt: skip


def test_realms_that_are_there_all_the_time_are_listed(layers: Layers) -> None:
    """Also those that go from memory to the store between two pages."""
    make(layers, "/a", "/b", "/c", "/x")
    layers.checkpoint()
    make(layers, "/d", "/e", "/f", "/g")
    paths = [one.path for one in listed(layers, layers.checkpoint)]
    assert paths == ["/a", "/b", "/c", "/d", "/e", "/f", "/g", "/x"]


def test_a_client_lists_realms_one_after_the_other(tmp_path: Path) -> None:
    """All of them, also where the first are used before the last are asked for; wrong arguments are told at once."""
    paths = [f"/realm/{number}" for number in range(7)]

    async def walk(address: str) -> list[tuple[str, int]]:
        async with aconnect(address) as server:
            with pytest.raises(UsageError, match="timeout_s"):
                server.scan_realms(timeout_s=-1)
            return [(realm.path, await server.count(realm.path)) async for realm in server.scan_realms()]

    with Primary.open(tmp_path / "a", listen="127.0.0.1:0") as primary:
        for path in paths:
            primary.commit(path, [Put(b"key", b"value")])
        assert asyncio.run(walk(primary.address)) == [(path, 1) for path in paths]
        assert [realm.path for realm in primary.realms()] == paths
