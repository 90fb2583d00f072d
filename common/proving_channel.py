"""A channel whose calls say who calls: by token, by certificate, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio

AUTHORIZATION_METADATA = "authorization"

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")  # of calls, as a channel makes them

Metadata = Sequence[tuple[str, str | bytes]]


class ProvingChannel:
    """``channel`` as the generated stubs use it, with ``proofs()`` in the metadata of each call."""

    def __init__(self, channel: grpc.aio.Channel, proofs: Callable[[], Metadata]) -> None:
        self._channel = channel
        self._proofs = proofs

    def _proving(self, kind: Callable[..., Any]) -> Callable[..., Any]:
        def method(*arguments: Any, **options: Any) -> Any:
            call = kind(*arguments, **options)

            def called(*request: Any, metadata: Metadata = (), **options: Any) -> Any:
                return call(*request, metadata=(*metadata, *self._proofs()), **options)

            return called

        return method

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._channel, name)
        return self._proving(found) if name in KINDS else found

    async def __aenter__(self) -> ProvingChannel:
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._channel.__aexit__(*error)
