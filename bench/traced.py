"""A primary or a replica that notes when each commit passes which point, and writes that to a file at its end.

Usage: ``python -P traced.py FILE primary --data-dir DIR ...``. Times are of CLOCK_MONOTONIC, in seconds.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from understudy.cli.grpc_engine import prefer_the_faster_engine
from understudy.cli.main import run


def main() -> int:
    """Runs ``understudy`` with what follows the name of the file; returns its exit code."""
    prefer_the_faster_engine()  # before gRPC is imported below
    target, role, *arguments = sys.argv[1:]
    noted = _traced_primary() if role == "primary" else _traced_replica()
    code = run([role, *arguments])
    Path(target).write_text(json.dumps(noted))
    return code


def _traced_primary() -> dict[str, list[float]]:
    from understudy.common.changelog import ChangeLog
    from understudy.common.engine import Engine
    from understudy.primary.data_service import _Answers
    from understudy.primary.follower_session import FollowerSession
    from understudy.primary.node import PrimaryNode

    return {
        "submitted": _note(PrimaryNode, "submit"),
        "handed over": _note(Engine, "submit"),
        "writes": _note(ChangeLog, "write_batch"),
        "durable": _note(ChangeLog, "write_batch", at_end=True),
        "hears": _note(PrimaryNode, "on_durable"),
        "ships": _note(FollowerSession, "on_sending", when=lambda session, size, **_: size > 0),
        "replica told": _note(PrimaryNode, "on_replica_progress"),
        "answers": _note(_Answers, "add"),
    }


def _traced_replica() -> dict[str, list[float]]:
    from understudy.common.changelog import ChangeLog
    from understudy.replica.copy import Copy
    from understudy.replica.follow_session import FollowSession

    return {
        "chunk came": _note(FollowSession, "on_chunk", when=lambda session, records, **_: bool(records)),
        "replica writes": _note(ChangeLog, "write_batch"),
        "replica durable": _note(ChangeLog, "write_batch", at_end=True),
        "replica hears": _note(Copy, "on_durable"),
        "replica applied": _note(FollowSession, "on_applied_some"),
    }


def _note(
    owner: type, name: str, *, at_end: bool = False, when: Callable[..., bool] = lambda *_, **__: True
) -> list[float]:
    """Gives the list to which each call of a method adds the time when it began, or ended."""
    times_s: list[float] = []
    method = getattr(owner, name)

    @functools.wraps(method)
    def noted(*arguments: Any, **named: Any) -> Any:
        counts = when(*arguments, **named)
        if counts and not at_end:
            times_s.append(time.monotonic())
        result = method(*arguments, **named)
        if counts and at_end:
            times_s.append(time.monotonic())
        return result

    setattr(owner, name, noted)
    return times_s


if __name__ == "__main__":
    sys.exit(main())
