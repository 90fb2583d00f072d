"""Metrics over HTTP, by prometheus-client's own server, in threads of its own."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server

from understudy.common.addresses import split_address
from understudy.common.errors import UsageError
from understudy.common.tls import ServerTls


@contextlib.contextmanager
def serve_metrics(address: str, registry: CollectorRegistry, tls: ServerTls | None = None) -> Iterator[None]:
    """Serves ``/metrics`` on ``HOST:PORT`` for the length of the block, over HTTPS where there is TLS.

    Raises:
        UsageError: the address is in use.
    """
    host, port = split_address(address)
    try:
        server, thread = start_http_server(
            port,
            host,
            registry,
            certfile=str(tls.cert) if tls is not None else None,
            keyfile=str(tls.key) if tls is not None else None,
        )
    except OSError as error:
        raise UsageError(f"can't serve metrics on {address}: {error.strerror}") from error
    if tls is not None:
        _follow_certificate(server.socket, tls)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _follow_certificate(listening: socket.socket, tls: ServerTls) -> None:
    assert isinstance(listening, ssl.SSLSocket)
    # Else the one thread that accepts would wait for whoever connects and never speaks.
    listening.do_handshake_on_connect = False  # type: ignore[attr-defined]  # the stubs do not know it
    context = listening.context

    def load() -> None:
        try:
            context.load_cert_chain(tls.cert, tls.key)
        except OSError as error:  # ssl.SSLError is one: the files have changed once more
            raise UsageError(f"metrics go on with the old certificate: {error}") from error

    tls.on_change(load)
