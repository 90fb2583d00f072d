"""The client process for etcd: just enough of HTTP/2 (RFC 9113) and gRPC to call Put and Txn over raw sockets.

Headers are sent as literals without Huffman coding or table (RFC 7541, 6.2.2), so that they are the same bytes for
each call. Of an answer it matters only that there is a message: gRPC sends none with an error. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from jobs import FillJob, TimedJob, argument, parse_job
from load import ordered_pairs, random_pairs

from peers.closed_loop import Window
from understudy.common.portal import new_event_loop

_CONNECTIONS_MAX = 8
_FILLS_UNDER_WAY = 2  # two transactions fit into HTTP/2's first window of 65,535 bytes
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM = _ACK = 1
_END_HEADERS = 4
_HEAD_BYTES = 9
# Never used up by answers of some 30 bytes, so that nothing has to be given back.
_WINDOW_BYTES = (1 << 31) - 1 - 65_535
_INITIAL_WINDOW_SIZE = 4
Done = Callable[[], None]
Pairs = Iterator[tuple[bytes, bytes]]


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + body


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def _headers(method: bytes, authority: bytes) -> bytes:
    return b"".join(
        [
            _literal(b":method", b"POST"),
            _literal(b":scheme", b"http"),
            _literal(b":path", b"/etcdserverpb.KV/" + method),
            _literal(b":authority", authority),
            _literal(b"content-type", b"application/grpc"),
            _literal(b"te", b"trailers"),
        ]
    )


_PREFACE = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + _frame(_SETTINGS, 0, 0, _INITIAL_WINDOW_SIZE.to_bytes(2) + (1 << 20).to_bytes(4))
    + _frame(_WINDOW_UPDATE, 0, 0, _WINDOW_BYTES.to_bytes(4))
)


class _Connection(asyncio.Protocol):
    """Calls one method, as often as it is told, several at a time."""

    def __init__(self, method: bytes, authority: bytes, fail: Callable[[Exception], None]) -> None:
        self._headers = _headers(method, authority)
        self._fail = fail
        self._received = bytearray()
        self._waiting: dict[int, Done] = {}  # by stream
        self._with_message: set[int] = set()
        self._stream = -1

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(_PREFACE)

    def call(self, message: bytes, done: Done) -> None:
        """Sends a request; calls ``done`` when it was answered."""
        self._stream += 2
        self._waiting[self._stream] = done
        body = b"\x00" + len(message).to_bytes(4) + message
        self._transport.write(
            _frame(_HEADERS, _END_HEADERS, self._stream, self._headers)
            + _frame(_DATA, _END_STREAM, self._stream, body)
        )

    def data_received(self, data: bytes) -> None:
        self._received += data
        at = 0
        while len(self._received) - at >= _HEAD_BYTES:
            size = int.from_bytes(self._received[at : at + 3])
            end = at + _HEAD_BYTES + size
            if len(self._received) < end:
                break
            kind, flags = self._received[at + 3], self._received[at + 4]
            stream = int.from_bytes(self._received[at + 5 : at + _HEAD_BYTES])
            self._take(kind, flags, stream, bytes(self._received[at + _HEAD_BYTES : end]))
            at = end
        del self._received[:at]

    def _take(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        if kind == _DATA:
            self._with_message.add(stream)
        elif kind == _HEADERS and flags & _END_STREAM:
            self._answered(stream, body)
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._transport.write(_frame(kind, _ACK, 0, body if kind == _PING else b""))
        elif kind in (_RST_STREAM, _GOAWAY):
            self._fail(RuntimeError(f"etcd has ended a call or the connection: {body!r}"))

    def _answered(self, stream: int, trailers: bytes) -> None:
        if stream not in self._with_message:
            self._fail(RuntimeError(f"etcd refused a call: {trailers!r}"))
            return
        self._with_message.discard(stream)
        self._waiting.pop(stream)()


def _field(number: int, value: bytes) -> bytes:
    """A field of bytes in protobuf's encoding; ``value`` shorter than 128 bytes."""
    assert len(value) < 1 << 7, "its length takes one byte"
    return bytes([number << 3 | 2, len(value)]) + value


def _put(key: bytes, value: bytes) -> bytes:
    """A PutRequest."""
    return _field(1, key) + _field(2, value)


def _txn(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """A TxnRequest without conditions."""
    return b"".join(_field(2, _field(2, _put(key, value))) for key, value in pairs)


async def _connect(address: str, method: bytes, fail: Callable[[Exception], None]) -> _Connection:
    host, _, port = address.partition(":")
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: _Connection(method, address.encode(), fail), host, int(port)
    )
    return connection


async def timed(job: TimedJob) -> dict[str, Any]:
    """Writes for a while; gives rate and latencies."""
    window = Window()
    pairs = random_pairs(seed=job.seed, keys=job.keys, value_bytes=job.value_bytes)
    connections = [
        await _connect(job.address, b"Put", window.fail) for _ in range(min(job.writers, _CONNECTIONS_MAX))
    ]
    for number in range(job.writers):
        _write_on(connections[number % len(connections)], pairs, window)
    return await window.measure(job.warm_s, job.window_s)


def _write_on(connection: _Connection, pairs: Pairs, window: Window) -> None:
    """One writer: writes, waits for the answer, writes the next."""

    def send() -> None:
        began_s = time.monotonic()

        def done() -> None:
            window.note(time.monotonic() - began_s)
            send()

        connection.call(_put(*next(pairs)), done)

    send()


async def fill(job: FillJob) -> dict[str, Any]:
    """Preloads."""
    pairs = ordered_pairs(seed=0, keys=job.keys, value_bytes=job.value_bytes)
    await asyncio.gather(*(_fill_from(pairs, job) for _ in range(_FILLS_UNDER_WAY)))
    return {}


async def _fill_from(pairs: Pairs, job: FillJob) -> None:
    window = Window()
    connection = await _connect(job.address, b"Txn", window.fail)
    while batch := list(islice(pairs, job.puts_each)):
        answered = asyncio.Event()
        connection.call(_txn(batch), answered.set)
        await window.wait_for(answered)


def main() -> None:
    """Does the job in the argument."""
    is_fill = json.loads(argument())["mode"] == "fill"
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        work = fill(parse_job(FillJob, argument())) if is_fill else timed(parse_job(TimedJob, argument()))
        print(json.dumps(runner.run(work)))


if __name__ == "__main__":
    main()
