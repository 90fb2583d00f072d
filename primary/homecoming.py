"""Changes that this server has lost, or never had, come home: from clients that still hold them, or from an export.

A change is believed for its HMAC: only a server of this cluster can have made it, and only after it had been taken
in. Where it is the next of its realm it is appended as it was, and so keeps version and digest. Where the realm has
gone on without it, it becomes a new change, unless what it does is there already, by its client's number (G6).

A tail is taken in step by step. Nothing of it counts before all of it is known to be genuine. Each step is whole in
itself: between two of them the realm may have gone on, been dropped, or been brought the same changes by somebody
else, so each looks anew at where the realm stands.
"""

from __future__ import annotations

import hmac
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Protocol

from google.protobuf.message import DecodeError

from understudy.common import entries
from understudy.common.errors import BadOperation, UnderstudyError
from understudy.common.memtable import Missing, Receipt
from understudy.common.operations import check_operations
from understudy.common.state import State
from understudy.common.types import REALM_PATH_BYTES_MAX, check_realm_path, is_system_realm
from understudy.primary.in_flight import Done, SignedChange
from understudy.v1 import data_pb2, log_pb2, sync_pb2

_PROBLEMS_MAX = 10
# What is done in one step, some milliseconds: 256 small changes, or fewer large ones.
STEP_BYTES = 256 << 10
_CHANGE_BYTES = 1 << 10  # a change costs as much as that many bytes of its operations

OnTaken = Callable[[sync_pb2.Homecoming], None]
_Tail = Sequence[tuple[log_pb2.Change, SignedChange]]


class Taker(Protocol):
    """Where changes are taken in: a :class:`~understudy.primary.committer.Committer`."""

    def head(self, path: str) -> tuple[int, bytes]:
        """Version and digest of a realm's last change, applied or in flight."""

    def is_in_flight(self, path: str, client: bytes, number: int) -> bool:
        """Whether a client's change was taken in, and is not applied yet."""

    def was_renewed(self, path: str, client: bytes, number: int) -> bool:
        """Whether a change has come home as a new one before."""

    def submit_renewed(self, transaction: data_pb2.Transaction, origin: bytes, done: Done) -> None:
        """Takes in a change of ``origin`` as a new one; of one that is in flight it waits for the outcome."""

    def submit_again(self, change: log_pb2.Change, signed: SignedChange, done: Done) -> None:
        """Takes in a change as it was."""


class Refused(Exception):
    """Why a tail is not taken."""


def take_home(
    path: str,
    changes: Sequence[tuple[bytes, bytes]],
    *,
    state: State,
    taker: Taker,
    history_key: bytes,
    may_renew: bool,
    on_taken: OnTaken,
) -> Generator[None, None, None]:
    """Takes in what is missing of a realm's changes, a step at a time; best while nothing of the realm is in flight.

    Whoever closes it early leaves the rest out; what was taken in until then is taken in.

    Args:
        path: the realm.
        changes: serialized ``Change`` messages, of versions without gaps, oldest first, each with its HMAC.
        state: what has been applied.
        taker: takes changes in.
        history_key: what the cluster's changes are signed with.
        may_renew: whether changes may be made anew where the realm has gone on.
        on_taken: called once all that was taken in has reached the server's durability.
    """
    arrival = _Arrival(path, state, taker, on_taken, may_renew=may_renew)
    try:
        tail = yield from _checked(path, changes, history_key)
        yield from arrival.take(tail)
    except (UnderstudyError, Refused) as error:
        arrival.refuse(len(changes), str(error))
    finally:
        arrival.close()


class _Arrival:
    """One tail being taken in."""

    def __init__(self, path: str, state: State, taker: Taker, on_taken: OnTaken, *, may_renew: bool) -> None:
        self._path = path
        self._state = state
        self._taker = taker
        self._on_taken = on_taken
        self._may_renew = may_renew
        self._result = sync_pb2.Homecoming()
        self._receipts: dict[tuple[bytes, int], Receipt | Missing | None] = {}  # of numbers that are not new
        self._kept_from: int | None = (
            None  # the oldest version of which our digest is kept; None: not looked up
        )
        self._at = 0  # how many changes have been dealt with
        self._version = 0  # the realm's, when we looked last
        self._realm_id = 0
        self._waiting = 1  # for `close`, and for each change that was taken in

    def take(self, tail: _Tail) -> Iterator[None]:
        """Takes the tail in.

        Raises:
            Refused, UnderstudyError: no more of it.
        """
        self._pass_over(self._count_applied(tail))
        while self._at < len(tail):
            version, digest = self._look_again()
            if self._is_brought_by_another(tail, version, digest):
                continue
            first = tail[self._at][0]
            if (first.version, first.previous) == (version + 1, digest):
                self._take_step(tail, self._append)
            elif self._kept_from is not None:
                self._take_step(tail, self._renew)
            else:
                self._kept_from = yield from self._look_up(tail)
                continue
            yield

    def _take_step(self, tail: _Tail, take: Callable[[log_pb2.Change, SignedChange], None]) -> None:
        size = 0
        while size < STEP_BYTES and self._at < len(tail):
            change, signed = tail[self._at]
            take(change, signed)
            self._at += 1
            size += _cost(signed.change)

    # -- where the realm stands ------------------------------------------------------------------------------

    def _look_again(self) -> tuple[int, bytes]:
        """Version and digest of the realm's last change.

        Raises:
            Refused: it was dropped under us, or may have been before: what lets one read a realm must not bring it
                back.
        """
        version, digest = self._taker.head(self._path)
        realm = self._state.realm(self._path)
        realm_id = realm.id if realm is not None else 0
        if version < self._version or self._realm_id not in (0, realm_id):
            raise Refused("the realm was dropped meanwhile")
        if not version and not self._may_renew:
            raise Refused("the realm is not here, and this client may not write to it")
        self._version, self._realm_id = version, realm_id
        return version, digest

    def _count_applied(self, tail: _Tail) -> int:
        """How many changes of the tail are on our history.

        Each names the one before it: if one of them is, so are all before it, also those that are too old to be
        looked up. So the last one is found by halving.
        """
        realm = self._state.realm(self._path)
        if realm is None or not tail:
            return 0
        first = tail[0][0].version
        oldest = max(self._digests_first() - first, 0)
        behind = min(max(realm.version + 1 - first, oldest), len(tail))
        found = bisect_left(tail, True, min(oldest, behind), behind, key=self._is_not_applied)
        return found if found > oldest else 0

    def _digests_first(self) -> int:
        realm = self._state.realm(self._path)
        return self._state.history_first(self._path) - 1 if realm is not None else 0

    def _is_not_applied(self, one: tuple[log_pb2.Change, SignedChange]) -> bool:
        change, signed = one
        return self._state.digest_at(self._path, change.version) != signed.digest

    def _is_brought_by_another(self, tail: _Tail, version: int, digest: bytes) -> bool:
        """Whether the realm has come further along this very tail; it is passed over up to there."""
        at = version - tail[0][0].version
        if not self._at <= at < len(tail) or tail[at][1].digest != digest:
            return False
        change, _ = tail[at]
        if self._taker.is_in_flight(self._path, change.client, change.number):
            self._submit_renewed(change)  # it is waited for, and with it all before it
        self._pass_over(at + 1)
        return True

    def _pass_over(self, upto: int) -> None:
        self._result.known += upto - self._at
        self._at = upto

    # -- as they were, or renewed ----------------------------------------------------------------------------

    def _append(self, change: log_pb2.Change, signed: SignedChange) -> None:
        self._send(lambda done: self._taker.submit_again(change, signed, done))
        self._result.appended += 1

    def _renew(self, change: log_pb2.Change, signed: SignedChange) -> None:
        if not self._may_renew:
            raise Refused("the realm has gone on, and this client may not write to it")
        if self._kept_from is None or change.version < self._kept_from:  # it may have been on our history
            raise Refused(f"version {change.version} is older than what is kept of the realm's history")
        if self._is_here(change):
            self._result.known += 1
        elif self._taker.is_in_flight(self._path, change.client, change.number):
            self._submit_renewed(change)
            self._result.known += 1
        else:
            self._submit_renewed(change)
            self._result.renewed += 1

    def _submit_renewed(self, change: log_pb2.Change) -> None:
        transaction = data_pb2.Transaction(
            number=change.number, realm=self._path, operations=change.operations
        )
        self._send(lambda done: self._taker.submit_renewed(transaction, change.client, done))

    def _look_up(self, tail: _Tail) -> Generator[None, None, int]:
        """Notes receipts, client by client: the search for one finds all others of its client, but of no other's.

        Returns:
            The oldest version of which our digest is kept.
        """
        size, client = 0, b""
        for change, signed in sorted(tail[self._at :], key=lambda pair: pair[0].client):
            if size >= STEP_BYTES or change.client != client:
                size, client = 0, change.client
                yield
            self._receipt(change)
            size += _cost(signed.change)
        return self._digests_first()

    def _receipt(self, change: log_pb2.Change) -> Receipt | Missing | None:
        """What our history has of the change's number; what was not on it before may have been applied since."""
        key = change.client, change.number
        if key not in self._receipts and change.number <= self._state.last_number(self._path, change.client):
            self._receipts[key] = self._state.receipt(self._path, change.client, change.number)
        return self._receipts.get(key)

    def _is_here(self, change: log_pb2.Change) -> bool:
        """Whether a change of another history was made on ours, too: under its own name, or as a renewed one."""
        receipt = self._receipt(change)
        if isinstance(receipt, Missing):
            raise Refused(f"version {change.version} is too old to tell whether it was applied")
        return receipt is not None or self._taker.was_renewed(self._path, change.client, change.number)

    # -- what came of it -------------------------------------------------------------------------------------

    def refuse(self, count: int, problem: str) -> None:
        """Of ``count`` changes, those that were not dealt with yet are refused."""
        self._result.refused += count - self._at
        if len(self._result.problems) < _PROBLEMS_MAX:
            self._result.problems.append(f"{self._path:.{REALM_PATH_BYTES_MAX}}: {problem}")

    def _send(self, submit: Callable[[Done], None]) -> None:
        def done(_: Receipt) -> None:
            self.close()

        self._waiting += 1
        try:
            submit(done)
        except UnderstudyError:
            self._waiting -= 1
            raise

    def close(self) -> None:
        """One thing less to wait for."""
        self._waiting -= 1
        if not self._waiting:
            self._on_taken(self._result)


def _cost(raw: bytes) -> int:
    return len(raw) + _CHANGE_BYTES


def _checked(
    path: str, changes: Iterable[tuple[bytes, bytes]], history_key: bytes
) -> Generator[None, None, list[tuple[log_pb2.Change, SignedChange]]]:
    """The changes of a tail, each genuine and following the one before.

    Raises:
        Refused: with the first that is not.
        BadRealmPath: no realm can be there.
    """
    check_realm_path(path)
    if is_system_realm(path):
        raise Refused("this realm is the system's own")
    found: list[tuple[log_pb2.Change, SignedChange]] = []
    before: tuple[int, bytes] | None = None
    size = 0
    for at, (raw, mac) in enumerate(changes):
        digest = entries.change_digest(raw)
        if not hmac.compare_digest(entries.sign(history_key, digest), mac):
            raise Refused(f"change {at} of {path} was not made by a server of this cluster")
        change = _parsed(raw, at)
        if change.realm != path:
            raise Refused(f"change {at} is of realm {change.realm}")
        if before is not None and (change.version, change.previous) != (before[0] + 1, before[1]):
            raise Refused(f"change {at}, of version {change.version}, does not follow the one before it")
        before = change.version, digest
        found.append((change, SignedChange(raw, digest, mac)))
        size += _cost(raw)
        if size >= STEP_BYTES:
            size = 0
            yield
    return found


def _parsed(raw: bytes, at: int) -> log_pb2.Change:
    try:
        change = log_pb2.Change.FromString(raw)
    except DecodeError as error:
        raise Refused(f"change {at} can't be decoded") from error
    try:
        check_operations(change.operations)
    except UnderstudyError as error:
        raise Refused(f"change {at} can't be applied by this version: {error}") from error
    return change


def add_up(total: sync_pb2.Homecoming, more: sync_pb2.Homecoming) -> None:
    """Adds the figures of ``more`` to ``total``."""
    total.appended += more.appended
    total.renewed += more.renewed
    total.known += more.known
    total.refused += more.refused
    total.problems.extend(more.problems[: _PROBLEMS_MAX - len(total.problems)])


def runs_of(changes: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[str, list[tuple[bytes, bytes]]]]:
    """Changes of many realms in the order of a log, as runs of one realm's consecutive versions.

    Raises:
        BadOperation: one can't be decoded.
    """
    runs: dict[str, tuple[int, list[tuple[bytes, bytes]]]] = {}
    for at, (raw, mac) in enumerate(changes):
        try:
            change = log_pb2.Change.FromString(raw)
        except DecodeError as error:
            raise BadOperation(f"change {at} can't be decoded") from error
        version, run = runs.get(change.realm, (0, []))
        if run and change.version != version + 1:  # dropped, and made again
            yield change.realm, run
            run = []
        run.append((raw, mac))
        runs[change.realm] = change.version, run
    for path, (_, run) in runs.items():
        yield path, run
