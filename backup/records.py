"""A pinned source as records: rows of its store and entries of its log, of all realms or of chosen ones.

Each realm's rows are read twice. First all that can be recomputed is; a realm that is not as it was written is left
out whole, and the rest is saved. Only then are its rows copied, in the order of realm ids, so that who loads them
appends. The list of realms comes behind all rows, since only then is known what it has; then ``meta``, and the log
behind the checkpoint. What is not in it is left out of the log, too, but for where the log stands then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from google.protobuf.message import DecodeError

from understudy.backup.chosen import check_chosen
from understudy.backup.contents import Member, describe
from understudy.backup.log_files import LogPart
from understudy.backup.manifest import FailedRealm, FileEntry, Form, Manifest
from understudy.backup.progress import Meter
from understudy.backup.rows import PART_BYTES, TAIL, TailRow, encode_row, part_name
from understudy.backup.selection import Selection
from understudy.backup.source import Source
from understudy.common.entries import parse_change, parse_entry
from understudy.common.errors import RESTORE, CorruptionError
from understudy.common.log_reader import LogPlace
from understudy.common.records import ChainReader, Record
from understudy.common.state_digest import REALM_PREFIX_BYTES, encode, realm_hash
from understudy.common.store_check import check_realm
from understudy.common.store_layout import (
    CHECKPOINT_KEY,
    CLIENTS_CURSOR_KEY,
    DROPPING_PREFIX,
    HISTORY_CURSOR_KEY,
    lmdb_errors,
    prefix_end,
    realm_prefix,
)
from understudy.common.store_rows import rows_between
from understudy.common.types import SYSTEM_REALM, SYSTEM_REALMS
from understudy.v1.log_pb2 import Entry
from understudy.v1.store_pb2 import CheckpointRow, RealmRow


class _Part:
    """Rows of one database, until they fill a file."""

    def __init__(self, database: str) -> None:
        self._database = database
        self._rows = bytearray()  # in one: a list of small ones would take twice the memory
        self._number = 0

    @property
    def is_full(self) -> bool:
        """Whether it is time to :meth:`take`."""
        return len(self._rows) >= PART_BYTES

    def add(self, row: bytes) -> None:
        """Appends an encoded row."""
        self._rows += row

    def take(self) -> Iterator[Member]:
        """The rows since the last call as a file, if there are any."""
        if self._rows:
            self._number += 1
            rows, self._rows = bytes(self._rows), bytearray()
            yield Member(part_name(self._database, self._number), len(rows), [rows])


class Records:
    """What a backup of records of a pinned source consists of. Its members are taken once, in their order.

    Raises:
        UsageError: no realm is chosen.
    """

    def __init__(self, source: Source, selection: Selection, meter: Meter) -> None:
        self._source = source
        self._meter = meter  # of what is read before it is known to be good
        self._selection = selection
        self._unmatched = check_chosen(source, selection)
        self._environment = source.state.store.environment
        self._txn = source.snapshot.txn
        self._checkpoint = CheckpointRow()
        self._checkpoint.CopyFrom(source.checkpoint)
        self._failed: dict[str, str] = {}  # realms and what is wrong with them
        self._realms = 0  # at the end of the log, without the system's own
        self._is_there: dict[str, bool] = {}  # realms that the log has touched

    def members(self) -> Iterator[Member]:
        """The files.

        Raises:
            CorruptionError: the source is damaged where that does not concern a realm alone.
            StorageFailed.
        """
        tail = self._source.parts(self._source.begin)  # opened now, so that nobody prunes it meanwhile
        with lmdb_errors("read", self._environment.path):
            yield from self._rows_of_realms()
            yield from self._list_of_realms()
            yield from self._meta()
        yield from self._tail(tail)

    def describe(self, entries: Iterable[FileEntry]) -> Manifest:
        """The manifest, once all members were taken."""
        manifest = describe(self._source, entries, checkpoint=self._checkpoint)
        failed = [FailedRealm(realm=realm, error=error) for realm, error in sorted(self._failed.items())]
        failed += [one for one in manifest.failed if self._selection.takes(one.realm)]
        selection = self._selection
        return replace(
            manifest,
            form=Form.RECORDS,
            realms=self._realms,
            realms_chosen=list(selection.realms) or manifest.realms_chosen,
            realms_excluded=[*manifest.realms_excluded, *selection.exclude],
            realms_unmatched=self._unmatched if selection.realms else manifest.realms_unmatched,
            failed=failed,
        )

    # -- realms --------------------------------------------------------------------------------------------

    def _rows_of_realms(self) -> Iterator[Member]:
        store = self._environment
        parts = [
            (store.data, _Part("data")),
            (store.history, _Part("history")),
            (store.clients, _Part("clients")),
        ]
        for found in self._chosen_by_id():
            realm_id, path = int.from_bytes(found[:REALM_PREFIX_BYTES], "big"), found[REALM_PREFIX_BYTES:]
            if not self._check(path):
                continue
            for database, part in parts:
                rows = rows_between(self._txn.cursor(database), realm_prefix(realm_id), prefix_end(realm_id))
                for key, value in rows:
                    part.add(encode_row(key, value))
                    if part.is_full:
                        yield from part.take()
        for _, part in parts:
            yield from part.take()

    def _chosen_by_id(self) -> list[bytes]:
        """Id and path of each chosen realm, in one: a million of them are to fit into memory."""
        found = [realm_prefix(row.id) + path.encode() for path, row in self._all_realms()]
        found.sort()
        return found

    def _all_realms(self) -> Iterator[tuple[str, RealmRow]]:
        """The chosen realms by path, without those that have failed; one whose row can't be read fails."""
        for key, raw in self._txn.cursor(self._environment.realms):
            path = key.decode(errors="backslashreplace")
            if not self._selection.takes(path) or path in self._failed:
                continue
            try:
                key.decode()
                row = RealmRow.FromString(raw)
            except (DecodeError, UnicodeDecodeError) as error:
                self._fail(path, f"its row can't be read: {error}")
            else:
                yield path, row

    def _check(self, raw_path: bytes) -> bool:
        """Whether a realm's rows are as they were written."""
        path = raw_path.decode()
        row = RealmRow.FromString(self._txn.get(raw_path, b"", self._environment.realms))
        problems = check_realm(self._environment, self._txn, path, row, on_read=self._meter.read)
        if problems:
            self._fail(path, problems[0])
        return not problems

    def _fail(self, path: str, error: str) -> None:
        if path == SYSTEM_REALM:  # it holds the keys: without them there is nothing to start a server on
            raise CorruptionError(
                f"{path} of {self._source.path} can't be backed up: {error}", remedy=RESTORE
            )
        self._failed[path] = error

    def _list_of_realms(self) -> Iterator[Member]:
        part = _Part("realms")
        digest = count = 0
        for path, row in self._all_realms():
            part.add(encode_row(path.encode(), row.SerializeToString()))
            digest += realm_hash(path, row.version, row.entries, row.state_digest)
            count += 1
            self._realms += path not in SYSTEM_REALMS
            if part.is_full:
                yield from part.take()
        yield from part.take()
        self._note_missing(count, encode(digest))
        self._checkpoint.realms, self._checkpoint.state_digest = count, encode(digest)

    def _note_missing(self, count: int, digest: bytes) -> None:
        """Where nothing was left out, the list of realms must be what the checkpoint says."""
        said = self._source.checkpoint
        if self._selection.is_filtered or self._failed or (count, digest) == (said.realms, said.state_digest):
            return
        self._failed[""] = (
            f"the store holds {count} realms with state digest {digest.hex()}, its checkpoint at LSN {said.lsn} "
            f"names {said.realms} with {said.state_digest.hex()}: some are lost"
        )

    # -- meta ----------------------------------------------------------------------------------------------

    def _meta(self) -> Iterator[Member]:
        """Without what is known of rows that are not there, and of searches that go on."""
        part = _Part("meta")
        for key, value in self._txn.cursor(self._environment.meta):
            if key == CHECKPOINT_KEY:
                part.add(encode_row(key, self._checkpoint.SerializeToString()))
            elif not key.startswith(DROPPING_PREFIX) and key not in (CLIENTS_CURSOR_KEY, HISTORY_CURSOR_KEY):
                part.add(encode_row(key, value))
        yield from part.take()

    # -- the log -------------------------------------------------------------------------------------------

    def _tail(self, log_parts: list[LogPart]) -> Iterator[Member]:
        part = _Part(TAIL)
        offset = self._source.begin.offset
        gap: TailRow | None = None
        for record in self._entries(log_parts):
            offset += record.encoded_bytes
            entry = parse_entry(record.payload, record.lsn)
            place = LogPlace(record.position, offset)
            if not self._keeps(record, entry):
                gap = TailRow(place, entry.time_us)
                continue
            if gap is not None:
                part.add(gap.encode())
                gap = None
            part.add(TailRow(place, entry.time_us, record.payload).encode())
            if part.is_full:
                yield from part.take()
        if gap is not None:
            part.add(gap.encode())
        yield from part.take()

    def _entries(self, log_parts: list[LogPart]) -> Iterator[Record]:
        reader = ChainReader(self._source.begin.position)
        for log_part in log_parts:
            for piece in log_part.records():
                yield from reader.feed(piece)

    def _keeps(self, record: Record, entry: Entry) -> bool:
        kind = entry.WhichOneof("body")
        if kind == "change":
            return self._keeps_change(parse_change(entry.change, record.lsn).realm)
        if kind == "realm_dropped":
            return self._keeps_drop(entry.realm_dropped.realm)
        return kind != "digest_mark"  # it is of another state than this one, and changes nothing

    def _keeps_change(self, path: str) -> bool:
        if not self._selection.takes(path) or path in self._failed:
            return False
        self._note(path, is_there=True)
        return True

    def _keeps_drop(self, path: str) -> bool:
        if not self._selection.takes(path):
            return False
        self._note(path, is_there=False)
        self._failed.pop(path, None)  # what was damaged is gone, and the realm may be made again
        return True

    def _note(self, path: str, *, is_there: bool) -> None:
        """Keeps count of the realms."""
        was_there = self._is_there.get(path)
        if was_there is None:
            was_there = path not in self._failed and self._source.state.store.current.realm(path) is not None
        if path not in SYSTEM_REALMS:
            self._realms += is_there - was_there
        self._is_there[path] = is_there
