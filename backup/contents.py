"""What a backup of a pinned source consists of, whatever it is written to: its pages, and what all backups have."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from understudy.backup.courtesy import Courtesy
from understudy.backup.manifest import FileEntry, Manifest, read_manifest, utc_text
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.source import Source
from understudy.common.directory import ADMIN_TOKEN_FILE, MANIFEST_FILE, NodeFile, Role
from understudy.common.files import storage_errors
from understudy.common.store_layout import DATA_FILE
from understudy.common.types import new_id
from understudy.v1.store_pb2 import CheckpointRow

STORE_FILE = f"store/{DATA_FILE}"


@dataclass(frozen=True, slots=True)
class Member:
    """A file of a backup, to be written once."""

    name: str  # its path in the backup, with slashes
    size: int  # bytes
    # A memoryview begins where a page of memory does, and stays as it is until the source is closed.
    pieces: Iterable[bytes | memoryview]


def metering(source: Source, total: int | None, *, rate: int | None, progress: OnProgress | None) -> Meter:
    """Counts what is read of a source: at the rate that was asked for, or else with courtesy for its server."""
    courtesy = Courtesy(source.path / "log") if rate is None else None
    return Meter(total, rate=rate, courtesy=courtesy, progress=progress)


def copy_members(source: Source) -> list[Member]:
    """Log and store."""
    return [
        *(Member(f"log/{part.name}", part.file_bytes, part.content()) for part in source.parts(source.begin)),
        Member(STORE_FILE, source.snapshot.file_bytes, source.snapshot.content()),
    ]


def token_member(source: Source) -> Iterator[Member]:
    """The operators' token, where the source has one."""
    path = source.path / ADMIN_TOKEN_FILE
    if path.is_file():
        with storage_errors("read", path):
            data = path.read_bytes()
        yield Member(ADMIN_TOKEN_FILE, len(data), [data])


def node_member(source: Source) -> Member:
    """``node.json``: a backup of the source's cluster, under a name of its own."""
    node = NodeFile(role=Role.BACKUP, cluster=source.node.cluster, node=str(uuid.UUID(bytes=new_id())))
    data = json.dumps(asdict(node), indent=2).encode() + b"\n"
    return Member("node.json", len(data), [data])


def describe(source: Source, entries: Iterable[FileEntry], *, checkpoint: CheckpointRow) -> Manifest:
    """The manifest of a backup that reaches up to where the source does.

    Args:
        entries: its files, but for ``node.json`` and the manifest itself.
        checkpoint: where the backup's store stands.
    """
    end = source.end
    origin = origin_of(source)
    return Manifest(
        cluster=source.node.cluster,
        node=source.node.node,
        epoch=source.epoch,
        lsn=end.position.lsn,
        digest=end.position.digest.hex(),
        log_offset=end.offset,
        time=utc_text(source.state.time_us / 1e6),
        checkpoint_lsn=checkpoint.lsn,
        state_digest=checkpoint.state_digest.hex(),
        realms=source.state.user_realm_count,
        made=utc_text(time.time()),
        version=importlib.metadata.version("understudy"),
        machine=platform.machine(),
        byte_order=sys.byteorder,
        page_bytes=source.snapshot.page_bytes,
        files=list(entries),
        realms_chosen=origin.realms_chosen if origin is not None else [],
        realms_excluded=origin.realms_excluded if origin is not None else [],
        realms_unmatched=origin.realms_unmatched if origin is not None else [],
        failed=origin.failed if origin is not None else [],
    )


def origin_of(source: Source) -> Manifest | None:
    """Where the source is a backup itself, its manifest: it may not hold all realms.

    Raises:
        CorruptionError, NewerFormat, StorageFailed.
    """
    if source.node.role is not Role.BACKUP or not (source.path / MANIFEST_FILE).exists():
        return None
    return read_manifest(source.path)
