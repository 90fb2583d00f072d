"""The machine that was measured, as far as figures depend on it. No names of hosts, people or directories."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

_PACKAGES = ("understudy", "grpcio", "protobuf", "lmdb", "uvloop", "xxhash", "sortedcontainers")
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})


def facts(folder: Path) -> dict[str, Any]:
    """What stands beside the figures; ``folder`` is where the data lay."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
        "file_system": file_system(folder),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def file_system(folder: Path) -> str:
    """The type of the file system that ``folder`` lies on, such as ``ext4``."""
    found = ("", "unknown")
    path = folder.resolve()
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split(" ")
        if path.is_relative_to(mount) and len(mount) >= len(found[0]):
            found = (mount, kind)
    return found[1]


def is_in_memory(folder: Path) -> bool:
    """Whether an fsync in ``folder`` would cost nothing, and so say nothing."""
    return file_system(folder) in _IN_MEMORY


def busy() -> dict[str, float]:
    """Processor time of the whole machine since it started, in seconds, by kind.

    ``busy`` is all but idle and waiting for I/O; ``stolen`` is what the hypervisor gave to others meanwhile.
    """
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, idle, iowait, irq, softirq, steal = fields[:8]
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    return {
        "busy": (user + nice + system + irq + softirq) * tick_s,
        "stolen": steal * tick_s,
        "all": (user + nice + system + idle + iowait + irq + softirq + steal) * tick_s,
    }


def stolen_percent(before: dict[str, float]) -> float:
    """The share of all processor time since ``before`` that the hypervisor gave to others."""
    now = busy()
    return 100 * (now["stolen"] - before["stolen"]) / max(now["all"] - before["all"], 1e-9)
