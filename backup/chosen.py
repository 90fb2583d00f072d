"""Whether a selection chooses anything of a source: a mistyped realm is not to make a backup of nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from understudy.backup.contents import origin_of
from understudy.backup.selection import Selection
from understudy.backup.source import Source
from understudy.common.access import matches
from understudy.common.errors import UsageError
from understudy.common.store_layout import lmdb_errors
from understudy.common.types import is_system_realm

_SUGGESTED_MAX = 5


def check_chosen(source: Source, selection: Selection) -> list[str]:
    """The patterns of ``selection.realms`` that match no realm of a source.

    Raises:
        UsageError: nothing is chosen.
        StorageFailed.
    """
    if not selection.is_filtered:
        return []
    unmatched, is_any_chosen = list(selection.realms), False
    others: list[str] = []
    for path in _paths(source):
        unmatched = [pattern for pattern in unmatched if not matches(pattern, path)]
        if selection.takes(path):
            is_any_chosen = True
        elif len(others) < _SUGGESTED_MAX:
            others.append(path)
        if is_any_chosen and not unmatched:
            return []
    if not is_any_chosen:
        raise UsageError(
            f"{source.path} holds no realm that {replace(selection, portable=False)} chooses",
            remedy=f"it holds {', '.join(others)}" if others else "it holds none at all",
        )
    return unmatched


def _paths(source: Source) -> Iterator[str]:
    """All realms at a source's end but the system's own: damaged ones, and those that it had to leave out, too."""
    origin = origin_of(source)
    yield from (one.realm for one in (origin.failed if origin is not None else []) if one.realm)
    recent = set(source.state.recent_paths())
    yield from (path for path in sorted(recent) if not is_system_realm(path) and source.state.realm(path))
    environment = source.state.store.environment
    with lmdb_errors("read", environment.path):
        for key, _ in source.snapshot.txn.cursor(environment.realms):
            path = key.decode(errors="backslashreplace")
            if path not in recent and not is_system_realm(path):
                yield path
