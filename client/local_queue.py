"""A realm's own changes that are not confirmed yet, in memory: a mirror of the rows of ``queue``.

Changed only once the rows are, under the store's lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from understudy.client.local_types import ForeignChange, Queued
from understudy.client.overlay import Overlay
from understudy.v1 import log_pb2


def is_meant(client: bytes, number: int, foreign: ForeignChange) -> bool:
    """Whether an own change has to get another name."""
    return client == foreign.client and foreign.first <= number <= foreign.last


def _is_left_of(ours: Iterable[log_pb2.Operation], theirs: Iterable[log_pb2.Operation]) -> bool:
    """Whether ours are theirs, or what a reset has left of them: somebody else may bring the whole change home."""
    remaining = iter(theirs)
    return all(any(one == other for other in remaining) for one in ours)


class LocalQueue:
    """Changes in the order of their numbers, and the overlay that they make."""

    def __init__(self, changes: Iterable[Queued] = ()) -> None:
        self.bytes = 0
        self._changes: dict[int, Queued] = {}
        self._clients: Counter[bytes] = Counter()
        self._overlay = Overlay()
        self._views = 0  # that hold the present overlay
        for change in changes:
            self.append(change)

    def __len__(self) -> int:
        return len(self._changes)

    @property
    def last(self) -> int:
        """The highest number; 0: there is none."""
        return next(reversed(self._changes), 0)

    # -- what is in it -------------------------------------------------------------------------------------

    def get(self, number: int) -> Queued | None:
        """The change of that number."""
        return self._changes.get(number)

    def clients(self, present: bytes) -> list[bytes]:
        """Whose changes there are, ``present`` first in any case."""
        return [present, *(client for client in self._clients if client != present)]

    def after(self, number: int, *, count_max: int, bytes_max: int) -> list[Queued]:
        """Changes behind ``number``, oldest first; the first one whatever its size."""
        found: list[Queued] = []
        size = 0
        for change in self._changes.values():
            if change.number <= number:
                continue
            size += change.size
            if len(found) >= count_max or (found and size > bytes_max):
                break
            found.append(change)
        return found

    def numbers_up_to(self, last_numbers: Mapping[bytes, int]) -> list[int]:
        """Numbers of the changes that are among those that a server has applied."""
        return [
            change.number
            for change in self._changes.values()
            if change.number <= last_numbers.get(change.client, 0)
        ]

    def all(self) -> list[Queued]:
        """Every change, oldest first."""
        return list(self._changes.values())

    def matches(self, change: log_pb2.Change, present: bytes, next_number: int) -> bool:
        """Whether a change that came from the server is one of these.

        Raises:
            ForeignChange: it has the name of one of these, or one that we have yet to give, and is not ours.
        """
        ours = self._changes.get(change.number)
        if ours is not None and ours.client == change.client:
            if not _is_left_of(ours.operations, change.operations):
                raise ForeignChange(
                    f"change {change.number} is not the one that was made here",
                    ours.client,
                    first=change.number,
                    last=change.number,
                )
            return True
        # Ids that we no longer give to new changes may have gone on elsewhere: that is why we gave them up.
        if change.client == present and change.number >= next_number:
            raise ForeignChange(
                f"change {change.number} was made elsewhere, with the id that we use",
                present,
                first=0,
                last=0,
            )
        return False

    # -- changing it ---------------------------------------------------------------------------------------

    def append(self, change: Queued) -> None:
        """A change that was made just now."""
        self._changes[change.number] = change
        self._clients[change.client] += 1
        self.bytes += change.size
        self._own_overlay().add(change.number, change.operations)

    def remove(self, numbers: Iterable[int]) -> None:
        """Changes that were confirmed."""
        for number in numbers:
            change = self._changes.pop(number)
            self.bytes -= change.size
            self._clients[change.client] -= 1
            if not self._clients[change.client]:
                del self._clients[change.client]
            self._own_overlay().remove(number)

    def joined_by(self, changes: Iterable[Queued]) -> LocalQueue:
        """Another queue with more changes, each where its number belongs."""
        return LocalQueue(sorted([*self._changes.values(), *changes], key=lambda change: change.number))

    def reidentify(self, client: bytes, foreign: ForeignChange) -> None:
        """Changes that somebody else has used the names of were made by ``client``."""
        for number, change in self._changes.items():
            if is_meant(change.client, number, foreign):
                self._changes[number] = change._replace(client=client)
        self._clients = Counter(change.client for change in self._changes.values())

    # -- the overlay ---------------------------------------------------------------------------------------

    def overlay_for_view(self) -> Overlay:
        """The overlay, which is not changed from here on until :meth:`view_closed`."""
        self._views += 1
        return self._overlay

    def view_closed(self, overlay: Overlay) -> None:
        """A view has no more use for ``overlay``."""
        if overlay is self._overlay:
            self._views -= 1

    def _own_overlay(self) -> Overlay:
        if self._views:
            self._overlay = self._overlay.clone()
            self._views = 0
        return self._overlay
