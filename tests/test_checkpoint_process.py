"""The checkpoint process: real processes, signals, kills and a full disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from harness import wait_until
from store_helpers import Edit, Model, assert_equal, fill_disk, make_store, open_both, small_disk

from understudy.common import checkpoint_process
from understudy.common.checkpoint_process import Checkpointer, read_frame, write_frame
from understudy.common.errors import DiskFull, StorageFailed
from understudy.common.lmdb_check import check_structure
from understudy.common.store import Store
from understudy.common.store_check import check_state
from understudy.common.store_layout import history_key
from understudy.v1.store_pb2 import CheckpointHello, CheckpointResult


@contextlib.contextmanager
def checkpointing(path: Path) -> Iterator[Checkpointer]:
    """A checkpoint process for the store in ``path``, ended with the block."""
    checkpointer = Checkpointer()
    checkpointer.start(path, None)
    try:
        yield checkpointer
    finally:
        checkpointer.close()


def pid_of(checkpointer: Checkpointer) -> int:
    """The id of its process, which must have been started."""
    assert checkpointer.pid is not None
    return checkpointer.pid


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_jobs_are_written_and_seen(tmp_path: Path) -> None:
    """This process reads what the other one wrote as soon as the answer is there."""
    path = make_store(tmp_path)
    with Store.open(path) as store, checkpointing(path) as checkpointer:
        model = Model()
        for number in range(5):
            puts = {b"%d" % key: b"%d" % number for key in range(100)}
            model, job = model.step([Edit(path=f"/{number % 3}", puts=puts, changes=number + 1)])
            result = checkpointer.run([job])
            assert_equal(store.refresh(), model)
            assert result.checkpoint == store.current.checkpoint
            assert result.store_bytes == store.data_path.stat().st_size
            assert result.seconds > 0
            assert check_state(store).problems == []


def test_the_process_says_who_it_is(tmp_path: Path) -> None:
    """The handle knows the process's id and its LMDB's version."""
    with checkpointing(make_store(tmp_path)) as checkpointer:
        assert is_alive(pid_of(checkpointer))
        assert checkpointer.pid != os.getpid()
        assert checkpointer.lmdb_version == ".".join(map(str, lmdb.version(lib_version=0)))
        pid = pid_of(checkpointer)
    assert not is_alive(pid)


def test_it_imports_little(tmp_path: Path) -> None:
    """The process starts without gRPC, so that it starts at once and stays small."""
    with checkpointing(make_store(tmp_path)) as checkpointer:
        assert "grpc" not in Path(f"/proc/{checkpointer.pid}/maps").read_text()
        assert "lmdb" in Path(f"/proc/{checkpointer.pid}/maps").read_text()


def test_closing_is_for_every_moment(tmp_path: Path) -> None:
    """Closing before the start, twice, or after the process died is no error."""
    Checkpointer().close()
    checkpointer = Checkpointer()
    checkpointer.start(make_store(tmp_path), None)
    os.kill(pid_of(checkpointer), signal.SIGKILL)
    checkpointer.close()
    checkpointer.close()
    assert checkpointer.pid is None
    with pytest.raises(StorageFailed, match="no checkpoint process"):
        checkpointer.run([Model().step([])[1]])


def test_closing_lets_a_checkpoint_finish(tmp_path: Path) -> None:
    """Closing while a checkpoint is being written waits for it: its answer comes, and it is in the store."""
    path = make_store(tmp_path)
    model, job = Model().step([large_edit(0)])
    with checkpointing(path) as checkpointer:
        answers: list[CheckpointResult] = []
        begun = threading.Event()
        thread = threading.Thread(target=lambda: (begun.set(), answers.append(checkpointer.run([job]))))
        thread.start()
        begun.wait()
        wait_until(lambda: checkpointer._in_use.locked() or answers)
        checkpointer.close()
        thread.join()
        assert [answer.checkpoint.lsn for answer in answers] == [model.lsn]
    with Store.open(path) as store:
        assert_equal(store.current, model)


def test_a_missing_store_is_an_error_at_the_start(tmp_path: Path) -> None:
    """A process that can't open the store says why, and is gone."""
    checkpointer = Checkpointer()
    with pytest.raises(StorageFailed, match="there is no store"):
        checkpointer.start(tmp_path, None)
    assert checkpointer.pid is None


def test_a_process_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that ends at once, is not there, or never speaks is an error, and hangs nobody."""
    path = make_store(tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StorageFailed, match="exit code 1"):
        Checkpointer().start(path, None)
    monkeypatch.setattr(sys, "executable", "/none")
    with pytest.raises(StorageFailed, match="can't start"):
        Checkpointer().start(path, None)
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nread line\n")
    silent.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(silent))
    monkeypatch.setattr(checkpoint_process, "START_DEADLINE_S", 0.1)
    with pytest.raises(StorageFailed, match="did not start"):
        Checkpointer().start(path, None)


def test_ctrl_c_and_sigterm_are_for_the_parent_to_obey(tmp_path: Path) -> None:
    """SIGINT and SIGTERM, sent from the very first moment on, don't end the process."""
    path = make_store(tmp_path)
    done = threading.Event()
    with Store.open(path) as store:
        checkpointer = Checkpointer()
        thread = threading.Thread(target=_bother, args=(checkpointer, done))
        thread.start()
        try:
            checkpointer.start(path, None)
            model, job = Model().step([Edit(path="/r", puts={b"k": b"v"})])
            checkpointer.run([job])
        finally:
            done.set()
            thread.join()
            checkpointer.close()
        assert_equal(store.refresh(), model)


def _bother(checkpointer: Checkpointer, done: threading.Event) -> None:
    """Sends signals without a pause; through a descriptor, since a process id could be another's by then."""
    while (pid := checkpointer.pid) is None and not done.is_set():
        pass
    if pid is not None:
        process = os.pidfd_open(pid)
        with contextlib.suppress(ProcessLookupError):
            while not done.is_set():
                signal.pidfd_send_signal(process, signal.SIGINT)
                signal.pidfd_send_signal(process, signal.SIGTERM)
        os.close(process)


def test_the_directory_is_locked_until_the_process_is_gone(tmp_path: Path) -> None:
    """The lock that the server held stays held while its checkpoint process lives (G8)."""
    path = make_store(tmp_path)
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    checkpointer = Checkpointer()
    checkpointer.start(path, lock)
    os.close(lock)
    other = os.open(tmp_path / "lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    checkpointer.close()
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    """A server that is killed leaves no checkpoint process behind."""
    path = make_store(tmp_path)
    script = (
        "import sys; from pathlib import Path\n"
        "from understudy.common.checkpoint_process import Checkpointer\n"
        "checkpointer = Checkpointer(); checkpointer.start(Path(sys.argv[1]), None)\n"
        "print(checkpointer.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    wait_until(lambda: not is_alive(pid))


def test_a_job_that_is_cut_off_is_not_written(tmp_path: Path) -> None:
    """A parent that dies while it hands over a job leaves the store at the checkpoint before (G2)."""
    path = make_store(tmp_path)
    _, job = Model().step([large_edit(0)])
    checkpointer = Checkpointer()
    checkpointer.start(path, None)
    process = checkpointer._process
    assert process is not None
    assert process.stdin is not None
    write_frame(process.stdin, job.SerializeToString())
    checkpointer.close()
    assert process.returncode == 0
    with Store.open(path) as store:
        assert store.current.checkpoint.lsn == 0
        assert not list(store.current.realms())


def test_a_job_that_does_not_follow_leaves_the_process_running(tmp_path: Path) -> None:
    """A mistaken job is an error with its reason, and the next job is written."""
    path = make_store(tmp_path)
    with Store.open(path) as store, checkpointing(path) as checkpointer:
        model, job = Model().step([Edit(path="/r")])
        checkpointer.run([job])
        with pytest.raises(StorageFailed, match="at LSN 2 already"):
            checkpointer.run([job])
        model, job = model.step([Edit(path="/r")])
        checkpointer.run([job])
        assert_equal(store.refresh(), model)


def test_damage_ends_the_process(tmp_path: Path) -> None:
    """After an error of the store itself nothing more is written: the process ends, the reason is told (G11)."""
    path = make_store(tmp_path)
    model, job = Model().step([Edit(path="/r", changes=3, change_bytes=8 << 20)])
    with checkpointing(path) as checkpointer:
        checkpointer.run([job])
    environment, store = open_both(path)
    with store, environment.env.begin(environment.history, write=True) as txn:
        assert txn.delete(history_key(1, 1))
    with checkpointing(path) as checkpointer:
        _, job = model.step([Edit(path="/r", changes=6, change_bytes=8 << 20)])
        with pytest.raises(StorageFailed, match=r"history of realm /r has gaps.*make the copy anew"):
            checkpointer.run([job])
        wait_until(lambda: not is_alive(pid_of(checkpointer)))
        with pytest.raises(StorageFailed, match="ended with exit code 1"):
            checkpointer.run([job])


def test_an_idle_process_gives_its_memory_back(tmp_path: Path) -> None:
    """Some time after a job the store is unmapped, and the next job opens it again (G9)."""
    script = (
        "import sys; from pathlib import Path\n"
        "from understudy.common import checkpoint_process\n"
        "checkpoint_process.IDLE_S = 0.05\n"
        "sys.exit(checkpoint_process.main(Path(sys.argv[1])))"
    )
    path = make_store(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child, Store.open(path) as store:
        assert child.stdin is not None
        assert child.stdout is not None
        hello = read_frame(child.stdout)
        assert hello is not None
        assert CheckpointHello.FromString(hello).pid == child.pid
        model = Model()
        for _ in range(3):
            wait_until(lambda: "data.mdb" not in Path(f"/proc/{child.pid}/maps").read_text())
            model, job = model.step([Edit(path="/r", puts={b"k": b"v"})])
            write_frame(child.stdin, job.SerializeToString())
            write_frame(child.stdin, b"")
            child.stdin.flush()
            answer = read_frame(child.stdout)
            assert answer is not None
            assert CheckpointResult.FromString(answer).error == ""
            assert_equal(store.refresh(), model)
        child.stdin.close()


# -- kill -9 -----------------------------------------------------------------------------------------------


def large_edit(number: int) -> Edit:
    """A job that takes a good while: it touches every page of a realm."""
    chance = random.Random(number)
    return Edit(
        path=f"/{number % 2}",
        puts={b"%08d" % chance.randrange(40_000): b"%d" % number * 50 for _ in range(10_000)},
        ranges=((b"%08d" % (number * 1000), b"%08d" % (number * 1000 + 500)),),
        deletes=frozenset(),
        changes=2000,
    )


def test_a_killed_checkpoint_is_in_the_store_whole_or_not_at_all(tmp_path: Path, seed: int) -> None:
    """Killed at a random moment, again and again, the store opens at the old or the new checkpoint (G2)."""
    chance = random.Random(seed)
    path = make_store(tmp_path)
    model, taken_s, number = Model(), 0.5, 0
    outcomes: set[bool] = set()
    while number < 15 or len(outcomes) < 2:
        number += 1
        later, job = model.step([large_edit(number)])
        checkpointer = Checkpointer()
        checkpointer.start(path, None)
        answers: list[CheckpointResult] = []
        thread = threading.Thread(target=_run, args=(checkpointer, job, answers))
        begun = time.monotonic()
        thread.start()
        # The random moment; an answer that comes before it counts as well.
        thread.join(chance.uniform(0, 1.2 * taken_s))
        os.kill(pid_of(checkpointer), signal.SIGKILL)
        thread.join()
        taken_s = time.monotonic() - begun if answers else taken_s
        checkpointer.close()
        assert check_structure(path) == []
        with Store.open(path) as store:
            written = store.current.checkpoint.lsn == later.lsn
            assert written or not answers, "an answered checkpoint is gone"
            model = later if written else model
            if model.lsn:
                assert_equal(store.current, model)
            assert check_state(store).problems == []
        outcomes.add(written)


def _run(checkpointer: Checkpointer, job: object, answers: list[CheckpointResult]) -> None:
    try:
        answers.append(checkpointer.run([job]))  # type: ignore[arg-type]
    except StorageFailed as error:
        assert "signal 9" in str(error)  # noqa: PT017


def test_a_killed_process_is_named(tmp_path: Path) -> None:
    """A checkpoint process that somebody killed is reported with the signal, and with how to go on."""
    with checkpointing(make_store(tmp_path)) as checkpointer:
        os.kill(pid_of(checkpointer), signal.SIGKILL)
        wait_until(lambda: not is_alive(pid_of(checkpointer)))
        with pytest.raises(StorageFailed, match=r"ended with signal 9.*give the command again.*memory"):
            checkpointer.run([Model().step([])[1]])


# -- a full disk -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_bytes", [0, 200_000, 800_000])
def test_a_full_disk_changes_nothing_and_is_no_end(tmp_path: Path, left_bytes: int) -> None:
    """Without space a job is refused whole, however late it runs out; with space again the same job works (G9)."""
    with small_disk(tmp_path / "disk", size="12m") as disk:
        path = make_store(disk)
        with Store.open(path) as store, checkpointing(path) as checkpointer:
            model, job = Model().step(
                [Edit(path="/r", puts={b"%d" % key: bytes(1000) for key in range(1000)})]
            )
            checkpointer.run([job])
            later, job = model.step([Edit(path="/r", puts={b"%d" % key: bytes(1500) for key in range(1000)})])
            (disk / "spare").write_bytes(bytes(left_bytes))
            fill = fill_disk(disk)
            (disk / "spare").unlink()
            for _ in range(3):
                with pytest.raises(DiskFull, match="free some space"):
                    checkpointer.run([job])
                assert_equal(store.refresh(), model)
                assert check_state(store).problems == []
            fill.unlink()
            checkpointer.run([job])
            assert_equal(store.refresh(), later)
            assert check_state(store).problems == []
        assert check_structure(path) == []
        assert sorted(file.name for file in path.iterdir()) == ["data.mdb", "lock.mdb"]


def test_a_start_on_a_full_disk_says_so(tmp_path: Path) -> None:
    """A process that finds no room for its lock file is an error that passes, not a failure (G9)."""
    with small_disk(tmp_path / "disk", size="2m") as disk:
        path = make_store(disk)
        (path / "lock.mdb").unlink()
        fill = fill_disk(disk)
        with pytest.raises(DiskFull, match="free some space"):
            Checkpointer().start(path, None)
        fill.unlink()
        with checkpointing(path) as checkpointer:
            checkpointer.run([Model().step([Edit(path="/r")])[1]])
