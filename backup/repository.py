"""Where backups are kept: named objects in a folder, or in a bucket of an object storage.

``Repository`` is the port; ``folder_repository`` and ``object_repository`` are the two that there are.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol
from urllib.parse import SplitResult, unquote, urlsplit

from understudy.common.errors import (
    AlreadyStored,
    CorruptionError,
    ForeignCluster,
    NewerFormat,
    NotStored,
    RepositoryRefused,
    UsageError,
)
from understudy.common.types import ClusterId, format_id

FORMAT_VERSION = 1
IDENTITY = "understudy.json"
SIZE_MAX = 64 << 20  # bytes that are read into memory at once

OBJECT_SCHEMES = ("s3", "gs", "az")
# A leading dot is kept for what is no object: files being written, and what network folders hide in them.
_PART = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
_NAME = re.compile(rf"{_PART}(/{_PART})*\Z")
_URLS = "give /path, file:///path, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
_PREFIX = re.compile(rf"({_PART}/)*({_PART})?\Z")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as it is listed."""

    name: str
    size: int  # bytes
    modified_s: float  # seconds since 1970, by the storage's clock


class Repository(Protocol):
    """Objects by name. A name is relative, with slashes; an object is there whole or not at all.

    Everything raises :class:`RepositoryError` where the storage is not reachable or throttles for too long, of these
    :class:`RepositoryRefused` where it refuses; a folder also raises DiskFull and StorageFailed.
    """

    url: str  # as given; it never holds credentials

    def put(self, name: str, data: bytes) -> None:
        """Creates an object; never overwrites.

        Raises:
            AlreadyStored: there is one of that name.
        """

    def upload(self, name: str, *, expected_bytes: int = 0) -> AbstractContextManager[IO[bytes]]:
        """Streams an object, in bounded memory.

        It exists under its name only after the block has ended well. After an error, here or in the block, nothing
        is left. A name is to be used for one upload only; two at the same time are told apart in a folder, but not
        in every object storage.

        Args:
            expected_bytes: how large it will be, about, where it may have more than 100 GiB.

        Raises:
            AlreadyStored: there is one of that name; it is untouched.
        """

    def read(self, name: str, size_max: int = SIZE_MAX) -> bytes:
        """All of a small object.

        Raises:
            NotStored: there is none of that name.
            CorruptionError: it has more than ``size_max`` bytes.
        """

    def download(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Reads an object of any size from its beginning to its end, in bounded memory.

        A connection that is cut is resumed. The end is reported only where it is.

        Raises:
            NotStored: there is none of that name.
        """

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """All objects whose names begin so, sorted by name.

        What another run stores or deletes meanwhile may be missing or there still, and some storages show new
        objects late: that an object is not listed is no proof that there is none. What must be safe is decided by
        ``put``, ``swap`` and ``read``.
        """

    def delete(self, name: str) -> None:
        """Removes an object; what is gone already is fine."""

    def swap(self, name: str, data: bytes, expected: bytes | None) -> bool:
        """Replaces a small object if it is as expected; says whether it was.

        Args:
            expected: its content; None where there must be none.
        """

    def now_s(self) -> float:
        """The time by the clock that objects are dated by, seconds since 1970."""

    def sweep(self, older_than_s: float) -> None:
        """Removes what runs have left that were cut off so many seconds ago: a folder's temporary files.

        Object storages don't show the parts of an upload that was cut off. A lifecycle rule of the bucket
        (``AbortIncompleteMultipartUpload``) removes them; here there is nothing to do.
        """


def open_repository(url: str) -> Repository:
    """The repository at a URL.

    Args:
        url: ``/path``, ``file:///path``, ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``.

    Raises:
        UsageError: it is none of these.
        RepositoryError: the folder is not there. It is never made here: a network folder that is not mounted must
            not be taken for an empty repository.
    """
    # The two import this module; and importing the library for object storages takes its time.
    from understudy.backup.folder_repository import FolderRepository

    folder = folder_of_url(url)
    if folder is not None:
        repository = FolderRepository(url, folder)
        repository.check_root()
        return repository
    from understudy.backup.object_repository import ObjectRepository

    return ObjectRepository(url)


def check_url(url: str) -> None:
    """Refuses what can't be a repository's URL, without looking for it.

    Raises:
        UsageError.
    """
    folder_of_url(url)


def is_repository(text: str) -> bool:
    """Whether ``text`` names a repository: by its scheme, or as a folder that was claimed by a cluster."""
    if _split(text).scheme in (*OBJECT_SCHEMES, "file"):
        return True
    return (Path(text) / IDENTITY).is_file()


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        what = f"{url!r} is no URL" if "@" not in url else "that is no URL"  # it may hold a credential
        raise UsageError(f"{what}: {error}", remedy=_URLS) from None


def folder_of_url(url: str) -> Path | None:
    """The folder that a URL names; None if it names an object storage."""
    if url.startswith("/"):
        return Path(url)
    parts = _split(url)
    if "@" in parts.netloc:  # not shown: it may hold a credential
        raise UsageError("the URL of a repository holds credentials", remedy="give them in the environment")
    if parts.scheme == "file" and parts.path.startswith("/") and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    if parts.scheme not in OBJECT_SCHEMES:
        raise UsageError(
            f"backups can't be kept at {url!r}" if "@" not in url else "backups can't be kept at that URL",
            remedy=_URLS,
        )
    return None


def check_name(name: str) -> str:
    """``name`` if it can be an object's.

    Raises:
        UsageError: it can't.
    """
    if not _NAME.match(name):
        raise UsageError(
            f"{name!r} can't be the name of an object in a repository",
            remedy="a name is parts of A-Z a-z 0-9 . _ - joined by /, none of which begins with a dot",
        )
    return name


def is_name(name: str) -> bool:
    """Whether an object can have that name."""
    return _NAME.match(name) is not None


def check_prefix(prefix: str) -> str:
    """``prefix`` if a name can begin so.

    Raises:
        UsageError: none can.
    """
    if not _PREFIX.match(prefix):
        raise UsageError(f"no name of an object in a repository begins with {prefix!r}")
    return prefix


# -- whose it is -----------------------------------------------------------------------------------------------


def claim(repository: Repository, cluster: ClusterId) -> None:
    """Makes sure that the repository holds backups of this cluster, and no other.

    Raises:
        ForeignCluster: it is another's.
        NewerFormat: a later version has made it.
        CorruptionError: what it says of itself can't be read.
        RepositoryRefused: the storage would overwrite what is there.
    """
    try:
        found = repository.read(IDENTITY)
    except NotStored:
        found = _create_identity(repository, cluster)
    owner = _decode_identity(found, repository.url)
    if owner != cluster:
        raise ForeignCluster(
            f"{repository.url} holds backups of cluster {format_id(owner)}; this is cluster {format_id(cluster)}",
            remedy="keep the backups of each cluster in a repository of their own",
        )


def check_claimed(repository: Repository) -> None:
    """Makes sure that some cluster keeps its backups there, though there may be none yet.

    Raises:
        UsageError: it is no repository.
    """
    try:
        repository.read(IDENTITY)
    except NotStored:
        raise UsageError(
            f"{repository.url} is no repository of backups: it has no {IDENTITY}",
            remedy="give what stands in a policy's repositories; a policy's first run makes one of an empty folder",
        ) from None


def _create_identity(repository: Repository, cluster: ClusterId) -> bytes:
    data = json.dumps({"format": FORMAT_VERSION, "cluster": format_id(cluster)}).encode() + b"\n"
    try:
        repository.put(IDENTITY, data)
    except AlreadyStored:
        return repository.read(IDENTITY)  # another run was first
    _check_that_nothing_is_overwritten(repository, data)
    return data


def _check_that_nothing_is_overwritten(repository: Repository, data: bytes) -> None:
    """Some object storages ignore the condition that all else here relies on, so it is tried once."""
    try:
        repository.put(IDENTITY, data)
    except AlreadyStored:
        return
    raise RepositoryRefused(
        f"{repository.url} overwrites objects where it is told not to",
        remedy="backups need a storage that honours If-None-Match, as S3, Google Cloud Storage, Azure and MinIO do",
    )


def _decode_identity(data: bytes, url: str) -> ClusterId:
    try:
        raw = json.loads(data)
        if raw["format"] > FORMAT_VERSION:
            raise NewerFormat(
                f"{url} was written by a newer version of Understudy (format {raw['format']})",
                remedy=f"this version reads format {FORMAT_VERSION}; upgrade it",
            )
        return ClusterId(uuid.UUID(raw["cluster"]).bytes)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptionError(
            f"{IDENTITY} in {url} can't be read: {error}",
            remedy="is it a repository of Understudy's? Keep backups where nothing else is kept",
        ) from error
