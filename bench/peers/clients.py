"""Blocking connections to single nodes of each system. They carry markers, not the load."""

from __future__ import annotations

import socket
import subprocess

from load import REALM, key
from processes import BenchFailed

from peers.system import Client, Endpoint, find
from understudy.client import Put, connect
from understudy.common.errors import Unavailable

_ANSWER_S_MAX = 120.0
_END = "end of the answer"


class UnderstudyClient:
    """Understudy's own blocking client."""

    def __init__(self, address: str) -> None:
        self._server = connect(address, timeout_s=_ANSWER_S_MAX)

    def put(self, key_number: int, value: int) -> bool:
        """Writes."""
        self._server.commit(REALM, [Put(key(key_number), b"%d" % value)], timeout_s=_ANSWER_S_MAX)
        return True

    def get(self, key_number: int) -> int:
        """Reads."""
        try:
            return int(self._server.get(REALM, key(key_number), timeout_s=_ANSWER_S_MAX) or -1)
        except Unavailable:
            return -1  # a replica that has no copy yet

    def close(self) -> None:
        """Ends the connection."""
        self._server.close()


class PostgresqlClient:
    """A psql that is fed line by line."""

    def __init__(self, address: str) -> None:
        host, _, port = address.partition(":")
        self._psql = subprocess.Popen(
            [find("psql"), "-qAtX", "-h", host, "-p", port, "-U", "postgres", "postgres"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )

    def put(self, key_number: int, value: int) -> bool:
        """Writes."""
        return self._ask(
            f"INSERT INTO kv VALUES ({key_number}, '{value}') ON CONFLICT (k) DO UPDATE SET v = excluded.v RETURNING 1"
        ) == ["1"]

    def get(self, key_number: int) -> int:
        """Reads."""
        lines = self._ask(f"SELECT v FROM kv WHERE k = {key_number}")
        return int(lines[0]) if len(lines) == 1 and lines[0].isdigit() else -1

    def _ask(self, statement: str) -> list[str]:
        """The lines of the answer, errors included."""
        assert self._psql.stdin is not None
        assert self._psql.stdout is not None
        self._psql.stdin.write(f"{statement};\n\\echo {_END}\n")
        lines: list[str] = []
        for line in self._psql.stdout:
            if line.rstrip("\n") == _END:
                return lines
            lines.append(line.rstrip("\n"))
        raise BenchFailed(f"psql ended: {lines}")

    def close(self) -> None:
        """Ends the connection."""
        self._psql.communicate()


class RedisClient:
    """RESP over a socket."""

    def __init__(self, address: str) -> None:
        host, _, port = address.partition(":")
        self._socket = socket.create_connection((host, int(port)), _ANSWER_S_MAX)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self._socket.makefile("rb")

    def put(self, key_number: int, value: int) -> bool:
        """Writes."""
        return self.ask(b"SET", key(key_number), b"%d" % value) == b"OK"

    def get(self, key_number: int) -> int:
        """Reads."""
        answer = self.ask(b"GET", key(key_number))
        return int(answer) if answer.isdigit() else -1

    def ask(self, *words: bytes) -> bytes:
        """The answer to one command: text, number, or the text of an error behind a minus."""
        parts = [b"*%d\r\n" % len(words), *(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)]
        self._socket.sendall(b"".join(parts))
        line = self._lines.readline().rstrip(b"\r\n")
        if not line:
            raise BenchFailed("Redis has closed the connection")
        if line[:1] != b"$":
            return line if line[:1] == b"-" else line[1:]
        size = int(line[1:])
        return b"" if size < 0 else self._lines.read(size + 2)[:-2]

    def close(self) -> None:
        """Ends the connection."""
        self._lines.close()
        self._socket.close()


_KINDS: dict[str, type[UnderstudyClient] | type[PostgresqlClient] | type[RedisClient]] = {
    "Understudy": UnderstudyClient,
    "PostgreSQL": PostgresqlClient,
    "Redis": RedisClient,
}


def connect_to(endpoint: Endpoint) -> Client:
    """A connection in the language of the endpoint's system."""
    return _KINDS[endpoint.system](endpoint.address)
