"""What a backup says of itself: ``backup.json``, for people and for programs. ``docs/FORMAT.md`` explains the keys."""

from __future__ import annotations

import datetime
import enum
import json
import re
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from understudy.backup.selection import describe_unmatched
from understudy.common.directory import MANIFEST_FILE
from understudy.common.errors import OTHER_BACKUP, CorruptionError, NewerFormat, NotADataDirectory
from understudy.common.files import publish, storage_errors
from understudy.common.types import ClusterId, Digest, Epoch, Lsn, Position

FORMAT_VERSION = 1
# Beyond it, what is read is no manifest: one lists a few files for each 64 MiB of log.
MANIFEST_BYTES_MAX = 64 << 20
# Anything else has no business in a data directory, and is not written anywhere.
FILE_NAMES = re.compile(
    r"(node\.json|backup\.json|admin-token|store/data\.mdb|log/[0-9]{20}\.seg|records/[a-z]+-[0-9]{6}\.rows)\Z"
)
_SEAL = "seal"
_PROBLEMS_MAX = 20  # where there are so many, more say nothing new
_SHOWN_CHARACTERS_MAX = 100  # of a value that can't be
_U64 = range(1 << 64)
# What each number can be. Earlier versions wrote no seal, so a value that can't be is all there is to tell damage by.
_NUMBERS = {
    "format": range(1, FORMAT_VERSION + 1),
    "epoch": _U64[1:],
    "lsn": _U64[1:],
    "log_offset": _U64,
    "checkpoint_lsn": _U64,
    "realms": _U64,
    "page_bytes": _U64,
}
_FILE_BYTES = range(1 << 63)
_TEXT = re.compile(r".*", re.DOTALL)
_TEXTS = {
    "cluster": re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    "digest": re.compile(r"[0-9a-f]{64}"),
    "state_digest": re.compile(r"([0-9a-f]{2})*"),
    "node": _TEXT,
    "version": _TEXT,
    "machine": _TEXT,
    "byte_order": _TEXT,
}
_XXH3 = re.compile(r"[0-9a-f]{32}")


class Form(enum.StrEnum):
    """What a backup consists of."""

    PAGES = "pages"  # a data directory
    RECORDS = "records"  # what any machine can make a data directory of


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of the backup."""

    path: str  # relative to the backup, with slashes
    bytes: int
    xxh3: str  # XXH3-128, hexadecimal, as `xxhsum -H2` prints it


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRealm:
    """A realm that is damaged in the source and was left out."""

    realm: str  # its path, as far as that can be read; empty where it can't be told which
    error: str


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
    form: Form = Form.PAGES
    realms_chosen: list[str] = field(default_factory=list)  # patterns; none: all realms
    realms_excluded: list[str] = field(default_factory=list)  # patterns
    realms_unmatched: list[str] = field(default_factory=list)  # of the chosen: the source had no such realm
    failed: list[FailedRealm] = field(default_factory=list)

    @property
    def is_filtered(self) -> bool:
        """Whether realms were left out because nobody wanted them in it."""
        return bool(self.realms_chosen or self.realms_excluded)

    @property
    def is_whole(self) -> bool:
        """Whether it holds all that the source held."""
        return not self.is_filtered and not self.failed

    @property
    def position(self) -> Position:
        """The last entry."""
        return Position(Lsn(self.lsn), Digest(bytes.fromhex(self.digest)))

    @property
    def rank(self) -> tuple[Epoch, Lsn]:
        """What is of a higher epoch is newer, though it reach less far; within an epoch, what reaches further."""
        return Epoch(self.epoch), Lsn(self.lsn)

    @property
    def problems(self) -> list[str]:
        """What is missing that should be in it, a line each."""
        lines = [
            f"realm {one.realm} was left out: {one.error}" if one.realm else one.error
            for one in self.failed[:_PROBLEMS_MAX]
        ]
        more = len(self.failed) - len(lines)
        lines += [f"{more} more realms were left out"] if more else []
        return lines + [describe_unmatched(pattern) for pattern in self.realms_unmatched]

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
        return sealed(asdict(self))

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
            raw = unsealed(data)
            if raw["format"] > FORMAT_VERSION:
                raise NewerFormat(
                    f"{name} was written by a newer version of Understudy (format {raw['format']})",
                    remedy=f"this version reads format {FORMAT_VERSION}; upgrade it",
                )
            files = [FileEntry(**file) for file in raw.pop("files")]
            failed = [FailedRealm(**one) for one in raw.pop("failed", [])]
            form = Form(raw.pop("form", Form.PAGES))
            manifest = cls(files=files, failed=failed, form=form, **raw)
            manifest._check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptionError(f"{name} can't be read: {error}", remedy=OTHER_BACKUP) from error
        return manifest

    def _check(self) -> None:
        for key, numbers in _NUMBERS.items():
            _require(_is_in(getattr(self, key), numbers), key, getattr(self, key))
        for key, pattern in _TEXTS.items():
            _require(_fits(getattr(self, key), pattern), key, getattr(self, key))
        for key in ("time", "made"):
            _require(_is_moment(getattr(self, key)), key, getattr(self, key))
        self._check_files()
        self._check_realms()

    def _check_files(self) -> None:
        seen: set[str] = set()
        for file in self.files:
            is_new = _fits(file.path, FILE_NAMES) and file.path not in seen
            _require(is_new, "the path of a file", file.path)
            _require(_is_in(file.bytes, _FILE_BYTES), f"bytes of {file.path}", file.bytes)
            _require(_fits(file.xxh3, _XXH3), f"xxh3 of {file.path}", file.xxh3)
            seen.add(file.path)

    def _check_realms(self) -> None:
        for key in ("realms_chosen", "realms_excluded", "realms_unmatched"):
            patterns = getattr(self, key)
            are_texts = isinstance(patterns, list) and all(isinstance(each, str) for each in patterns)
            _require(are_texts, key, patterns)
        for one in self.failed:
            _require(isinstance(one.realm, str) and isinstance(one.error, str), "failed", asdict(one))


def _is_in(number: object, numbers: range) -> bool:
    return type(number) is int and number in numbers  # True is an int, too


def _fits(text: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(text, str) and pattern.fullmatch(text) is not None


def _is_moment(text: str) -> bool:
    try:
        utc_seconds(text)
    except (ValueError, TypeError):
        return False
    return True


def _require(is_so: bool, what: str, value: object) -> None:
    if not is_so:
        raise ValueError(f"{what} is {repr(value)[:_SHOWN_CHARACTERS_MAX]}")


def sealed(facts: dict[str, Any]) -> bytes:
    """Readable JSON with a digest of what it says, as nothing else knows what a manifest should say."""
    return json.dumps({**facts, _SEAL: _seal_of(facts)}, indent=2).encode() + b"\n"


def unsealed(data: bytes) -> dict[str, Any]:
    """The inverse of :func:`sealed`; earlier versions wrote no digest.

    Raises:
        ValueError, AttributeError, RecursionError: it is not what was written.
    """
    facts: dict[str, Any] = json.loads(data)
    seal = facts.pop(_SEAL, None)
    if seal is not None and seal != _seal_of(facts):
        raise ValueError(f"its {_SEAL} does not fit, so something in it is not what was written")
    return facts


def _seal_of(facts: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


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
            data = file.read(MANIFEST_BYTES_MAX)
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


def utc_seconds(text: str) -> float:
    """The inverse of :func:`utc_text`.

    Raises:
        ValueError, TypeError: that is no such time.
    """
    moment = datetime.datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return moment.timestamp()
