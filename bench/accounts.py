"""What processes use, read from /proc: processor time and memory of their own."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_SAMPLE_S = 0.05
_CHECKPOINT_PROCESS = b"understudy.common.checkpoint_process"


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process so far, in steps of 10 ms; without its children."""
    fields = _stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs; 0 once it is gone. LMDB's map of its file is not in it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


def checkpoint_process(parent: int) -> int:
    """The pid of a node's checkpoint process; 0 if it has none."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            is_child = int(_stat_fields(int(folder.name))[1]) == parent
            if is_child and _CHECKPOINT_PROCESS in (folder / "cmdline").read_bytes():
                return int(folder.name)
    return 0


def children(parent: int) -> list[int]:
    """The pids of a process's children."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return [pid for pid in pids if _parent(pid) == parent]


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only its exit status."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return _stat_fields(pid)[0] not in "ZX"
    return False


def _parent(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return int(_stat_fields(pid)[1])
    return 0


def _stat_fields(pid: int) -> list[str]:
    """Fields of ``stat`` behind the command's name, which may hold anything; the first is the state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


class MemorySampler:
    """Watches anonymous memory of some processes, 20 times a second, until the block ends.

    A peak between two samples is missed; a checkpoint's lasts for tenths of a second.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self.peaks = dict.fromkeys(pids, 0)
        self.peak_of_sum = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            now = {name: anonymous_bytes(pid) for name, pid in self._pids.items()}
            self.peaks = {name: max(self.peaks[name], found) for name, found in now.items()}
            self.peak_of_sum = max(self.peak_of_sum, sum(now.values()))
