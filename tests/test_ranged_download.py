"""Downloads from an object storage: ranges of one version of an object, several at once, and what befalls them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import obstore
import pytest
from harness import wait_until
from s3_server import FaultyFront
from test_repository import MIB, behind, content, download, front, impatient, s3, upload

from understudy.backup import ranged_download
from understudy.backup.object_repository import ObjectRepository, Patience
from understudy.backup.ranged_download import RANGES_AHEAD
from understudy.backup.repository import Repository
from understudy.common import portal
from understudy.common.errors import NotStored, RepositoryError

__all__ = ["behind", "front", "impatient", "s3"]  # fixtures

RANGE_BYTES = 100_000  # here
RANGES = 20
SIZE = RANGE_BYTES * (RANGES - 1) + 1
DATA = content(SIZE)
ENDLESS = Patience(request_s=3600, total_s=3600)


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an object of a few megabytes has many."""
    monkeypatch.setattr(ranged_download, "RANGE_BYTES", RANGE_BYTES)


@pytest.fixture
def stored(behind: Repository, small_ranges: None) -> Repository:
    """A repository behind the front, with one object, ``large``."""
    upload(behind, "large", DATA)
    return behind


def replace(repository: Repository, old: bytes, new: bytes) -> None:
    """The object is another from one moment to the next."""
    assert repository.swap("large", new, old)


def tasks_on_the_way() -> int:
    """How many there are on the portal's loop, with the one that counts them."""

    async def count() -> int:
        return len(asyncio.all_tasks())

    return portal.call(count())


@contextlib.contextmanager
def requests_kept_back(front: FaultyFront) -> Iterator[None]:
    """They are taken, and wait until the block has ended."""
    front.may_pass.clear()
    try:
        yield
    finally:
        front.may_pass.set()


# -- without faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, RANGE_BYTES - 1, RANGE_BYTES, RANGE_BYTES + 1, 2 * RANGE_BYTES, SIZE])
def test_an_object_of_any_number_of_ranges_is_read(behind: Repository, front: FaultyFront, size: int) -> None:
    """Every byte in its place, with one request for each range; an empty object is looked at once more."""
    behind.put("one", DATA[:size])
    before = front.requests
    assert download(behind, "one") == DATA[:size]
    ranges = -(-size // RANGE_BYTES)
    assert front.requests - before == (ranges or 2)


def test_several_ranges_are_on_their_way_at_once_and_no_more(stored: Repository, front: FaultyFront) -> None:
    """G9: as many as are meant to be; the next is asked for when one was read."""
    before = front.requests
    with stored.download("large") as file:
        assert front.requests - before == 1
        with requests_kept_back(front):
            begun = file.read(1)
            wait_until(lambda: front.requests - before == 1 + RANGES_AHEAD)
        assert begun + file.read() == DATA
    assert front.requests - before == RANGES


def test_ranges_are_read_in_their_order_however_they_come(
    stored: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of those that are on their way at once comes last."""
    get_async = obstore.get_async
    come: list[int] = []
    others_have_come = asyncio.Event()

    async def first_last(store: Any, path: str, *, options: Any) -> Any:
        got = await get_async(store, path, options=options)
        start = options["range"][0]
        if start == RANGE_BYTES:
            await others_have_come.wait()
        come.append(start)
        if len(come) == RANGES_AHEAD:
            others_have_come.set()
        return got

    monkeypatch.setattr(obstore, "get_async", first_last)
    assert download(stored, "large") == DATA
    assert come[RANGES_AHEAD] == RANGE_BYTES


def test_a_large_object_comes_whole(behind: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ranges as large as they are elsewhere."""
    monkeypatch.undo()
    data = content(20 * MIB)
    upload(behind, "large", data)
    assert download(behind, "large") == data


# -- connections that are cut ----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_e_tags", [True, False])
def test_a_download_that_is_cut_goes_on(stored: Repository, front: FaultyFront, has_e_tags: bool) -> None:
    """G8: connections cut in the middle, several in a row, cost no byte, and no more than another request each."""
    front.has_e_tags = has_e_tags
    front.cut_downloads = 2
    before = front.requests
    with stored.download("large") as file:
        assert front.cut_downloads == 0
        front.cut_downloads = RANGES_AHEAD
        assert file.read() == DATA
    assert front.cut_downloads == 0
    assert front.requests - before == 2 + RANGES_AHEAD + RANGES


def test_a_storage_that_throttles_is_asked_again(stored: Repository, front: FaultyFront) -> None:
    """Answers of 503 to some of the ranges cost another request each."""
    with stored.download("large") as file:
        front.refused = 9
        assert file.read() == DATA
    assert front.refused == 0


def test_a_download_that_is_cut_for_good_is_an_error(
    stored: Repository, impatient: Repository, front: FaultyFront
) -> None:
    """G8: a part of an object is never taken for all of it, nor one with a hole, however often it is read."""
    with impatient.download("large") as file:
        front.refused = front.cut_downloads = 10_000
        assert file.read(RANGE_BYTES) == DATA[:RANGE_BYTES]
        for _ in range(2):
            with pytest.raises(RepositoryError, match="can't read large in s3://"):
                file.read(1)
            front.refused = front.cut_downloads = 0


def test_of_ranges_that_all_fail_one_is_told(
    stored: Repository, impatient: Repository, front: FaultyFront, caplog: pytest.LogCaptureFixture
) -> None:
    """The errors behind the first appear nowhere, and are no errors of the program's."""
    with impatient.download("large") as file:
        front.refused = 10_000
        before = tasks_on_the_way()
        assert file.read(1) == DATA[:1]
        wait_until(lambda: tasks_on_the_way() == before)
        with pytest.raises(RepositoryError, match=r"SlowDown|503"):
            file.read()
    gc.collect()
    assert caplog.records == []


# -- another object of the same name ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE, SIZE - 1, 1])
def test_an_object_that_is_replaced_while_it_is_read_is_an_error(stored: Repository, size: int) -> None:
    """G8: ranges of two objects are never put together, however alike they look."""
    with stored.download("large") as file:
        begun = file.read(RANGE_BYTES // 2)
        replace(stored, DATA, content(size, seed=2))
        with pytest.raises(RepositoryError, match="changed"):
            file.read()
    assert DATA.startswith(begun)


def test_an_object_that_is_removed_while_it_is_read_is_an_error(stored: Repository) -> None:
    """Who reads it, and who comes then, is told that there is none."""
    with stored.download("large") as file:
        stored.delete("large")
        with pytest.raises(NotStored):
            file.read()
    with pytest.raises(NotStored), stored.download("large"):
        pass


def test_without_etags_an_object_that_is_replaced_is_told_by_its_size(
    stored: Repository, front: FaultyFront
) -> None:
    """G8: or by when it was written, as far as the storage tells."""
    new = content(SIZE + 1, seed=2)
    front.has_e_tags = False
    with stored.download("large") as file:
        front.has_e_tags = True
        replace(stored, DATA, new)
        front.has_e_tags = False
        with pytest.raises(RepositoryError, match="changed"):
            file.read()


@pytest.mark.parametrize("cut", ["first range", "second range"])
def test_an_object_that_is_replaced_while_its_connection_is_cut_is_not_mixed(
    behind: Repository, front: FaultyFront, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """G8: with nothing read it is the new one that is read; else it is told as changed, not as a connection's fault."""
    old, new = content(2 * RANGE_BYTES), content(2 * RANGE_BYTES, seed=2)
    upload(behind, "large", old)
    cut_off = front._cut

    def replace_first(request: BaseHTTPRequestHandler) -> None:
        replace(behind, old, new)
        cut_off(request)

    monkeypatch.setattr(front, "_cut", replace_first)
    if cut == "first range":
        front.cut_downloads = 1
        assert download(behind, "large") == new
        return
    with behind.download("large") as file:
        front.cut_downloads = 1
        with pytest.raises(RepositoryError, match="changed"):
            file.read()


# -- closed early ----------------------------------------------------------------------------------------------


def test_closing_ends_what_is_on_its_way(stored: Repository, front: FaultyFront) -> None:
    """G9: it waits for no answer, however patient the repository is, and leaves nothing running."""
    before = tasks_on_the_way()
    repository = ObjectRepository(stored.url, patience=ENDLESS)
    seen = front.requests
    with contextlib.ExitStack() as kept_back:
        with repository.download("large") as file:
            kept_back.enter_context(requests_kept_back(front))
            file.read(1)
            wait_until(lambda: front.requests - seen == 1 + RANGES_AHEAD)
        assert tasks_on_the_way() == before
    assert download(stored, "large") == DATA
    assert front.requests - seen == 1 + RANGES_AHEAD + RANGES


def test_who_only_looks_pays_for_the_first_range(stored: Repository, front: FaultyFront) -> None:
    """Whether an object is there takes one request."""
    before = front.requests
    with stored.download("large"):
        pass
    assert front.requests - before == 1
