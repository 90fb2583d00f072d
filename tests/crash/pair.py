"""A primary and its replica on two machines, each with an address for good, and all that can happen to them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from harness import ANY_PORT, DEADLINE_S, Launch, Process, Processes, wait_until
from killing import Nursery
from nodes import (
    assert_equal,
    assert_sound,
    offline_status,
    status,
    try_checkpoint,
    wait_until_caught_up,
)

from crash.clients import Clients
from crash.ledger import Ledger
from crash.machines import Machine, let_run
from crash.tally import Tally
from understudy.client import connect, peers
from understudy.common.errors import ExitCode

_BEFORE_A_CRASH_MAX = 150  # transactions
_CHECKPOINT_CHANCE = 0.5
_STUMBLE_CHANCE = 0.2
_STUMBLE_S_MAX = 0.3


@dataclass
class Node:
    """A machine with the address that its node always has, and the process that runs there."""

    name: str
    machine: Machine
    address: str
    process: Process | None = None

    @property
    def running(self) -> Process:
        """The process that should be there."""
        assert self.process is not None
        return self.process


class CrashingPair:
    """Two nodes, of which one is the primary and the other its replica; which is which changes.

    Args:
        durability: the server's level; at ``local`` there must be no failover, which may lose what is acknowledged.
    """

    def __init__(
        self,
        processes: Processes,
        nursery: Nursery,
        machines: tuple[Machine, Machine],
        chance: Random,
        tally: Tally,
        *,
        durability: str,
    ) -> None:
        self._processes = processes
        self._launch: Launch = nursery.dying_at(0)  # never: it is the nursery's quick start that is wanted
        self._chance = chance
        self._tally = tally
        self._durability = durability
        self.ledger = Ledger()
        self.primary, self.replica = (
            Node(name, machine, ANY_PORT) for name, machine in zip("ab", machines, strict=True)
        )
        self._start_primary()
        self._start_replica()
        self._caught_up()

    @property
    def addresses(self) -> str:
        """Both."""
        return ",".join(sorted((self.primary.address, self.replica.address)))

    # -- what happens ------------------------------------------------------------------------------------------

    def go_through(self, clients: Clients) -> None:
        """A crash of some kind under load, and everything in order again."""
        clients.wait_for(self._chance.randrange(1, _BEFORE_A_CRASH_MAX))
        with self._checkpoint_under_way():
            clients.wait_for(self._chance.randrange(1, 20))
            self._chance.choice(self._kinds)(clients)
        self._tally.add("rounds")
        self._caught_up()
        clients.wait_for(1)

    @property
    def _kinds(self) -> list[Callable[[Clients], None]]:
        kinds: list[Callable[[Clients], None]] = [self._lose_primary, self._lose_replica, self._lose_both]
        return kinds if self._durability == "local" else [*kinds, self._fail_over, self._fail_over]

    def _lose_primary(self, clients: Clients) -> None:
        self._crash(self.primary)
        self._check_kept(self.primary, clients)
        self._start_primary()

    def _lose_replica(self, clients: Clients) -> None:
        self._crash(self.replica)
        if self._durability != "local":
            self._check_kept(self.replica, clients)
        self._start_replica()

    def _lose_both(self, clients: Clients) -> None:
        self._crash(*self._chance.sample([self.primary, self.replica], 2))
        self._check_kept(self.primary, clients)
        self._start_primary()
        self._start_replica()

    def _fail_over(self, clients: Clients) -> None:
        old, new = self.primary, self.replica
        self._crash(old, *([new] if self._chance.random() < 0.5 else []))
        if new.process is None:
            self._check_kept(new, clients)
        self._command("promote", new.machine.directory)
        if new.process is not None:
            assert new.process.wait() == 0, new.process.describe()
        self.primary, self.replica = new, old
        self._start_primary()
        self._tally.add("failovers")
        if self._chance.random() < 0.7:
            self._come_back_as_primary(old)
        self._command("rewind", old.machine.directory, "--to", new.address, "--id", old.name)
        self._start_replica()

    def _come_back_as_primary(self, old: Node) -> None:
        """The old primary does not know what has happened, until a client tells it."""
        self._start(old, "primary", *self._as_primary)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(peers, "_SURVEY_S_MAX", DEADLINE_S)  # however slow they are, both are heard
            with connect(self.addresses) as client:
                assert client.status().epoch == status(self.primary.address).epoch
        wait_until(lambda: status(old.address).role == "fenced", what=old.running.describe)
        self._crash(old)
        refused = self._processes.start("primary", "--data-dir", old.machine.directory, launch=self._launch)
        assert refused.wait() == ExitCode.DIRECTORY, refused.describe()
        self._tally.add("old primaries fenced")

    # -- steps -------------------------------------------------------------------------------------------------

    def _crash(self, *nodes: Node) -> None:
        for node in nodes:
            node.machine.crash(node.running)
            node.process = None
            self._tally.add(node.machine.crash_name)

    def _start_primary(self) -> None:
        self._start(self.primary, "primary", *self._as_primary)

    @property
    def _as_primary(self) -> tuple[str, ...]:
        return ("--durability", self._durability)

    def _start_replica(self) -> None:
        self._start(self.replica, "replica", "--primary", self.primary.address, "--id", self.replica.name)

    def _start(self, node: Node, role: str, *flags: str) -> None:
        arguments: tuple[str | Path, ...] = (role, "--data-dir", node.machine.directory)
        arguments += ("--listen", node.address, *flags)
        if self._chance.random() < _STUMBLE_CHANCE:
            node.process = self._processes.start(*arguments, launch=self._launch)
            let_run(node.process, self._chance.random() * _STUMBLE_S_MAX)
            self._crash(node)
        node.process = self._processes.start(*arguments, launch=self._launch)
        node.address = node.process.address  # a free one the first time, and the same from then on

    def _command(self, *arguments: str | Path) -> None:
        done = self._processes.start(*arguments, launch=self._launch)
        assert done.wait() == 0, done.describe()

    @contextlib.contextmanager
    def _checkpoint_under_way(self) -> Iterator[None]:
        """Now and then, so that crashes meet checkpoints, too."""
        if self._chance.random() >= _CHECKPOINT_CHANCE:
            yield
            return
        asking = threading.Thread(target=try_checkpoint, args=(self.primary.address,))
        asking.start()
        yield
        asking.join()

    def _check_kept(self, node: Node, clients: Clients) -> None:
        """What was acknowledged is in the log that the crash has left (G1)."""
        acknowledged = clients.notes.highest_lsn
        assert offline_status(node.machine.directory).lsn >= acknowledged

    def _caught_up(self) -> None:
        wait_until_caught_up(self.primary.address, self.replica.address)
        self._read_log()

    def _read_log(self) -> None:
        upto = status(self.replica.address).committed_lsn
        self.ledger.read(self.primary.machine.directory, upto=upto)

    def check(self, clients: Clients) -> None:
        """When the clients have stopped: both copies are equal and sound, and what clients were told is true."""
        assert_equal(self.primary.address, self.replica.address)
        self._read_log()
        clients.notes.check(self.ledger.realms)
        self._tally.add_notes(clients.notes)
        for node in (self.replica, self.primary):
            assert node.running.terminate() == 0, node.running.describe()
            assert_sound(node.machine.directory)
