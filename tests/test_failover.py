"""The main job: the primary dies, the replica takes its place, nothing acknowledged is lost, the old one comes back."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from harness import Process, Processes, complaint, wait_until
from killing import KILLED, Nursery
from nodes import (
    DIRECTORY,
    Load,
    Pair,
    ask_to_follow,
    assert_equal,
    assert_sound,
    copy_node,
    offline_status,
    pairs,
    put,
    status,
    wait_until_caught_up,
)

from understudy.client import Add, Delete, DeleteRange, Operation, Put, connect
from understudy.common.directory import DataDirectory, Role
from understudy.common.errors import Fenced, OutcomeUnknown, UnderstudyError
from understudy.common.follow_table import PROTOCOL_VERSION, Decision
from understudy.common.log_reader import read_records
from understudy.common.records import Record
from understudy.common.types import ClusterId, Lsn
from understudy.v1 import replication_pb2

# -- the story -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replica_runs", [True, False])
def test_a_failover_under_load_loses_and_doubles_nothing(
    processes: Processes, tmp_path: Path, replica_runs: bool
) -> None:
    """G1, G6, G11: kill -9 under load, promote, go on: all acknowledged is there once; rewound, both are equal."""
    pair = Pair(processes, tmp_path, "--durability", "replica")
    with Load(pair.addresses) as load:
        load.wait_for(200)
        pair.primary.kill()
        if not replica_runs:
            pair.replica.kill()
        processes.run("promote", pair.b)
        pair.replica.wait()
        primary = processes.primary(pair.b, "--listen", pair.replica.address)
        load.wait_for(200)
        load.stop()
    assert load.errors == []
    load.check(primary.address)
    processes.run("rewind", pair.a, "--to", primary.address, "--id", "a")
    replica = processes.replica(pair.a, primary.address, "--id", "a")
    assert_equal(primary.address, replica.address)
    load.check(replica.address)
    processes.run("verify", "--server", primary.address, "--against", replica.address)


def test_a_transaction_whose_answer_was_lost_is_applied_once(processes: Processes, tmp_path: Path) -> None:
    """G6: committed but unanswered when the primary died, a transaction gets its first receipt from the new one."""
    pair = Pair(processes, tmp_path, "--durability", "replica")
    with (
        FaultyProxy(pair.primary.address) as proxy,
        connect(f"{proxy.address},{pair.replica.address}") as client,
    ):
        first = client.commit("/realm", [Add(b"counter", 1)])
        proxy.is_mute = True
        with pytest.raises(OutcomeUnknown) as unknown:
            client.commit("/realm", [Add(b"counter", 1)], timeout_s=0.3)
        wait_until(lambda: status(pair.replica.address).durable_lsn == first.lsn + 1)
        new = pair.fail_over()
        assert client.wait(unknown.value.number).lsn == first.lsn + 1
        assert client.commit("/realm", [Add(b"counter", 1)]).version == 3
    assert pairs(new.address, "/realm") == {b"counter": b"3"}


# -- one reign -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("witness", ["client", "replica"])
def test_an_old_primary_that_is_started_again_acknowledges_nothing_and_fences_itself(
    processes: Processes, tmp_path: Path, witness: str
) -> None:
    """G7: without a rewind it waits in vain, is fenced by who has seen the new epoch, and stays so after restart."""
    pair = Pair(processes, tmp_path, "--durability", "replica")
    put(pair.primary.address, "/before", (b"key", b"value"))
    new = pair.fail_over()
    old = processes.primary(pair.a, "--durability", "replica")
    with connect(old.address) as client:
        with pytest.raises(OutcomeUnknown) as unknown:
            client.commit("/late", [Put(b"key", b"value")], timeout_s=0.3)
        if witness == "client":
            _show_as_client(new, old)
        else:
            _show_as_replica(processes, tmp_path / "c", new, old)
        assert status(old.address).role == "fenced"
        with pytest.raises(UnderstudyError):  # refused or unknown, but no receipt
            client.wait(unknown.value.number, timeout_s=0.3)
    with connect(old.address) as client, pytest.raises(Fenced, match="rewind"):
        client.commit("/late", [Put(b"key", b"value")])
    assert old.terminate() == 0
    refused = complaint(processes.run("primary", "--data-dir", pair.a, code=DIRECTORY))
    assert f"understudy rewind {pair.a} --to" in refused
    assert "fenced" in complaint(processes.run("promote", pair.a, code=DIRECTORY))


def _show_as_client(new: Process, old: Process) -> None:
    """A client that has met the new epoch comes to the old primary, because the new one is gone."""
    with connect(f"{new.address},{old.address}") as client:
        client.commit("/new", [Put(b"key", b"value")])
        new.kill()
        with pytest.raises(UnderstudyError):
            client.commit("/new", [Put(b"key", b"other")], durability="local", timeout_s=2)
        wait_until(lambda: status(old.address).role == "fenced")


def _show_as_replica(processes: Processes, directory: Path, new: Process, old: Process) -> None:
    """A replica of the new primary asks the old one, because the new one is gone."""
    replica = processes.replica(directory, f"{new.address},{old.address}", "--id", "c")
    wait_until_caught_up(new.address, replica.address)
    new.kill()
    wait_until(lambda: status(old.address).role == "fenced", what=replica.describe)
    wait_until(lambda: "is fenced" in "\n".join(status(replica.address).warnings), what=replica.describe)


def test_clients_leave_a_primary_that_is_fenced_while_it_runs(processes: Processes, tmp_path: Path) -> None:
    """G6, G7: promoted away from a primary that still runs, what waits there is applied once, by the new one."""
    pair = Pair(processes, tmp_path, "--durability", "replica")
    with connect(pair.addresses) as client:
        client.commit("/realm", [Add(b"counter", 1)])
        processes.run("promote", pair.b)
        new = processes.primary(pair.b, "--listen", pair.replica.address)
        with pytest.raises(OutcomeUnknown) as unknown:
            client.commit("/realm", [Add(b"counter", 1)], timeout_s=0.3)
        known = status(new.address)
        hello = replication_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            cluster=known.cluster,
            node=known.node,
            run=bytes(16),
            replica_id="witness",
            epoch=known.epoch,
            proof=known.proof,
        )
        hello.locator.add(lsn=known.lsn, digest=known.digest)
        assert ask_to_follow(pair.primary.address, hello).decision == Decision.FENCED
        assert status(pair.primary.address).role == "fenced"
        assert client.wait(unknown.value.number).version == 2
    assert pairs(new.address, "/realm") == {b"counter": b"2"}


# -- what only the old primary had -----------------------------------------------------------------------------

_UNIQUE: tuple[tuple[str, list[Operation]], ...] = (
    ("/text", [Put(b"key", b"value"), Put("schl\u00fcssel".encode(), b"")]),
    ("/bytes", [Put(b"\xff\x00key", bytes(range(256)))]),
    ("/text", [Add(b"counter", -3), Delete(b"key"), DeleteRange(b"a", b"b\xff")]),
)


def test_a_rewind_exports_what_only_the_old_primary_had(processes: Processes, tmp_path: Path) -> None:
    """G4: entries that never left the old primary are JSON lines with their exact bytes, its copy is set aside."""
    pair = Pair(processes, tmp_path)
    shared = put(pair.primary.address, "/text", (b"shared", b"by both"))
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    assert pair.replica.terminate() == 0
    with connect(pair.primary.address) as client:
        receipts = [client.commit(realm, operations) for realm, operations in _UNIQUE]
    new = pair.fail_over()
    put(new.address, "/text", (b"new", b"reign"))
    lost = {record.lsn: record for record in _records(pair.a, shared.lsn)}
    assert lost.keys() == {receipt.lsn for receipt in receipts}
    before = _files(pair.a)

    shown = processes.run("rewind", pair.a, "--to", new.address, "--id", "a", "--json").stdout
    rewound = json.loads(shown)
    assert (rewound["decision"], rewound["common_lsn"]) == ("DIVERGED", shared.lsn)
    assert rewound["common_digest"] == shared.digest.hex()
    rows = [json.loads(line) for line in Path(rewound["exported"]).read_text().splitlines()]
    assert len(rows) == rewound["entries_exported"] == len(lost)
    for row, receipt in zip(rows, receipts, strict=True):
        assert (row["lsn"], row["digest"], row["realm"]) == (receipt.lsn, receipt.digest.hex(), receipt.realm)
        assert base64.b64decode(row["entry_base64"]) == lost[receipt.lsn].payload
    assert rows[0]["operations"] == [
        {"kind": "put", "key": "key", "value": "value"},
        {"kind": "put", "key": "schl\u00fcssel"},
    ]
    assert base64.b64decode(rows[1]["operations"][0]["key_base64"]) == b"\xff\x00key"
    assert base64.b64decode(rows[1]["operations"][0]["value_base64"]) == bytes(range(256))
    assert [row["kind"] for row in rows[2]["operations"]] == ["add", "delete", "delete_range"]
    assert rows[2]["operations"][0]["amount"] == -3
    assert _files(Path(rewound["set_aside"])) == before

    replica = processes.replica(pair.a, new.address, "--id", "a")
    assert_equal(new.address, replica.address)
    assert pairs(replica.address, "/text") == {b"shared": b"by both", b"new": b"reign"}


def test_a_rewind_fetches_only_what_differs(processes: Processes, tmp_path: Path) -> None:
    """An old primary that is rewound takes what it shares with the new one from its own store."""
    pair = Pair(processes, tmp_path)
    values = [(b"%03d" % number, bytes([number]) * 200_000) for number in range(60)]
    put(pair.primary.address, "/large", *values)
    assert_equal(pair.primary.address, pair.replica.address)  # which takes a checkpoint
    assert pair.replica.terminate() == 0
    put(pair.primary.address, "/small", (b"lost", b"by the failover"))
    new = pair.fail_over()
    put(new.address, "/small", (b"new", b"reign"))
    shown = processes.run("rewind", pair.a, "--to", new.address, "--id", "a", "--json").stdout
    rewound = json.loads(shown)
    assert rewound["bytes_total"] > 12_000_000
    assert rewound["bytes_fetched"] < rewound["bytes_total"] / 4
    replica = processes.replica(pair.a, new.address, "--id", "a")
    assert_equal(new.address, replica.address)


def _records(path: Path, after: int) -> list[Record]:
    cluster = ClusterId(offline_status(path).cluster)
    return list(read_records(path / "log", cluster, Lsn(after)))


def _files(path: Path) -> dict[str, bytes]:
    names = [*(path / "log").glob("*.seg"), path / "store" / "data.mdb"]
    return {str(name.relative_to(path)): name.read_bytes().rstrip(b"\0") for name in names}


def test_a_promotion_whose_answer_was_lost_can_be_asked_for_again(
    processes: Processes, tmp_path: Path
) -> None:
    """Promoting what was promoted already changes nothing and says so; what never was a replica is refused."""
    pair = Pair(processes, tmp_path)
    put(pair.primary.address, "/realm", (b"key", b"value"))
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    pair.primary.kill()
    first = json.loads(processes.run("promote", pair.b, "--json").stdout)
    pair.replica.wait()
    again = processes.run("promote", pair.b, "--json")
    assert {**json.loads(again.stdout), "seconds": 0} == {**first, "seconds": 0}
    assert "had been promoted before" in again.stderr.decode()
    new = processes.primary(pair.b)
    put(new.address, "/realm", (b"key", b"other"))
    assert new.terminate() == 0
    assert json.loads(processes.run("promote", pair.b, "--json").stdout)["epoch"] == 2
    complaint(processes.run("promote", pair.a, code=DIRECTORY))


def test_a_copy_that_has_no_entries_yet_is_not_promoted(processes: Processes, tmp_path: Path) -> None:
    """G4: rewound to a primary's first checkpoint and not yet started, a directory is no new primary's."""
    pair = Pair(processes, tmp_path)
    pair.replica.kill()
    put(pair.primary.address, "/realm", (b"lost", b"by the failover"))
    new = pair.fail_over()
    processes.run("rewind", pair.a, "--to", new.address, "--id", "a")
    assert offline_status(pair.a).lsn == 0
    refused = complaint(processes.run("promote", pair.a, code=DIRECTORY))
    assert "no entry of its primary yet" in refused
    replica = processes.replica(pair.a, new.address, "--id", "a")
    assert_equal(new.address, replica.address)


# -- killed on the way -----------------------------------------------------------------------------------------


def test_a_promotion_killed_at_any_step_is_finished_by_the_next(
    processes: Processes, tmp_path: Path, nursery: Nursery
) -> None:
    """G1, G7: whatever step kill -9 comes before, `promote` again begins one new epoch behind all there was."""
    pair = Pair(processes, tmp_path)
    last = put(pair.primary.address, "/kept", (b"key", b"value"))
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    pair.stop()
    for step in itertools.count(1):
        copy = copy_node(pair.b, tmp_path / f"b{step}")
        process = processes.start("promote", copy, launch=nursery.dying_at(step))
        code = process.wait()
        if code == KILLED:
            again = processes.start("promote", copy, launch=nursery.dying_at(0))
            if again.wait() == DIRECTORY:  # it was promoted, only the end was cut off
                assert "its role is primary" in again.stderr
        found = offline_status(copy)
        assert (found.role, found.epoch, found.lsn) == ("primary", 2, last.lsn + 1)
        assert_sound(copy)
        if code == 0:
            break
        assert code == KILLED, process.describe()
    assert step > 5  # two roles and an entry were published
    primary = processes.primary(copy)
    assert pairs(primary.address, "/kept") == {b"key": b"value"}


def test_a_running_replica_killed_at_any_step_of_its_promotion_is_promoted_by_the_next(
    processes: Processes, tmp_path: Path, nursery: Nursery
) -> None:
    """G1, G7: a replica killed while it promotes itself leaves what `promote` again makes a primary's, whole."""
    pair = Pair(processes, tmp_path)
    last = put(pair.primary.address, "/kept", (b"key", b"value"))
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    gone = pair.primary.address
    pair.stop()
    for step in itertools.count(1):
        copy, armed = copy_node(pair.b, tmp_path / f"b{step}"), tmp_path / f"armed{step}"
        replica = processes.replica(copy, gone, launch=nursery.dying_at(step, armed=armed))
        armed.touch()
        asked = processes.start("promote", copy, launch=nursery.dying_at(0))
        code = replica.wait()
        assert code in (0, KILLED)
        if asked.wait():
            assert asked.wait() == DIRECTORY
            assert "run promote again" in asked.stderr
            assert processes.start("promote", copy, launch=nursery.dying_at(0)).wait() in (0, DIRECTORY)
        found = offline_status(copy)
        assert (found.role, found.epoch, found.lsn) == ("primary", 2, last.lsn + 1)
        if code == 0:
            break
    assert step > 5
    assert_sound(copy)


@pytest.mark.timeout(300)
def test_a_rewind_killed_at_any_step_is_finished_by_the_next(
    processes: Processes, tmp_path: Path, nursery: Nursery
) -> None:
    """G4: whatever step kill -9 comes before, `rewind` again ends as a sound replica, nothing of the old copy lost."""
    pair = Pair(processes, tmp_path)
    shared = put(pair.primary.address, "/text", (b"shared", b"by both"))
    wait_until_caught_up(pair.primary.address, pair.replica.address)
    assert pair.replica.terminate() == 0
    lost = put(pair.primary.address, "/text", (b"lost", b"by the failover"))
    new = pair.fail_over()
    put(new.address, "/text", (b"new", b"reign"))
    old_log = _files(pair.a)
    for step in itertools.count(1):
        copy = copy_node(pair.a, tmp_path / f"a{step}")
        arguments = ("rewind", copy, "--to", new.address, "--id", "a")
        process = processes.start(*arguments, launch=nursery.dying_at(step))
        code = process.wait()
        if code:
            assert code == KILLED, process.describe()
            again = processes.start(*arguments, launch=nursery.dying_at(0))
            assert again.wait() == 0, again.describe()
        assert offline_status(copy).role == "replica"
        assert_sound(copy)
        (export,) = (copy / "set-aside").glob("entries-*.jsonl")
        assert [json.loads(line)["lsn"] for line in export.read_text().splitlines()] == [lost.lsn]
        kept = [folder for folder in (copy / "set-aside").glob("copy-*") if any(folder.iterdir())]
        assert [_files(folder) for folder in kept] == [old_log]
        if code == 0:
            break
        shutil.rmtree(copy)
    assert step > 20
    assert shared.lsn < lost.lsn
    replica = processes.replica(copy, new.address, "--id", "a")
    assert_equal(new.address, replica.address)
    assert pairs(replica.address, "/text") == {b"shared": b"by both", b"new": b"reign"}


class _Cut(BaseException):
    """Stands for a kill where a whole process would be too much."""


@pytest.mark.parametrize("keep_old", [True, False])
def test_an_installation_cut_off_at_any_step_is_finished_by_the_next_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_old: bool
) -> None:
    """G4: a new copy is in place once the directory is opened again, and the old one where it was to be kept."""
    for step in itertools.count(1):
        path = tmp_path / f"{step}"
        with DataDirectory.open(path) as directory:
            directory.begin(Role.PRIMARY, _CLUSTER)
            for folder, content in ((path, "old"), (directory.incoming, "new")):
                for name in ("log", "store"):
                    (folder / name).mkdir(parents=True)
                    (folder / name / "content").write_text(content)
            finished = False
            with monkeypatch.context() as patched, contextlib.suppress(_Cut):
                _cut_at(step, patched)
                directory.install(_CLUSTER, keep_old=keep_old)
                finished = True
        with DataDirectory.open(path) as directory:
            if directory.role is Role.PRIMARY:  # nothing was begun
                assert _contents(path) == ["old", "old"]
                directory.install(_CLUSTER, keep_old=keep_old)
            assert directory.role is Role.REPLICA
        assert _contents(path) == ["new", "new"]
        kept = [folder for folder in path.glob("set-aside/copy-*") if any(folder.iterdir())]
        assert [_contents(folder) for folder in kept] == ([["old", "old"]] if keep_old else [])
        if finished:
            break
    assert step > 6


_CLUSTER = ClusterId(bytes(range(16)))


def _contents(path: Path) -> list[str]:
    return [(path / name / "content").read_text() for name in ("log", "store")]


def _cut_at(step: int, patched: pytest.MonkeyPatch) -> None:
    numbers = itertools.count(1)

    def cutting(function: Callable[..., object]) -> Callable[..., object]:
        def cut(*arguments: object, **keywords: object) -> object:
            if next(numbers) == step:
                raise _Cut
            return function(*arguments, **keywords)

        return cut

    for name in ("mkdir", "rename", "unlink", "rmdir"):
        patched.setattr(os, name, cutting(getattr(os, name)))
