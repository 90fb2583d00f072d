"""The command line in a process whose wall clock is an hour behind for as long as a file exists.

``python clock_jump.py FILE COMMAND ...``
"""

from __future__ import annotations

import os
import sys
import time

HOUR_NS = 3600 * 10**9


def main() -> None:
    """Replaces the clock, then runs the command."""
    flag = sys.argv.pop(1)
    real_ns = time.time_ns

    def time_ns() -> int:
        return real_ns() - (HOUR_NS if os.path.exists(flag) else 0)

    time.time_ns = time_ns
    time.time = lambda: time_ns() / 1e9
    from understudy.cli.main import main as command_line

    command_line()


if __name__ == "__main__":
    main()
