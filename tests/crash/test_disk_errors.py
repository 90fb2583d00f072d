"""Each call with which a node changes its files fails once: the node says so, ends if it must, and loses nothing."""

from __future__ import annotations

import contextlib
import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path
from random import Random

import pytest
from harness import Launch, Process, Processes, wait_until
from killing import Nursery
from nodes import assert_equal, assert_sound, checkpoint, offline_status, status, try_checkpoint

from crash.clients import Notes, transaction
from crash.disk_errors import Call, check_strace, failing, has_failed, noted_calls, noting
from crash.history import Outcome
from crash.ledger import REALMS, Ledger
from crash.tally import Tally
from understudy.client import Put, Server, connect
from understudy.common.errors import ExitCode, OutcomeUnknown, UnderstudyError

_TRANSACTIONS = 2
_LARGE = b"v" * (3 << 19)  # more than what is filled with zeros ahead, so that the log has to go on filling
_ANSWER_S = 1.0
_PATIENCE_S = 5.0
_END_S_MAX = 30.0
# With which a node may end whose disk fails: before it has its directory it can't use that; later it has failed.
_ENDS = (ExitCode.FAILED, ExitCode.DIRECTORY)


class _Story(ABC):
    """A node that is started on an errant disk, used, stopped if it still runs, and started on a sound one."""

    durability: str

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        (folder / "processes").mkdir(parents=True)
        self.folder = folder
        self.errant = folder / "errant"
        self.notes = Notes()
        self.processes = Processes(folder / "processes")
        self.sound: Launch = nursery.dying_at(0)

    def run(self, launch: Launch) -> None:
        """From beginning to end; ``launch`` starts the node whose disk is errant."""
        process = self.start(launch)
        wait_until(lambda: " ready on " in process.stdout or not process.is_running)
        if process.is_running:
            self._use(process)
        self._end(process)
        self.recover()

    @abstractmethod
    def start(self, launch: Launch) -> Process:
        """The node on the errant disk, not waited for."""

    @property
    @abstractmethod
    def address(self) -> str:
        """The primary's."""

    @abstractmethod
    def recover(self) -> None:
        """Starts it on a sound disk and checks everything."""

    def tries_again(self, process: Process) -> bool:
        """Whether it may go on without answering, because it says what fails and tries that again and again."""
        return False

    def _use(self, process: Process) -> None:
        with contextlib.suppress(UnderstudyError), connect(self.address) as server:
            for _ in range(2):
                for realm in REALMS:
                    for number in range(_TRANSACTIONS):
                        self._commit(server, realm, process, large=number == 1)
                        if self.tries_again(process):
                            return
                try_checkpoint(self.address)

    def _commit(self, server: Server, realm: str, process: Process, *, large: bool) -> None:
        """One transaction; its outcome stays unknown only where the node has ended, or says what it tries again."""
        label, started_s = self.notes.new_label("client"), time.monotonic()
        operations = [*transaction(label), *([Put(b"large", _LARGE)] if large else [])]
        outcome, receipt, number = Outcome.UNKNOWN, None, 0
        while receipt is None and outcome is Outcome.UNKNOWN and process.is_running:
            waited_s = time.monotonic() - started_s
            if waited_s > _PATIENCE_S and self.tries_again(process):
                break
            assert waited_s < _END_S_MAX, "it neither answers nor ends"
            try:
                if number:
                    receipt = server.wait(number, timeout_s=_ANSWER_S)
                else:
                    receipt = server.commit(
                        realm, operations, durability=self.durability, timeout_s=_ANSWER_S
                    )
                outcome = Outcome.ACKNOWLEDGED
            except OutcomeUnknown as error:
                number = error.number
            except UnderstudyError:
                outcome = Outcome.REFUSED
        self.notes.note(realm, label, started_s, outcome, receipt)

    def _end(self, process: Process) -> None:
        """It has ended with an exit code that says so, or goes on until it is told to end."""
        codes = {*_ENDS}
        if process.is_running:
            process.terminate()
            codes.add(ExitCode.DONE)  # or not: what it writes at its end can fail, too
        assert process.wait() in codes, process.describe()
        assert "internal error" not in process.stderr, process.describe()
        if process.wait() != ExitCode.DONE:
            assert process.stderr.splitlines()[-1].startswith("understudy: "), process.describe()

    def _check(self) -> None:
        ledger = Ledger()
        ledger.read(self.primary_directory, upto=status(self.address).durable_lsn)
        self.notes.check(ledger.realms)

    @property
    @abstractmethod
    def primary_directory(self) -> Path:
        """The primary's data directory."""


class _ErrantPrimary(_Story):
    durability = "local"

    def start(self, launch: Launch) -> Process:
        self._process = self.processes.start(*self._command, launch=launch)
        return self._process

    @property
    def _command(self) -> tuple[str | Path, ...]:
        return "primary", "--data-dir", self.errant, "--listen", "127.0.0.1:0"

    @property
    def address(self) -> str:
        return self._process.address

    @property
    def primary_directory(self) -> Path:
        return self.errant

    def recover(self) -> None:
        process = self.start(self.sound)
        with connect(self.address) as server:
            self._commit(server, REALMS[0], process, large=False)
        self._check()
        assert process.terminate() == 0
        assert_sound(self.errant)


class _ErrantReplica(_Story):
    durability = "replica"

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        super().__init__(folder, nursery)
        self._primary = self.processes.primary(self.primary_directory, launch=self.sound)
        with connect(self.address) as server:
            server.commit("/before", [Put(b"key", b"value")])
        checkpoint(self.address)

    def start(self, launch: Launch) -> Process:
        arguments = ("--primary", self.address, "--listen", "127.0.0.1:0", "--id", "b")
        return self.processes.start("replica", "--data-dir", self.errant, *arguments, launch=launch)

    def tries_again(self, process: Process) -> bool:
        # Of a copy that is being made nothing was promised yet. Each attempt syncs in a thread of its own, and strace
        # counts anew for each.
        return (
            any("event=not_following" in line and "/incoming" in line for line in process.stderr.splitlines())
            and not (self.errant / "log").exists()
        )

    @property
    def address(self) -> str:
        return self._primary.address

    @property
    def primary_directory(self) -> Path:
        return self.folder / "primary"

    def recover(self) -> None:
        if self.notes.highest_lsn:
            assert offline_status(self.errant).lsn >= self.notes.highest_lsn
        replica = self.start(self.sound)
        with connect(self.address) as server:
            self._commit(server, REALMS[0], replica, large=False)
        assert_equal(self.address, replica.address)
        self._check()
        for process in (replica, self._primary):
            assert process.terminate() == 0
        assert_sound(self.errant)


def _run(story: type[_Story], folder: Path, nursery: Nursery, launch: Launch) -> None:
    running = story(folder, nursery)
    try:
        running.run(launch)
    except BaseException:
        running.processes.close()  # and print what they logged
        raise


def _all_calls(story: type[_Story], folder: Path, nursery: Nursery) -> list[Call]:
    output = folder.with_suffix(".calls")
    _run(story, folder, nursery, noting(output))
    shutil.rmtree(folder)
    return noted_calls(output, folder / "errant")


@pytest.mark.parametrize("story", [_ErrantPrimary, _ErrantReplica], ids=["primary", "replica"])
def test_whichever_call_fails_nothing_acknowledged_is_lost(
    tmp_path: Path,
    nursery: Nursery,
    seed: int,
    seconds: float,
    is_thorough: bool,
    tally: Tally,
    story: type[_Story],
) -> None:
    """G1, G2, G9: an I/O error or a full disk at any call: no false acknowledgement, a clear end, a full recovery."""
    check_strace()
    calls = _all_calls(story, tmp_path / "first", nursery)
    cases = [(call, error) for call in calls for error in ("EIO", "ENOSPC")]
    Random(seed).shuffle(cases)
    until_s = time.monotonic() + seconds
    for number, (call, error) in enumerate(cases):
        if not is_thorough and time.monotonic() > until_s:
            break
        print(f"{error} at {call}")
        folder, output = tmp_path / f"{number}", tmp_path / f"{number}.calls"
        _run(story, folder, nursery, failing(call, folder / "errant", error, output))
        tally.add("failed calls" if has_failed(output) else "calls that did not come this time")
        shutil.rmtree(folder)
        output.unlink()
    tally.add("in all", len(cases))
