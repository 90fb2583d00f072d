"""The process that writes checkpoints, and the parent's handle on it.

py-lmdb gives up the interpreter's lock and takes it again at each row. Beside a busy thread every row waits for
that thread's time slice: 20,000 rows took 10 s, alone 0.03 s. So the rows are written where nothing else runs.

The child reads jobs from its standard input and answers on its standard output, each message with its length
before it (u64, little-endian): first ``CheckpointHello``, then one ``CheckpointResult`` for each
``CheckpointJob``. It ends when its input does: when the parent closes it or dies. Until then it holds the data
directory's lock, so that nobody opens the directory under an unfinished checkpoint.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import lmdb

from understudy.common.checkpoint import JobRefused, apply_checkpoint
from understudy.common.errors import DiskFull, StorageFailed, UnderstudyError
from understudy.common.store_layout import Environment, open_environment
from understudy.v1.store_pb2 import CheckpointHello, CheckpointJob, CheckpointResult

# Reading the interpreter and its modules from a cold disk takes seconds; a minute means that it hangs.
START_DEADLINE_S = 60.0
# A checkpoint under way ends within seconds. One that does not is cut off; the store stays at the one before.
CLOSE_DEADLINE_S = 60.0
# From the end of its output to its own end the process has nothing left to do.
_END_DEADLINE_S = 10.0
# Checkpoints follow each other faster than this while the server has work to do.
IDLE_S = 10.0
# A job is a memtable, 32 MiB and one transaction; a length beyond this is no length.
_FRAME_BYTES_MAX = 1 << 30

# Of what it was to write, nothing or all is in the store.
_START_AGAIN = (
    "give the command again: a server starts with all it had acknowledged, a restore goes on or begins anew"
)

_END_OF_JOB = b""

_LENGTH = struct.Struct("<Q")
_PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def write_frame(file: IO[bytes], data: bytes) -> None:
    """Writes one message with its length before it; the caller flushes."""
    file.write(_LENGTH.pack(len(data)))
    file.write(data)


def read_frame(file: IO[bytes]) -> bytes | None:
    """The next message, or None when the stream ended, be it in the middle of one.

    Raises:
        StorageFailed: what comes is not a message.
    """
    header = file.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    if length > _FRAME_BYTES_MAX:
        raise StorageFailed(f"a message of {length} bytes between server and checkpoint process")
    data = file.read(length)
    return data if len(data) == length else None


# -- the parent's side -------------------------------------------------------------------------------------


class Checkpointer:
    """Starts the checkpoint process and hands it jobs, one at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._in_use = threading.Lock()
        self.lmdb_version = ""

    def start(self, store: Path, lock_fd: int | None) -> None:
        """Starts the process and waits until it has the store open.

        Args:
            store: the directory ``store/``.
            lock_fd: the descriptor that the data directory's lock is held through, if it is.

        Raises:
            DiskFull: no room for LMDB's lock file.
            StorageFailed: it did not start, or can't open the store.
        """
        self._process = process = _spawn(store, lock_fd)
        try:
            hello = CheckpointHello.FromString(_answer(process, START_DEADLINE_S))
            if hello.error:
                raise (DiskFull if hello.disk_full else StorageFailed)(hello.error)
        except BaseException:
            self.close()
            raise
        self.lmdb_version = hello.lmdb_version

    @property
    def pid(self) -> int | None:
        """The process id, or None where none was started."""
        return self._process.pid if self._process else None

    def run(self, parts: Iterable[CheckpointJob]) -> CheckpointResult:
        """Writes a checkpoint; blocks until it is durable.

        Args:
            parts: of one job; see :func:`understudy.common.checkpoint.apply_checkpoint`.

        Raises:
            DiskFull: nothing was changed; trying the same job again can help.
            StorageFailed: it can't be known what is in the store; the server must end. When it starts again, the
                store is at this checkpoint or at the one before.
        """
        with self._in_use:
            process = self._process
            if process is None or process.stdin is None:
                raise StorageFailed("there is no checkpoint process")
            try:
                for part in parts:
                    write_frame(process.stdin, part.SerializeToString())
                write_frame(process.stdin, _END_OF_JOB)
                process.stdin.flush()
            except BrokenPipeError as error:
                raise _ended(process) from error
            result = CheckpointResult.FromString(_answer(process, None))
        if result.error:
            raise (DiskFull if result.disk_full else StorageFailed)(result.error)
        return result

    def close(self) -> None:
        """Lets a checkpoint under way finish, then ends the process; may be called at any time, and again."""
        process = self._process
        if process is None:
            return
        idle = self._in_use.acquire(timeout=CLOSE_DEADLINE_S)
        try:
            if idle and process.stdin is not None:
                with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
                    process.stdin.close()
                    process.wait(CLOSE_DEADLINE_S)
            process.kill()
            process.wait()
            if idle and process.stdout is not None:
                process.stdout.close()
            self._process = None
        finally:
            if idle:
                self._in_use.release()


def _spawn(store: Path, lock_fd: int | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", __name__, os.fspath(store)]
    # The child must find the modules that this process found, wherever an application has them from.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Ctrl-C goes to the whole foreground group; until the child ignores it, it inherits that it is blocked.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS_SIGNALS)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            pass_fds=() if lock_fd is None else (lock_fd,),
        )
    except OSError as error:
        raise StorageFailed(f"can't start the checkpoint process: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _answer(process: subprocess.Popen[bytes], deadline_s: float | None) -> bytes:
    assert process.stdout is not None
    if deadline_s is not None:
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        if not poll.poll(deadline_s * 1000):
            raise StorageFailed(f"the checkpoint process did not start within {deadline_s:.0f} s")
    data = read_frame(process.stdout)
    if data is None:
        raise _ended(process)
    return data


def _ended(process: subprocess.Popen[bytes]) -> StorageFailed:
    try:
        code = process.wait(_END_DEADLINE_S)
    except subprocess.TimeoutExpired:
        return StorageFailed("the checkpoint process does not answer any more", remedy=_START_AGAIN)
    how = f"signal {-code}" if code < 0 else f"exit code {code}, for a reason that it wrote to standard error"
    remedy = _START_AGAIN
    if code == -signal.SIGKILL:
        remedy += "; if nobody killed it, the kernel did so since memory ran out: leave it more"
    return StorageFailed(f"the checkpoint process ended with {how}", remedy=remedy)


# -- the child's side --------------------------------------------------------------------------------------


def main(store: Path) -> int:
    """Writes checkpoints until standard input ends; returns the exit code."""
    for number in _PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PARENTS_SIGNALS)
    # A job makes some 100,000 objects and not one cycle; looking for cycles took longer than finding the rows.
    gc.disable()
    frames, answers = os.fdopen(0, "rb", closefd=False), _take_standard_output()
    with contextlib.suppress(BrokenPipeError), _Writer(store) as writer:
        write_frame(answers, writer.hello().SerializeToString())
        answers.flush()
        with contextlib.suppress(_StreamEnded):
            while not writer.failed and _job_comes(frames, writer):
                result = writer.write(_parts(frames))
                write_frame(answers, result.SerializeToString())
                answers.flush()
        return 1 if writer.failed else 0
    return 0  # the parent died, and nobody wants the answer


def _take_standard_output() -> IO[bytes]:
    """Standard output for messages only: what a library prints goes to standard error instead."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


class _StreamEnded(Exception):
    """The parent died in the middle of a job."""


def _job_comes(frames: io.BufferedReader, writer: _Writer) -> bool:
    """Waits for the next job; False when the stream has ended."""
    poll = select.poll()
    poll.register(frames, select.POLLIN)
    if not poll.poll(IDLE_S * 1000):
        writer.close()
    return bool(frames.peek(1))


def _parts(frames: IO[bytes]) -> Iterator[CheckpointJob]:
    """The next job's parts, as they come.

    Raises:
        _StreamEnded: before the end of the job.
    """
    while (frame := read_frame(frames)) != _END_OF_JOB:
        if frame is None:
            raise _StreamEnded
        yield CheckpointJob.FromString(frame)


class _Writer:
    """The store, open from a job until there was none for a while.

    LMDB keeps the memory of all pages that it ever changed in one transaction, up to 250 MiB, for the next one:
    under load that is a gain, at rest a waste.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._environment: Environment | None = None
        self.failed = False  # the store must not be written to any more

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the store; the next job opens it again."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None

    def _open(self) -> Environment:
        self._environment = self._environment or open_environment(self._path, readonly=False)
        return self._environment

    def hello(self) -> CheckpointHello:
        """What the parent hears first."""
        hello = CheckpointHello(pid=os.getpid(), lmdb_version=".".join(map(str, lmdb.version())))
        try:
            self._open()
        except UnderstudyError as error:
            hello.error, hello.disk_full = str(error), isinstance(error, DiskFull)
            self.failed = True
        return hello

    def write(self, parts: Iterator[CheckpointJob]) -> CheckpointResult:
        """Writes one checkpoint; returns the answer."""
        try:
            return apply_checkpoint(self._open(), parts)
        except (DiskFull, JobRefused) as error:
            return CheckpointResult(error=str(error), disk_full=isinstance(error, DiskFull))
        except UnderstudyError as error:
            self.failed = True
            return CheckpointResult(error=str(error))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
