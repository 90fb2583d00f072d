"""Many things in order, in transactions of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from understudy.common.errors import UnderstudyError

# Large enough that a transaction costs little beside its content, small enough that others get their turn.
BATCH_BYTES = 1 << 20

_T = TypeVar("_T")


def in_batches(items: Iterable[_T], size_of: Callable[[_T], int], *, count_max: int) -> Iterator[list[_T]]:
    """The items in order, at most ``count_max`` and about ``BATCH_BYTES`` at a time.

    Args:
        size_of: what an item counts for in a transaction, in bytes; one that is larger than a batch has one to itself.

    Raises:
        UnderstudyError: what reading the items raises; those that came before it are a batch first.
    """
    batch: list[_T] = []
    size = 0
    try:
        for item in items:
            more = size_of(item)
            if batch and (len(batch) == count_max or size + more > BATCH_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(item)
            size += more
    except UnderstudyError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch
