"""The demo's devices: each a directory with a copy of one realm, online now and then, written to all the same.

Most of this waits, so it is called in threads. A change puts a key of its own, and adds one to a counter that all
changes of the realm share: it shows whether any of them was applied twice.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path

from understudy.client import Add, Operation, Put, Realm, Update
from understudy.client.realm import ResetMode
from understudy.common.errors import CorruptionError, UsageError

COUNTER = b"changes"
WAIT_S_MAX = 60.0  # for what should take a second or two


def entry(who: str, number: int) -> tuple[bytes, bytes]:
    """Key and value of somebody's change."""
    return f"{who}/{number:04}".encode(), f"change {number} of {who}".encode()


def operations(key: bytes, value: bytes) -> list[Operation]:
    """What a change does."""
    return [Put(key, value), Add(COUNTER, 1)]


def digest(pairs: Iterable[tuple[bytes, bytes]]) -> str:
    """SHA-256 over pairs in key order, in hexadecimal."""
    found = hashlib.sha256()
    for key, value in pairs:
        found.update(b"%d %d " % (len(key), len(value)) + key + value)
    return found.hexdigest()


class Device:
    """One client and its changes.

    Attributes:
        confirmed: key and value of changes that the server had confirmed.
        queued: of those that it had not seen.
    """

    def __init__(self, name: str, path: str, folder: Path, *, on_reset: ResetMode) -> None:
        self.name = name
        self.path = path
        self.confirmed: dict[bytes, bytes] = {}
        self.queued: dict[bytes, bytes] = {}
        self._directory = folder / name
        self._on_reset: ResetMode = on_reset
        self._realm: Realm | None = None
        self._has_ended = False
        self._lock = threading.Lock()

    def open(self, server: str | None) -> None:
        """Opens the copy anew: synced with ``"a:7850,b:7850"``, or offline.

        Raises:
            UsageError: the device has ended.
        """
        with self._lock:
            self._close()
            if self._has_ended:
                raise UsageError(f"{self.name} has ended")
            self._realm = Realm.open(
                self.path, server=server, directory=self._directory, on_reset=self._on_reset
            )

    def end(self) -> None:
        """Closes the copy for good; a call on another thread that waits for it ends with an error."""
        with self._lock:
            self._has_ended = True
            self._close()

    def _close(self) -> None:
        if self._realm is not None:
            self._realm.close()

    @property
    def _opened(self) -> Realm:
        assert self._realm is not None, "it was opened"
        return self._realm

    # -- writing -------------------------------------------------------------------------------------------

    def write(self, count: int) -> None:
        """Makes changes, and returns when the server has confirmed them."""
        self.confirmed |= self._put(count)
        self._opened.wait_for_upload(WAIT_S_MAX)

    def queue(self, count: int) -> None:
        """Makes changes that stay in the queue."""
        self.queued |= self._put(count)

    def queue_update(self, key: bytes, value: bytes) -> None:
        """Makes one that has a value only where the key still is when the server gets it."""
        self._opened.commit([Update(key, value)])
        self.queued[key] = value

    def _put(self, count: int) -> dict[bytes, bytes]:
        first = len(self.confirmed) + len(self.queued) + 1
        entries = dict(entry(self.name, number) for number in range(first, first + count))
        for key, value in entries.items():
            self._opened.commit(operations(key, value))
        return entries

    # -- syncing -------------------------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Returns when the copy is where the server is, and nothing is left in the queue."""
        self._opened.wait_for_download(WAIT_S_MAX)
        self._opened.wait_for_upload(WAIT_S_MAX)

    def digest(self) -> str:
        """Of what is read here."""
        return digest(self._opened.scan())

    def resets(self) -> tuple[str, ...]:
        """Reason and mode of each, as the copies say that were kept.

        Raises:
            CorruptionError: the queue that was given up is not in one of them.
        """
        return tuple(self._reset(kept) for kept in sorted(self._directory.glob("recovered/*")))

    def _reset(self, kept: Path) -> str:
        with Realm.open(self.path, server=None, directory=kept, read_only=True) as old:
            state = old.state
        if state.pending_changes != len(self.queued) or state.reset is None:
            raise CorruptionError(
                f"{kept} has {state.pending_changes} changes of {self.name}'s queue of {len(self.queued)}"
            )
        return f"{state.reset.reason}, {state.reset.attempted}"
