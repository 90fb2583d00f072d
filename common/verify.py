"""Verifies a data directory offline: everything that can be recomputed is, and nothing is changed (G11).

The store first, since it says which key the changes in the log were signed with and what the log must agree with;
then the log from end to end. Each problem is a sentence that says where it is and what mends it, and where it is
possible the check goes on behind it.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path

from google.protobuf.message import DecodeError

from understudy.common.backup_end import check_end
from understudy.common.directory import DataDirectory, Role
from understudy.common.engine import HISTORY_KEY
from understudy.common.entries import change_digest, parse_change, parse_entry, sign
from understudy.common.errors import RESTORE, CorruptionError, NotADataDirectory, UnderstudyError
from understudy.common.lmdb_check import check_structure
from understudy.common.log_reader import (
    SegmentEnd,
    last_end_problem,
    open_segments,
    read_records,
    read_watermark,
    sealed_end_problem,
    segment_records,
)
from understudy.common.operations import PUT
from understudy.common.realm_heads import Head, RealmHeads
from understudy.common.records import Record
from understudy.common.segment import Segment
from understudy.common.store import Store, StoreSnapshot
from understudy.common.store_check import check_state
from understudy.common.types import START, SYSTEM_REALM, Digest, Lsn, Position
from understudy.v1 import log_pb2

PROBLEMS_MAX = 100  # where there are so many, more say nothing new
_PROGRESS_ENTRIES = 10_000

OnProgress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was found."""

    lsn: Lsn  # the log's last good entry
    digest: Digest  # at `lsn`
    entries_checked: int  # of the log
    realms_checked: int  # of the store
    realms_in_log_only: int  # until the next checkpoint writes them: no state to check yet
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def verify_directory(path: Path, progress: OnProgress | None = None) -> VerifyReport:
    """Checks chain and content of the log, structure and state digests of the store, and that both agree.

    Args:
        path: a data directory that no process has open.
        progress: called now and then with the number of log entries and key-value pairs checked so far.

    Raises:
        DirectoryInUse, NotADataDirectory, NewerFormat, StorageFailed: it can't be checked at all.
    """
    with DataDirectory.open_existing(path) as directory:
        if not directory.has_copy:
            raise NotADataDirectory(
                f"{path} holds no data yet: its role is {directory.role.value}",
                remedy="start its node once, so that it creates or fetches its data",
            )
        return verify_opened(directory, progress)


def verify_opened(directory: DataDirectory, progress: OnProgress | None = None) -> VerifyReport:
    """As :func:`verify_directory`, of one that holds a copy and is open in this process.

    Raises:
        NewerFormat, StorageFailed.
    """
    return _Verification(directory, progress or (lambda _: None)).run()


class _Verification:
    def __init__(self, directory: DataDirectory, progress: OnProgress) -> None:
        self._directory = directory
        self._progress = progress
        self._problems: list[str] = []
        self._realms = 0
        self._pairs = 0

    def run(self) -> VerifyReport:
        with contextlib.ExitStack() as stack:
            snapshot = None
            with self._noting():
                snapshot = self._check_store(stack)
            log = _LogCheck(
                self._directory,
                snapshot,
                stack.enter_context(RealmHeads()),
                self._report,
                lambda count: self._progress(self._pairs + count),
            )
            unwritten = 0
            with self._noting():
                log.run()
                unwritten = log.realms_not_in_store()
            if self._directory.role is Role.BACKUP:
                with self._noting():
                    check_end(self._directory.path, self._directory.cluster)
        return VerifyReport(
            lsn=log.position.lsn,
            digest=log.position.digest,
            entries_checked=log.entries,
            realms_checked=self._realms,
            realms_in_log_only=unwritten,
            problems=self._problems,
        )

    def _report(self, problem: str) -> None:
        if len(self._problems) < PROBLEMS_MAX and problem not in self._problems:
            self._problems.append(problem)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except CorruptionError as error:
            self._report(str(error))

    def _check_store(self, stack: contextlib.ExitStack) -> StoreSnapshot | None:
        """The store's snapshot, open as long as ``stack``; None where LMDB might crash on it."""
        path = self._directory.store
        structure = (
            check_structure(path) if (path / "data.mdb").exists() else [f"there is no store in {path}"]
        )
        for problem in structure:
            self._report(f"{path / 'data.mdb'}: {problem} ({RESTORE})")
        if structure:
            return None
        store = stack.enter_context(Store.open(path, cluster=self._directory.cluster))
        check = check_state(store, progress=self._count_pairs)
        for problem in check.problems:
            self._report(f"{path}: {problem} ({RESTORE})")
        self._pairs, self._realms = check.entries_checked, check.realms_checked
        return store.current

    def _count_pairs(self, count: int) -> None:
        self._progress(count)


class _LogCheck:
    """The whole log against itself, against the history key, and against the store."""

    def __init__(
        self,
        directory: DataDirectory,
        snapshot: StoreSnapshot | None,
        heads: RealmHeads,
        report: Callable[[str], None],
        progress: OnProgress,
    ) -> None:
        self._directory = directory
        self._snapshot = snapshot
        self._report = report
        self._progress = progress
        self._known = _known_positions(snapshot) if snapshot else {}
        self._checkpoint_lsn = snapshot.checkpoint.lsn if snapshot else 0
        self._key = b""
        self._heads = heads  # of realms met so far
        self._gap_end = 0  # the last LSN that is missing before the entries at hand
        self.position: Position = START
        self.entries = 0

    def run(self) -> None:
        segments, damaged = open_segments(self._directory.log, self._directory.cluster)
        for error in damaged:
            self._report(str(error))
        if not segments:
            self._report(f"{self._directory.log} holds no segment of a change-log ({RESTORE})")
            return
        self._key = self._history_key()
        self._gap_end = segments[0].header.before.lsn
        self._compare_position(segments[0].header.before)
        for segment, following in zip_longest(segments, segments[1:]):
            self._check_segment(segment, following)
        self._check_reaches_checkpoint(segments[0])
        if self._heads and not self._key:  # a copy that has yet to receive its first change needs none
            self._report(
                f"{self._directory.path}: the key that changes are signed with is neither in the store nor in the "
                f"log, so their origin was not checked ({RESTORE})"
            )

    def _history_key(self) -> bytes:
        """From the store; from the log where the store does not have it (yet) or can't be read."""
        if self._snapshot is not None:
            row = self._snapshot.realm(SYSTEM_REALM)
            key = self._snapshot.get(row.id, HISTORY_KEY) if row else None
            if key:
                return key
        with contextlib.suppress(UnderstudyError):
            for record in read_records(self._directory.log, self._directory.cluster):
                key = _key_set_by(record)
                if key:
                    return key
        return b""

    def realms_not_in_store(self) -> int:
        """How many realms the log has changes of, and the store nothing."""
        found = self._snapshot
        return sum(
            1
            for path, (version, _) in self._heads.items()
            if version and (not found or not found.realm(path))
        )

    # -- segments ------------------------------------------------------------------------------------------

    def _check_segment(self, segment: Segment, following: Segment | None) -> None:
        self.position = segment.header.before
        try:
            watermark = None if following else read_watermark(segment)
        except CorruptionError as error:
            self._report(str(error))
            watermark = None
        end = self._check_records(segment)
        problem = None
        if following is not None:
            problem = sealed_end_problem(segment, end, following)
        elif watermark is not None:
            problem = last_end_problem(segment, end, watermark)
        if problem is not None:
            self._report(str(problem))
        if problem is not None and following is not None:
            self._gap_end = following.header.before.lsn
            self._heads.clear()  # what is behind the gap can't be compared with what is before it

    def _check_records(self, segment: Segment) -> SegmentEnd:
        records = segment_records(segment)
        while True:
            try:
                record = next(records)
            except StopIteration as ended:
                end: SegmentEnd = ended.value
                return end
            try:
                self._check_record(record)
            except CorruptionError as error:
                self._report(f"{segment.path}: {error.message} ({error.remedy or RESTORE})")
            self.position = record.position
            self._compare_position(record.position)
            self.entries += 1
            if not self.entries % _PROGRESS_ENTRIES:
                self._progress(self.entries)

    def _compare_position(self, position: Position) -> None:
        known = self._known.get(position.lsn)
        if known is not None and known != position.digest:
            self._report(
                f"{self._directory.path}: the store has digest {known.hex()} at LSN {position.lsn}, the log has "
                f"{position.digest.hex()}: they are not of one history ({RESTORE})"
            )

    def _check_reaches_checkpoint(self, first: Segment) -> None:
        if self._snapshot is None:
            return
        if not first.header.before.lsn <= self._checkpoint_lsn <= self.position.lsn:
            self._report(
                f"{self._directory.path}: the store's checkpoint is at LSN {self._checkpoint_lsn}, but the log goes "
                f"from {first.header.first_lsn} to {self.position.lsn} ({RESTORE})"
            )

    # -- entries -------------------------------------------------------------------------------------------

    def _check_record(self, record: Record) -> None:
        entry = parse_entry(record.payload, record.lsn)
        match entry.WhichOneof("body"):
            case "change":
                self._check_change(record, entry)
            case "epoch_start":
                self._check_epoch(record, entry)
            case "digest_mark":
                self._check_mark(record, entry.digest_mark)
            case "realm_dropped":
                self._heads[entry.realm_dropped.realm] = (0, b"")
        if record.lsn == self._checkpoint_lsn:
            self._check_heads()

    def _check_change(self, record: Record, entry: log_pb2.Entry) -> None:
        change = parse_change(entry.change, record.lsn)
        digest = change_digest(entry.change)
        self._check_signature(record, digest, entry.hmac)
        head = self._heads[change.realm] or self._head_before(change.realm, record.lsn)
        self._heads[change.realm] = (change.version, digest)
        if head is not None and (change.version, change.previous) != (head[0] + 1, head[1]):
            raise CorruptionError(
                f"entry {record.lsn} makes version {change.version} of realm {change.realm}, and does not follow from "
                f"version {head[0]}"
            )

    def _head_before(self, path: str, lsn: Lsn) -> Head | None:
        """Where a realm that the log has not touched so far stands; None where nobody knows."""
        if self._snapshot is None or not self._gap_end <= self._checkpoint_lsn < lsn:
            return None
        row = self._snapshot.realm(path)
        return (row.version, row.head) if row else (0, b"")

    def _check_epoch(self, record: Record, entry: log_pb2.Entry) -> None:
        try:
            start = log_pb2.EpochStart.FromString(entry.epoch_start)
        except DecodeError as error:
            raise CorruptionError(
                f"the epoch start in entry {record.lsn} can't be decoded: {error}"
            ) from error
        self._check_signature(record, sha256(entry.epoch_start).digest(), entry.hmac)
        said = (start.cluster, start.lsn, start.previous)
        if said != (self._directory.cluster, record.lsn, self.position.digest):
            raise CorruptionError(
                f"entry {record.lsn} starts epoch {start.epoch} at another place than it is at"
            )

    def _check_signature(self, record: Record, digest: bytes, signature: bytes) -> None:
        if self._key and not hmac.compare_digest(sign(self._key, digest), signature):
            raise CorruptionError(f"entry {record.lsn} is not signed with the cluster's history key")

    def _check_mark(self, record: Record, mark: log_pb2.DigestMark) -> None:
        if self._snapshot is None or mark.freeze_lsn != self._checkpoint_lsn:
            return
        own = self._snapshot.checkpoint.state_digest
        if own != mark.state_digest:
            raise CorruptionError(
                f"the digest mark in entry {record.lsn} says that the state at LSN {mark.freeze_lsn} has digest "
                f"{mark.state_digest.hex()}, the store's is {own.hex()}",
                remedy="this copy differs from the primary's: remove it and let it bootstrap again",
            )

    def _check_heads(self) -> None:
        """At the checkpoint, the store's realms must stand where the log has brought them."""
        assert self._snapshot is not None
        for path, (version, head) in self._heads.items():
            row = self._snapshot.realm(path)
            found = (row.version, row.head) if row else (0, b"")
            if found != (version, head):
                self._report(
                    f"{self._directory.path}: at LSN {self._checkpoint_lsn} the log has realm {path} at version "
                    f"{version}, the store at {found[0]}, or with other content ({RESTORE})"
                )


def _known_positions(snapshot: StoreSnapshot) -> dict[int, Digest]:
    known: dict[int, Digest] = {mark.lsn: mark.digest for mark in snapshot.marks()}
    known[snapshot.checkpoint.lsn] = Digest(snapshot.checkpoint.digest)
    return known


def _key_set_by(record: Record) -> bytes:
    """The history key, where this entry sets it."""
    entry = parse_entry(record.payload, record.lsn)
    if entry.WhichOneof("body") != "change":
        return b""
    change = parse_change(entry.change, record.lsn)
    if change.realm != SYSTEM_REALM:
        return b""
    return next((one.value for one in change.operations if one.kind == PUT and one.key == HISTORY_KEY), b"")
