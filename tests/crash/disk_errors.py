"""A command whose n-th call of some kind on some file fails, made so by strace: the real process and the real file.

A first run notes all the calls that change files; each of them can then be made to fail in a run of its own. strace
counts the calls of each thread for itself, so the n-th call fails in every thread that comes so far.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import Launch, Running

_ON_DESCRIPTORS = (
    "write",
    "pwrite64",
    "writev",
    "pwritev",
    "fsync",
    "fdatasync",
    "ftruncate",
    "fallocate",
    "copy_file_range",
)
_ON_NAMES = ("openat", "rename", "mkdir")
_LINE = re.compile(r"\d+ +(\w+)\((.*)")
_DESCRIPTOR = re.compile(r"\d+<([^>]*)>")
_NAME = re.compile(r'"([^"]*)"')
_TRY_S_MAX = 20.0


@dataclass(frozen=True, slots=True)
class Call:
    """The ``nth`` (from 1) call of a kind on a file; its path is relative to the data directory."""

    system_call: str
    path: str
    nth: int

    def __str__(self) -> str:
        return f"{self.system_call} number {self.nth} on {self.path}"


def check_strace() -> None:
    """Skips the test where strace can't be used, saying why."""
    if shutil.which("strace") is None:
        pytest.skip("errors of the disk are made with strace, which is not installed")
    command = ["strace", "-f", "--seccomp-bpf", "-e", "inject=getcwd:error=EIO", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TRY_S_MAX)
    if done.returncode:
        pytest.skip(
            f"errors of the disk are made with strace, which may not trace here: {done.stderr.strip()}"
        )


def noting(output: Path) -> Launch:
    """A way to start a command whose calls are noted in a file."""
    calls = ",".join((*_ON_DESCRIPTORS, *_ON_NAMES))
    return _under_strace("-y", "-o", str(output), "-e", f"trace={calls}")


def failing(call: Call, directory: Path, error: str, output: Path) -> Launch:
    """A way to start a command of which one call fails with ``error``; ``output`` tells, see :func:`has_failed`."""
    inject = f"inject={call.system_call}:error={error}:when={call.nth}"
    trace = f"trace={call.system_call}"
    return _under_strace("-o", str(output), "-P", str(directory / call.path), "-e", trace, "-e", inject)


def has_failed(output: Path) -> bool:
    """Whether the call came."""
    return "(INJECTED)" in output.read_text()


def _under_strace(*options: str) -> Launch:
    # -D: the command is our child, and strace the one beside: signals and exit codes are the command's own.
    strace = ["strace", "-D", "-f", "-qq", "--seccomp-bpf", *options]

    def launch(arguments: list[str], environment: dict[str, str], stdout: Path, stderr: Path) -> Running:
        with open(stdout, "wb") as out, open(stderr, "wb") as err:
            return subprocess.Popen(
                [*strace, sys.executable, "-m", "understudy.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
            )

    return launch


def noted_calls(output: Path, directory: Path) -> list[Call]:
    """All calls that changed something in the data directory, in the order in which they came."""
    counts: Counter[tuple[str, str, str]] = Counter()
    found: dict[Call, None] = {}
    for line in output.read_text(errors="replace").splitlines():
        system_call, path, creates = _parsed(line)
        if not path.startswith(f"{directory}/") and path != str(directory):
            continue
        key = (line.partition(" ")[0], system_call, path)
        counts[key] += 1
        if system_call != "openat" or creates:
            relative = str(Path(path).relative_to(directory))
            found[Call(system_call, relative, counts[key])] = None
    return list(found)


def _parsed(line: str) -> tuple[str, str, bool]:
    """The call's kind, the file's path, and whether it may create the file; empty where there is none."""
    match = _LINE.match(line)
    if match is None:
        return "", "", False
    system_call, rest = match.groups()
    place = (_NAME if system_call in _ON_NAMES else _DESCRIPTOR).search(rest)
    return system_call, place[1] if place else "", "O_CREAT" in rest
