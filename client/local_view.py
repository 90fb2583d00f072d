"""What an application sees of a local realm at one moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import islice

import lmdb

from understudy.client.local_layout import Environment, Transaction, local_error, prefix, prefix_end, walk
from understudy.client.overlay import Overlay
from understudy.common.errors import UsageError
from understudy.v1 import local_pb2


class LocalView:
    """A copy with the queue on top, as they were when the view was opened. Must be closed.

    Everything raises :class:`UsageError` once it is closed, and :class:`CorruptionError` where the file turns out
    to be damaged.

    Attributes:
        path: the realm, as the application calls it.
        version: of the copy.
        pending: how many own changes that are not confirmed yet it shows.
    """

    def __init__(
        self,
        environment: Environment,
        path: str,
        copy: local_pb2.LocalCopy,
        overlay: Overlay,
        *,
        pending: int,
        on_close: Callable[[LocalView], None],
    ) -> None:
        self.path = path
        self.version = copy.version
        self.pending = pending
        self.overlay = overlay
        self._environment = environment
        self._copy = copy
        self._on_close = on_close
        self._lock = threading.Lock()  # closing the store may meet a read on another thread
        self._prefix = prefix(copy.id)
        try:
            self._txn: Transaction | None = environment.env.begin(environment.data)
        except lmdb.Error as error:
            raise local_error(error, "read", environment.path) from error

    def __enter__(self) -> LocalView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of that moment, so that its space can be used again."""
        with self._lock:
            txn, self._txn = self._txn, None
        if txn is not None:
            txn.abort()
            self._on_close(self)

    def get(self, key: bytes) -> bytes | None:
        """The value at ``key``; None where there is none."""
        try:
            with self._lock:
                below = self._open().get(self._prefix + key) if key else None
        except lmdb.BadValsizeError:
            return None  # longer than any key
        except lmdb.Error as error:
            raise local_error(error, "read", self._environment.path) from error
        return self.overlay.value(key, below) if self.overlay else below

    def scan(
        self, start: bytes = b"", end: bytes = b"", *, limit: int | None = None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Pairs from ``start`` to before ``end``, in order; empty means without bound."""
        base = self._base(start, end, reverse=reverse)
        return islice(self.overlay.scan(base, start, end, reverse=reverse), limit)

    def count(self, start: bytes = b"", end: bytes = b"") -> int:
        """How many keys there are from ``start`` to before ``end``."""
        if not (start or end or self.overlay):
            self._open()
            return self._copy.entries
        return sum(1 for _ in self.scan(start, end))

    def _base(self, start: bytes, end: bytes, *, reverse: bool) -> Iterator[tuple[bytes, bytes]]:
        first = self._prefix + start
        stop = self._prefix + end if end else prefix_end(self._copy.id)
        skip = len(self._prefix)
        try:
            with self._lock:
                rows = walk(self._open().cursor(), first, stop, reverse=reverse)
            while True:
                with self._lock:
                    self._open()
                    row = next(rows, None)
                if row is None:
                    return
                yield row[0][skip:], row[1]
        except lmdb.Error as error:
            raise local_error(error, "read", self._environment.path) from error

    def _open(self) -> Transaction:
        if self._txn is None:
            raise UsageError(f"this view of {self.path} is closed", remedy="open another one")
        return self._txn
