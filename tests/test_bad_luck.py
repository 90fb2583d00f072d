"""Damaged files, full disks, kills and other things that happen to people: refused clearly or lived through."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from harness import Processes, as_program, wait_until
from killing import Nursery
from nodes import (
    DIRECTORY,
    Load,
    Pair,
    assert_equal,
    assert_sound,
    checkpoint,
    children,
    copy_node,
    is_alive,
    offline_status,
    pairs,
    put,
    status,
    try_checkpoint,
    wait_until_caught_up,
    warnings,
)

from understudy.client import Put, connect
from understudy.common.errors import DiskFull, ExitCode, OutcomeUnknown

MIB = 1 << 20
CLOCK_JUMP = Path(__file__).with_name("clock_jump.py")

# -- kills -----------------------------------------------------------------------------------------------------

ROUNDS = 8


def test_a_primary_killed_again_and_again_loses_nothing(
    processes: Processes, tmp_path: Path, seed: int
) -> None:
    """G1, G2, G6: kill -9 of a primary under load, in checkpoints too: all acknowledged is there, once, each time."""
    chance = random.Random(seed)
    primary = processes.primary(tmp_path / "a")
    address = primary.address
    with Load(address) as load:
        for _ in range(ROUNDS):
            load.wait_for(chance.randrange(1, 150))
            asking = threading.Thread(target=try_checkpoint, args=(address,))
            asking.start()
            load.wait_for(chance.randrange(1, 20))
            primary.kill()
            assert offline_status(tmp_path / "a").lsn >= load.highest_lsn
            asking.join()
            primary = processes.primary(tmp_path / "a", "--listen", address)
    assert load.errors == []
    load.check(address)
    assert primary.terminate() == 0
    assert_sound(tmp_path / "a")


def test_a_replica_killed_again_and_again_loses_nothing(
    processes: Processes, tmp_path: Path, seed: int
) -> None:
    """G1, G2: at level `replica`, what was acknowledged is on the killed replica each time, and both end equal."""
    chance = random.Random(seed)
    pair = Pair(processes, tmp_path, "--durability", "replica")
    address, replica = pair.primary.address, pair.replica
    with Load(address) as load:
        for _ in range(ROUNDS):
            load.wait_for(chance.randrange(1, 150))
            replica.kill()
            assert offline_status(pair.b).lsn >= load.highest_lsn
            replica = processes.replica(pair.b, address, "--id", "b")
    assert load.errors == []
    assert_equal(address, replica.address)
    load.check(replica.address)


def test_nothing_is_left_of_a_killed_primary(processes: Processes, tmp_path: Path) -> None:
    """The process that writes checkpoints ends with the one that it writes for, and the directory is free again."""
    primary = processes.primary(tmp_path / "a")
    (checkpointer,) = children(primary)
    primary.kill()
    wait_until(lambda: not is_alive(checkpointer))
    assert processes.primary(tmp_path / "a").address


def test_a_stopped_primary_finishes_what_it_took_in(processes: Processes, tmp_path: Path) -> None:
    """G1, G6: SIGTERM under load ends a primary with exit code 0, and its clients go on when it is back."""
    primary = processes.primary(tmp_path / "a")
    address = primary.address
    with Load(address) as load:
        load.wait_for(50)
        assert primary.terminate() == 0
        processes.primary(tmp_path / "a", "--listen", address)
        load.wait_for(50)
    assert load.errors == []
    load.check(address)


@pytest.mark.parametrize("role", ["primary", "replica"])
def test_a_second_signal_ends_a_server_at_once(processes: Processes, tmp_path: Path, role: str) -> None:
    """Ctrl-C after SIGTERM does not wait for anything, and leaves a directory that can be started again."""
    primary = processes.primary(tmp_path / "a")
    server = primary if role == "primary" else processes.replica(tmp_path / "b", primary.address)
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        server.send(number)  # stopped, so that both are there when it goes on
    assert server.wait() in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    if role == "primary":
        assert processes.primary(tmp_path / "a").address
    else:
        replica = processes.replica(tmp_path / "b", primary.address)
        assert_equal(primary.address, replica.address)


# -- damage ----------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_log_is_named(processes: Processes, tmp_path: Path) -> None:
    """G2, G11: a log that was damaged where it had been durable is refused, with segment, byte and LSN, and kept."""
    primary = processes.primary(tmp_path / "a")
    receipts = [put(primary.address, "/realm", (b"key", b"value number %d" % number)) for number in range(9)]
    assert primary.terminate() == 0
    (segment,) = (tmp_path / "a" / "log").glob("*.seg")
    data = bytearray(segment.read_bytes())
    at = data.index(b"value number 4")
    data[at] ^= 1
    segment.write_bytes(data)
    for arguments in (("primary", "--data-dir", tmp_path / "a"), ("verify", tmp_path / "a")):
        done = processes.run(*arguments, code=ExitCode.CORRUPT)
        said = (done.stdout + done.stderr).decode()
        found = re.search(rf"{re.escape(str(segment))}: entry (\d+), at byte (\d+), is damaged", said)
        assert found, said
        assert int(found[1]) == receipts[4].lsn
        assert at - 300 < int(found[2]) < at
    assert segment.read_bytes() == data


def test_a_torn_tail_is_cut_off(processes: Processes, tmp_path: Path, seed: int) -> None:
    """G1, G2: what a crash left behind the last whole batch is cut off, and everything acknowledged is there."""
    primary = processes.primary(tmp_path / "a")
    address = primary.address
    with Load(address) as load:
        load.wait_for(50)
        primary.kill()
        (segment,) = (tmp_path / "a" / "log").glob("*.seg")
        with open(segment, "r+b") as file:
            file.seek(len(file.read().rstrip(b"\0")) + 8)  # a digest may end with a zero or two
            file.write(random.Random(seed).randbytes(5_000))
        primary = processes.primary(tmp_path / "a", "--listen", address)
        load.wait_for(50)
    assert "log_tail_cut" in primary.stderr
    assert load.errors == []
    load.check(address)
    assert primary.terminate() == 0
    assert_sound(tmp_path / "a")


def test_a_missing_segment_is_named(processes: Processes, tmp_path: Path) -> None:
    """G2: a log with a hole in it is refused, with the place, and nothing is made of the rest."""
    primary = processes.primary(tmp_path / "a")
    with connect(primary.address) as server:
        for number in range(10):
            server.commit("/large", [Put(b"key", bytes([number]) * (15 * MIB))])
    assert primary.terminate() == 0
    segments = sorted((tmp_path / "a" / "log").glob("*.seg"))
    assert len(segments) == 3
    segments[1].unlink()
    done = processes.run("primary", "--data-dir", tmp_path / "a", code=ExitCode.CORRUPT)
    said = done.stderr.decode()
    assert f"{segments[0]}: ends at byte" in said
    assert f"a part of one is missing before LSN {int(segments[2].stem)}" in said
    assert str(segments[2]) in processes.run("verify", tmp_path / "a", code=ExitCode.CORRUPT).stdout.decode()


def test_a_flipped_bit_in_the_store_is_found(processes: Processes, tmp_path: Path) -> None:
    """G11: `verify` finds a value in LMDB that is not what was written, and names the realm."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/sound", (b"key", b"a value"))
    put(primary.address, "/hurt", (b"key", b"a value that is damaged soon"))
    checkpoint(primary.address)
    assert primary.terminate() == 0
    store = tmp_path / "a" / "store" / "data.mdb"
    data = bytearray(store.read_bytes())
    found = [match.start() for match in re.finditer(b"a value that is damaged soon", data)]
    for at in found:
        data[at] ^= 1  # in the data, and in the history, too
    store.write_bytes(data)
    shown = json.loads(processes.run("verify", tmp_path / "a", "--json", code=ExitCode.CORRUPT).stdout)
    assert not shown["ok"]
    assert "/hurt" in " ".join(shown["problems"])
    assert "/sound" not in " ".join(shown["problems"])


def test_a_flipped_bit_on_the_wire_is_asked_for_again(processes: Processes, tmp_path: Path) -> None:
    """G2, G11: damaged in a bootstrap range or in the stream, bytes are not used, and the replica ends equal."""
    word = b"comes by the proxy"
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", *((b"%d" % number, word * 10_000) for number in range(8)))
    checkpoint(primary.address)
    with FaultyProxy(primary.address, word) as proxy:
        proxy.flips_left = 2
        replica = processes.replica(tmp_path / "b", proxy.address)
        wait_until_caught_up(primary.address, replica.address)
        assert proxy.flips_left == 0
        assert "range_damaged" in replica.stderr
        proxy.flips_left = 1
        put(primary.address, "/realm", (b"streamed", word))
        assert_equal(primary.address, replica.address)
        assert proxy.flips_left == 0
        assert replica.stderr.count("event=following") == 2  # the stream, and the stream again
        assert replica.is_running
        replica.kill()


# -- directories -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped nodes: a primary in ``a`` and its replica in ``b``."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "processes").mkdir()
    processes = Processes(folder / "processes")
    try:
        pair = Pair(processes, folder)
        put(pair.primary.address, "/realm", (b"key", b"value"))
        wait_until_caught_up(pair.primary.address, pair.replica.address)
        pair.stop()
    finally:
        processes.close()
    return folder


NOBODY = "127.0.0.1:1"
COMMANDS = {
    "primary": ("primary", "--listen", "127.0.0.1:0", "--data-dir"),
    "replica": ("replica", "--listen", "127.0.0.1:0", "--primary", NOBODY, "--data-dir"),
    "promote": ("promote",),
    "rewind": ("rewind", "--to", NOBODY),
    "status": ("status",),
    "verify": ("verify",),
}
# Which role refuses which command, and the command that it is answered with.
REFUSALS = {
    "primary": {"replica": "rewind", "promote": "primary"},
    "replica": {"primary": "promote"},
    "fenced": {"primary": "rewind", "replica": "rewind", "promote": "rewind"},
    "promoting": {"primary": "promote", "replica": "promote", "rewind": "promote"},
    "empty": {"promote": "", "rewind": "replica", "primary": "promote"},
    "creating": {"replica": "primary", "promote": "", "rewind": ""},
}


@pytest.mark.parametrize("role", REFUSALS)
def test_a_command_that_does_not_fit_the_role_names_one_that_does(
    processes: Processes, tmp_path: Path, stopped: Path, nursery: Nursery, role: str
) -> None:
    """G4, G7: each role refuses each command that is not for it with exit code 6, and stays what it is."""
    path = copy_node(stopped / ("b" if role in ("replica", "empty") else "a"), tmp_path / "node")
    node = json.loads((path / "node.json").read_text())
    node |= {"role": "replica", "cluster": ""} if role == "empty" else {"role": role}
    (path / "node.json").write_text(json.dumps(node))
    for command, helps in REFUSALS[role].items():
        process = processes.start(*COMMANDS[command], path, launch=nursery.dying_at(0))
        assert process.wait() == DIRECTORY, process.describe()
        (said,) = [line for line in process.stderr.splitlines() if line.startswith("understudy: ")]
        assert str(path) in said
        assert not helps or re.search(rf"understudy {helps}\b", said), said
        assert json.loads((path / "node.json").read_text()) == node


@pytest.mark.parametrize("command", COMMANDS)
def test_a_directory_of_a_newer_version_is_left_alone(
    processes: Processes, tmp_path: Path, stopped: Path, nursery: Nursery, command: str
) -> None:
    """G4: whatever the command, a directory of a newer format is refused with exit code 6 and the format's number."""
    path = copy_node(stopped / "a", tmp_path / "node")
    node = json.loads((path / "node.json").read_text()) | {"format": 2}
    (path / "node.json").write_text(json.dumps(node))
    process = processes.start(*COMMANDS[command], path, launch=nursery.dying_at(0))
    assert process.wait() == DIRECTORY, process.describe()
    assert "written by a newer version of Understudy (format 2)" in process.stderr
    assert json.loads((path / "node.json").read_text()) == node


@pytest.mark.parametrize("command", COMMANDS)
def test_a_directory_that_is_not_ours_is_left_alone(
    processes: Processes, tmp_path: Path, nursery: Nursery, command: str
) -> None:
    """G4: whatever the command, somebody else's directory is refused with exit code 6, and nothing is put into it."""
    (tmp_path / "holiday.jpg").touch()
    process = processes.start(*COMMANDS[command], tmp_path, launch=nursery.dying_at(0))
    assert process.wait() == DIRECTORY, process.describe()
    assert "not a data directory of Understudy" in process.stderr.replace("and not", "not")
    assert [entry.name for entry in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_log_of_another_cluster_is_refused(processes: Processes, tmp_path: Path, stopped: Path) -> None:
    """G3: a directory whose parts come from two clusters is not started."""
    path = copy_node(stopped / "a", tmp_path / "node")
    other = processes.primary(tmp_path / "other")
    assert other.terminate() == 0
    shutil.rmtree(path / "log")
    shutil.copytree(tmp_path / "other" / "log", path / "log")
    done = processes.run("primary", "--data-dir", path, code=ExitCode.CORRUPT)
    assert "cluster" in done.stderr.decode()


def test_a_read_only_directory_is_refused(processes: Processes, tmp_path: Path, stopped: Path) -> None:
    """A data directory that can't be written to is refused with exit code 6, and said to be read-only."""
    path = copy_node(stopped / "a", tmp_path / "node")
    with _mounted("--bind", str(path), str(path)):
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        done = processes.run("primary", "--data-dir", path, code=DIRECTORY)
        assert f"can't use {path} as data directory: Read-only file system" in done.stderr.decode()


# -- time ------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_back_is_no_matter(processes: Processes, tmp_path: Path) -> None:
    """Entries never go back in time though the clock does, and lag is never negative, also after a restart."""
    flag = tmp_path / "an hour ago"
    jumping = as_program(CLOCK_JUMP, flag)
    primary = processes.primary(tmp_path / "a", "--durability", "replica", launch=jumping)
    replica = processes.replica(tmp_path / "b", primary.address, "--id", "b", launch=jumping)
    put(primary.address, "/realm", (b"key", b"before"))
    flag.touch()
    put(primary.address, "/realm", (b"key", b"after"))
    checkpoint(primary.address)
    wait_until_caught_up(primary.address, replica.address)
    primary.kill()
    primary = processes.primary(tmp_path / "a", "--listen", primary.address, launch=jumping)
    put(primary.address, "/realm", (b"key", b"after a restart"))
    assert_equal(primary.address, replica.address)
    assert all(one.lag_seconds >= 0 for one in status(primary.address).replicas)
    assert status(replica.address).upstream.lag_seconds >= 0
    primary.kill()
    processes.run("promote", tmp_path / "b")
    shown = processes.run("log", tmp_path / "b", "--json").stdout
    times = [json.loads(line)["time_us"] for line in shown.splitlines()]
    assert len(times) > 6
    assert times == sorted(times)


# -- full disks ------------------------------------------------------------------------------------------------


class SmallDisk:
    """A file system of its own, 48 MiB large."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, *, leaving: int) -> None:
        """Takes all space but so many bytes."""
        found = os.statvfs(self.path)
        with open(self._ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_bsize - leaving)

    def free(self) -> None:
        """Gives it back."""
        self._ballast.unlink()


@contextlib.contextmanager
def _mounted(*arguments: str) -> Iterator[None]:
    """With something mounted; the last argument is where. Skips the test where that is not allowed."""
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs to mount a file system, which is not allowed here: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", arguments[-1]], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk that is soon full. Ask for it before ``processes``, so that it goes after them."""
    path = tmp_path / "disk"
    path.mkdir()
    with _mounted("-t", "tmpfs", "-o", "size=48m", "tmpfs", str(path)):
        yield SmallDisk(path)


def test_a_full_disk_stops_writes_and_loses_nothing(small_disk: SmallDisk, processes: Processes) -> None:
    """G9: with no space for the log, writes are refused as such; with space, they and those under way go on."""
    path = small_disk.path / "a"
    primary = processes.primary(path)
    address = primary.address
    small_disk.fill(leaving=3 * MIB)
    acknowledged = {}
    with connect(address) as server:
        values = ((b"%03d" % number, bytes([number]) * 100_000) for number in itertools.count())
        unknown = 0
        while not unknown:
            key, value = next(values)
            try:
                server.commit("/realm", [Put(key, value)], timeout_s=5)
                acknowledged[key] = value
            except OutcomeUnknown as error:
                unknown = error.number
        wait_until(lambda: "no space left" in warnings(address))
        assert len(acknowledged) > 5
        with pytest.raises(DiskFull, match=f"no space left in {path}"):
            server.commit("/realm", [Put(b"refused", b"")])
        assert pairs(address, "/realm") == acknowledged
        small_disk.free()
        server.wait(unknown)
        wait_until(lambda: "no space" not in warnings(address))
        server.commit("/realm", [Put(b"last", b"one")])
    acknowledged |= {key: value, b"last": b"one"}
    assert pairs(address, "/realm") == acknowledged
    primary.kill()
    assert_sound(path)
    processes.primary(path, "--listen", address)
    assert pairs(address, "/realm") == acknowledged


def test_a_full_disk_holds_up_a_checkpoint_and_loses_nothing(
    small_disk: SmallDisk, processes: Processes
) -> None:
    """G9: with no space for a checkpoint, writes are refused until there is; then it is made and they go on."""
    path = small_disk.path / "a"
    primary = processes.primary(path)
    address = primary.address
    values = {b"%03d" % number: bytes([number]) * 100_000 for number in range(50)}
    put(address, "/realm", *values.items())
    small_disk.fill(leaving=MIB // 2)
    asking = threading.Thread(target=try_checkpoint, args=(address,))
    asking.start()
    wait_until(lambda: "no space left" in warnings(address))
    assert status(address).checkpoint_lsn == 0
    with connect(address) as server:
        with pytest.raises(DiskFull):
            server.commit("/realm", [Put(b"refused", b"")])
        assert pairs(address, "/realm") == values
        small_disk.free()
        wait_until(lambda: status(address).checkpoint_lsn > 0)
        server.commit("/realm", [Put(b"last", b"one")])
    asking.join()
    assert pairs(address, "/realm") == values | {b"last": b"one"}
    assert primary.terminate() == 0
    assert_sound(path)


def test_a_full_disk_holds_up_a_replica_and_loses_nothing(
    small_disk: SmallDisk, processes: Processes, tmp_path: Path
) -> None:
    """G9: with no space for its copy or for its log a replica says so and waits; with space, it ends equal."""
    primary = processes.primary(tmp_path / "a")
    address = primary.address
    put(address, "/realm", *((b"%03d" % number, bytes([number]) * 100_000) for number in range(100)))
    checkpoint(address)
    small_disk.fill(leaving=5 * MIB)
    replica = processes.replica(small_disk.path / "b", address)
    wait_until(lambda: "no space left" in warnings(replica.address), what=replica.describe)
    small_disk.free()
    assert_equal(address, replica.address)
    small_disk.fill(leaving=MIB // 4)
    put(address, "/realm", *((b"%03d" % number, bytes(100_000)) for number in range(40)))
    wait_until(lambda: "no space left" in warnings(replica.address), what=replica.describe)
    small_disk.free()
    assert_equal(address, replica.address)
    assert replica.is_running


def test_a_primary_that_finds_no_space_to_begin_can_begin_later(
    small_disk: SmallDisk, processes: Processes
) -> None:
    """G9: a first start on a full disk says so, and the next one makes the same directory a primary's."""
    small_disk.fill(leaving=MIB // 4)
    path = small_disk.path / "a"
    done = processes.run("primary", "--data-dir", path, "--listen", "127.0.0.1:0", code=ExitCode.FAILED)
    assert "no space left" in done.stderr.decode()
    small_disk.free()
    primary = processes.primary(path)
    put(primary.address, "/realm", (b"key", b"value"))
