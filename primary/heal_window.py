"""What came home to this server, and the time after a promotion in which it takes nothing else."""

from __future__ import annotations

import asyncio

from understudy.common.events import log
from understudy.common.types import REALM_PATH_BYTES_MAX, format_id
from understudy.primary.homecoming import add_up
from understudy.v1 import admin_pb2, sync_pb2

_CLIENTS_COUNTED_MAX = 10_000  # a bound on memory; more are not told apart


class HealWindow:
    """Counts what comes home. While it is open, new transactions wait, so that histories do not fork meanwhile."""

    def __init__(self, until_s: float) -> None:
        """Open until the monotonic clock says ``until_s``; not at all if that is past."""
        self._until_s = until_s
        self._total = sync_pb2.Homecoming()
        self._clients: set[bytes] = set()
        # Of those who take something in: parsed, a tail is several times as large as it came.
        self.turn = asyncio.Lock()

    def is_open(self, now_s: float) -> bool:
        """Whether new transactions wait."""
        return now_s < self._until_s

    def note(self, client: bytes, path: str, homecoming: sync_pb2.Homecoming) -> None:
        """Something came home from a client, or (of no bytes) from an export."""
        if not homecoming.ByteSize():
            return  # broken off before anything was taken in
        add_up(self._total, homecoming)
        if (homecoming.appended or homecoming.renewed) and len(self._clients) < _CLIENTS_COUNTED_MAX:
            self._clients.add(client)
        report = log.warning if homecoming.refused else log.info
        report(
            "tail_refused" if homecoming.refused else "tail_came_home",
            realm=path[:REALM_PATH_BYTES_MAX],
            client=format_id(client),
            appended=homecoming.appended,
            renewed=homecoming.renewed,
            known=homecoming.known,
            refused=homecoming.refused,
            problems=list(homecoming.problems),
        )

    def status(self, now_s: float) -> admin_pb2.Healing:
        """For ``understudy status``."""
        return admin_pb2.Healing(
            seconds_left=max(self._until_s - now_s, 0.0), clients=len(self._clients), homecoming=self._total
        )
