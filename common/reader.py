"""Reads of the applied state, as servers answer them and an embedded primary makes them: checked, and in pages.

All of it runs on the event loop that applies entries; no step takes long enough to hold up commits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from itertools import islice
from typing import TypeVar, cast

from understudy.common.errors import NotPermitted, Overloaded, TransactionTooLarge
from understudy.common.scan import Scan
from understudy.common.state import State
from understudy.common.types import Lsn, RealmInfo, check_key, check_realm_path, is_system_realm

PAGE_BYTES = 256 << 10  # small enough that making one page never holds up commits for long
PAGE_PAIRS = 2_000
SCAN_S_MAX = 600.0  # a scan pins its snapshot, and what is pinned makes the store grow
SCANS_MAX = 64
KEYS_PER_GET_MAX = 10_000
ANSWER_BYTES_MAX = 16 << 20

_T = TypeVar("_T")


class OpenScan:
    """A scan under way, all of it as of one LSN."""

    def __init__(self, scan: Scan, *, lsn: Lsn, version: int, limit: int | None) -> None:
        self.lsn = lsn
        self.version = version
        self.at_end = limit == 0
        self._scan = scan
        self._left = limit
        self._deadline_s = time.monotonic() + SCAN_S_MAX

    def page(self) -> tuple[list[bytes], list[bytes]]:
        """The next keys and values.

        Raises:
            Overloaded: the scan has been open for too long.
        """
        if time.monotonic() > self._deadline_s:
            raise Overloaded(f"the scan took longer than {SCAN_S_MAX:.0f} s", remedy="scan smaller ranges")
        pairs_max = PAGE_PAIRS if self._left is None else min(PAGE_PAIRS, self._left)
        keys, values, self.at_end = self._scan.page(bytes_max=PAGE_BYTES, pairs_max=pairs_max)
        if self._left is not None:
            self._left -= len(keys)
            self.at_end = self.at_end or not self._left
        return keys, values


class Reader:
    """Reads what ``state`` gives; that raises where there is nothing to read from."""

    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state
        self._scans = 0

    def get(self, path: str, keys: Sequence[bytes]) -> tuple[list[bytes | None], Lsn]:
        """The values at some keys, all as of one LSN.

        Raises:
            UnknownRealm, BadRealmPath, BadKey, NotPermitted.
            TransactionTooLarge: too many keys, or too large values.
        """
        _check_readable(path)
        if len(keys) > KEYS_PER_GET_MAX:
            raise TransactionTooLarge(
                f"a read of {len(keys)} keys", remedy=f"ask for at most {KEYS_PER_GET_MAX} at once"
            )
        state = self._state()
        if not keys:
            state.get(path, b"")  # there may be no such realm
        values: list[bytes | None] = []
        size = 0
        for key in keys:
            check_key(key)
            value = state.get(path, key)
            values.append(value)
            size += len(value or b"")
            if size > ANSWER_BYTES_MAX:
                raise TransactionTooLarge(
                    "the values asked for are too large for one answer", remedy="ask for fewer"
                )
        return values, state.applied.lsn

    @contextlib.contextmanager
    def scan(
        self, path: str, start: bytes, end: bytes, *, limit: int | None = None, reverse: bool = False
    ) -> Iterator[OpenScan]:
        """A scan from ``start`` (included) to ``end`` (excluded); its first page must be taken at once.

        Raises:
            UnknownRealm, BadRealmPath, NotPermitted.
            Overloaded: too many are open.
        """
        _check_readable(path)
        if self._scans >= SCANS_MAX:
            raise Overloaded(f"{SCANS_MAX} scans are under way already", remedy="try again later")
        state = self._state()
        head = state.realm(path)
        self._scans += 1
        try:
            with state.scan(path, start, end, reverse=reverse) as scan:
                yield OpenScan(scan, lsn=state.applied.lsn, version=head.version if head else 0, limit=limit)
        finally:
            self._scans -= 1

    async def count(self, path: str, start: bytes, end: bytes) -> tuple[int, Lsn]:
        """How many keys there are from ``start`` to before ``end``, as of one LSN.

        Raises:
            UnknownRealm, BadRealmPath, NotPermitted, Overloaded.
        """
        _check_readable(path)
        state = self._state()
        if not start and not end:
            lsn, steps = state.applied.lsn, state.counting(path)
            known = await _finished(steps)
            if known is not None:
                return known, lsn
        with self.scan(path, start, end) as scan:
            count = 0
            while not scan.at_end:
                count += len(scan.page()[0])
                await asyncio.sleep(0)  # commits go on meanwhile, however many keys there are
            return count, scan.lsn

    async def realms(self) -> AsyncIterator[list[RealmInfo]]:
        """All realms but the system's own, in order of their paths, in pages; the first may be empty.

        Each page is as of its own moment, so that nothing is held however slowly they are taken. A realm that is there
        all the time is in one of them.
        """
        recent = self._state().recent_paths()
        after = ""
        while True:
            paths, page = self._realms_page(recent, after)
            yield page
            if len(paths) < PAGE_PAIRS:
                return
            after = paths[-1]
            await asyncio.sleep(0)

    def _realms_page(self, recent: list[str], after: str) -> tuple[list[str], list[RealmInfo]]:
        """The next paths behind ``after``, and what is known of those that are realms for clients.

        Args:
            recent: paths that the store may not have, or not yet have had when the first page was made; in order.
        """
        state = self._state()
        rows = dict(islice(state.store.current.realms(after), PAGE_PAIRS))
        start = bisect_right(recent, after)
        paths = sorted({*rows, *recent[start : start + PAGE_PAIRS]})[:PAGE_PAIRS]
        page = []
        for path in paths:
            head = state.realm(path)
            if head is None or is_system_realm(path):
                continue
            row = rows.get(path)
            known = row if row is not None and row.id == head.id else None
            page.append(
                RealmInfo(
                    path=path,
                    version=head.version,
                    entries=known.entries if known else 0,
                    bytes=known.bytes if known else 0,
                )
            )
        return paths, page


async def _finished(steps: Generator[None, None, _T]) -> _T:
    """What ``steps`` return; others get a turn between two of them."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast(_T, end.value)
        await asyncio.sleep(0)


def _check_readable(path: str) -> None:
    check_realm_path(path)
    if is_system_realm(path):
        raise NotPermitted(f"realm {path} is the system's own")
