"""Keeps runs that change the same repository apart, wherever they run, and survives those that crash.

The lock is an object with a lease, which its holder renews. Nobody compares clocks of two machines: who waits takes
the lock over once it has seen the very same lease for as long as it lasts, by its own monotonic clock.

Object storages can't delete on condition, so a lock that is released is replaced by one that nobody holds: deleting
it could hit the lock of a run that has taken over in that moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

from understudy.backup.manifest import utc_text
from understudy.backup.repository import Repository
from understudy.common.errors import NotStored, RepositoryBusy, RepositoryError, UnderstudyError

LOCK = "lock.json"
_FREE = b"{}\n"
_POLL_S = 1.0
_REMEDY = "run it again; nothing that was stored before is lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """How long a lock outlives its holder, and how often it is renewed."""

    length_s: float = 60.0
    renewal_s: float = 20.0


DEFAULT_LEASE = Lease()


@dataclass(frozen=True, slots=True, kw_only=True)
class LockRecord:
    """What the lock says: for people, but for ``owner`` and ``lease_s``."""

    owner: str  # random
    host: str
    pid: int
    what: str
    since: str  # UTC, as are all times here
    expires: str
    lease_s: float
    renewals: int  # no two leases look the same, whatever the clock does

    def encode(self) -> bytes:
        """Readable JSON."""
        return json.dumps(asdict(self), indent=2).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> LockRecord | None:
        """The inverse of :meth:`encode`; None if it is damaged."""
        try:
            record = cls(**json.loads(data))
            return replace(record, lease_s=float(record.lease_s))
        except (ValueError, TypeError, RecursionError):
            return None


class RepositoryLock:
    """A lock that is held."""

    def __init__(
        self,
        repository: Repository,
        record: LockRecord,
        *,
        held_since_s: float,
        lease: Lease,
        clock: Callable[[], float],
    ) -> None:
        self._repository = repository
        self._record = record
        self._lease = lease
        self._clock = clock
        self._renewed_s = held_since_s  # when the last renewal that went well was begun
        self._is_lost = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._renew_often, name="backup-lock", daemon=True)

    def check(self) -> None:
        """To be called before what only the holder may do.

        Raises:
            RepositoryError: the lock was lost, or may be: it could not be renewed in time.
        """
        if self._is_lost or self._found() is None or not self._in_time():
            raise RepositoryError(
                f"the lock of {self._repository.url} was lost to another run", remedy=_REMEDY
            )

    def renew(self) -> None:
        """Begins a new lease, or finds out that the lock was lost.

        Raises:
            UnderstudyError: the storage can't be reached or written to; the old lease goes on.
        """
        begun_s = self._clock()
        renewed = _renewed(self._record)
        if not self._repository.swap(LOCK, renewed.encode(), self._record.encode()):
            # An attempt before may have done it although it failed.
            found = self._found()
            if found is None or not self._repository.swap(LOCK, renewed.encode(), found):
                self._is_lost = True
                return
        self._record, self._renewed_s = renewed, begun_s

    def start(self) -> None:
        """Renews it from now on, in a thread."""
        self._thread.start()

    def release(self) -> None:
        """Gives it up, if it is still ours. Where that fails, it lapses by itself."""
        self._stopped.set()
        self._thread.join(self._lease.length_s)
        if self._thread.is_alive() or self._is_lost:
            return
        with contextlib.suppress(UnderstudyError):
            found = self._found()
            if found is not None:
                self._repository.swap(LOCK, _FREE, found)

    def _in_time(self) -> bool:
        return self._clock() < self._renewed_s + self._lease.length_s

    def _found(self) -> bytes | None:
        """The lock as it is stored, if it is ours. Asking is what notices that the machine was asleep."""
        data = _read(self._repository)
        record = None if data is None else LockRecord.decode(data)
        return data if record is not None and record.owner == self._record.owner else None

    def _renew_often(self) -> None:
        while not self._stopped.wait(self._lease.renewal_s) and not self._is_lost:
            # It is tried again; if that does not help for as long as the lease lasts, ``check`` says so.
            with contextlib.suppress(UnderstudyError):
                self.renew()


@contextlib.contextmanager
def locked(
    repository: Repository,
    what: str,
    *,
    wait_s: float = 90.0,
    lease: Lease = DEFAULT_LEASE,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[RepositoryLock]:
    """Holds the repository's lock for the block.

    Args:
        what: what it is held for, for those who find it held.
        wait_s: how long to wait for another run. If it is longer than a lease, the lock of one that has crashed is
            taken over.
        lease: how long the lock outlives this process.
        sleep: it may raise what ends the waiting.

    Raises:
        RepositoryBusy: another run has held it all that time.
        RepositoryError, DiskFull, StorageFailed.
    """
    record = _new_record(what, lease)
    held_since_s = _acquire(repository, record, wait_s=wait_s, clock=clock, sleep=sleep)
    lock = RepositoryLock(repository, record, held_since_s=held_since_s, lease=lease, clock=clock)
    lock.start()
    try:
        yield lock
    finally:
        lock.release()


def _acquire(
    repository: Repository,
    record: LockRecord,
    *,
    wait_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], object],
) -> float:
    """Waits until the lock is ours; says when that began."""
    give_up_s = clock() + wait_s
    seen: bytes | None = None
    seen_since_s = clock()
    while True:
        found = _read(repository)
        begun_s = clock()
        if found != seen:
            seen, seen_since_s = found, begun_s
        is_free = found in (None, _FREE) or begun_s >= seen_since_s + _lease_s(found, record)
        if is_free and repository.swap(LOCK, record.encode(), found):
            return begun_s
        if begun_s >= give_up_s:
            raise _busy(repository, found)
        sleep(min(_POLL_S, give_up_s - begun_s, record.lease_s / 4))


def _lease_s(found: bytes | None, record: LockRecord) -> float:
    """How long the lock that was found has to stay the same to be given up."""
    holder = None if found is None else LockRecord.decode(found)
    return max(record.lease_s, holder.lease_s if holder is not None else 0.0)


def _busy(repository: Repository, found: bytes | None) -> RepositoryBusy:
    holder = None if found is None else LockRecord.decode(found)
    if holder is None:
        return RepositoryBusy(f"{repository.url} is in use", remedy="try again later")
    return RepositoryBusy(
        f"{repository.url} is in use: {holder.what}, process {holder.pid} on {holder.host}, since {holder.since}",
        remedy=f"wait for it; if it is no more, its lock lapses within {holder.lease_s:g} s",
    )


def _new_record(what: str, lease: Lease) -> LockRecord:
    now_s = time.time()
    return LockRecord(
        owner=secrets.token_hex(16),
        host=socket.gethostname(),
        pid=os.getpid(),
        what=what,
        since=utc_text(now_s),
        expires=utc_text(now_s + lease.length_s),
        lease_s=lease.length_s,
        renewals=0,
    )


def _renewed(record: LockRecord) -> LockRecord:
    expires = utc_text(time.time() + record.lease_s)
    return replace(record, expires=expires, renewals=record.renewals + 1)


def _read(repository: Repository) -> bytes | None:
    try:
        return repository.read(LOCK)
    except NotStored:
        return None
