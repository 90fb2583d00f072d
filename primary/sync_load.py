"""A realm's state on its way to a client, page by page. Pure over the ports of :mod:`understudy.primary.sync_host`.

Every page is of one version. Pages of one scan are of the same; the next scan is of a later one, and the changes
made meanwhile go out before its first page. So a load can be broken off after any page and gone on with much later,
and pins what it reads only for a while.

The last page brings the signed changes that no replica is known to have, so that whoever has loaded a realm can bring
them home as one who has followed it.
"""

from __future__ import annotations

from collections.abc import Sequence

from understudy.primary.sync_host import Change, Head, Host, Pages
from understudy.primary.sync_safe import find_safe_version
from understudy.v1 import sync_pb2

PAGE_PAIRS = 2_000
PAGE_BYTES = 256 << 10
PAGES_A_SCAN = 64  # 16 MiB
UNREAD_POLLS_MAX = 10  # so often in a row may the session look around while nothing is taken from a scan
# Of the changes that come with the last page: what a client keeps, and with the page what a message takes.
TAIL_CHANGES_MAX = 10_000
TAIL_BYTES_MAX = 4 << 20
CHANGES_AT_ONCE = 500  # read in two milliseconds


class Loading:
    """One load. ``begun``: the client holds pages, of the version that its binding stands at."""

    def __init__(self, frontier: bytes | None) -> None:
        """Goes on behind ``frontier``, the last key that the client holds; None: from the first."""
        self.begun = frontier is not None
        self._frontier = frontier or b""
        self._scan: Pages | None = None
        self._pages_left = 0
        self._unread_polls = 0
        self._position = sync_pb2.RealmPosition()
        self._realm_id = 0
        self._lsn = 0
        self._last_numbers: list[int] = []
        self._page: sync_pb2.StatePage | None = None
        self._unsafe: _UnsafeChanges | None = None  # what goes with the last page

    def close(self) -> None:
        """Lets go of what is pinned."""
        if self._scan is not None:
            self._scan.close()
            self._scan = None

    def next_page(
        self, host: Host, path: str, head: Head, clients: Sequence[bytes]
    ) -> sync_pb2.StatePage | None:
        """The page to be sent next, the same until it was :meth:`sent`; None: it must not be seen yet."""
        if self._page is None:
            if self._scan is None and not self._open(host, path, head, clients):
                return None
            self._page = self._make()
        return self._page

    def _open(self, host: Host, path: str, head: Head, clients: Sequence[bytes]) -> bool:
        lsn = host.state.head_lsn(path)
        if lsn > host.shown_lsn:
            return False
        self._scan = host.scan(path, self._frontier)
        self._pages_left = PAGES_A_SCAN
        self._position = sync_pb2.RealmPosition(version=head.version, digest=head.head)
        self._realm_id, self._lsn = head.id, lsn
        self._last_numbers = [host.state.last_number(path, client) for client in clients]
        self._time_us = host.state.time_us
        return True

    def _make(self) -> sync_pb2.StatePage:
        assert self._scan is not None
        keys, values, at_end = self._scan.page(bytes_max=PAGE_BYTES, pairs_max=PAGE_PAIRS)
        return sync_pb2.StatePage(
            position=self._position,
            realm_id=self._realm_id,
            lsn=self._lsn,
            keys=keys,
            values=values,
            last=at_end,
            last_numbers=self._last_numbers,
            time_us=self._time_us,
        )

    def make_whole(self, host: Host, path: str, page: sync_pb2.StatePage) -> bool:
        """Adds some of the changes that go with the last page; whether ``page`` has all, and may be :meth:`sent`.

        To be called when the page can go out at once, so that none is held for long with them.
        """
        if not page.last:
            return True
        if self._unsafe is None:
            self._unsafe = _UnsafeChanges(host, path, page)
        return self._unsafe.add_some(host, path)

    def sent(self, page: sync_pb2.StatePage) -> None:
        """The page is going out."""
        self.begun, self._page, self._unsafe = True, None, None
        if page.keys:
            self._frontier = page.keys[-1]
        self._pages_left -= 1
        self._unread_polls = 0
        if self._pages_left <= 0:
            self.close()

    def poll(self) -> None:
        """Time has passed: a client that does not read pins nothing; it goes on with another scan."""
        self._unread_polls += 1
        if self._unread_polls > UNREAD_POLLS_MAX:
            self.close()


class _UnsafeChanges:
    """The changes up to a page's version that are not safe, as far back as history goes; none where they don't fit.

    A replica that lacks so many is hardly promoted, and where there is no replica at all, that is the whole history.
    """

    def __init__(self, host: Host, path: str, page: sync_pb2.StatePage) -> None:
        version = page.position.version
        self._page = page
        self._hmacs: list[bytes] = []
        self._next = self._end = version + 1  # the next to be read: none
        self._bytes_left = TAIL_BYTES_MAX - page.ByteSize()
        if page.lsn <= host.safe_lsn or self._bytes_left <= 0:
            return
        safe = find_safe_version(host, path, told=0, upto=version)
        first = max(safe + 1, host.state.history_first(path))
        if first <= version < first + TAIL_CHANGES_MAX:
            self._next = first

    def add_some(self, host: Host, path: str) -> bool:
        """Reads on, and adds what it reads to the page; whether that was all."""
        count = min(self._end - self._next, CHANGES_AT_ONCE)
        if count:
            rows = host.state.history(path, self._next, count_max=count, bytes_max=self._bytes_left)
            self._add(rows or [])
            if not rows or self._bytes_left < 0:  # no longer kept, or too many
                self._give_up()
        if self._next < self._end:
            return False
        self._page.hmacs = b"".join(self._hmacs)
        return True

    def _add(self, rows: Sequence[Change]) -> None:
        changes = [row.change for row in rows]
        self._next += len(rows)
        self._bytes_left -= sum(map(len, changes))
        self._page.changes.extend(changes)
        self._hmacs += [row.hmac for row in rows]

    def _give_up(self) -> None:
        self._next = self._end
        self._page.ClearField("changes")
        self._hmacs.clear()
