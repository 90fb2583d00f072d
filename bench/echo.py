"""An echo over gRPC, nothing else: what one bidirectional stream of ``grpc.aio`` does on this machine.

Both ends are processes of their own with the same event loop and the same socket options as Understudy's.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from jobs import EchoJob, argument, parse_job
from results import quantile

from understudy.cli.grpc_engine import prefer_the_faster_engine
from understudy.common.portal import new_event_loop

prefer_the_faster_engine()  # as the servers do, before gRPC is imported

import grpc  # noqa: E402
import grpc.aio  # noqa: E402

_METHOD = "/bench.Echo/Echo"


async def serve() -> None:
    """Echoes until standard input ends; prints its port."""

    async def echo(_: Any, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Echo": grpc.stream_stream_rpc_method_handler(echo)
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


async def ask(job: EchoJob) -> dict[str, float]:
    """Keeps ``in_flight`` messages on their way; gives messages a second and the median round trip."""
    message = bytes(job.message_bytes)
    sent_s: list[float] = []
    times_s: list[float] = []
    async with grpc.aio.insecure_channel(job.address) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(_METHOD)()
        for _ in range(job.in_flight):
            sent_s.append(time.monotonic())
            await call.write(message)
        began_s = time.monotonic()
        while time.monotonic() - began_s < job.seconds:
            await call.read()
            times_s.append(time.monotonic() - sent_s[len(times_s)])
            sent_s.append(time.monotonic())
            await call.write(message)
        call.cancel()
    return {"rate": len(times_s) / job.seconds, "p50_s": quantile(times_s, 0.5)}


def main() -> None:
    """Is what the argument says."""
    job = parse_job(EchoJob, argument())
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        if not job.address:
            runner.run(serve())
            return
        print(json.dumps(runner.run(ask(job))))


if __name__ == "__main__":
    main()
