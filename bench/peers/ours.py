"""Understudy itself, by its command line."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from jobs import CountedJob, FillJob, PacedJob, TimedJob
from processes import Node
from stage import data_file

from peers.clients import UnderstudyClient
from peers.system import Client, Durability, Endpoint, Paced, Pair, Timed

_FILL_BYTES = 1 << 20
_COUNTED_WRITERS = 512


class Understudy(Pair):
    """Primary and replica as an operator starts them."""

    name = "Understudy"
    durabilities: ClassVar[Mapping[Durability, str]] = {
        "local": "--durability local",
        "replica": "--durability replica",
        "applied": "--durability applied",
    }
    settings: ClassVar[Sequence[str]] = (
        "`understudy primary` and `understudy replica` with their defaults, but for `--durability` as given",
        "client: one `aconnect` of `understudy.client`, as many tasks as writers",
    )
    _primary: Node
    _replica: Node

    @classmethod
    def version(cls) -> str:
        return importlib.metadata.version("understudy")

    def make_primary(self) -> None:
        self._directory = self.folder / "node-1"
        self._replica_directory = self.folder / "node-2"
        self.start_primary("local")
        job = FillJob(
            address=self._primary.address,
            keys=self.data.keys,
            value_bytes=self.data.value_bytes,
            puts_each=_FILL_BYTES // self.data.value_bytes,
        )
        self.bench.processes.run("writer.py", job)
        self._primary.checkpoint()

    def start_primary(self, durability: Durability) -> None:
        self._primary = self.bench.processes.primary(self._directory, "--durability", durability)

    def stop_primary(self) -> None:
        self._primary.stop()

    def kill_primary(self) -> None:
        self._primary.kill()

    def new_replica(self) -> None:
        self.start_replica()

    def start_replica(self) -> None:
        self._replica = self.bench.processes.replica(self._replica_directory, self._primary)

    def stop_replica(self) -> None:
        self._replica.stop()

    def remove_replica(self) -> None:
        shutil.rmtree(self._replica_directory)

    def promote(self) -> None:
        self.bench.processes.command("promote", str(self._replica_directory), "--serve", "--json")
        self._directory, self._replica_directory = self._replica_directory, self._directory
        self._primary = self._replica

    @property
    def store(self) -> Path:
        """The primary's LMDB environment."""
        return data_file(self._directory).parent

    def endpoint(self, *, replica: bool) -> Endpoint:
        return Endpoint(system=self.name, address=(self._replica if replica else self._primary).address)

    def client(self, *, replica: bool) -> Client:
        return UnderstudyClient(self.endpoint(replica=replica).address)

    def timed(self, writers: int, seed: int) -> Timed:
        job = TimedJob(
            address=self._primary.address,
            writers=writers,
            keys=self.data.keys,
            value_bytes=self.data.value_bytes,
            warm_s=self.bench.scale.warm_s,
            window_s=self.bench.scale.window_s,
            seed=seed,
        )
        found = self.bench.processes.run("writer.py", job)
        return Timed(rate=found["rate"], p50_s=found["p50_s"], p99_s=found["p99_s"])

    def counted(self, transactions: int, seed: int) -> None:
        job = CountedJob(
            address=self._primary.address,
            writers=_COUNTED_WRITERS,
            keys=self.data.keys,
            value_bytes=self.data.value_bytes,
            transactions=transactions,
            puts_each=1,
            seed=seed,
        )
        self.bench.processes.run("writer.py", job)

    def paced(self, rate: int, seconds: float, seed: int) -> Paced:
        job = PacedJob(
            address=self._primary.address,
            rate=rate,
            seconds=seconds,
            keys=self.data.keys,
            value_bytes=self.data.value_bytes,
            seed=seed,
        )
        process = self.bench.processes.helper("writer.py", job)

        def finish() -> float:
            found = process.result()
            return float(len(found["answered"]) / found["seconds"])

        return Paced(process=process, finish=finish)
