"""The services that a server answers with at the moment: those of a promoted replica change under its connections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import grpc
import grpc.aio

Add = Callable[[grpc.aio.Server], None]


class ServiceTable(grpc.GenericRpcHandler):
    """Finds the handler of a call among the services added last."""

    def __init__(self) -> None:
        self._handlers: dict[str, Any] = {}

    def replace(self, add: Add) -> None:
        """Answers new calls with the services that ``add`` adds to what it is given, and with no others.

        Calls under way go on with the handlers that they began with.
        """
        collected = _Collected()
        add(cast(grpc.aio.Server, collected))
        self._handlers = collected.handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler, or None."""
        return self._handlers.get(handler_call_details.method)


class _Collected:
    """What generated code takes for a server."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Iterable[object]) -> None:
        """They are the same as the registered ones."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Each by the name that calls have."""
        self.handlers |= {f"/{service}/{method}": handler for method, handler in handlers.items()}
