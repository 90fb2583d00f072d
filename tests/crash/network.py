"""A TCP proxy that is a bad network: slow, stalling, cut off, forgetful of connections, and not always truthful."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from random import Random

from understudy.common.addresses import split_address

_READ_BYTES = 1 << 16
# What is damaged is in the middle of much: the few bytes of a greeting would be answered with a refusal for good.
_DAMAGED_BYTES_MIN = 512
_SLICE_S = 0.02
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, and for no time


class BadNetwork:
    """Between clients and ``target``; good until it is told otherwise, and again after :meth:`recover`.

    Attributes:
        bytes_a_second: in each direction of each connection; None: as fast as it goes.
        delay_s: before each piece.
        damages_left: so many pieces have one bit changed.
        damaged: so many pieces had.
    """

    def __init__(self, target: str, chance: Random, *, damages_requests: bool = False) -> None:
        self.bytes_a_second: int | None = None
        self.delay_s = 0.0
        self.damages_left = 0
        self.damaged = 0
        self._damages_requests = damages_requests
        self._bytes_to_stall: int | None = None
        self._target = split_address(target)
        self._chance = chance
        self._flows = threading.Event()
        self._flows.set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._live: set[socket.socket] = set()
        self._forgotten: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> BadNetwork:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.recover()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        with self._lock:
            _shut(self._live | self._forgotten)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    # -- weather -----------------------------------------------------------------------------------------------

    def stall(self, *, after_bytes: int = 0) -> None:
        """Lets so many more bytes from the server through, and then nothing in any direction."""
        self._bytes_to_stall = after_bytes
        if not after_bytes:
            self._flows.clear()

    @property
    def is_stalled(self) -> bool:
        """Whether nothing comes through."""
        return not self._flows.is_set()

    def cut(self) -> None:
        """Ends all connections, at once or in order; new ones can be made."""
        with self._lock:
            sockets, self._live = self._live, set()
            if self._chance.random() < 0.5:
                for one in sockets:
                    with contextlib.suppress(OSError):
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            _shut(sockets)
        self._flows.set()

    def forget(self) -> None:
        """Half-open: what is sent on present connections is swallowed, and neither side is told."""
        with self._lock:
            self._forgotten |= self._live
            self._live = set()

    def recover(self) -> None:
        """Good weather for the connections that are left."""
        self.bytes_a_second, self.delay_s, self._bytes_to_stall = None, 0.0, None
        self._flows.set()

    # -- pieces ------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                with self._lock:
                    self._live |= {client, server}
                both = (client, server)
                for pump in (
                    threading.Thread(target=self._pump, args=(*both, False)),
                    threading.Thread(target=self._pump, args=(*reversed(both), True)),
                ):
                    self._threads.append(pump)
                    pump.start()

    def _pump(self, source: socket.socket, sink: socket.socket, from_server: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_READ_BYTES):
                if source not in self._forgotten:
                    self._pass_on(data, sink, from_server)
        if source not in self._forgotten:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

    def _pass_on(self, data: bytes, sink: socket.socket, from_server: bool) -> None:
        if from_server or self._damages_requests:
            data = self._damaged(data)
        if from_server and self._bytes_to_stall is not None:
            data = self._until_stall(data, sink)
        self._flows.wait()
        time.sleep(self.delay_s)
        while data:
            size = len(data)
            if self.bytes_a_second is not None:
                size = max(int(self.bytes_a_second * _SLICE_S), 1)
                time.sleep(_SLICE_S)
            sink.sendall(data[:size])
            data = data[size:]

    def _until_stall(self, data: bytes, sink: socket.socket) -> bytes:
        """Sends what may still go; the rest waits."""
        with self._lock:
            size = min(self._bytes_to_stall or 0, len(data))
            self._bytes_to_stall = (self._bytes_to_stall or 0) - size
            if size < len(data):
                self._bytes_to_stall = None
                self._flows.clear()
        sink.sendall(data[:size])
        return data[size:]

    def _damaged(self, data: bytes) -> bytes:
        with self._lock:
            if not self.damages_left or len(data) < _DAMAGED_BYTES_MIN:
                return data
            self.damages_left -= 1
            self.damaged += 1
        at = self._chance.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << self._chance.randrange(8))]) + data[at + 1 :]


def _shut(sockets: set[socket.socket]) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
