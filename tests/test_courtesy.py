"""What a backup leaves to the server whose data it copies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from understudy.backup import courtesy
from understudy.backup.courtesy import Courtesy
from understudy.common.segment import segment_name
from understudy.common.types import Lsn


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that passes for a backup."""
    found = Clock()
    monkeypatch.setattr(courtesy, "time", found)
    return found


@pytest.fixture
def segment(tmp_path: Path) -> Path:
    """The newest segment of a log."""
    (tmp_path / segment_name(Lsn(1))).touch()
    path = tmp_path / segment_name(Lsn(100))
    path.touch()
    return path


def commit(segment: Path) -> None:
    """Writes to a segment; the file's time is another one whatever the filesystem's clock does."""
    os.utime(segment, ns=(0, segment.stat().st_mtime_ns + 1_000_000))


def test_a_backup_pauses_while_its_server_writes(clock: Clock, segment: Path) -> None:
    """For three quarters of the time; at once no more when the server is at rest."""
    kind = Courtesy(segment.parent)
    for _ in range(3):
        clock.now_s += 0.03
        commit(segment)
        pause_s = kind.pause_s()
        assert pause_s == pytest.approx(0.09)
        clock.now_s += pause_s
    clock.now_s += 0.03
    assert kind.pause_s() == 0


def test_a_backup_of_a_server_at_rest_does_not_pause(clock: Clock, segment: Path) -> None:
    """However long it takes."""
    kind = Courtesy(segment.parent)
    for _ in range(10):
        clock.now_s += 0.5
        assert kind.pause_s() == 0


def test_a_new_segment_is_a_sign_of_work(clock: Clock, segment: Path) -> None:
    """The log has gone on, in another file."""
    kind = Courtesy(segment.parent)
    following = segment.with_name(segment_name(Lsn(200)))
    following.touch()
    os.utime(following, ns=(0, segment.stat().st_mtime_ns))
    clock.now_s += 0.03
    assert kind.pause_s() > 0


def test_waiting_for_a_slow_target_is_not_paid_for(clock: Clock, segment: Path) -> None:
    """A piece that took long was waited for, and costs the server nothing: the pause has a limit."""
    kind = Courtesy(segment.parent)
    clock.now_s += 60
    commit(segment)
    assert kind.pause_s() == pytest.approx(0.2)


def test_a_log_that_is_gone_is_no_reason_to_wait(clock: Clock, segment: Path) -> None:
    """What replaces it is found by whoever reads it."""
    kind = Courtesy(segment.parent / "gone")
    clock.now_s += 0.03
    assert kind.pause_s() == 0
