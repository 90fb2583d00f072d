"""Ctrl-C and SIGTERM for commands that have something to put in order before they end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@contextlib.contextmanager
def handling(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Has Ctrl-C and SIGTERM call ``handler`` while the block runs. For the main thread.

    What whoever started us has set otherwise, as a shell does for what runs in the background, stays so.
    """
    before = {number: usual for number, usual in _USUAL.items() if signal.getsignal(number) is usual}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


@contextlib.contextmanager
def interrupted_once() -> Iterator[None]:
    """Has the first Ctrl-C or SIGTERM end the block by a KeyboardInterrupt, and those after it do nothing.

    A second one would otherwise end what puts things in order: shells and supervisors often send two, one to the
    process and one to its group. SIGKILL is left.
    """
    came: list[int] = []

    def interrupt(number: int, _: object) -> None:
        came.append(number)
        if len(came) == 1:
            raise KeyboardInterrupt

    with handling(interrupt):
        yield
