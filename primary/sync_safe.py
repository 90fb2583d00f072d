"""How far a realm is on enough replicas, as far as its history tells. Pure."""

from __future__ import annotations

from understudy.primary.sync_host import Host


def find_safe_version(host: Host, path: str, *, told: int, upto: int) -> int:
    """The highest version up to ``upto`` that is on enough replicas.

    Args:
        host: the server.
        path: a realm that is there.
        told: a version known to be safe.
        upto: the last version of interest.
    """
    state = host.state
    before = state.history_first(path) - 1
    low, high = max(told, before), upto
    while low < high:
        middle = (low + high + 1) // 2
        rows = state.history(path, middle, count_max=1, bytes_max=1)
        if rows and rows[0].lsn <= host.safe_lsn:
            low = middle
        else:
            high = middle - 1
    return low if low > before else told  # what is no longer kept may never have been safe
