"""etcd with three members; the client is our own, see ``etcd_client``."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jobs import FillJob, TimedJob
from processes import Process, wait_until

from peers.system import HOST, Durability, System, Timed, find, free_port, run

_MEMBERS = 3
_PUTS_EACH = 100  # of 128 that a transaction may have
_READY_S_MAX = 120.0


class Etcd(System):
    """A commit is on the disks of two members of three when it is acknowledged."""

    name = "etcd"
    programs: ClassVar[Mapping[str, str]] = {"etcd": "etcd-server", "etcdctl": "etcd-client"}
    durabilities: ClassVar[Mapping[Durability, str]] = {"replica": "3 members"}
    settings: ClassVar[Sequence[str]] = (
        "three members, `--quota-backend-bytes=8589934592`; the client talks to the leader",
        "each write is a `Put` call of its own, as writes in one call would be one transaction; old revisions are kept",
        "client: our own HTTP/2 over raw sockets on one asyncio loop (uvloop), with up to 8 connections; gRPC's "
        "Python library would be the bottleneck, and `etcdctl check perf` offers fixed loads of its own only",
    )
    _members: list[Process]

    @classmethod
    def version(cls) -> str:
        return run([find("etcd"), "--version"]).split()[2]

    def make(self) -> None:
        self.bench.say(f"{self.name}: preloading {self.data.keys:,} keys")
        self._client_ports = [free_port() for _ in range(_MEMBERS)]
        self._peer_ports = [free_port() for _ in range(_MEMBERS)]
        self.start("replica")
        job = FillJob(
            address=self._leader(),
            keys=self.data.keys,
            value_bytes=self.data.value_bytes,
            puts_each=_PUTS_EACH,
        )
        self._run_client(job)
        self.stop()

    def start(self, durability: Durability) -> None:
        self._members = [self._member(number) for number in range(_MEMBERS)]
        wait_until(self._is_healthy, what="etcd is healthy", deadline_s=_READY_S_MAX, every_s=0.2)

    def stop(self) -> None:
        # All at once: the last two would try for seconds to hand over to members that are gone.
        for member in self._members:
            member.kill()

    def timed(self, writers: int, seed: int) -> Timed:
        job = TimedJob(
            address=self._leader(),
            writers=writers,
            keys=self.data.keys,
            value_bytes=self.data.value_bytes,
            warm_s=self.bench.scale.warm_s,
            window_s=self.bench.scale.window_s,
            seed=seed,
        )
        return Timed(**self._run_client(job))

    def _member(self, number: int) -> Process:
        client, peer = (f"http://{HOST}:{ports[number]}" for ports in (self._client_ports, self._peer_ports))
        cluster = ",".join(f"m{index}=http://{HOST}:{port}" for index, port in enumerate(self._peer_ports))
        command = [
            *(find("etcd"), "--name", f"m{number}", "--data-dir", str(self.folder / f"member-{number}")),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", cluster, "--initial-cluster-state", "new"),
            *("--quota-backend-bytes", str(8 << 30), "--logger", "zap", "--log-level", "error"),
        ]
        return self.bench.processes.program(Process, "etcd", command)

    def _is_healthy(self) -> bool:
        for member in self._members:
            if not member.is_running:
                raise member.failure("ended before it was ready")
        return self._etcdctl("endpoint", "health").returncode == 0

    def _leader(self) -> str:
        """HOST:PORT of the leader."""
        answer = json.loads(self._etcdctl("endpoint", "status", "-w", "json").stdout)
        return next(
            str(one["Endpoint"])
            for one in answer
            if one["Status"]["leader"] == one["Status"]["header"]["member_id"]
        )

    def _etcdctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        endpoints = ",".join(f"{HOST}:{port}" for port in self._client_ports)
        return subprocess.run(
            [find("etcdctl"), f"--endpoints={endpoints}", *words],
            check=False,
            capture_output=True,
            text=True,
            timeout=_READY_S_MAX,
            env=os.environ | {"ETCDCTL_API": "3"},
        )

    def _run_client(self, job: Any) -> Any:
        command = [sys.executable, "-P", "-m", "peers.etcd_client", json.dumps(dataclasses.asdict(job))]
        return self.bench.processes.program(Process, "etcd-client", command).result()
