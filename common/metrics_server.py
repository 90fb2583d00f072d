"""Metrics over HTTP, by prometheus-client's own server, in threads of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server

from understudy.common.errors import UsageError
from understudy.common.rpc import split_address


@contextlib.contextmanager
def serve_metrics(address: str, registry: CollectorRegistry) -> Iterator[None]:
    """Serves ``/metrics`` on ``HOST:PORT`` for the length of the block.

    Raises:
        UsageError: the address is in use.
    """
    host, port = split_address(address)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise UsageError(f"can't serve metrics on {address}: {error.strerror}") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
