"""The demo's last act: four devices outlive a server that had confirmed to them what its replica did not have."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from understudy.cli.demo_device import Device, digest, entry, operations
from understudy.cli.demo_fates import (
    Fate,
    Reunion,
    copy_problems,
    counter_problems,
    fate_problems,
    present,
)
from understudy.cli.demo_processes import Node, run_command
from understudy.cli.demo_screen import Screen
from understudy.cli.output import seconds_text
from understudy.client import Delete, Put, Server, connect

NOTES: Final = "/notes"
TASKS: Final = "/tasks"
_SOMEBODY: Final = "somebody"  # who writes to the server itself
_PLAN: Final = b"plan"  # what somebody deletes and a device, offline, updates
_WRITTEN: Final = 20
_QUEUED: Final = 5

EXPECTED: Final = [
    Fate(name="laptop", realm=NOTES, lost=_WRITTEN, appended=_WRITTEN, queued=_QUEUED, kept=_QUEUED),
    Fate(name="phone", realm=NOTES, queued=_QUEUED, kept=_QUEUED),
    # One more in its queue: the update of what somebody has deleted meanwhile.
    Fate(
        name="desktop",
        realm=TASKS,
        resets=("OTHER_HISTORY, recover",),
        lost=_WRITTEN,
        renewed=_WRITTEN,
        queued=_QUEUED + 1,
        kept=_QUEUED,
    ),
    # What it had from the desktop is home by then.
    Fate(
        name="tablet",
        realm=TASKS,
        resets=("OTHER_HISTORY, discard",),
        lost=_WRITTEN,
        renewed=_WRITTEN,
        queued=_QUEUED,
    ),
]

_T = TypeVar("_T")


class ClientStory:
    """Everything that happens, in order. What speaks to a server is called in threads, and waits."""

    def __init__(self, folder: Path, *, screen: Screen) -> None:
        self._third = Node("third", folder)
        self._fourth = Node("fourth", folder)
        self._screen = screen
        self._laptop = Device("laptop", NOTES, folder, on_reset="recover_or_discard")
        self._phone = Device("phone", NOTES, folder, on_reset="recover_or_discard")
        self._desktop = Device("desktop", TASKS, folder, on_reset="recover")
        self._tablet = Device("tablet", TASKS, folder, on_reset="discard")
        self._devices = [self._laptop, self._phone, self._desktop, self._tablet]

    async def play(self) -> Reunion:
        """From the start of two nodes to the proof; nothing runs any more when this returns or raises.

        Raises:
            UnderstudyError: it could not be played to its end.
        """
        async with contextlib.AsyncExitStack() as stack:
            for node in (self._third, self._fourth):
                stack.push_async_callback(node.stop)
            stack.push_async_callback(asyncio.to_thread, self._end_devices)
            await self._start()
            await self._fall_behind()
            await self._fail_over()
            return await self._in_thread(self._come_back)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        """What waits. Interrupted, it ends before the nodes do, which it may just be waiting for."""
        task = asyncio.create_task(asyncio.to_thread(work))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.to_thread(self._end_devices)
            await asyncio.gather(task, return_exceptions=True)
            raise

    def _end_devices(self) -> None:
        for device in self._devices:
            device.end()

    # -- before --------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        await self._third.start_primary("--durability", "local")
        await self._fourth.start_replica(self._third.address)
        self._screen.tell("four devices begin; third is at durability local, fourth its replica")
        await self._in_thread(self._load)
        self._screen.tell("laptop and phone have copies of /notes, desktop and tablet of /tasks")

    def _load(self) -> None:
        with connect(self._third.address) as server:
            for path in (NOTES, TASKS):
                # Returns when the replica has it, and so what was there before.
                server.commit(path, [Put(_PLAN, b"to be made")], durability="replica")
        for device in self._devices:
            device.open(f"{self._third.address},{self._fourth.address}")
            device.catch_up()

    async def _fall_behind(self) -> None:
        await self._fourth.stop()
        self._screen.tell("stopped fourth: what is confirmed from here on, only third has")
        await self._in_thread(self._write)
        confirmed = sum(len(device.confirmed) for device in self._devices)
        queued = sum(len(device.queued) for device in self._devices)
        self._screen.tell(f"{confirmed} changes are confirmed; all but laptop go offline, and queue {queued}")

    def _write(self) -> None:
        """One after the other, so that it comes out the same each time."""
        self._laptop.write(_WRITTEN // 2)
        self._phone.catch_up()
        self._phone.open(None)
        self._laptop.write(_WRITTEN - _WRITTEN // 2)
        self._desktop.write(_WRITTEN)
        self._tablet.catch_up()
        self._desktop.open(None)
        self._tablet.write(_WRITTEN)
        self._tablet.open(None)
        self._desktop.queue_update(_PLAN, b"made")
        for device in (self._phone, self._desktop, self._tablet):
            device.queue(_QUEUED)

    # -- failover ------------------------------------------------------------------------------------------

    async def _fail_over(self) -> None:
        await self._third.kill()
        await self._in_thread(self._queue_on)
        began_s = time.monotonic()
        await run_command("promote", str(self._fourth.directory))
        self._screen.tell(
            f"killed third (SIGKILL), promoted fourth in {seconds_text(time.monotonic() - began_s)}"
        )
        await self._fourth.start_primary("--durability", "local")

    def _queue_on(self) -> None:
        """It was online to the last moment."""
        self._laptop.open(None)
        self._laptop.queue(_QUEUED)

    def _come_back(self) -> Reunion:
        with connect(self._fourth.address) as server:
            lost = {device.name: _absent(device, _pairs(server, device.path)) for device in self._devices}
            self._screen.tell(
                f"fourth lacks {sum(lost.values())} confirmed changes, and somebody goes on in {TASKS}"
            )
            server.commit(TASKS, [*operations(*entry(_SOMEBODY, 1)), Delete(_PLAN)])
            homes = {device.name: self._bring_back(device, server) for device in self._devices}
            reunion = self._prove(server, lost, homes)
        self._screen.tell("compared all copies with fourth")
        return reunion

    def _bring_back(self, device: Device, server: Server) -> _Home:
        before = server.status().healing.homecoming
        device.open(self._fourth.address)
        device.catch_up()
        after = server.status().healing.homecoming
        home = _Home(after.appended - before.appended, after.renewed - before.renewed)
        self._screen.tell(f"{device.name} is back: {_home_text(home)}; {_reset_text(device)}")
        return home

    def _prove(self, server: Server, lost: dict[str, int], homes: dict[str, _Home]) -> Reunion:
        fates: list[Fate] = []
        problems: list[str] = []
        for path in (NOTES, TASKS):
            devices = [device for device in self._devices if device.path == path]
            for device in devices:
                device.catch_up()
            pairs = _pairs(server, path)
            fates += [_fate(device, lost[device.name], homes[device.name], pairs) for device in devices]
            copies = [(device.name, device.digest()) for device in devices]
            problems += copy_problems(path, digest(pairs.items()), copies)
            problems += counter_problems(path, pairs, [_SOMEBODY, *(device.name for device in devices)])
        return Reunion(fates=fates, problems=[*fate_problems(fates, EXPECTED), *problems])


class _Home(NamedTuple):
    """What a device brought home, as the server counts it."""

    appended: int
    renewed: int


def _pairs(server: Server, path: str) -> dict[bytes, bytes]:
    return dict(server.scan(path))


def _absent(device: Device, pairs: dict[bytes, bytes]) -> int:
    return len(device.confirmed) - present(device.confirmed, pairs)


def _fate(device: Device, lost: int, home: _Home, pairs: dict[bytes, bytes]) -> Fate:
    return Fate(
        name=device.name,
        realm=device.path,
        resets=device.resets(),
        lost=lost,
        missing=_absent(device, pairs),
        appended=home.appended,
        renewed=home.renewed,
        queued=len(device.queued),
        kept=present(device.queued, pairs),
    )


def _home_text(home: _Home) -> str:
    if home.appended:
        return f"{home.appended} changes home as they were"
    return f"{home.renewed} changes home as new ones" if home.renewed else "nothing to bring home"


def _reset_text(device: Device) -> str:
    return "; ".join(device.resets()) or "no reset"
