"""The demo: that it plays to its end, that it would not hide a loss, and that it leaves nothing behind."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import Process, Processes, wait_until

from understudy.cli import demo_clients, demo_story
from understudy.cli.demo_device import digest, entry
from understudy.cli.demo_fates import Fate, Reunion, copy_problems, counter_problems, fate_problems, present
from understudy.cli.demo_ledger import TOTAL, Ledger, Tally, operations
from understudy.cli.main import run
from understudy.client import Add, Put

PLAY_S_MAX = 200.0


@pytest.fixture
def start_demo(processes: Processes) -> Iterator[Callable[..., Process]]:
    """Starts ``understudy demo``, and ends it cleanly if the test fails: killed, it would leave its nodes running."""
    demos: list[Process] = []

    def start(*arguments: str | Path) -> Process:
        demos.append(processes.start("demo", *arguments))
        return demos[-1]

    yield start
    for demo in demos:
        if demo.is_running:
            demo.terminate()


@pytest.mark.timeout(300)
def test_demo_plays_the_whole_story_and_loses_nothing(
    start_demo: Callable[..., Process], processes: Processes, tmp_path: Path
) -> None:
    """G1, G6: primary killed, replica promoted, old primary rewound, every acknowledged transaction there once."""
    keep = tmp_path / "kept"
    demo = start_demo("--seconds", "3", "--writers", "4", "--keep", keep, "--json")
    assert demo.wait(deadline_s=PLAY_S_MAX) == 0, demo.describe()
    facts = json.loads(demo.stdout)
    assert facts["ok"] is True
    assert facts["digests_equal"] is True
    assert (facts["lost"], facts["duplicated"], facts["strange"], facts["unknown"]) == (0, 0, 0, 0)
    assert facts["acknowledged"] > facts["under_way_at_failover"] == 4 * 8
    assert facts["files"] > 100
    assert facts["files_differing"] == 0
    assert facts["seconds_without_primary"] > facts["promote_seconds"] > 0
    # What was under way had reached both nodes, or the old primary alone, or neither; that one may also have had marks.
    assert facts["answered_again"] + facts["entries_exported"] <= facts["under_way_at_failover"] + 2
    for node in ("first", "second", "fourth"):
        processes.run("verify", keep / node)
    _check_clients(facts)


def _check_clients(facts: dict[str, Any]) -> None:
    """At durability local, what only clients still had came home, and each reset did what its mode says."""
    assert facts["client_problems"] == []
    laptop, phone, desktop, tablet = facts["clients"]
    assert [client["confirmed_and_lost"] for client in facts["clients"]] == [20, 0, 20, 20]
    assert [client["missing"] for client in facts["clients"]] == [0, 0, 0, 0]
    assert (laptop["brought_home_as_they_were"], laptop["resets"]) == (20, [])
    assert (phone["queued"], phone["kept"], phone["resets"]) == (5, 5, [])
    assert (desktop["kept"], desktop["dropped"], desktop["resets"]) == (5, 1, ["OTHER_HISTORY, recover"])
    assert (tablet["kept"], tablet["dropped"], tablet["resets"]) == (0, 5, ["OTHER_HISTORY, discard"])
    assert desktop["brought_home_as_new"] == tablet["brought_home_as_new"] == 20


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scene", ["writers begin", "four devices begin"])
def test_interrupted_demo_ends_its_nodes_and_removes_its_folder(
    start_demo: Callable[..., Process], processes: Processes, tmp_path: Path, scene: str
) -> None:
    """Ctrl-C in mid-load, or while clients wait for a server: exit code 130, no process and no file left."""
    processes.environment["TMPDIR"] = str(tmp_path)
    demo = start_demo("--writers", "1", "--seconds", "1")
    wait_until(lambda: scene in demo.stdout, what=demo.describe, deadline_s=PLAY_S_MAX)
    addresses = [line.rpartition(" ")[2] for line in demo.stdout.splitlines() if ", on 127.0.0.1:" in line]
    assert len(addresses) == 2
    demo.send(signal.SIGINT)
    assert demo.wait() == 130
    assert list(tmp_path.iterdir()) == []
    for address in addresses:
        host, _, port = address.rpartition(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)))


def test_demo_does_not_work_among_files_of_others(processes: Processes, tmp_path: Path) -> None:
    """A directory to keep that is not empty is refused, and nothing in it touched."""
    (tmp_path / "mine").touch()
    done = processes.run("demo", "--keep", tmp_path, code=2)
    assert b"not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("tally", "files_differing", "problems", "client_problems"),
    [
        (Tally(acknowledged=10, lost=1), 0, [], []),
        (Tally(acknowledged=10, duplicated=1), 0, [], []),
        (Tally(acknowledged=10, strange=1), 0, [], []),
        (Tally(acknowledged=10), 1, [], []),
        (Tally(acknowledged=10), 0, ["realm /a differs"], []),
        (Tally(acknowledged=10), 0, [], ["laptop's copy differs"]),
    ],
)
def test_demo_that_finds_something_wrong_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tally: Tally,
    files_differing: int,
    problems: list[str],
    client_problems: list[str],
) -> None:
    """Exit code 4, and the table all the same, where anything was lost, doubled, or differs."""

    async def play(_: demo_story.Story) -> demo_story.Outcome:
        return _outcome(tally, files_differing, problems)

    async def play_clients(_: demo_clients.ClientStory) -> Reunion:
        return Reunion(fates=demo_clients.EXPECTED, problems=client_problems)

    monkeypatch.setattr(demo_story.Story, "play", play)
    monkeypatch.setattr(demo_clients.ClientStory, "play", play_clients)
    assert run(["demo", "--json", "--keep", str(tmp_path / "kept")]) == 4
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is False
    assert (facts["lost"], facts["duplicated"]) == (tally.lost, tally.duplicated)


def _outcome(tally: Tally, files_differing: int, problems: list[str]) -> demo_story.Outcome:
    return demo_story.Outcome(
        imported=demo_story.Imported(files=1, file_bytes=1, realms=1),
        failover=demo_story.Failover(without_primary_s=1.0, promote_s=0.5, under_way=1),
        answered_again=0,
        rewound=demo_story.Rewound(seconds=1.0, entries_exported=0, bytes_fetched=0, bytes_total=0),
        proof=demo_story.Proof(tally=tally, files_differing=files_differing, problems=problems, lsn=1),
    )


# -- the ledger ----------------------------------------------------------------------------------------------


class _State:
    """What a realm holds after some transactions."""

    def __init__(self) -> None:
        self.pairs: dict[bytes, bytes] = {}

    def apply(self, writer: int, number: int) -> None:
        for operation in operations(writer, number):
            match operation:
                case Put(key, value):
                    self.pairs[key] = value
                case Add(key, amount):
                    self.pairs[key] = b"%d" % (int(self.pairs.get(key, b"0")) + amount)


def _played(transactions: int) -> tuple[Ledger, _State]:
    """A ledger whose transactions were all applied and acknowledged, and the state that this makes."""
    ledger, state = Ledger(writer=1), _State()
    for _ in range(transactions):
        number = ledger.next_number()
        state.apply(1, number)
        ledger.acknowledged.add(number)
    return ledger, state


def test_ledger_agrees_with_what_was_written() -> None:
    """Acknowledged transactions, each there once, are a clean tally."""
    ledger, state = _played(5)
    tally = ledger.check(state.pairs.items())
    assert tally == Tally(acknowledged=5)
    assert tally.is_clean


def test_acknowledged_transaction_that_was_never_applied_is_lost() -> None:
    """An invented acknowledgement is found out."""
    ledger, state = _played(5)
    ledger.acknowledged.add(7)
    tally = ledger.check(state.pairs.items())
    assert tally == Tally(acknowledged=6, lost=1)
    assert not tally.is_clean


def test_value_that_is_another_than_written_is_lost() -> None:
    """It is not enough that the key is there."""
    ledger, state = _played(5)
    state.pairs[b"value/00000002"] = b"something else"
    assert ledger.check(state.pairs.items()).lost == 1


def test_add_that_is_missing_from_the_total_is_lost() -> None:
    """The shared counter is checked against the single ones."""
    ledger, state = _played(5)
    state.pairs[TOTAL] = b"4"
    assert ledger.check(state.pairs.items()).lost == 1


def test_transaction_applied_twice_is_duplicated() -> None:
    """Puts repeat without a trace; the counters tell."""
    ledger, state = _played(5)
    state.apply(1, 3)
    assert ledger.check(state.pairs.items()) == Tally(acknowledged=5, duplicated=1)


@pytest.mark.parametrize("was_applied", [False, True])
def test_unanswered_transaction_may_be_there_or_not(was_applied: bool) -> None:
    """Its outcome is unknown, and neither outcome is wrong."""
    ledger, state = _played(5)
    number = ledger.next_number()
    if was_applied:
        state.apply(1, number)
    assert ledger.check(state.pairs.items()) == Tally(acknowledged=5, unknown=1)


def test_half_a_transaction_is_strange() -> None:
    """G2: an unanswered transaction may be there, but only whole."""
    ledger, state = _played(5)
    number = ledger.next_number()
    state.apply(1, number)
    del state.pairs[b"value/%08d" % number]
    assert ledger.check(state.pairs.items()).strange == 1


def test_pair_that_nobody_wrote_is_strange() -> None:
    """What was never sent must not be there."""
    ledger, state = _played(5)
    state.apply(1, 9)
    assert not ledger.check(state.pairs.items()).is_clean


# -- the devices ---------------------------------------------------------------------------------------------


def _made(*changes: tuple[str, int]) -> dict[bytes, bytes]:
    """What a realm holds after these changes, each applied once."""
    return {b"changes": b"%d" % len(changes), **dict(entry(who, number) for who, number in changes)}


def test_changes_are_there_only_as_they_were_made() -> None:
    """Neither one that is gone nor one that has another value counts as kept."""
    changes = dict(entry("laptop", number) for number in (1, 2, 3))
    pairs = _made(("laptop", 1), ("laptop", 2))
    assert present(changes, pairs) == 2
    assert present(changes, {**pairs, b"laptop/0002": b"something else"}) == 1


def test_device_that_ends_otherwise_than_it_should_is_a_problem() -> None:
    """One more change dropped, or a reset that was not needed, is found out."""
    wanted = Fate(name="laptop", realm="/notes", queued=5, kept=5)
    assert fate_problems([wanted], [wanted]) == []
    for found in (replace(wanted, kept=4), replace(wanted, resets=("SERVER_BEHIND, recover",))):
        assert len(fate_problems([found], [wanted])) == 1


def test_copy_that_is_not_what_the_server_has_is_a_problem() -> None:
    """It is named; those that are equal are not."""
    server, other = digest(_made(("a", 1)).items()), digest(_made(("a", 2)).items())
    [problem] = copy_problems("/notes", server, [("laptop", server), ("phone", other)])
    assert problem.startswith("phone")


@pytest.mark.parametrize("times", [1, 3])
def test_g6_change_that_was_not_applied_once_is_a_problem(times: int) -> None:
    """G6: the counter of a realm tells what a put that was repeated does not."""
    pairs = _made(("laptop", 1), ("somebody", 1))
    assert counter_problems("/notes", pairs, ["laptop", "somebody"]) == []
    assert len(counter_problems("/notes", {**pairs, b"changes": b"%d" % times}, ["laptop", "somebody"])) == 1
