"""Synced clients that write offline and online, die, come again, and are reset where they have to be."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from sim.cluster import BrokenPromise, Cluster
from sim.threads import sleep
from sim.universe import Process
from sim.writers import REALM, numbers

from understudy.client import Realm
from understudy.client.recovery import Recovery
from understudy.common.errors import UnderstudyError
from understudy.common.operations import Add, Put

_WAIT_S = 5.0


@dataclass
class Device:
    """A machine with a local copy: it puts `name/number`, and adds one to `name`, in the same transaction.

    Attributes:
        committed: numbers whose transaction has returned.
        tried: how many there are; one that died in it may be there or not.
        dropped: how often a reset has dropped something, with why.
    """

    cluster: Cluster
    name: str
    committed: set[int] = field(default_factory=set)
    tried: int = 0
    dropped: list[str] = field(default_factory=list)
    pause_s: float = 0.2
    process: Process | None = None
    stopped: bool = False
    is_synced: bool = False
    pairs: dict[bytes, bytes] = field(default_factory=dict)  # as the copy had them in the end
    starts: int = 0
    why: str = ""

    def __post_init__(self) -> None:
        self._path: Path = self.cluster.lab.machine(self.name) / "local"

    def start(self) -> None:
        """Its process, if there is none."""
        if self.process is not None and self.process.is_alive:
            return
        self.starts += 1
        self.process = self.cluster.lab.start(
            f"{self.name}.{self.starts}", self.name, lambda: asyncio.to_thread(self._run)
        )

    def _open(self) -> Realm:
        return Realm.open(
            REALM,
            server=self.cluster.addresses,
            directory=self._path,
            on_reset="recover",
            after_reset=self._after_reset,
        )

    def _after_reset(self, local: object, fresh: object, recovered: Recovery) -> None:
        if self.cluster.is_lossless:
            self.cluster.lab.universe.problems.append(f"G5: {self.name} was reset, though nothing was lost")
        dropped = [f"{change.number}: {change.dropped}" for change in recovered.changes if change.dropped]
        self.dropped += dropped
        self.cluster.lab.universe.trace(
            "reset", self.name, f"{recovered.applied} again, {len(dropped)} dropped"
        )

    def _run(self) -> None:
        universe = self.cluster.lab.universe
        while not self.stopped:
            with self._open() as realm:
                for _ in range(universe.rng.randrange(5, 60)):
                    if self.stopped:
                        break
                    self._write(realm)
                    sleep(universe, universe.rng.expovariate(1 / self.pause_s))
                if universe.rng.random() < 0.5:
                    self._wait(realm)
            sleep(universe, universe.rng.uniform(0.0, 2.0))
        self._finish()

    def _write(self, realm: Realm) -> None:
        self.tried += 1
        number = self.tried
        realm.commit([Put(f"{self.name}/{number:06}".encode(), b"l"), Add(self.name.encode(), 1)])
        self.committed.add(number)
        total = int(realm.get(self.name.encode()) or b"0")
        if total < 1:
            raise BrokenPromise(f"{self.name} does not read what it has written: {total}")

    def _wait(self, realm: Realm) -> bool:
        """Whether it came up to date."""
        try:
            realm.wait_for_upload(timeout_s=_WAIT_S)
            realm.wait_for_download(timeout_s=_WAIT_S)
        except UnderstudyError as error:
            self.why = repr(error)
            return False
        return True

    def _finish(self) -> None:
        """Until all is uploaded and downloaded, when everything works again."""
        universe = self.cluster.lab.universe
        with self._open() as realm:
            while True:
                if self._wait(realm):
                    self.is_synced = True
                    self.pairs = dict(realm.scan())
                sleep(universe, 1.0)

    def shown(self, state: dict[bytes, bytes]) -> set[int]:
        """Its transactions that a state has; any of a node at any time.

        Raises:
            BrokenPromise: it has one in part, or one that never was.
        """
        there = numbers(state, f"{self.name}/")
        total = int(state.get(self.name.encode(), b"0"))
        if total != len(there):
            raise BrokenPromise(f"G2, G6: {self.name} has {len(there)} keys, and has counted {total}")
        if unknown := sorted(there - set(range(1, self.tried + 1))):
            raise BrokenPromise(f"{self.name}: never written, and there: {unknown[:10]}")
        return there

    def check(self, state: dict[bytes, bytes]) -> None:
        """All that was committed here is on the server, once.

        Raises:
            BrokenPromise.
        """
        if lost := sorted(self.committed - self.shown(state)):
            raise BrokenPromise(f"{self.name}: committed and gone: {lost[:10]}; dropped: {self.dropped[:3]}")
        if self.pairs != state:
            raise BrokenPromise(f"{self.name}'s copy is not what the server has")
