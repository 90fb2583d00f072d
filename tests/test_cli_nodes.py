"""The command line's view of nodes: status, log, promotion and rewind, comparison."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import nodes
import pytest
from harness import DEADLINE_S, Launch, Processes, Running, complaint, wait_until

from understudy.cli.compare import _Node
from understudy.common.directory import DataDirectory, Role
from understudy.common.errors import DiskFull, ExitCode, Unavailable
from understudy.common.rpc import open_channel, peer_errors
from understudy.common.settings import PrimarySettings
from understudy.common.store_layout import open_environment, realm_prefix
from understudy.primary.server import serving_primary
from understudy.v1 import admin_pb2, admin_pb2_grpc
from understudy.v1.store_pb2 import RealmRow

STATUS_KEYS = [
    *("role", "cluster", "node", "epoch", "lsn", "durable_lsn", "committed_lsn", "checkpoint_lsn", "digest"),
    *("realms", "durability", "replicas", "upstream", "warnings"),
]
REPLICA_KEYS = [
    *("id", "connected", "state", "durable_lsn", "applied_lsn", "lag_entries", "lag_bytes", "lag_seconds"),
]
UPSTREAM_KEYS = ["address", "connected", "lag_entries", "lag_bytes", "lag_seconds"]


# -- looking at a node -----------------------------------------------------------------------------------------


def test_status_is_the_same_from_server_socket_and_files(processes: Processes, tmp_path: Path) -> None:
    """``status`` has its keys in order, and tells the same of a node over the network, its socket, and its files."""
    primary = processes.primary(tmp_path / "data")
    processes.run("put", "--server", primary.address, "/inventory", "apple", "3")

    def status(*where: str | Path) -> dict[str, object]:
        shown: dict[str, object] = json.loads(processes.run("status", *where, "--json").stdout)
        assert list(shown)[: len(STATUS_KEYS)] == STATUS_KEYS
        return shown

    asked = status("--server", primary.address)
    assert (asked["role"], asked["lsn"], asked["realms"], asked["durability"]) == ("primary", 3, 1, "local")
    assert asked["upstream"] is None
    assert asked["running"] is True
    assert asked["access"] == "protected"
    assert status(tmp_path / "data") == asked
    assert b"primary" in processes.run("status", tmp_path / "data").stdout
    assert primary.terminate() == 0
    assert status(tmp_path / "data") == asked | {"running": False, "durability": None, "access": None}
    assert b"not running" in processes.run("status", tmp_path / "data").stdout


def test_status_shows_replicas_while_they_are_away(processes: Processes, tmp_path: Path) -> None:
    """A replica is in the primary's status with its lag, connected or not, and also when nothing runs any more."""
    primary = processes.primary(tmp_path / "a")
    replica = processes.replica(tmp_path / "b", primary.address, "--id", "second")

    def replicas(*where: str | Path) -> list[dict[str, object]]:
        found: list[dict[str, object]] = json.loads(processes.run("status", *where, "--json").stdout)[
            "replicas"
        ]
        return found

    def streaming() -> bool:
        found = replicas("--server", primary.address)
        return bool(found and found[0]["connected"])

    wait_until_following(primary.address, "second")
    (connected,) = replicas("--server", primary.address)
    assert list(connected) == REPLICA_KEYS
    assert connected["id"] == "second"
    follower = json.loads(processes.run("status", tmp_path / "b", "--json").stdout)
    assert follower["role"] == "replica"
    assert list(follower["upstream"]) == UPSTREAM_KEYS
    assert replica.terminate() == 0
    processes.run("put", "--server", primary.address, "/a", "k", "v")
    wait_until(lambda: not streaming())
    (away,) = replicas(tmp_path / "a")
    assert (away["connected"], away["state"]) == (False, "disconnected")
    assert away["lag_entries"] == 1
    assert isinstance(away["lag_bytes"], int)
    assert away["lag_bytes"] > 0
    assert primary.terminate() == 0
    (remembered,) = replicas(tmp_path / "a")
    assert (remembered["id"], remembered["lag_entries"]) == ("second", 1)
    assert remembered["lag_bytes"] == away["lag_bytes"]


def test_the_log_is_shown_while_it_is_written(processes: Processes, tmp_path: Path) -> None:
    """``log`` prints entries of a directory in use, from and to an LSN, of one realm, and no more than asked for."""
    primary = processes.primary(tmp_path / "data")
    for number, realm in enumerate(("/a", "/b", "/a"), 1):
        processes.run("put", "--server", primary.address, realm, "key", f"value {number}")
    processes.run("delete", "--server", primary.address, "/a", "--range", "k", "")

    def lsns(*options: str) -> list[int]:
        shown = processes.run("log", tmp_path / "data", "--json", *options).stdout
        return [json.loads(line)["lsn"] for line in shown.splitlines()]

    assert lsns() == [1, 2, 3, 4, 5, 6]
    assert lsns("--from", "5") == [5, 6]
    assert lsns("--to", "2") == [1, 2]
    assert lsns("--realm", "/a") == [3, 5, 6]
    assert lsns("--realm", "/a", "--limit", "1") == [3]
    assert lsns("--from", "100") == []
    fifth = json.loads(processes.run("log", tmp_path / "data", "--json", "--from", "5", "--to", "5").stdout)
    assert fifth["operations"] == [{"kind": "put", "key": "key", "value": "value 3"}]
    shown = processes.run("log", tmp_path / "data").stdout.decode()
    assert "/b version 1: put key = value 2" in shown
    assert "delete_range from k to before the end" in shown
    assert primary.terminate() == 0
    assert processes.run("log", tmp_path / "data").stdout.decode() == shown


def test_the_log_does_not_show_the_history_key(processes: Processes, tmp_path: Path) -> None:
    """G10: the key that changes are signed with is in the log, and is printed in neither form."""
    primary = processes.primary(tmp_path / "data")
    assert primary.terminate() == 0
    segment = next((tmp_path / "data" / "log").glob("*.seg")).read_bytes()
    at = segment.index(b"history-key") + len(b"history-key") + 2
    key = segment[at : at + 32]
    shown = (
        processes.run("log", tmp_path / "data").stdout
        + processes.run("log", tmp_path / "data", "--json").stdout
    )
    assert b"history-key" in shown
    rows = [json.loads(line) for line in shown.splitlines() if line.startswith(b"{")]
    history_key, admin_token = rows[1]["operations"]
    assert history_key == {"kind": "put", "key": "history-key", "hidden": True}
    assert admin_token["key"].startswith("token/")
    assert admin_token["hidden"]
    assert key not in shown
    assert key.hex().encode() not in shown


def test_a_log_that_does_not_go_back_so_far_says_where_it_begins(
    processes: Processes, tmp_path: Path
) -> None:
    """Asked for entries that are no longer held, ``log`` names the first that is."""
    primary = processes.primary(tmp_path / "a")
    processes.run("put", "--server", primary.address, "/a", "k", "v")
    processes.run("verify", "--server", primary.address, "--against", primary.address)  # takes a checkpoint
    processes.replica(tmp_path / "b", primary.address)
    wait_until(lambda: b'"running": true' in processes.run("status", tmp_path / "b", "--json").stdout)
    wait_until(lambda: json.loads(processes.run("status", tmp_path / "b", "--json").stdout)["checkpoint_lsn"])
    done = processes.run("log", tmp_path / "b", "--from", "1", code=ExitCode.USAGE)
    assert re.search(r"begins with LSN \d+", complaint(done))


# -- promotion and rewind --------------------------------------------------------------------------------------


def test_the_story_of_a_failover(processes: Processes, tmp_path: Path) -> None:
    """G1, G7: primary killed, replica promoted and started, old primary refused, rewound, and following again."""
    first = processes.primary(tmp_path / "a", "--durability", "replica")
    second = processes.replica(tmp_path / "b", first.address, "--id", "b")
    processes.run("put", "--server", first.address, "/inventory", "apple", "3")
    first.kill()

    promoted = json.loads(processes.run("promote", tmp_path / "b", "--json").stdout)
    assert list(promoted) == ["epoch", "lsn", "digest", "seconds", "durability"]
    assert promoted["epoch"] == 2
    assert second.wait() == ExitCode.DONE
    assert f"understudy primary --data-dir {tmp_path / 'b'}" in second.stderr

    refused = processes.run("replica", "--data-dir", tmp_path / "b", "--primary", "127.0.0.1:1", code=6)
    assert "understudy primary --data-dir" in complaint(refused)
    assert b"had been promoted before" in processes.run("promote", tmp_path / "b").stderr

    second = processes.primary(tmp_path / "b")
    assert processes.run("get", "--server", second.address, "/inventory", "apple").stdout == b"3"
    processes.run("put", "--server", second.address, "/inventory", "pear", "4")

    shown = processes.run("rewind", tmp_path / "a", "--to", second.address, "--id", "a", "--json").stdout
    rewound = json.loads(shown)
    assert rewound["common_lsn"] == promoted["lsn"] - 1
    first = processes.replica(tmp_path / "a", second.address, "--id", "a")
    nodes.wait_until_caught_up(second.address, first.address)
    at = ("--server", first.address, "/inventory", "pear")
    assert processes.run("scan", *at[:3]).stdout == b"apple\t3\npear\t4\n"
    refused = processes.run("put", *at, "5", code=ExitCode.DIRECTORY)
    assert "is a replica" in complaint(refused)


def test_a_role_that_does_not_fit_names_the_command_that_helps(processes: Processes, tmp_path: Path) -> None:
    """A replica's directory is refused by ``primary`` with ``promote``, a primary's by ``replica`` with ``rewind``."""
    primary = processes.primary(tmp_path / "a")
    replica = processes.replica(tmp_path / "b", primary.address)
    assert replica.terminate() == 0
    assert primary.terminate() == 0
    done = processes.run("primary", "--data-dir", tmp_path / "b", code=ExitCode.DIRECTORY)
    assert f"understudy promote {tmp_path / 'b'}" in complaint(done)
    done = processes.run(
        "replica", "--data-dir", tmp_path / "a", "--primary", "127.0.0.1:1", code=ExitCode.DIRECTORY
    )
    assert f"understudy rewind {tmp_path / 'a'}" in complaint(done)


def put_past_everything(store: Path, realm: str, key: bytes, value: bytes) -> None:
    """Changes a pair in a store that nobody has open, without a word to what keeps its digests."""
    environment = open_environment(store, readonly=False)
    try:
        with environment.env.begin(environment.data, write=True) as txn:
            row = txn.get(realm.encode(), db=environment.realms)
            assert row is not None
            prefix = realm_prefix(RealmRow.FromString(row).id)
            assert txn.replace(prefix + key, value) is not None
    finally:
        environment.close()


def test_comparing_two_nodes_names_the_realm_that_differs(processes: Processes, tmp_path: Path) -> None:
    """G11: ``verify --server --against`` finds equal nodes equal, and of a changed copy names the realm."""
    primary = processes.primary(tmp_path / "a")
    for realm in ("/sound", "/hurt"):
        processes.run("put", "--server", primary.address, realm, "key", "a value")
    replica = processes.replica(tmp_path / "b", primary.address)
    compare = ("verify", "--server", primary.address, "--against", replica.address)
    nodes.settle(primary.address)  # so that it takes no checkpoint that the replica would be behind
    nodes.wait_until_caught_up(primary.address, replica.address)
    equal = json.loads(processes.run(*compare, "--json").stdout)
    assert (equal["ok"], equal["problems"]) == (True, [])
    assert equal["realms_checked"] >= 2
    assert b"equal" in processes.run(*compare).stdout

    assert replica.terminate() == 0
    put_past_everything(tmp_path / "b" / "store", "/hurt", b"key", b"another value")
    replica = processes.replica(tmp_path / "b", primary.address)
    found = processes.run(*compare[:-1], replica.address, code=ExitCode.CORRUPT).stdout.decode()
    assert "realm /hurt differs" in found
    assert "realm /sound" not in found
    assert processes.run(*compare[:-1], replica.address, "--json", code=4).stdout.startswith(b'{"ok": false')


def test_nodes_of_two_clusters_are_not_compared(processes: Processes, tmp_path: Path) -> None:
    """Two servers that have nothing to do with each other are not called different, but foreign."""
    one, other = processes.primary(tmp_path / "one"), processes.primary(tmp_path / "other")
    done = processes.run(
        "verify", "--server", one.address, "--against", other.address, code=ExitCode.RESET_NEEDED
    )
    assert "cluster" in complaint(done)


def test_nodes_that_have_diverged_are_told_apart(processes: Processes, tmp_path: Path) -> None:
    """G3: of two histories, ``verify --server --against`` says which is of which epoch, and what they share.

    And what to do; before anything is scanned, in either order, and when both have reached the same LSN.
    """
    old = processes.primary(tmp_path / "a")
    processes.run("put", "--server", old.address, "/a", "key", "common")
    replica = processes.replica(tmp_path / "b", old.address)
    wait_until(lambda: json.loads(processes.run("status", tmp_path / "b", "--json").stdout)["lsn"] == 3)
    processes.run("promote", tmp_path / "b")
    assert replica.wait() == 0
    new = processes.primary(tmp_path / "b")  # LSN 4 begins epoch 2
    between = ("verify", "--server", old.address, "--against", new.address)
    said = complaint(processes.run(*between, code=ExitCode.RESET_NEEDED))
    assert "both primaries: they can share nothing beyond LSN 3, " in said
    assert f"stop {old.address}" in said
    for _ in range(2):
        processes.run("put", "--server", old.address, "/a", "key", "only here")
        for order in (between, (*between[:2], new.address, between[3], old.address)):
            said = complaint(processes.run(*order, code=ExitCode.RESET_NEEDED))
            assert "have diverged: they can share nothing beyond LSN 3, " in said
            assert f"{old.address} (primary, epoch 1, LSN " in said
            assert f"{new.address} (primary, epoch 2, LSN 4)" in said
            assert f"stop {old.address}" in said
            assert f"understudy rewind DIR --to {new.address}" in said
    assert old.terminate() == new.terminate() == 0


def test_copies_of_one_primary_that_went_on_have_diverged(processes: Processes, tmp_path: Path) -> None:
    """G3: two primaries of one epoch with other entries at one LSN are of two histories, not of a damaged one."""
    one = processes.primary(tmp_path / "a")
    processes.run("put", "--server", one.address, "/a", "key", "common")
    assert one.terminate() == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns("*.sock"))
    one, other = processes.primary(tmp_path / "a"), processes.primary(tmp_path / "b")
    for address, value in ((one.address, "one"), (other.address, "other")):
        processes.run("put", "--server", address, "/a", "key", value)
    at = ("verify", "--server", one.address, "--against", other.address)
    said = complaint(processes.run(*at, code=ExitCode.RESET_NEEDED))
    assert "have diverged: the last position known to be common is LSN 1, where epoch 1 began" in said
    assert "decide which one stays" in said


def test_the_node_that_is_not_reachable_is_named(processes: Processes, tmp_path: Path) -> None:
    """``verify --server --against`` with one of the two gone names that one, and ends with 5."""
    primary = processes.primary(tmp_path / "a")
    for order in ((primary.address, "127.0.0.1:1"), ("127.0.0.1:1", primary.address)):
        done = processes.run("verify", "--server", order[0], "--against", order[1], code=ExitCode.UNREACHABLE)
        assert "127.0.0.1:1 is not reachable" in complaint(done)
        assert primary.address not in complaint(done)


def test_a_node_that_is_behind_says_what_to_wait_for(tmp_path: Path) -> None:
    """A node that can't answer for the other's LSN yet is named, with its own words and what to do."""

    async def compare() -> None:
        settings = PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")
        async with serving_primary(settings) as primary, open_channel(primary.address) as channel:
            said = f"^{primary.address} can't be compared now: this node is at LSN 2, before 1000 [(]try again once"
            with pytest.raises(Unavailable, match=said):
                await _Node(primary.address, channel).digests(1000)

    asyncio.run(asyncio.wait_for(compare(), DEADLINE_S))


def in_folder(folder: Path) -> Launch:
    """Runs the command that is installed, with ``folder`` as its working directory."""

    def launch(arguments: list[str], environment: dict[str, str], stdout: Path, stderr: Path) -> Running:
        command = Path(sys.executable).with_name("understudy")
        with open(stdout, "wb") as out, open(stderr, "wb") as err:
            return subprocess.Popen(
                [command, *arguments],
                cwd=folder,
                stdout=out,
                stderr=err,
                env=environment,
                stdin=subprocess.DEVNULL,
            )

    return launch


def test_a_check_imports_nothing_from_where_the_server_runs(processes: Processes, tmp_path: Path) -> None:
    """A file in the server's working directory that is named as a module is never run by a check's process."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("random", "lmdb", "typing"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported from the working directory')\n")
    one = processes.primary(tmp_path / "a", launch=in_folder(folder))
    processes.run("put", "--server", one.address, "/a", "key", "value")
    shown = processes.run("verify", "--server", one.address, "--against", one.address).stdout
    assert b"equal" in shown


def test_a_rewind_with_nothing_to_do_says_so(processes: Processes, tmp_path: Path) -> None:
    """A replica's directory that is not ahead and not diverged has nothing to rewind, in plain words."""
    primary = processes.primary(tmp_path / "a")
    processes.run("put", "--server", primary.address, "/a", "key", "value")
    replica = processes.replica(tmp_path / "b", primary.address, "--id", "b")
    wait_until(lambda: json.loads(processes.run("status", tmp_path / "b", "--json").stdout)["lsn"] == 3)
    assert replica.terminate() == 0
    shown = processes.run("rewind", tmp_path / "b", "--to", primary.address, "--id", "b").stdout.decode()
    assert shown.startswith("nothing to rewind: ")


def test_a_rewind_says_under_which_name_log_is_kept(processes: Processes, tmp_path: Path) -> None:
    """Started as it says, the replica has that name, and no second one is left behind."""
    pair = nodes.Pair(processes, tmp_path)
    pair.primary.kill()
    processes.run("promote", pair.b)
    pair.replica.wait()
    new = processes.primary(pair.b)
    shown = processes.run("rewind", pair.a, "--to", new.address).stdout.decode()
    name = socket.gethostname()
    at = f"--primary {new.address} --id {name}"
    assert f"start it with: understudy replica --data-dir {pair.a} {at}\n" in shown
    assert f"understudy forget {name} --server {new.address}" in shown
    processes.replica(pair.a, new.address, "--id", name)
    assert {one.id for one in nodes.status(new.address).replicas} == {name}


# -- a primary that shall reign no more ------------------------------------------------------------------------


def test_g7_an_operator_fences_a_primary(processes: Processes, tmp_path: Path) -> None:
    """G7: ``fence`` ends a primary's reign while it runs and after a restart, and says how to bring it back."""
    primary = processes.primary(tmp_path / "a")
    replica = processes.replica(tmp_path / "b", primary.address)
    at = ("--server", primary.address)
    assert "not a primary" in complaint(
        processes.run("fence", "--server", replica.address, code=ExitCode.DIRECTORY)
    )
    processes.run("put", *at, "/a", "key", "value")
    shown = processes.run("fence", *at).stdout.decode()
    assert shown.startswith(f"fenced {primary.address} in epoch 1")
    assert "understudy rewind DIR --to HOST:PORT" in shown
    assert json.loads(processes.run("fence", *at, "--json").stdout) == {"epoch": 1}  # as often as one likes
    found = json.loads(processes.run("status", *at, "--json").stdout)
    assert found["role"] == "fenced"
    assert [warning for warning in found["warnings"] if "fenced by an operator" in warning]
    assert "has begun elsewhere" not in str(found)
    assert "is fenced" in complaint(
        processes.run("put", *at, "/a", "key", "other", code=ExitCode.RESET_NEEDED)
    )
    primary.kill()
    assert "rewind" in complaint(
        processes.run("primary", "--data-dir", tmp_path / "a", code=ExitCode.DIRECTORY)
    )


def test_g9_a_fence_that_is_not_on_disk_is_not_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G7, G9: on a full disk a primary takes no more writes, but says that a restart would not know; later it does."""

    async def ask(address: str) -> admin_pb2.FenceResponse:
        async with open_channel(address) as channel:
            with peer_errors(address):
                return await admin_pb2_grpc.AdminStub(channel).Fence(admin_pb2.FenceRequest(), timeout=60)

    def full(*_: object) -> None:
        raise DiskFull("no space left")

    async def fence() -> None:
        settings = PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")
        async with serving_primary(settings) as primary:
            with monkeypatch.context() as patch:
                patch.setattr(DataDirectory, "set_role", full)
                with pytest.raises(DiskFull, match="a restart would not remember it"):
                    await ask(primary.address)
                assert primary.node.is_fenced
            directory = primary.node.engine.directory
            await asyncio.to_thread(wait_until, lambda: directory.role is Role.FENCED)
            assert (await ask(primary.address)).epoch == 1

    asyncio.run(asyncio.wait_for(fence(), DEADLINE_S))


def test_one_primary_by_two_addresses_is_told(processes: Processes, tmp_path: Path) -> None:
    """``verify --server --against`` with two names of one primary is a mistake of usage, not two reigns."""
    primary = processes.primary(tmp_path / "a")
    other = primary.address.replace("127.0.0.1", "localhost")
    done = processes.run("verify", "--server", primary.address, "--against", other, code=ExitCode.USAGE)
    assert "are the same node" in complaint(done)


# -- replicas that will not come back --------------------------------------------------------------------------


def test_a_replica_that_will_not_come_back_is_forgotten(processes: Processes, tmp_path: Path) -> None:
    """G9: ``forget`` takes a replica's slot away while it is gone, durably, and says what it held.

    Not while it follows. A name that is not known is answered with those that are.
    """
    primary = processes.primary(tmp_path / "a", "--log-floor", "0")
    at = ("--server", primary.address)
    assert "none is known" in complaint(processes.run("forget", "b", *at, code=ExitCode.USAGE))
    replica = processes.replica(tmp_path / "b", primary.address, "--id", "b")
    wait_until_following(primary.address, "b")
    assert "connected" in complaint(processes.run("forget", "b", *at, code=ExitCode.FAILED))
    said = complaint(processes.run("forget", "c", *at, code=ExitCode.USAGE))
    assert "known are: b" in said
    assert "a primary" in complaint(
        processes.run("forget", "b", "--server", replica.address, code=ExitCode.DIRECTORY)
    )
    assert replica.terminate() == 0
    wait_until(lambda: not connected(processes, primary.address))
    for number in range(5):  # more than a segment, which is what is removed
        nodes.put(primary.address, "/a", (b"%d" % number, bytes(15 << 20)))
    nodes.checkpoint(primary.address)  # from here on the replica alone holds it
    forgotten = json.loads(processes.run("forget", "b", *at, "--json").stdout)
    assert list(forgotten) == ["id", "durable_lsn", "released_bytes"]
    assert (forgotten["id"], forgotten["durable_lsn"]) == ("b", 2)
    assert forgotten["released_bytes"] >= 60 << 20
    assert len(list((tmp_path / "a" / "log").glob("*.seg"))) == 2
    put_in_a_checkpoint(primary.address)
    wait_until(lambda: len(list((tmp_path / "a" / "log").glob("*.seg"))) == 1)
    primary.kill()
    assert json.loads(processes.run("status", tmp_path / "a", "--json").stdout)["replicas"] == []
    primary = processes.primary(tmp_path / "a")
    processes.replica(tmp_path / "b", primary.address, "--id", "b")  # after all
    wait_until(lambda: "b" in connected(processes, primary.address))


def test_what_forgetting_freed_is_said(processes: Processes, tmp_path: Path) -> None:
    """Without ``--json``, ``forget`` says in words how far the replica had got."""
    primary = processes.primary(tmp_path / "a")
    replica = processes.replica(tmp_path / "b", primary.address, "--id", "b")
    wait_until_following(primary.address, "b")
    assert replica.terminate() == 0
    wait_until(lambda: not connected(processes, primary.address))
    shown = processes.run("forget", "b", "--server", primary.address).stdout
    assert shown == b"forgot b, which had got to LSN 2: no log was kept for it alone\n"


def put_in_a_checkpoint(address: str) -> None:
    """Something that the next checkpoint has to write, and that checkpoint."""
    nodes.put(address, "/a", (b"more", b""))
    nodes.checkpoint(address)


def wait_until_following(address: str, replica_id: str) -> None:
    """Returns once the replica follows the primary at ``address``, which knows that the replica has everything."""

    def has_everything() -> bool:
        found = nodes.slot(address, replica_id)
        return found is not None and found.connected and not found.lag_entries

    wait_until(has_everything)


def connected(processes: Processes, address: str) -> list[str]:
    """The replicas that follow the primary at ``address``."""
    status = json.loads(processes.run("status", "--server", address, "--json").stdout)
    return [replica["id"] for replica in status["replicas"] if replica["connected"]]


def test_an_import_needs_a_primary(processes: Processes, tmp_path: Path) -> None:
    """Writing to a replica is refused at once, with what it is, instead of waiting for it to become a primary."""
    primary = processes.primary(tmp_path / "a")
    replica = processes.replica(tmp_path / "b", primary.address)
    done = processes.run("import", "--server", replica.address, "/a", "-", code=ExitCode.DIRECTORY)
    assert "is a replica" in complaint(done)
