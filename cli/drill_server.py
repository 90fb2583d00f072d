"""A program: a primary on a restored backup that reads all it holds through a client of its own, ``DIR HOST:PORT``.

It prints a line of JSON every second as long as it gets on with reading, and one with the facts when everything was
read; it serves on, and ends with its standard input: nothing is left of a drill that was killed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from understudy.client import AsyncServer, aconnect
from understudy.common.directory import CONTROL_SOCKET
from understudy.common.errors import CorruptionError, ExitCode, UnderstudyError
from understudy.common.logs import configure_logs
from understudy.common.portal import new_event_loop
from understudy.common.rpc import open_channel, peer_errors, short_socket_path
from understudy.common.settings import PrimarySettings
from understudy.primary.server import serving_primary
from understudy.v1 import accounts_pb2, accounts_pb2_grpc

_CALL_S = 60.0
_TOKEN_S = 24 * 3600.0  # in which all must be read
_TELL_EVERY_S = 1.0
_REALMS_AT_ONCE = 32  # small ones take a sixth less time so than one after the other


async def _serve(directory: Path, listen: str) -> None:
    """Serves until it is cancelled.

    Raises:
        CorruptionError: not all of it can be read.
        UnderstudyError: it can't serve, or not any longer.
    """
    _cancel_with_our_input()
    settings = PrimarySettings(data_dir=directory, listen=listen)
    settings.validate()
    async with serving_primary(settings) as server:
        realms, pairs = await _read_all(server.address, directory)
        print(json.dumps({"address": server.address, "realms": realms, "pairs": pairs}), flush=True)
        raise await server.failed


def _cancel_with_our_input() -> None:
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def read() -> None:
        # Not through Python's buffer: its lock, held when the process ends by itself, would abort it and hide why.
        while os.read(sys.stdin.fileno(), 4096):
            pass
        loop.call_soon_threadsafe(task.cancel)

    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    threading.Thread(target=read, name="drill-input", daemon=True).start()


async def _read_all(address: str, directory: Path) -> tuple[int, int]:
    """The number of realms, and of all their pairs.

    Raises:
        CorruptionError: a realm can't be read, or not all of it.
    """
    with short_socket_path(directory / CONTROL_SOCKET) as socket:
        # Whoever may open the socket may do everything. The backup's own tokens may all be revoked or lost.
        async with open_channel(f"unix:{socket}") as channel:
            with peer_errors(address):
                stub = accounts_pb2_grpc.AccountsStub(channel)
                issued = await stub.IssueToken(
                    accounts_pb2.IssueTokenRequest(
                        kind=accounts_pb2.TOKEN_ADMIN, note="a drill", lifetime_s=_TOKEN_S
                    ),
                    timeout=_CALL_S,
                )
                async with aconnect(address, token=issued.token) as server:
                    realms, pairs = await _Reading(server).read_all()
                await stub.RevokeToken(accounts_pb2.RevokeTokenRequest(id=issued.id), timeout=_CALL_S)
    return realms, pairs


class _Reading:
    """Reads realms, and tells that it gets on."""

    def __init__(self, server: AsyncServer) -> None:
        self._server = server
        self._told_s = time.monotonic()

    async def read_all(self) -> tuple[int, int]:
        """The number of realms, and of all their pairs.

        Raises:
            CorruptionError: not all of them can be read.
        """
        realms = pairs = 0
        batch: list[str] = []
        async for realm in self._server.scan_realms():
            batch.append(realm.path)
            if len(batch) == _REALMS_AT_ONCE:
                pairs += sum(await asyncio.gather(*map(self._read, batch)))
                realms += len(batch)
                batch.clear()
        pairs += sum(await asyncio.gather(*map(self._read, batch)))
        return realms + len(batch), pairs

    async def _read(self, path: str) -> int:
        """The number of a realm's pairs.

        Raises:
            CorruptionError: not all of them can be read.
        """
        read = 0
        async for _ in self._server.scan(path):
            read += 1
            self._tell(path, read)
        counted = await self._server.count(path, timeout_s=_CALL_S)
        if read != counted:
            raise CorruptionError(f"{path} holds {counted:,} pairs, of which {read:,} could be read")
        self._tell(path, read)
        return read

    def _tell(self, path: str, read: int) -> None:
        if time.monotonic() - self._told_s >= _TELL_EVERY_S:
            self._told_s = time.monotonic()
            print(json.dumps({"realm": path, "read": read}), flush=True)


def main(directory: Path, listen: str) -> int:
    """Serves until standard input ends; returns the exit code."""
    configure_logs(level=logging.ERROR)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve(directory, listen))
    except asyncio.CancelledError:
        return ExitCode.DONE
    except UnderstudyError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return ExitCode.DONE


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
