"""What can happen to the machine that a node runs on: its processes are killed, or its power fails.

A power loss takes what had not reached the disk. ext4 offers that for testing: forced to shut down without flushing its
journal, a file system refuses everything from that moment on, and when it is mounted again it is what the disk held.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Protocol

import pytest
from harness import Process, wait_until

_COMMAND_S_MAX = 60.0
_DISK_BYTES = 1 << 30  # sparse
# _IOR('X', 125, __u32) and its argument, from the kernel's fs/ext4/ext4.h.
_EXT4_IOC_SHUTDOWN = 0x8004587D
_EXT4_GOING_FLAGS_NOLOGFLUSH = 2
_AFTERLIFE_S_MAX = 0.2
_POLL_S = 0.005


class Machine(Protocol):
    """Where a node's data are."""

    directory: Path  # the node's data directory
    crash_name: str

    def crash(self, process: Process) -> None:
        """The process is gone, and whatever else a crash of this kind takes. The directory can be used again."""


class Killing:
    """A machine that runs on; processes are killed."""

    crash_name = "kills"

    def __init__(self, folder: Path) -> None:
        self.directory = folder / "data"

    def crash(self, process: Process) -> None:
        """``kill -9``."""
        process.kill()


class PowerLoss:
    """A machine with a disk of its own, whose power fails."""

    crash_name = "power losses"

    def __init__(self, device: str, mount_point: Path, chance: Random) -> None:
        self.directory = mount_point / "data"
        self._device = device
        self._mount_point = mount_point
        self._chance = chance

    def crash(self, process: Process) -> None:
        """Nothing reaches the disk any more; a moment later the process is gone as well.

        In that moment it can still talk, and must not say that something is durable.
        """
        self.unplug()
        let_run(process, self._chance.random() * _AFTERLIFE_S_MAX)
        process.kill()
        self.plug_in()

    def unplug(self) -> None:
        """From now on everything on the disk fails, and what was not durable is lost."""
        fd = os.open(self._mount_point, os.O_RDONLY)
        try:
            flags = struct.pack("I", _EXT4_GOING_FLAGS_NOLOGFLUSH)
            fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, flags)
        finally:
            os.close(fd)

    def plug_in(self) -> None:
        """Mounts the disk again, once nobody has a file on it open any more."""
        # The process that writes checkpoints ends by itself, a moment after its parent.
        wait_until(lambda: _try("umount", self._mount_point), what=lambda: f"{self._mount_point} is in use")
        _run("mount", self._device, self._mount_point)


def let_run(process: Process, seconds: float) -> None:
    """Returns after that time, or when the process has ended."""
    deadline_s = time.monotonic() + seconds
    while process.is_running and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


@contextlib.contextmanager
def power_losses(folder: Path, chance: Random, count: int) -> Iterator[list[PowerLoss]]:
    """Machines whose power can fail; skips the test where they can't be had."""
    check_loop_devices()
    with contextlib.ExitStack() as stack:
        yield [
            PowerLoss(*stack.enter_context(_disk(folder / f"disk{number}")), chance)
            for number in range(count)
        ]


def check_loop_devices() -> None:
    """Skips the test where a file system of its own can't be had, saying why."""
    missing = [
        program for program in ("mkfs.ext4", "losetup", "mount", "umount") if not shutil.which(program)
    ]
    if not sys.platform.startswith("linux"):
        pytest.skip("a power loss is made with ext4 on a loop device: this is not Linux")
    if missing:
        pytest.skip(f"a power loss is made with ext4 on a loop device: {', '.join(missing)} not found")
    if os.geteuid() != 0:
        pytest.skip("a power loss is made with ext4 on a loop device, and only root may mount one")
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("a power loss is made with ext4 on a loop device: there is no /dev/loop-control here")


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[tuple[str, Path]]:
    """An empty file system: its device, and where it is mounted. Nothing of it is left afterwards."""
    mount_point = folder / "mounted"
    mount_point.mkdir(parents=True)
    image = folder / "image"
    with open(image, "wb") as file:
        file.truncate(_DISK_BYTES)
    _run("mkfs.ext4", "-q", image)
    with contextlib.ExitStack() as stack:
        stack.callback(image.unlink)
        try:
            device = _run("losetup", "--find", "--show", image)
        except subprocess.CalledProcessError as error:
            pytest.skip(
                f"a power loss is made with ext4 on a loop device: losetup says {error.stderr.strip()}"
            )
        stack.callback(_run, "losetup", "--detach", device)
        try:
            _run("mount", device, mount_point)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"a power loss is made with ext4 on a loop device: mount says {error.stderr.strip()}")
        # Lazily, so that it goes even if a process that the test has left behind holds a file in it.
        stack.callback(_try, "umount", "--lazy", mount_point)
        yield device, mount_point


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        [*map(str, command)], check=True, capture_output=True, text=True, timeout=_COMMAND_S_MAX
    )
    return done.stdout.strip()


def _try(*command: str | Path) -> bool:
    done = subprocess.run([*map(str, command)], capture_output=True, timeout=_COMMAND_S_MAX)
    return done.returncode == 0
