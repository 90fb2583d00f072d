"""Programs that do the same at the same time."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path


def run_together(*programs: Sequence[str | Path]) -> list[int]:
    """Starts all, waits until each has written a line, and lets them go on together by ending their input.

    Returns:
        Their statuses.
    """
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            for program in programs
        ]
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        for process in running:
            assert process.stdin is not None
            process.stdin.close()
        return [process.wait() for process in running]
