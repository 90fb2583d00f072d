"""Clients that write and read, note what they were told, and don't mind what happens to their servers.

A direct client shares one connection between a few tasks. Some of its deadlines are too short, so that outcomes are
unknown; then it waits for the answer, or gives the connection up with everything that is on its way. A synced client
writes to its own copy and uploads; another one only watches.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from harness import DEADLINE_S, wait_until

from crash.history import Applied, Outcome, Read, Write, check
from crash.ledger import LABEL, REALMS
from understudy.client import (
    Add,
    AsyncServer,
    Operation,
    OutcomeUnknown,
    Put,
    Realm,
    UnknownRealm,
    aconnect,
    connect,
)
from understudy.common import portal
from understudy.common.errors import ReceiptExpired, UnderstudyError
from understudy.common.memtable import Receipt

COUNT, LAST = b"count", b"last"  # every transaction adds to the one and puts its label at the other
_TASKS = 3
_DEADLINES_S = (0.02, 0.3, 5.0)
_PATIENCE_S = 3.0
_READ_S = 2.0
_TRY_AGAIN_S = 0.05
_PACE_S = 0.004  # a synced client's pause, or its queue would only grow


class _GivenUp(Exception):
    """The client lets go of its connection."""


class Notes:
    """What all clients have seen, by realm."""

    def __init__(self) -> None:
        self.writes: dict[str, list[Write]] = defaultdict(list)
        self.reads: dict[str, list[Read]] = defaultdict(list)
        self.acknowledged = 0
        self.highest_lsn = 0
        self._labels = itertools.count(1)
        self._lock = threading.Lock()

    def new_label(self, session: str) -> bytes:
        """For a transaction."""
        return f"{session}/{next(self._labels)}".encode()

    def note(
        self, realm: str, label: bytes, started_s: float, outcome: Outcome, receipt: Receipt | None = None
    ) -> None:
        """A transaction has come to its end, or its client has."""
        ended_s = time.monotonic()
        version, lsn = (receipt.version, receipt.lsn) if receipt else (0, 0)
        write = Write(
            label=label, started_s=started_s, ended_s=ended_s, outcome=outcome, version=version, lsn=lsn
        )
        with self._lock:
            self.writes[realm].append(write)
            self.acknowledged += outcome is Outcome.ACKNOWLEDGED
            self.highest_lsn = max(self.highest_lsn, lsn)

    def count(self, outcome: Outcome) -> int:
        """How many transactions ended so."""
        return sum(write.outcome is outcome for writes in self.writes.values() for write in writes)

    def check(self, log: dict[str, list[Applied]]) -> None:
        """The log agrees with all that was seen (G1, G2, G5, G6)."""
        for realm in REALMS:
            violations = check(self.writes[realm], self.reads[realm], log[realm])
            assert not violations, "\n".join([realm, *map(str, violations[:20])])


def transaction(label: bytes) -> list[Operation]:
    """What each transaction does."""
    return [Put(LABEL + label, b""), Put(LAST, label), Add(COUNT, 1)]


class Clients:
    """They run in threads of this process while the ``with`` block does.

    Args:
        addresses: of all servers.
        synced: where the synced clients keep their copies; none of them without.
        credentials: for ``aconnect``.
    """

    def __init__(
        self,
        addresses: str,
        chance: Random,
        *,
        direct: int = 3,
        synced: Path | None = None,
        **credentials: Any,
    ) -> None:
        self.notes = Notes()
        self._addresses = addresses
        self._credentials = credentials
        self._stopping = threading.Event()
        self._errors: list[BaseException] = []
        seeds = [chance.random() for _ in range(direct)]
        jobs = [partial(self._run, f"direct-{number}", seed) for number, seed in enumerate(seeds)]
        if synced is not None:
            jobs += [partial(self._write_synced, synced / "writer"), partial(self._watch, synced / "watcher")]
        self._threads = [threading.Thread(target=self._guarded, args=(job,)) for job in jobs]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """Returns when all have come to their end; synced ones have uploaded and downloaded everything then."""
        self.__exit__()
        self._check_errors()

    def wait_for(self, more: int) -> None:
        """Returns once so many more transactions were acknowledged."""
        enough = self.notes.acknowledged + more
        wait_until(
            lambda: self.notes.acknowledged >= enough or self._errors,
            what=lambda: f"{enough - self.notes.acknowledged} more to be acknowledged",
        )
        self._check_errors()

    def _check_errors(self) -> None:
        if self._errors:
            pytest.fail(f"a client failed: {self._errors[0]!r}")

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._errors.append(error)
            raise

    # -- direct ------------------------------------------------------------------------------------------------

    def _run(self, name: str, seed: float) -> None:
        with asyncio.Runner(loop_factory=portal.new_event_loop) as runner:
            runner.run(self._direct(name, Random(seed)))

    async def _direct(self, name: str, chance: Random) -> None:
        while not self._stopping.is_set():
            try:
                async with aconnect(self._addresses, timeout_s=_READ_S, **self._credentials) as server:
                    await self._share(server, name, chance)
            except UnderstudyError:  # nobody is there
                await asyncio.sleep(_TRY_AGAIN_S)

    async def _share(self, server: AsyncServer, name: str, chance: Random) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(_TASKS):
                    tasks.create_task(self._work(server, f"{name}.{number}", chance))
        except* _GivenUp:
            pass

    async def _work(self, server: AsyncServer, session: str, chance: Random) -> None:
        while not self._stopping.is_set():
            realm = chance.choice(REALMS)
            if chance.random() < 0.7:
                await self._write(server, realm, session, chance)
            else:
                await self._read(server, realm, session)

    async def _write(self, server: AsyncServer, realm: str, session: str, chance: Random) -> None:
        label, started_s = self.notes.new_label(session), time.monotonic()
        outcome, receipt = Outcome.UNKNOWN, None
        try:
            receipt = await self._commit(server, realm, label, chance)
            outcome = Outcome.ACKNOWLEDGED
        except OutcomeUnknown as error:
            raise _GivenUp from error
        except ReceiptExpired:
            raise  # it was applied, and so recently that its receipt must be known
        except UnderstudyError:
            outcome = Outcome.REFUSED
        finally:
            self.notes.note(realm, label, started_s, outcome, receipt)

    @staticmethod
    async def _commit(server: AsyncServer, realm: str, label: bytes, chance: Random) -> Receipt:
        try:
            return await server.commit(realm, transaction(label), timeout_s=chance.choice(_DEADLINES_S))
        except OutcomeUnknown as error:
            if chance.random() < 0.3:
                raise
            return await server.wait(error.number, timeout_s=_PATIENCE_S)

    async def _read(self, server: AsyncServer, realm: str, session: str) -> None:
        started_s = time.monotonic()
        try:
            count, last = await server.get_many(realm, [COUNT, LAST], timeout_s=_READ_S)
        except UnknownRealm:
            count = last = None
        except UnderstudyError:
            return
        values = {COUNT: count, LAST: last}
        read = Read(session=session, started_s=started_s, ended_s=time.monotonic(), values=values)
        self.notes.reads[realm].append(read)

    # -- synced ------------------------------------------------------------------------------------------------

    def _open(self, directory: Path, realm: str) -> Realm:
        # A reset would be a finding: in none of these stories a server knows less than it has shown (G5).
        return Realm.open(
            realm,
            server=self._addresses,
            directory=directory,
            on_reset="manual",
            local_durability="relaxed",
            **self._credentials,
        )

    def _write_synced(self, directory: Path) -> None:
        (path, *_), waiting = REALMS, list[tuple[bytes, float]]()
        with self._open(directory, path) as realm:
            while not self._stopping.wait(_PACE_S):
                label = self.notes.new_label("synced")
                waiting.append((label, time.monotonic()))
                realm.commit(transaction(label))
                with contextlib.suppress(OutcomeUnknown):
                    realm.wait_for_upload(timeout_s=_PACE_S)
                    self._note_uploaded(path, waiting)
            realm.wait_for_upload(DEADLINE_S)
            self._note_uploaded(path, waiting)
            self._compare(realm)

    def _note_uploaded(self, path: str, waiting: list[tuple[bytes, float]]) -> None:
        for label, started_s in waiting:
            self.notes.note(path, label, started_s, Outcome.ACKNOWLEDGED)
        waiting.clear()

    def _watch(self, directory: Path) -> None:
        with contextlib.ExitStack() as stack:
            realms = [stack.enter_context(self._open(directory, path)) for path in REALMS]
            while not self._stopping.wait(_PACE_S):
                for realm in realms:
                    self._look(realm)
            for realm in realms:
                self._compare(realm)

    def _look(self, realm: Realm) -> None:
        started_s = time.monotonic()
        with realm.view() as view:
            values = {key: view.get(key) for key in (COUNT, LAST)}
        ended_s = time.monotonic()
        read = Read(session="watcher", started_s=started_s, ended_s=ended_s, values=values, is_local=True)
        self.notes.reads[realm.path].append(read)

    def _compare(self, realm: Realm) -> None:
        """When nobody writes any more, the copy is what the server has."""

        def is_same() -> bool:
            realm.wait_for_download(DEADLINE_S)
            return dict(realm.scan()) == self._on_server(realm.path)

        wait_until(is_same)

    def _on_server(self, path: str) -> dict[bytes, bytes]:
        with connect(self._addresses, **self._credentials) as server, contextlib.suppress(UnknownRealm):
            return dict(server.scan(path))
        return {}
