"""The change-log: records on the wire, entries, and segment files with and without good checksums."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import xxhash
from faulty_files import FaultyFiles
from log_helpers import CLUSTER, EPOCH, LOG, new_log
from state_helpers import KEY, Author, write_here
from store_helpers import make_store, open_both

from fuzz.target import Decode, Target, pure
from understudy.cli.log_entries import LogEntry
from understudy.common import entries
from understudy.common.changelog import ChangeLog
from understudy.common.entry_json import entry_row
from understudy.common.errors import UnderstudyError
from understudy.common.log_reader import read_records
from understudy.common.log_recovery import recover
from understudy.common.memtable import Memtable
from understudy.common.operations import Add, Delete, DeleteRange, Put, Update
from understudy.common.records import HEADER, ChainReader, Record, chain_digest, read_headers, scan_chain
from understudy.common.segment import RECORDS_START, SECTOR_BYTES, segment_name
from understudy.common.state import State
from understudy.common.types import START, Digest, Epoch, Lsn
from understudy.replica.follow_session import FollowSession

_OPERATIONS = (
    Put(b"key", b"value"),
    Update(b"key", b"\xff"),
    Delete(b"key"),
    DeleteRange(b"a", b"b"),
    Add(b"n", -1),
)


def _records() -> list[Record]:
    """One of each kind of entry, each following the one before."""
    author = Author()
    return [
        author.epoch_start(),
        author.change("/realm", _OPERATIONS),
        author.change("/__system", [Put(b"history-key", KEY)]),
        author.freeze(),
        author.digest_mark(),
        author.change("/realm", [Put(b"k" * 480, b"v" * 300)]),
        author.drop("/realm"),
        author.epoch_start(),
    ]


def _payloads() -> list[bytes]:
    return [record.payload for record in _records()]


def _encoded() -> bytes:
    return b"".join(HEADER.pack(len(one.payload), one.lsn, one.digest) + one.payload for one in _records())


# -- records -------------------------------------------------------------------------------------------------


def _read_stream(data: bytes) -> None:
    """Cut in two, as it may come over the wire."""
    reader = ChainReader(START)
    reader.feed(data[: len(data) // 2])
    reader.feed(data[len(data) // 2 :])


def _scan(data: bytes) -> None:
    list(read_headers(data, Lsn(1)))
    scan_chain(data, START)


def sealed_records(data: bytes) -> bytes:
    """``data`` taken for records, with the LSNs and digests that they should have."""
    out, previous, lsn, at = bytearray(), START.digest, 0, 0
    while len(data) - at >= HEADER.size:
        length = min(HEADER.unpack_from(data, at)[0], len(data) - at - HEADER.size)
        payload = data[at + HEADER.size : at + HEADER.size + length]
        lsn, at = lsn + 1, at + HEADER.size + length
        previous = chain_digest(Digest(previous), Lsn(lsn), payload)
        out += HEADER.pack(length, lsn, previous) + payload
    return bytes(out) + data[at:]


def _follow(data: bytes) -> None:
    """A primary's chunk with a good chain, whatever is in its entries."""
    session = FollowSession(after=START, epoch=Epoch(0), offset=0, now_s=0.0)
    records = sealed_records(data)
    session.on_chunk(records, head_lsn=Lsn(1), head_offset=len(records), clock_us=0, now_s=0.0)


# -- entries -------------------------------------------------------------------------------------------------


def _show(payload: bytes) -> None:
    """As ``understudy log`` prints it, and the export of a rewind."""
    record = Record(Lsn(1), chain_digest(START.digest, Lsn(1), payload), payload)
    entries.proves_epoch(payload, epoch=Epoch(1), cluster=CLUSTER, keys=[KEY])
    for show in (entry_row, lambda one: LogEntry.of(one).facts(), lambda one: LogEntry.of(one).line()):
        with contextlib.suppress(UnderstudyError):
            show(record)


@contextlib.contextmanager
def _applying(folder: Path) -> Iterator[Decode]:
    """What a replica takes into its log, applies, and writes into its store: what it took, it must be able to."""
    environment, store = open_both(make_store(folder))

    def apply(payload: bytes) -> None:
        record = Record(Lsn(1), chain_digest(START.digest, Lsn(1), payload), payload)
        entries.check_entry(payload, record.lsn)
        state = State(store)
        state.apply(record)
        table = state.frozen[0] if state.frozen else state.active
        table.freeze(record.position, len(payload), state.time_us)
        write_and_undo(table)

    def write_and_undo(table: Memtable) -> None:
        try:
            write_here(environment, table)
        except UnderstudyError as error:
            raise AssertionError(
                "an entry that was taken into the log can't be written to the store"
            ) from error
        with environment.env.begin(write=True) as txn:
            for database in (environment.data, environment.realms, environment.history, environment.clients):
                txn.drop(database, delete=False)
            txn.drop(environment.meta, delete=False)
            txn.cursor(environment.meta).putmulti(empty)
        store.refresh()

    with store:
        with environment.env.begin(environment.meta) as txn:
            empty = list(txn.cursor())
        yield apply


# -- segments ------------------------------------------------------------------------------------------------


def _segment() -> bytes:
    """The file of a log in which a batch of each kind of entry was written."""
    files = FaultyFiles()
    with new_log(files) as log:
        for record in _records():
            data = HEADER.pack(len(record.payload), record.lsn, record.digest) + record.payload
            log.write_batch(data, record.position, epoch=EPOCH)
    content = bytes(files._names[LOG / segment_name(Lsn(1))].cache)
    return content[: RECORDS_START + len(_encoded()) + 100]


def sealed_segment(data: bytes) -> bytes:
    """``data`` taken for a segment file, with the checksums that header, watermark and records should have."""
    block = data[:RECORDS_START].ljust(RECORDS_START, b"\0")
    header, watermark = block[: SECTOR_BYTES - 32], block[SECTOR_BYTES : 2 * SECTOR_BYTES - 8]
    sealed = (
        header + sha256(header).digest() + watermark + struct.pack("<Q", xxhash.xxh3_64_intdigest(watermark))
    )
    return sealed + block[2 * SECTOR_BYTES :] + sealed_records(data[RECORDS_START:])


def _name(data: bytes) -> str:
    """The name that fits the header, so that more than the name is looked at."""
    return segment_name(Lsn(int.from_bytes(data[40:48], "little")))


@contextlib.contextmanager
def _reading_segments(folder: Path) -> Iterator[Decode]:
    def read(data: bytes) -> None:
        for content in (data, sealed_segment(data)):
            path = folder / _name(content)
            path.write_bytes(content)
            try:
                for after in (None, Lsn(0), Lsn(3)):
                    with contextlib.suppress(UnderstudyError):
                        list(read_records(folder, CLUSTER, after))
            finally:
                path.unlink()

    yield read


def _recover(data: bytes) -> None:
    for content in (data, sealed_segment(data)):
        files = FaultyFiles()
        with contextlib.closing(files.open(LOG / _name(content), create=True)) as file:
            file.write_at(content, 0)
        with contextlib.suppress(UnderstudyError):
            recover(LOG, cluster=CLUSTER, after=START, after_offset=0, files=files).writer.file.close()
        with (
            contextlib.suppress(UnderstudyError),
            ChangeLog.open(LOG, cluster=CLUSTER, after=START, after_offset=0, files=files) as log,
        ):
            for lsn in (1, 3, 1 << 63, (1 << 64) - 1):
                log.position_at(Lsn(lsn))


def targets() -> Sequence[Target]:
    """All of the change-log."""
    return (
        Target(name="log stream", opened=pure(_read_stream), samples=lambda: [_encoded()]),
        Target(name="log scan", opened=pure(_scan), samples=lambda: [_encoded()]),
        Target(name="log chunk", opened=pure(_follow), samples=lambda: [_encoded()]),
        Target(name="log entry shown", opened=pure(_show), samples=_payloads),
        Target(name="log entry applied", opened=_applying, samples=_payloads, is_slow=True),
        Target(name="segment read", opened=_reading_segments, samples=lambda: [_segment()], is_slow=True),
        Target(name="segment recovered", opened=pure(_recover), samples=lambda: [_segment()], is_slow=True),
    )
