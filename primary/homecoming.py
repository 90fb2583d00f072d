"""Changes that this server has lost, or never had, come home: from clients that still hold them, or from an export.

A change is believed for its HMAC: only a server of this cluster can have made it, and only after it had been taken
in. Where it is the next of its realm it is appended as it was, and so keeps version and digest. Where the realm has
gone on without it, it becomes a new change, unless what it does is there already, by its client's number (G6).
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from google.protobuf.message import DecodeError

from understudy.common import entries
from understudy.common.errors import BadOperation, UnderstudyError
from understudy.common.memtable import Missing, Receipt
from understudy.common.operations import check_operations
from understudy.common.state import State
from understudy.common.types import check_realm_path, is_system_realm
from understudy.primary.in_flight import Done, SignedChange
from understudy.v1 import data_pb2, log_pb2, sync_pb2

_PROBLEMS_MAX = 10

OnTaken = Callable[[sync_pb2.Homecoming], None]


class Taker(Protocol):
    """Where changes are taken in: a :class:`~understudy.primary.committer.Committer`."""

    def head(self, path: str) -> tuple[int, bytes]:
        """Version and digest of a realm's last change, applied or in flight."""

    def was_renewed(self, path: str, client: bytes, number: int) -> bool:
        """Whether a change has come home as a new one before."""

    def submit_renewed(self, transaction: data_pb2.Transaction, origin: bytes, done: Done) -> None:
        """Takes in a change of ``origin`` as a new one."""

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
) -> None:
    """Takes in what is missing of a realm's changes; best while nothing of the realm is in flight.

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
        checked = list(_checked(path, changes, history_key))
    except Refused as refused:
        arrival.refuse(len(changes), str(refused))
    else:
        arrival.take(checked)
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
        self._waiting = 1  # for `close`, and for each change that was taken in

    def take(self, tail: Sequence[tuple[log_pb2.Change, SignedChange]]) -> None:
        # Each change names the one before it: if one of them is on our history, so are all before it, also those that
        # are too old to be looked up.
        known = next((at for at in range(len(tail), 0, -1) if self._is_known(*tail[at - 1])), 0)
        missing = tail[known:]
        self._result.known += known
        if not missing:
            return
        version, digest = self._taker.head(self._path)
        if not version and not self._may_renew:
            # It may have been dropped: what lets one read a realm must not bring it back.
            self.refuse(len(missing), "the realm is not here, and this client may not write to it")
            return
        first = missing[0][0]
        follows = (first.version, first.previous) == (version + 1, digest)
        step = self._append if follows else self._renew
        if not follows:
            self._look_up(missing)
        for at, (change, signed) in enumerate(missing):
            try:
                step(change, signed)
            except (UnderstudyError, Refused) as error:
                self.refuse(len(missing) - at, str(error))
                return

    def _look_up(self, missing: Sequence[tuple[log_pb2.Change, SignedChange]]) -> None:
        """Notes receipts, client by client: the search for one finds all others of its client, but of no other's."""
        for change, _ in sorted(missing, key=lambda pair: pair[0].client):
            if change.number <= self._state.last_number(self._path, change.client):
                receipt = self._state.receipt(self._path, change.client, change.number)
                self._receipts[change.client, change.number] = receipt

    def _is_known(self, change: log_pb2.Change, signed: SignedChange) -> bool:
        return self._state.digest_at(self._path, change.version) == signed.digest

    def _append(self, change: log_pb2.Change, signed: SignedChange) -> None:
        self._send(lambda done: self._taker.submit_again(change, signed, done))
        self._result.appended += 1

    def _renew(self, change: log_pb2.Change, signed: SignedChange) -> None:
        if not self._may_renew:
            raise Refused("the realm has gone on, and this client may not write to it")
        self._check_forked(change)
        if self._is_here(change):
            self._result.known += 1
            return
        transaction = data_pb2.Transaction(
            number=change.number, realm=self._path, operations=change.operations
        )
        self._send(lambda done: self._taker.submit_renewed(transaction, change.client, done))
        self._result.renewed += 1

    def _is_here(self, change: log_pb2.Change) -> bool:
        """Whether a change of another history was made on ours, too: under its own name, or as a renewed one."""
        receipt = self._receipts.get((change.client, change.number))
        if isinstance(receipt, Missing):
            raise Refused(f"version {change.version} is too old to tell whether it was applied")
        return receipt is not None or self._taker.was_renewed(self._path, change.client, change.number)

    def _check_forked(self, change: log_pb2.Change) -> None:
        """Refuses what may have been on our history: it would be done a second time."""
        head = self._state.realm(self._path)
        is_past = head is not None and change.version <= head.version
        if is_past and self._state.digest_at(self._path, change.version) is None:
            raise Refused(f"version {change.version} is older than what is kept of the realm's history")

    def refuse(self, count: int, problem: str) -> None:
        self._result.refused += count
        if len(self._result.problems) < _PROBLEMS_MAX:
            self._result.problems.append(f"{self._path}: {problem}")

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


def _checked(
    path: str, changes: Iterable[tuple[bytes, bytes]], history_key: bytes
) -> Iterator[tuple[log_pb2.Change, SignedChange]]:
    """The changes of a tail, each genuine and following the one before.

    Raises:
        Refused: with the first that is not.
    """
    check_realm_path(path)
    if is_system_realm(path):
        raise Refused("this realm is the system's own")
    before: tuple[int, bytes] | None = None
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
        yield change, SignedChange(raw, digest, mac)


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
