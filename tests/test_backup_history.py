"""The history of runs: numbers that never come twice, entries that stay as long as needed, and a damaged file."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import Processes
from running_together import run_together

from understudy.backup import history as history_module
from understudy.backup.books import Books
from understudy.backup.history import ENTRIES_MAX, WITHOUT_BACKUP_MAX, Entry, History, Result
from understudy.backup.manifest import utc_text
from understudy.backup.policy import Policy
from understudy.backup.retention import Retention
from understudy.backup.run import run_policy
from understudy.common.errors import NewerFormat

START_S = 1795262400.25


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.json"


def add(history: History, result: Result = Result.DONE, **changed: Any) -> Entry:
    """A run like any other, but for what is ``changed``."""
    values: dict[str, Any] = {
        "policy": "nightly",
        "start_s": START_S,
        "seconds": 1.5,
        "realms": 3,
        "bytes": 4096,
        "lsn": 77,
    }
    number = history.reserve(changed.pop("floor", 0))
    return history.add(number=number, result=result, **{**values, **changed})


def numbers(history: History) -> list[int]:
    return [entry.number for entry in history.entries()]


def test_what_was_added_is_read_back(path: Path) -> None:
    """Every value of a run comes back, by another History on the same file, too."""
    entry = add(
        History(path), Result.PARTIAL, paths=["a.tar", "b.tar"], errors=["/notes: no space"], policy="Ä\ud800"
    )
    assert entry == Entry(
        number=1,
        policy="Ä\ud800",
        start=utc_text(START_S),
        seconds=1.5,
        result=Result.PARTIAL,
        realms=3,
        bytes=4096,
        lsn=77,
        paths=["a.tar", "b.tar"],
        errors=["/notes: no space"],
    )
    assert History(path).entries() == [entry]
    assert entry.start.startswith("2026-11-21T12:00:00.25")
    assert entry.start_s == START_S


def test_a_history_that_is_not_there_is_empty(path: Path) -> None:
    """The first run has number 1."""
    history = History(path)
    assert history.entries() == []
    history.forget("nightly", lambda path: False)
    assert not path.exists()
    assert add(history).number == 1


def test_a_result_is_one_of_four(path: Path) -> None:
    """Programs that read the file find these words."""
    for result in Result:
        add(History(path), result)
    written = json.loads(path.read_text())
    assert [entry["result"] for entry in written["entries"]] == ["done", "partial", "failed", "cancelled"]


# -- what stays --------------------------------------------------------------------------------------------


def test_entries_stay_as_long_as_their_backups(path: Path) -> None:
    """What else a policy has run is forgotten but for the last ones, and other policies' runs stay as they are."""
    history = History(path)
    kept = add(history, paths=["/repository/one/"])
    for _ in range(2):
        add(history, Result.FAILED, policy="hourly")
    gone = [add(history, paths=["/repository/gone/"]) for _ in range(60)]
    failed = [add(history, Result.FAILED) for _ in range(60)]
    history.forget("nightly", {"/repository/one/"}.__contains__)
    left = [entry.number for entry in (*gone, *failed)][-WITHOUT_BACKUP_MAX:]
    assert numbers(history) == [kept.number, 2, 3, *left]


def test_a_run_forgets_the_runs_whose_backups_it_has_pruned(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What retention keeps is in the history, and of the rest the last ones are."""
    monkeypatch.setattr(history_module, "WITHOUT_BACKUP_MAX", 1)
    processes.primary(tmp_path / "a")
    (tmp_path / "repository").mkdir()
    policy = Policy(
        name="nightly",
        schedule=None,
        repositories=(str(tmp_path / "repository"),),
        retention=Retention(last=2),
        archive_log=False,
    )
    for _ in range(4):
        assert run_policy(policy, tmp_path / "a").result is Result.DONE
    assert numbers(Books.of(tmp_path / "a").history) == [2, 3, 4]


def test_g9_entries_and_their_errors_are_bounded(path: Path) -> None:
    """G9: runs without end push out the oldest, and errors without end are cut."""
    history = History(path)
    add(history, Result.FAILED, errors=["x" * 10_000_000] * 100)
    assert path.stat().st_size < 100_000
    content = json.loads(path.read_text())
    (entry,) = content["entries"]
    content["entries"] = [{**entry, "number": number, "errors": []} for number in range(1, ENTRIES_MAX + 1)]
    path.write_text(json.dumps({**content, "last_number": ENTRIES_MAX}))
    add(history, Result.FAILED)
    assert numbers(history) == list(range(2, ENTRIES_MAX + 2))


# -- numbers -----------------------------------------------------------------------------------------------


def test_a_number_is_not_given_again(path: Path) -> None:
    """Neither where the newest entry is gone, nor where backups bear higher numbers."""
    history = History(path)
    add(history, Result.DONE)
    add(history, Result.FAILED)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "entries": content["entries"][:1]}))
    assert add(history).number == 3
    assert add(history, floor=2).number == 4
    assert add(history, floor=40).number == 41
    assert add(history).number == 42


def test_runs_that_end_in_another_order_than_they_began_are_all_there(path: Path) -> None:
    """Each under the number that it was given first; what is said of one again takes its place."""
    history = History(path)
    first = history.reserve()
    second = add(history)
    values = {"start_s": START_S, "seconds": 1.0, "realms": 0, "bytes": 0, "lsn": 0}
    for result in (Result.DONE, Result.PARTIAL):
        history.add(number=first, policy="other", result=result, **values)
        assert numbers(History(path)) == [first, second.number]
        assert history.entries()[0].result is result
    assert history.reserve() == second.number + 1


def test_numbers_go_on_where_the_file_was_lost(path: Path) -> None:
    """The backups that exist say how far they went."""
    add(History(path))
    path.unlink()
    assert add(History(path), floor=17).number == 18


ADDER = """
import sys
from pathlib import Path
from understudy.backup.history import History, Result
history = History(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
for _ in range(40):
    number, nothing = history.reserve(), {"seconds": 0, "realms": 0, "bytes": 0, "lsn": 0}
    history.add(number=number, policy=sys.argv[2], start_s=0, result=Result.DONE, **nothing)
    history.forget(sys.argv[2], lambda path: True)
"""


def test_processes_that_add_at_the_same_time_lose_nothing(path: Path) -> None:
    """Every run of each is there, under a number of its own."""
    assert run_together(*([sys.executable, "-c", ADDER, path, name] for name in "ab")) == [0, 0]
    assert numbers(History(path)) == list(range(1, 81))
    assert sorted(entry.policy for entry in History(path).entries()) == ["a"] * 40 + ["b"] * 40


# -- a damaged file ----------------------------------------------------------------------------------------

GOOD = {
    "number": 1, "policy": "nightly", "start": "2026-11-21T12:00:00.000Z", "seconds": 1, "result": "done", "realms": 1,
    "bytes": 1, "lsn": 1, "paths": [], "errors": [],
}  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"null",
        b'{"format": 1}',
        b'{"format": "1", "last_number": 1, "entries": []}',
        *(
            json.dumps({"format": 1, "last_number": 1, "entries": [{**GOOD, **wrong}]}).encode()
            for wrong in [
                {"number": "1"},
                {"number": 2},
                {"bytes": "1"},
                {"result": "fine"},
                {"start": "yesterday"},
                {"seconds": "1"},
                {"paths": [1]},
                {"errors": None},
            ]
        ),
        json.dumps({"format": 1, "last_number": 1, "entries": [GOOD, GOOD]}).encode(),
        json.dumps({"format": 1, "last_number": None, "entries": []}).encode(),
    ],
    ids=lambda data: data[:60].decode("latin-1"),
)
def test_a_damaged_history_is_set_aside_and_begun_anew(
    path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It is kept for examination, a warning says where, and runs go on."""
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, logger="understudy"):
        assert add(History(path), floor=6).number == 7
    assert path.with_name("history.json.damaged-1").read_bytes() == data
    assert numbers(History(path)) == [7]
    (warning,) = caplog.messages
    assert "backup_history_damaged" in warning
    assert "history.json.damaged-1" in warning


def test_what_was_set_aside_is_not_overwritten(path: Path) -> None:
    """A second damaged file gets the next name."""
    for data in (b"one", b"two"):
        path.write_bytes(data)
        assert History(path).entries() == []
    assert path.with_name("history.json.damaged-1").read_bytes() == b"one"
    assert path.with_name("history.json.damaged-2").read_bytes() == b"two"


def test_a_file_without_damage_stays_where_it_is(path: Path) -> None:
    """The form that the damaged ones above differ from is read."""
    path.write_text(json.dumps({"format": 1, "last_number": 1, "entries": [GOOD]}))
    assert numbers(History(path)) == [1]


def test_what_a_later_version_says_beside_is_passed_over(path: Path) -> None:
    """A server that still runs reads what a newer `backup run` has written."""
    later = {**GOOD, "later": 1}
    path.write_text(json.dumps({"format": 1, "last_number": 1, "entries": [later], "more": 1}))
    history = History(path)
    assert numbers(history) == [1]
    assert add(history).number == 2
    assert not list(path.parent.glob("*.damaged-*"))


def test_a_history_of_a_newer_version_is_refused_and_kept(path: Path) -> None:
    """It is no damage, and the newer version will want it back."""
    path.write_text('{"format": 2, "runs": {}}')
    with pytest.raises(NewerFormat, match="format 2"):
        add(History(path))
    assert [each.name for each in path.parent.iterdir() if each.suffix == ".json"] == ["history.json"]
    assert path.read_text() == '{"format": 2, "runs": {}}'
