"""How fast a backup may read."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Processes
from nodes import checkpoint, put

from understudy.backup import progress
from understudy.backup.make import make_backup
from understudy.backup.progress import Meter
from understudy.backup.selection import Selection


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that passes for a meter."""
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_what_is_read_only_to_be_checked_takes_its_time_too(clock: Clock) -> None:
    """A rate holds for all that is read; progress is what comes out."""
    meter = Meter(None, rate=100)
    meter.read(500)
    assert clock.now_s == pytest.approx(5)
    list(meter.metered([bytes(100)]))
    assert clock.now_s == pytest.approx(6)
    assert meter.done == 100


def test_a_rate_holds_for_both_readings_of_a_realm(
    processes: Processes, tmp_path: Path, clock: Clock
) -> None:
    """Realms that come as records are read to be checked first, no faster than to be copied."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", bytes(1 << 20)))
    checkpoint(primary.address)
    primary.terminate()
    make_backup(tmp_path / "a", tmp_path / "b", selection=Selection(portable=True), rate=1 << 20)
    assert clock.now_s >= 4  # the value itself and the change that made it, twice
