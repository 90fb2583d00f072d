"""How processes beside a server leave the processors to it."""

from __future__ import annotations

import os


def let_commits_go_first() -> None:
    """From now on this process runs mostly where nobody else wants to."""
    os.nice(10)
