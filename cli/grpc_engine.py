"""Which of gRPC's two engines for input and output the servers run on."""

from __future__ import annotations

import importlib.metadata
import os

# The last version that was seen to have both, by their names here. A later one without them would say so on standard
# error at each start.
_VERSION_WITH_BOTH = (1, 85)


def prefer_the_faster_engine() -> None:
    """Chooses before gRPC is imported; a choice that the environment makes already stays.

    gRPC's default hands each event on from thread to thread: a round trip of ``grpc.aio`` takes twice as long with it,
    a replicated commit a tenth to a quarter longer (docs/performance.md).
    """
    version = tuple(map(int, importlib.metadata.version("grpcio").split(".")[:2]))
    if version <= _VERSION_WITH_BOTH:
        os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
