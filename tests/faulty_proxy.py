"""A TCP proxy that flips bits in what a server sends, wherever a given word comes by, or keeps it all back."""

from __future__ import annotations

import contextlib
import socket
import threading

from understudy.common.addresses import split_address

_READ_BYTES = 1 << 16


class FaultyProxy:
    """Between clients and ``target``; harmless until it is told otherwise."""

    def __init__(self, target: str, word: bytes = b"") -> None:
        self.flips_left = 0  # so many times a bit is flipped where ``word`` comes by
        self.is_mute = False  # while it is, nothing of what the server sends arrives
        self.bytes_sent = 0  # by the server
        self._target = split_address(target)
        self._word = word
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> FaultyProxy:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._sockets += [client, server]
                for pump in (
                    threading.Thread(target=self._pump, args=(client, server, False)),
                    threading.Thread(target=self._pump, args=(server, client, True)),
                ):
                    self._threads.append(pump)
                    pump.start()

    def _pump(self, source: socket.socket, sink: socket.socket, from_server: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_READ_BYTES):
                if not from_server:
                    sink.sendall(data)
                elif not self.is_mute:
                    self.bytes_sent += len(data)
                    sink.sendall(self._flipped(data))
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _flipped(self, data: bytes) -> bytes:
        at = data.find(self._word)
        if at < 0 or not self.flips_left:
            return data
        self.flips_left -= 1
        return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
