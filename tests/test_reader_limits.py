"""What one reader may ask for, and how many may read at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from understudy.client import Put, connect
from understudy.client.blocking import Server
from understudy.common import reader
from understudy.common.errors import Overloaded, TransactionTooLarge
from understudy.primary import Primary


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[Primary]:
    """A primary on any port that has three pairs."""
    with Primary.open(tmp_path / "a", listen="127.0.0.1:0") as opened:
        opened.commit("/realm", [Put(key, b"value") for key in (b"a", b"b", b"c")])
        yield opened


@pytest.fixture(params=["embedded", "connected"])
def server(primary: Primary, request: pytest.FixtureRequest) -> Iterator[Primary | Server]:
    """It, and a connection to it."""
    with connect(primary.address) as connected:
        yield primary if request.param == "embedded" else connected


def test_g9_one_read_asks_for_so_many_keys_and_gets_so_many_bytes(
    server: Primary | Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: a read of more keys, or of larger values, than one answer may hold is refused, one of as much is not."""
    monkeypatch.setattr(reader, "KEYS_PER_GET_MAX", 2)
    assert server.get_many("/realm", [b"a", b"b"]) == [b"value"] * 2
    with pytest.raises(TransactionTooLarge, match="a read of 3 keys"):
        server.get_many("/realm", [b"a", b"b", b"c"])
    monkeypatch.setattr(reader, "ANSWER_BYTES_MAX", 2 * len(b"value") - 1)
    assert server.get("/realm", b"a") == b"value"
    with pytest.raises(TransactionTooLarge, match="too large for one answer"):
        server.get_many("/realm", [b"a", b"b"])


def test_g9_so_many_scans_are_open_at_a_time(primary: Primary, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: one scan more than may be open is refused, and there is room again as soon as one of them is closed."""
    monkeypatch.setattr(reader, "SCANS_MAX", 2)
    monkeypatch.setattr(reader, "PAGE_PAIRS", 1)
    first, second = primary.scan("/realm"), primary.scan("/realm")
    for one in (first, second):
        assert next(one) == (b"a", b"value")
    with pytest.raises(Overloaded, match="2 scans are under way"):
        next(primary.scan("/realm"))
    assert [key for key, _ in first] == [b"b", b"c"]
    assert [key for key, _ in primary.scan("/realm")] == [b"a", b"b", b"c"]
    assert [key for key, _ in second] == [b"b", b"c"]


def test_g9_a_scan_pins_its_snapshot_for_so_long(
    server: Primary | Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: a scan that is open for too long is ended, so that it does not make the store grow without end."""
    monkeypatch.setattr(reader, "SCAN_S_MAX", -1.0)
    with pytest.raises(Overloaded, match="the scan took longer"):
        next(iter(server.scan("/realm")))
    monkeypatch.setattr(reader, "SCAN_S_MAX", 600.0)
    assert len(list(server.scan("/realm"))) == 3
