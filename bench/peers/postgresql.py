"""PostgreSQL with one streaming standby; pgbench is the client."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import accounts
from processes import BenchFailed, Process, wait_until
from results import quantile

from peers.clients import PostgresqlClient
from peers.system import HOST, Client, Durability, Endpoint, Paced, Pair, Timed, find, free_port, run

_USER = "postgres"
_STANDBY = "standby"
_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "max_connections": "300",
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "min_wal_size": "1GB",
    "wal_keep_size": "4GB",
    # Nothing of a killed server is left in /dev/shm.
    "dynamic_shared_memory_type": "mmap",
}
_COMMIT_LEVELS: dict[Durability, str] = {"local": "local", "replica": "on", "applied": "remote_apply"}
_UPSERT = """\\set k random(0, {last})
INSERT INTO kv VALUES (:k, :value) ON CONFLICT (k) DO UPDATE SET v = excluded.v;
"""
# One row of every page, as there are more to a page.
_TOUCH = "UPDATE kv SET v = v WHERE k % {step} = 0"
_PAGE_BYTES = 8192
_ROW_HEADER_BYTES = 40
_FILL_SHARE = 0.9
_THREADS = 2
_CONNECTING_S_MAX = 0.04  # each; pgbench counts it as a part of its run
_PACED_CONNECTIONS = 64
_COUNTED_CONNECTIONS = 64


class Server(Process):
    """One PostgreSQL server. Its processes are ended with it, and its shared memory segment is removed."""

    directory: Path

    def _end(self, number: signal.Signals | None) -> None:
        if number is signal.SIGTERM:
            number = signal.SIGINT  # ends clients' sessions, then itself
        if number is not signal.SIGKILL:
            super()._end(number)
            return
        children, segment = accounts.children(self.pid), _segment(self.directory)
        super()._end(number)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        wait_until(lambda: not any(map(accounts.is_running, children)), what="PostgreSQL ends", every_s=0.001)
        if segment:
            subprocess.run(["ipcrm", "-m", segment], check=False, capture_output=True)


class Postgresql(Pair):
    """The nodes are run as Debian's user where the bench runs as root, which PostgreSQL refuses."""

    name = "PostgreSQL"
    programs: ClassVar[Mapping[str, str]] = {
        "postgres": "postgresql-15",
        "initdb": "postgresql-15",
        "pg_basebackup": "postgresql-client-15",
        "pgbench": "postgresql-client-15",
        "psql": "postgresql-client-15",
    }
    durabilities: ClassVar[Mapping[Durability, str]] = {
        level: f"synchronous_commit={said}" for level, said in _COMMIT_LEVELS.items()
    }
    settings: ClassVar[Sequence[str]] = (
        "both servers: " + ", ".join(f"`{name}={value}`" for name, value in _SETTINGS.items() if value),
        f"`synchronous_standby_names={_STANDBY}` but for rows at local durability, where it is empty; fsync, "
        "full_page_writes, wal_sync_method and autovacuum are at their defaults (on, on, fdatasync, on)",
        "table `kv (k bigint PRIMARY KEY, v text NOT NULL) WITH (fillfactor = 90)`, so that updates find room on "
        "their page; `INSERT … ON CONFLICT (k) DO UPDATE`, one a transaction, the value a parameter",
        "after each start one row of every page is updated, unmeasured, so that the full page images that follow a "
        "checkpoint, which a stop makes, do not fall into the measured time",
        f"client: `pgbench -M prepared -n`, a connection a writer, {_THREADS} threads, TCP, latencies from its log",
    )

    @classmethod
    def version(cls) -> str:
        return run([find("postgres"), "--version"]).split()[2]

    # -- nodes ---------------------------------------------------------------------------------------------

    def make_primary(self) -> None:
        self._directories = [self.folder / "node-1", self.folder / "node-2"]
        self._ports = [free_port(), free_port()]
        self._commit = "local"
        self._script = self.folder / "upsert.sql"
        self._script.write_text(_UPSERT.format(last=self.data.keys - 1))
        self.folder.chmod(0o755)
        _empty(self._directories[0])
        initdb = [find("initdb"), "-A", "trust", "-U", _USER, "-E", "UTF8", "--locale=C", "-D"]
        run(_as_user([*initdb, str(self._directories[0])]))
        self.start_primary("local", touch=False)
        self._ask("CREATE TABLE kv (k bigint PRIMARY KEY, v text NOT NULL) WITH (fillfactor = 90)")
        value = f"substr(repeat(md5(n::text), {self.data.value_bytes // 32 + 1}), 1, {self.data.value_bytes})"
        self._ask(f"INSERT INTO kv SELECT n, {value} FROM generate_series(0, {self.data.keys - 1}) n")
        self._ask("VACUUM ANALYZE kv")
        self._ask("CHECKPOINT")

    def start_primary(self, durability: Durability, *, touch: bool = True) -> None:
        self._commit = _COMMIT_LEVELS[durability]
        standbys = "" if durability == "local" else _STANDBY
        self._primary = self._start(0, "-c", f"synchronous_standby_names={standbys}")
        if touch:
            row_bytes = self.data.value_bytes + _ROW_HEADER_BYTES
            step = max(int(_PAGE_BYTES * _FILL_SHARE / row_bytes) * 3 // 4, 1)
            self._ask(_TOUCH.format(step=step), "-c", "synchronous_commit=local")

    def stop_primary(self) -> None:
        self._primary.stop()

    def kill_primary(self) -> None:
        self._primary.kill()

    def new_replica(self) -> None:
        _empty(self._directories[1])
        source = f"host={HOST} port={self._ports[0]} user={_USER} application_name={_STANDBY}"
        backup = [find("pg_basebackup"), "-d", source, "-D", str(self._directories[1])]
        run(_as_user([*backup, "-R", "-X", "stream", "-c", "fast"]))
        self.start_replica()

    def start_replica(self) -> None:
        self._replica = self._start(1)

    def stop_replica(self) -> None:
        self._replica.stop()

    def remove_replica(self) -> None:
        shutil.rmtree(self._directories[1])

    def promote(self) -> None:
        # Without waiting, as pg_ctl looks only every 100 ms: the client sees it sooner.
        run(_as_user([find("pg_ctl"), "promote", "-W", "-D", str(self._directories[1])]))
        self._directories.reverse()
        self._ports.reverse()
        self._primary, self._commit = self._replica, "local"

    def endpoint(self, *, replica: bool) -> Endpoint:
        return Endpoint(system=self.name, address=f"{HOST}:{self._ports[replica]}")

    def client(self, *, replica: bool) -> Client:
        return PostgresqlClient(self.endpoint(replica=replica).address)

    def _start(self, which: int, *flags: str) -> Server:
        port = str(self._ports[which])
        settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
        command = [find("postgres"), "-D", str(self._directories[which]), "-p", port, *settings, *flags]
        server = self.bench.processes.program(Server, "postgres", _as_user(command))
        server.directory = self._directories[which]
        wait_until(
            lambda: not server.is_running or _answers(port), what="PostgreSQL takes connections", every_s=0.01
        )
        if not server.is_running:
            raise server.failure("ended before it was ready")
        return server

    def _ask(self, statement: str, *options: str) -> str:
        psql = [find("psql"), "-qAtX", "-h", HOST, "-p", str(self._ports[0]), "-U", _USER, "-d", "postgres"]
        settings = ["-c", f"SET {options[1]}"] if options else []
        return run([*psql, *settings, "-c", statement])

    # -- load ----------------------------------------------------------------------------------------------

    def timed(self, writers: int, seed: int) -> Timed:
        scale = self.bench.scale
        seconds = int(scale.warm_s + scale.window_s) + 1 + int(writers * _CONNECTING_S_MAX)
        with self._log() as log:
            self._run_pgbench(writers, seed, log, "-T", str(seconds))
            done = _logged(log)
        begin_s = min(at_s for at_s, _ in done) + scale.warm_s
        if max(at_s for at_s, _ in done) < begin_s + scale.window_s:
            raise BenchFailed("pgbench ended before the window did")
        latencies_s = [took_s for at_s, took_s in done if begin_s <= at_s < begin_s + scale.window_s]
        return Timed(
            rate=len(latencies_s) / scale.window_s,
            p50_s=quantile(latencies_s, 0.5),
            p99_s=quantile(latencies_s, 0.99),
        )

    def counted(self, transactions: int, seed: int) -> None:
        each = -(-transactions // _COUNTED_CONNECTIONS)
        self._run_pgbench(_COUNTED_CONNECTIONS, seed, None, "-t", str(each), commit="off")

    def paced(self, rate: int, seconds: float, seed: int) -> Paced:
        command = self._pgbench(_PACED_CONNECTIONS, seed, "-R", str(rate), "-T", str(int(seconds)))
        log = self.folder / "paced"
        process = self.bench.processes.program(
            Process, "pgbench", ["env", _options(self._commit), *command, "-l", f"--log-prefix={log}"]
        )

        def finish() -> float:
            process.wait()
            done = _logged(log)
            _remove(log)
            times_s = [at_s for at_s, _ in done]
            return len(times_s) / (max(times_s) - min(times_s))

        return Paced(process=process, finish=finish)

    def _pgbench(self, connections: int, seed: int, *flags: str) -> list[str]:
        value = "v" * self.data.value_bytes
        where = ["-h", HOST, "-p", str(self._ports[0]), "-U", _USER, "postgres"]
        threads = str(min(connections, _THREADS))
        return [
            *(find("pgbench"), "-n", "-M", "prepared", "-f", str(self._script), "-D", f"value={value}"),
            *("-c", str(connections), "-j", threads, f"--random-seed={seed}", *flags, *where),
        ]

    def _run_pgbench(
        self, connections: int, seed: int, log: Path | None, *flags: str, commit: str = ""
    ) -> None:
        logging = () if log is None else ("-l", f"--log-prefix={log}")
        command = self._pgbench(connections, seed, *flags, *logging)
        run(["env", _options(commit or self._commit), *command])

    @contextlib.contextmanager
    def _log(self) -> Iterator[Path]:
        log = self.folder / "log"
        try:
            yield log
        finally:
            _remove(log)


def _options(commit: str) -> str:
    return f"PGOPTIONS=-c synchronous_commit={commit}"


def _logged(prefix: Path) -> list[tuple[float, float]]:
    """(moment of the end, latency) of each transaction in pgbench's logs, in seconds."""
    lines = [line.split() for path in _logs(prefix) for line in path.read_text().splitlines()]
    # client, number, latency in µs, script, seconds, microseconds; the lag behind the schedule, where there is one
    done = [(int(line[4]) + int(line[5]) / 1e6, int(line[2]) / 1e6) for line in lines if len(line) >= 6]
    if not done:
        raise BenchFailed("pgbench has logged nothing")
    return done


def _logs(prefix: Path) -> list[Path]:
    return list(prefix.parent.glob(f"{prefix.name}.*"))


def _remove(prefix: Path) -> None:
    for path in _logs(prefix):
        path.unlink()


def _as_user(command: Sequence[str]) -> list[str]:
    if os.geteuid() != 0:
        return list(command)
    return ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups", *command]


def _empty(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    if os.geteuid() == 0:
        account = pwd.getpwnam(_USER)
        os.chown(directory, account.pw_uid, account.pw_gid)


def _answers(port: str) -> bool:
    command = [find("pg_isready"), "-q", "-h", HOST, "-p", port]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _segment(directory: Path) -> str:
    """The id of the System V segment that a running server holds; a killed one leaves it behind."""
    with contextlib.suppress(FileNotFoundError, IndexError):
        return (directory / "postmaster.pid").read_text().splitlines()[6].split()[1]
    return ""
