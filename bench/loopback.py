"""An echo over plain TCP, one connection, blocking: what the kernel's loopback does by itself. Prints its port."""

from __future__ import annotations

import socket


def main() -> None:
    """Echoes until its one peer is gone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        peer, _ = listener.accept()
        with peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := peer.recv(1 << 16):
                peer.sendall(data)


if __name__ == "__main__":
    main()
