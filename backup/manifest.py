"""What a backup says of itself: ``backup.json``, for people and for programs. ``docs/FORMAT.md`` explains the keys."""

from __future__ import annotations

import datetime
import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from understudy.common.directory import MANIFEST_FILE
from understudy.common.errors import RESTORE, CorruptionError, NewerFormat, NotADataDirectory
from understudy.common.files import publish, storage_errors
from understudy.common.types import ClusterId

FORMAT_VERSION = 1
# Beyond it, what is read is no manifest: one lists a few files for each 64 MiB of log.
_MANIFEST_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of the backup."""

    path: str  # relative to the backup, with slashes
    bytes: int
    sha256: str  # hexadecimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a backup holds, and where it comes from."""

    format: int = FORMAT_VERSION
    cluster: str
    node: str  # the source's
    epoch: int
    lsn: int
    digest: str  # of the log at `lsn`, hexadecimal
    log_offset: int  # bytes of the log up to there, since LSN 1
    time: str  # of the last entry, UTC, ISO 8601
    checkpoint_lsn: int  # where the store stands; the log goes on from there
    state_digest: str  # of the store, hexadecimal
    realms: int  # without the system's own
    made: str  # when the backup was finished, UTC
    version: str  # of the software
    machine: str  # the store's pages can be read by machines of its kind
    byte_order: str
    page_bytes: int
    files: list[FileEntry]

    @property
    def cluster_id(self) -> ClusterId:
        """The cluster's id."""
        return ClusterId(uuid.UUID(self.cluster).bytes)

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    def encode(self) -> bytes:
        """Readable JSON."""
        return json.dumps(asdict(self), indent=2).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes, name: object) -> Manifest:
        """The inverse of :meth:`encode`.

        Args:
            name: what error messages call it.

        Raises:
            CorruptionError: it is no manifest.
            NewerFormat: it is one of a later version.
        """
        try:
            raw: dict[str, Any] = json.loads(data)
            if raw["format"] > FORMAT_VERSION:
                raise NewerFormat(
                    f"{name} was written by a newer version of Understudy (format {raw['format']})",
                    remedy=f"this version reads format {FORMAT_VERSION}; upgrade it",
                )
            files = [FileEntry(**file) for file in raw.pop("files")]
            manifest = cls(files=files, **raw)
            manifest._check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptionError(f"{name} can't be read: {error}", remedy=RESTORE) from error
        return manifest

    def _check(self) -> None:
        for file in self.files:
            parts = Path(file.path).parts
            if not parts or file.path.startswith("/") or ".." in parts or len(file.sha256) != 64:
                raise ValueError(f"it names a file {file.path!r}")
        uuid.UUID(self.cluster)
        bytes.fromhex(self.digest)
        numbers = (self.epoch, self.lsn, self.log_offset, self.checkpoint_lsn, self.realms)
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("a number is none")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the backup in ``directory``.

    Raises:
        NotADataDirectory: there is none.
        CorruptionError, NewerFormat, StorageFailed.
    """
    path = directory / MANIFEST_FILE
    with storage_errors("read", path):
        if not path.is_file():
            raise NotADataDirectory(f"{directory} is not a backup: it has no {MANIFEST_FILE}")
        with path.open("rb") as file:
            data = file.read(_MANIFEST_BYTES_MAX)
    return Manifest.decode(data, path)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Publishes it.

    Raises:
        DiskFull, StorageFailed.
    """
    publish(directory / MANIFEST_FILE, manifest.encode())


def utc_text(time_s: float) -> str:
    """A time of the wall clock, seconds since 1970, as manifests have it."""
    moment = datetime.datetime.fromtimestamp(time_s, datetime.UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
