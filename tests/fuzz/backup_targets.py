"""What lies in backups: the manifest, and the files of one of records."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fuzz.target import Decode, Target, pure
from understudy.backup.manifest import FileEntry, Form, Manifest
from understudy.backup.rows import TailRow, decode_rows, decode_tail, encode_row
from understudy.common.log_reader import LogPlace
from understudy.common.types import START

_MANIFEST = Manifest(
    cluster="00000000-0000-4000-8000-000000000000",
    node="00000000-0000-4000-8000-000000000001",
    epoch=1,
    lsn=7,
    digest="00" * 32,
    log_offset=100,
    time="2026-05-01T14:30:00.000000Z",
    checkpoint_lsn=5,
    state_digest="00" * 16,
    realms=1,
    made="2026-05-01T14:30:01.000000Z",
    version="1",
    machine="x86_64",
    byte_order="little",
    page_bytes=4096,
    files=[FileEntry(path="records/data-000001.rows", bytes=10, xxh3="00" * 16)],
    form=Form.RECORDS,
    realms_chosen=["/inventory/**"],
)


def _all_of(decode: Callable[[bytes, str], Iterator[object]]) -> Decode:
    def read(data: bytes) -> object:
        return sum(1 for _ in decode(data, "name"))

    return read


def targets() -> list[Target]:
    """Those of this module."""
    rows = b"".join(encode_row(b"key %d" % number, b"value" * number) for number in range(4))
    tail = TailRow(LogPlace(START, 100), 7, b"payload").encode()
    return [
        Target(
            name="backup manifest",
            opened=pure(lambda data: Manifest.decode(data, "name")),
            samples=lambda: [_MANIFEST.encode()],
            is_text=True,
        ),
        Target(name="backup rows", opened=pure(_all_of(decode_rows)), samples=lambda: [rows]),
        Target(name="backup log tail", opened=pure(_all_of(decode_tail)), samples=lambda: [tail, tail[:50]]),
    ]
