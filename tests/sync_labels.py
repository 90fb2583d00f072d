"""Labels: every change adds 1 to a counter of its own, so that counters tell what was lost and what was done twice."""

from __future__ import annotations

from collections.abc import Iterable

from understudy.common.operations import ADD
from understudy.v1 import log_pb2

LABEL = b"once/"

Label = tuple[str, bytes]  # realm and key


def labels_of(path: str, operations: Iterable[log_pb2.Operation]) -> set[Label]:
    """Of a change with these operations."""
    return {(path, one.key) for one in operations if one.kind == ADD and one.key.startswith(LABEL)}
