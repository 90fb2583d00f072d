"""Ranges of an object, of which several are fetched at once; they are read in their order.

One connection to an object storage is slower than most networks are, and each answer takes its time to begin. Where a
connection is cut, the rest of its range is asked for again, and nothing else.
"""

from __future__ import annotations

import asyncio
import datetime
import io
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError, GenericError, PreconditionError

from understudy.common import portal

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ObjectStore
    from typing_extensions import Buffer

RANGE_BYTES = 4 << 20
# Fetched, or on their way, beside the one that is read: 36 MiB in all. In the 180 s for one, all have to come.
RANGES_AHEAD = 8

_NO_SUCH_RANGE = "416 Range Not Satisfiable"


@dataclass(frozen=True, slots=True)
class _Version:
    """What tells two objects of the same name apart."""

    size: int  # bytes
    e_tag: str | None
    modified: datetime.datetime | None  # where there is no ETag

    @staticmethod
    def of(about: ObjectMeta) -> _Version:
        """As the storage tells."""
        e_tag = about["e_tag"]
        return _Version(about["size"], e_tag, about["last_modified"] if e_tag is None else None)


class Ranges:
    """Of one version of an object: the one that is met first. The errors are the library's.

    Args:
        pauses: seconds to wait after each attempt; it ends when nothing is to be tried again.
    """

    def __init__(self, store: ObjectStore, name: str, pauses: Callable[[], Iterator[float]]) -> None:
        self._store = store
        self._name = name
        self._pauses = pauses
        self._version = _Version(0, None, None)

    @property
    def size(self) -> int:
        """Of the object, in bytes, once its first range is there."""
        return self._version.size

    async def first(self) -> memoryview:
        """The first range, or all of a smaller object, which takes a single request."""
        try:
            self._version, data = await self._get({"range": (0, RANGE_BYTES)})
        except GenericError as error:
            if _NO_SUCH_RANGE not in str(error):
                raise
            # Only an empty object has none.
            self._version = _Version.of(await obstore.head_async(self._store, self._name))
            if self.size:
                raise
            return memoryview(b"")
        return data

    async def fetch(self, start: int, end: int) -> memoryview:
        """What there is from one position up to another.

        Raises:
            PreconditionError: the object was replaced meanwhile.
        """
        options: GetOptions = {"range": (start, end)}
        # A weak tag never matches (RFC 9110, 13.1.1); each answer's own is compared with it all the same.
        if self._version.e_tag is not None and not self._version.e_tag.startswith("W/"):
            options["if_match"] = self._version.e_tag
        version, data = await self._get(options)
        if version != self._version:  # some storages know no conditions, or ignore them
            raise PreconditionError(f"{version} is not {self._version}")
        return data

    async def _get(self, options: GetOptions) -> tuple[_Version, memoryview]:
        """The library tries again, and asks for the rest where a connection is cut in the middle.

        It does not where there is no ETag; and of what has been replaced meanwhile it tells that it was cut. Only that
        is left to do here.
        """
        for pause_s in self._pauses():
            got = await obstore.get_async(self._store, self._name, options=options)
            try:
                return _Version.of(got.meta), memoryview(await got.bytes_async())
            except (BaseError, OSError) as error:
                failure: Exception = error
            await asyncio.sleep(pause_s)
        raise failure


class RangedDownload(io.RawIOBase):
    """What an object holds, from its beginning to its end. Closing it ends what is on its way.

    Nothing more is fetched before the first read: who only looks whether an object is there does not pay for it.

    Args:
        first: the first range, or all of a smaller object.
        size: of the object, bytes.
        fetch: awaits what is from one position up to another, all of it. What it raises, reading raises, again and
            again: nothing behind a range that is missing is ever read.
    """

    def __init__(
        self, first: memoryview, size: int, fetch: Callable[[int, int], Awaitable[memoryview]]
    ) -> None:
        self._first: memoryview | None = first
        self._size = size
        self._fetch = fetch
        self._begun = len(first)  # bytes that are fetched or being fetched
        self._ahead: deque[asyncio.Future[memoryview]] = deque()  # of the portal's loop
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """The next bytes; none only at the object's end."""
        if not self._piece:
            self._piece = portal.call(self._next())
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._piece))
        view[:count], self._piece = self._piece[:count], self._piece[count:]
        return count

    def close(self) -> None:
        """Returns when nothing is on its way any more."""
        if self._ahead:
            portal.call(self._end())
        super().close()

    async def _next(self) -> memoryview:
        """The next range, once it is there; empty behind the last."""
        if self._first is not None:
            piece, self._first = self._first, None
        elif self._ahead:
            piece = await self._ahead[0]
            self._ahead.popleft()  # only now: where it has failed, it has to fail again
        else:
            return memoryview(b"")
        self._look_ahead()
        return piece

    def _look_ahead(self) -> None:
        while self._begun < self._size and len(self._ahead) < RANGES_AHEAD:
            start, self._begun = self._begun, min(self._begun + RANGE_BYTES, self._size)
            self._ahead.append(asyncio.ensure_future(self._fetch(start, self._begun)))

    async def _end(self) -> None:
        ahead = list(self._ahead)
        self._ahead.clear()
        for one in ahead:
            one.cancel()  # nor is anybody told of the errors of those that have failed
        await asyncio.gather(*ahead, return_exceptions=True)
