"""Redis with one replica; the client is our own, see ``redis_client``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jobs import CountedJob, FillJob, PacedJob
from processes import Process, wait_until

from peers.clients import RedisClient
from peers.redis_client import RedisTimedJob
from peers.system import HOST, Client, Durability, Endpoint, Paced, Pair, Timed, find, free_port, run

_SETTINGS = {
    "appendonly": "yes",
    "appendfsync": "always",
    "save": '""',
    "rdbcompression": "no",
    "repl-diskless-sync-delay": "0",
    "repl-backlog-size": "1gb",
    "client-output-buffer-limit": "replica 0 0 0",
}
_LOADED_S_MAX = 300.0
_NOBODY = 1  # a port on which nobody listens


class Redis(Pair):
    """Both nodes write an append-only file and sync it before they answer."""

    name = "Redis"
    programs: ClassVar[Mapping[str, str]] = {"redis-server": "redis-server"}
    durabilities: ClassVar[Mapping[Durability, str]] = {"local": "no WAIT", "replica": "WAIT 1"}
    settings: ClassVar[Sequence[str]] = (
        "both servers: " + ", ".join(f"`{name} {value}`" for name, value in _SETTINGS.items()),
        "`WAIT 1 0` behind each `SET`, sent together, but for rows at local durability: by then the replica has "
        "synced its file and applied the write, whose reads show it; it is set against ours at `replica`",
        "rewriting of the append-only file at its defaults (100 %, 64 MiB); the one that follows a first copy or a "
        "start is waited for, unmeasured",
        "client: raw sockets on one asyncio loop (uvloop), a connection a writer; redis-benchmark can't send SET and "
        "WAIT as one request",
    )
    _primary: Process
    _replica: Process

    @classmethod
    def version(cls) -> str:
        return run([find("redis-server"), "--version"]).split("v=")[1].split()[0]

    # -- nodes ---------------------------------------------------------------------------------------------

    def make_primary(self) -> None:
        self._directories = [self.folder / "node-1", self.folder / "node-2"]
        self._ports = [free_port(), free_port()]
        self._wait = False
        self.start_primary("local")
        job = FillJob(
            address=self._address(0), keys=self.data.keys, value_bytes=self.data.value_bytes, puts_each=1
        )
        self._run_client(job)
        self._settle(0)

    def start_primary(self, durability: Durability) -> None:
        self._wait = durability != "local"
        self._primary = self._start(0)

    def stop_primary(self) -> None:
        self._primary.stop()

    def kill_primary(self) -> None:
        self._primary.kill()

    def new_replica(self) -> None:
        self._replica = self._start(1, "--replicaof", HOST, str(self._ports[0]))

    def start_replica(self) -> None:
        self.new_replica()

    def stop_replica(self) -> None:
        self._settle(1)  # it refuses to end before its file holds all that came with its copy
        self._replica.stop()

    def remove_replica(self) -> None:
        shutil.rmtree(self._directories[1])

    def wait_for_replica(self) -> None:
        super().wait_for_replica()
        self._settle(0)
        self._settle(1)

    def cut_replica_off(self) -> None:
        """Without ending it: a replica whose process was ended takes a whole new copy when it comes back."""
        self._command(1, "REPLICAOF", HOST, str(_NOBODY))

    def let_replica_rejoin(self) -> None:
        self._command(1, "REPLICAOF", HOST, str(self._ports[0]))

    def promote(self) -> None:
        self._command(1, "REPLICAOF", "NO", "ONE")
        self._directories.reverse()
        self._ports.reverse()
        self._primary, self._wait = self._replica, False

    def endpoint(self, *, replica: bool) -> Endpoint:
        return Endpoint(system=self.name, address=self._address(int(replica)))

    def client(self, *, replica: bool) -> Client:
        return RedisClient(self._address(int(replica)))

    def _address(self, which: int) -> str:
        return f"{HOST}:{self._ports[which]}"

    def _start(self, which: int, *flags: str) -> Process:
        directory = self._directories[which]
        directory.mkdir(exist_ok=True)
        settings = [word for name, value in _SETTINGS.items() for word in (f"--{name}", *_words(value))]
        where = ["--bind", HOST, "--port", str(self._ports[which]), "--dir", str(directory)]
        command = [
            find("redis-server"),
            *where,
            *settings,
            "--loglevel",
            "notice",
            "--logfile",
            "/dev/stderr",
            *flags,
        ]
        process = self.bench.processes.program(Process, "redis-server", command)
        wait_until(
            lambda: not process.is_running or self._is_loaded(which),
            what="Redis has loaded its data",
            deadline_s=_LOADED_S_MAX,
            every_s=0.01,
        )
        if not process.is_running:
            raise process.failure("ended before it was ready")
        return process

    def _is_loaded(self, which: int) -> bool:
        with contextlib.suppress(OSError):
            return self._ask(which, "PING") == b"PONG"
        return False

    def _settle(self, which: int) -> None:
        """Returns when its append-only file is not being rewritten."""
        wait_until(
            lambda: (
                b"aof_rewrite_in_progress:0" in (found := self._command(which, "INFO", "persistence"))
                and b"aof_rewrite_scheduled:0" in found
            ),
            what="Redis rewrites its file",
            deadline_s=_LOADED_S_MAX,
            every_s=0.05,
        )

    def _command(self, which: int, *words: str) -> bytes:
        try:
            return self._ask(which, *words)
        except OSError as error:
            process = self._replica if which else self._primary
            raise process.failure(f"does not take {' '.join(words)}: {error}") from error

    def _ask(self, which: int, *words: str) -> bytes:
        client = RedisClient(self._address(which))
        try:
            return client.ask(*(word.encode() for word in words))
        finally:
            client.close()

    # -- load ----------------------------------------------------------------------------------------------

    def timed(self, writers: int, seed: int) -> Timed:
        job = RedisTimedJob(
            address=self._address(0),
            writers=writers,
            keys=self.data.keys,
            value_bytes=self.data.value_bytes,
            warm_s=self.bench.scale.warm_s,
            window_s=self.bench.scale.window_s,
            seed=seed,
            wait=self._wait,
        )
        return Timed(**self._run_client(job))

    def counted(self, transactions: int, seed: int) -> None:
        job = CountedJob(
            address=self._address(0),
            writers=1,
            keys=self.data.keys,
            value_bytes=self.data.value_bytes,
            transactions=transactions,
            puts_each=1,
            seed=seed,
        )
        self._run_client(job)

    def paced(self, rate: int, seconds: float, seed: int) -> Paced:
        job = PacedJob(
            address=self._address(0),
            rate=rate,
            seconds=seconds,
            keys=self.data.keys,
            value_bytes=self.data.value_bytes,
            seed=seed,
        )
        process = self._start_client(job)

        def finish() -> float:
            found = process.result()
            return float(found["answered"] / found["seconds"])

        return Paced(process=process, finish=finish)

    def _start_client(self, job: Any) -> Process:
        command = [sys.executable, "-P", "-m", "peers.redis_client", json.dumps(dataclasses.asdict(job))]
        return self.bench.processes.program(Process, "redis-client", command)

    def _run_client(self, job: Any) -> Any:
        return self._start_client(job).result()


def _words(value: str) -> list[str]:
    return [""] if value == '""' else value.split()
