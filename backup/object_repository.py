"""Backups in a bucket of an object storage: S3 and what speaks like it, Google Cloud Storage, Azure.

Objects are created with ``If-None-Match`` and the lock is swapped with ``If-Match``. A large object is uploaded in
parts; their completion can't be made conditional here, so the name is looked up before, and has to be unique.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, TypeVar, cast
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import from_url

from understudy.backup.ranged_download import RangedDownload, Ranges
from understudy.backup.repository import SIZE_MAX, StoredObject, check_name, check_prefix
from understudy.common import portal
from understudy.common.backoff import Backoff
from understudy.common.errors import (
    AlreadyStored,
    CorruptionError,
    NotStored,
    RepositoryError,
    RepositoryRefused,
    UsageError,
)

if TYPE_CHECKING:
    from obstore import ObjectMeta, UpdateVersion, WritableFile
    from obstore.store import ClientConfig, ObjectStore, RetryConfig
    from typing_extensions import Buffer

# S3 takes 10,000 parts. One part is being filled, two are on their way, and the first is held twice.
_PART_BYTES = 16 << 20  # at the least
_PARTS_MAX = 10_000
_PARTS_AT_ONCE = 2
_SLICE_BYTES = 1 << 20  # what is handed over at once; within one call there is no limit to what is in flight
_RETRIES_MAX = 100  # time is what ends them; this is for a clock that stands still
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 15.0
_SAID_CHARACTERS = 300  # of what the storage or the library says; more of it hides the rest of the message

_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": (),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION; AWS_ENDPOINT_URL where it is not Amazon's",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_T = TypeVar("_T")
_REFUSED = (PermissionDeniedError, UnauthenticatedError)
_NOT_AS_EXPECTED = (AlreadyExistsError, PreconditionError)
_NO_CONTAINER = re.compile("NoSuchBucket|ContainerNotFound|bucket does not exist", re.IGNORECASE)
# Of clocks that are being set, and of credentials that are made anew from time to time.
_PASSING = re.compile(
    "RequestTimeTooSkewed|RequestExpired|ExpiredToken|TokenRefreshRequired|has expired|signature expired"
    "|specified time frame|date header too old",
    re.IGNORECASE,
)
_CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long an object storage is waited for."""

    connect_s: float = 10.0
    request_s: float = 90.0  # for one; two parts at a time have to be sent in it, which takes 3 Mbit/s
    total_s: float = 180.0  # after which nothing is tried again; signatures last a little longer


class ObjectRepository:
    """A :class:`~understudy.backup.repository.Repository` in a bucket. Nothing is asked of it before it is used.

    Args:
        url: scheme, bucket and prefix. Credentials come from the environment.
        patience: how long it is waited for.

    Raises:
        UsageError: the URL holds something else, such as credentials.
        RepositoryRefused: credentials are missing, or can't be any.
    """

    def __init__(self, url: str, *, patience: Patience | None = None) -> None:
        self.url = _checked(url)
        self._scheme = urlsplit(url).scheme
        self._patience = patience or Patience()
        self._store = self._open(_RETRIES_MAX)
        # For conditional writes. The library would try again where an answer was lost, and then take the object
        # that it has written itself for somebody else's.
        self._store_without_retries = self._open(0)

    def _open(self, retries_max: int) -> ObjectStore:
        patience = self._patience
        endpoints = [os.environ[name] for name in _ENDPOINTS[self._scheme] if name in os.environ]
        client: ClientConfig = {
            "allow_http": bool(endpoints) and endpoints[0].startswith("http://"),
            "connect_timeout": datetime.timedelta(seconds=patience.connect_s),
            "timeout": datetime.timedelta(seconds=patience.request_s),
        }
        retry: RetryConfig = {
            "max_retries": retries_max,
            "retry_timeout": datetime.timedelta(seconds=patience.total_s),
            "backoff": {
                "init_backoff": datetime.timedelta(seconds=_FIRST_PAUSE_S),
                "max_backoff": datetime.timedelta(seconds=_LAST_PAUSE_S),
                "base": 2,
            },
        }
        try:
            return from_url(self.url, client_options=client, retry_config=retry)
        except (BaseError, ValueError) as error:  # the storage was not even asked
            raise self._refused(f"can't use {self.url}: {_said(error)}") from error
        except OSError as error:
            raise self._failed("use", "", error) from error

    def put(self, name: str, data: bytes) -> None:
        """Creates an object, with one request that makes it there whole."""
        if not self._put_if(check_name(name), data, expected=None):
            raise self.already_stored(name)

    @contextlib.contextmanager
    def upload(self, name: str, *, expected_bytes: int = 0) -> Iterator[IO[bytes]]:
        """Up to 16 MiB become one request with a condition; more is uploaded in at most 10,000 parts."""
        if self.size(check_name(name)) is not None:
            raise self.already_stored(name)
        # Half as many again, since what was expected can be wrong.
        upload = _Upload(self, name, max(_PART_BYTES, expected_bytes * 3 // 2 // _PARTS_MAX))
        try:
            yield cast(IO[bytes], upload)
            upload.finish()
        except BaseException:
            upload.abort()
            raise

    def read(self, name: str, size_max: int = SIZE_MAX) -> bytes:
        """All of a small object."""
        found = self._find(check_name(name), size_max)
        if found is None:
            raise self._not_stored(name)
        return found[0]

    @contextlib.contextmanager
    def download(self, name: str) -> Iterator[IO[bytes]]:
        """Reads an object in ranges, several at once, all of the same version of it."""
        ranges = Ranges(self._store, check_name(name), self._pauses)
        with self.errors("read", name):
            try:
                first = portal.call(ranges.first())
            except FileNotFoundError as error:
                if _NO_CONTAINER.search(str(error)):
                    raise
                raise self._not_stored(name) from None

        async def fetch(start: int, end: int) -> memoryview:
            return await self._fetch(ranges, name, start, end)

        download = RangedDownload(first, ranges.size, fetch)
        with io.BufferedReader(download, _SLICE_BYTES) as file:
            yield file

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """The objects, as the storage lists them, sorted."""
        folder = check_prefix(prefix).rpartition("/")[0]
        # The library's prefixes are whole parts of names.
        pages = self._listed(lambda: list(obstore.list(self._store, folder or None, chunk_size=1000)))
        found = [
            StoredObject(about["path"], about["size"], about["last_modified"].timestamp())
            for page in pages
            for about in page
            if about["path"].startswith(prefix)
        ]
        return iter(sorted(found, key=lambda one: one.name))

    def delete(self, name: str) -> None:
        """Removes an object."""
        with self.errors("delete", check_name(name)):
            try:
                obstore.delete(self._store, name)
            except FileNotFoundError as error:
                if _NO_CONTAINER.search(str(error)):
                    raise

    def swap(self, name: str, data: bytes, expected: bytes | None) -> bool:
        """Writes on condition that it is still the version that had the expected content."""
        return self._put_if(check_name(name), data, expected=expected)

    def now_s(self) -> float:
        """By this machine's clock: storages refuse requests whose time is not theirs within a quarter of an hour."""
        return time.time()

    def sweep(self, older_than_s: float) -> None:
        """Nothing: parts of an upload that was cut off are the bucket's lifecycle rule to remove."""

    # -- below ----------------------------------------------------------------------------------------------

    def _put_if(self, name: str, data: bytes, *, expected: bytes | None) -> bool:
        """Writes if the content is as expected; says whether it was.

        An answer may be lost although the storage did as asked. So before another attempt the content is read: if
        it is ours now, it was done.
        """
        version = None
        if expected is not None:
            found = self._find(name)
            if found is None or found[0] != expected:
                return False
            version = found[1]
        is_unclear = False
        for pause_s in self._pauses():
            try:
                obstore.put(self._store_without_retries, name, data, mode=version or "create")
                return True
            except _REFUSED as error:
                raise self._failed("write", name, error) from error
            except (BaseError, OSError) as error:
                failure: Exception = error
            is_unclear |= not isinstance(failure, _NOT_AS_EXPECTED)
            content = self._content(name)
            if content != expected:
                return is_unclear and content == data
            # Not even where it was told that something is there: it may just have been going.
            time.sleep(pause_s)
        raise self._failed("write", name, failure) from failure

    def _listed(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns, tried again: the library does not where an answer is cut off after it has begun."""
        for pause_s in self._pauses():
            try:
                return work()
            except (FileNotFoundError, *_REFUSED) as error:
                raise self._failed("list", "", error) from error
            except (BaseError, OSError) as error:
                if _NO_CONTAINER.search(str(error)):
                    raise self._failed("list", "", error) from error
                failure: Exception = error
            time.sleep(pause_s)
        raise self._failed("list", "", failure) from failure

    def _pauses(self) -> Iterator[float]:
        """Seconds to wait after each attempt; it ends when nothing is to be tried again."""
        backoff = Backoff(first_s=_FIRST_PAUSE_S, last_s=_LAST_PAUSE_S)
        end_s = time.monotonic() + self._patience.total_s
        while True:
            yield backoff.next_s(random.random())
            if time.monotonic() > end_s:
                return

    def _find(self, name: str, size_max: int = SIZE_MAX) -> tuple[bytes, UpdateVersion] | None:
        """Content and version."""
        with self.errors("read", name):
            try:
                got = obstore.get(self._store, name)
            except FileNotFoundError as error:
                if _NO_CONTAINER.search(str(error)):
                    raise
                return None
            about = got.meta
            if about["size"] > size_max:
                raise CorruptionError(f"{name} in {self.url} has more than {size_max:,} bytes")
            return bytes(got.bytes()), _version(about)

    def _content(self, name: str) -> bytes | None:
        found = self._find(name)
        return None if found is None else found[0]

    def size(self, name: str) -> int | None:
        """Of an object, in bytes; None if there is none."""
        with self.errors("look for", name):
            try:
                return obstore.head(self._store, name)["size"]
            except FileNotFoundError:
                return None

    def part_writer(self, name: str, part_bytes: int) -> WritableFile:
        """Begins an upload in parts."""
        at_once = _PARTS_AT_ONCE if part_bytes == _PART_BYTES else 1
        return obstore.open_writer(self._store, name, buffer_size=part_bytes, max_concurrency=at_once)

    async def _fetch(self, ranges: Ranges, name: str, start: int, end: int) -> memoryview:
        """A range of the same version of an object, whole."""
        with self.errors("read", name):
            try:
                data = await ranges.fetch(start, end)
            except FileNotFoundError as error:
                raise self._not_stored(name) from error
            except PreconditionError as error:
                raise RepositoryError(f"{name} in {self.url} was changed while it was read") from error
        if len(data) != end - start:
            raise RepositoryError(f"{name} in {self.url} ends {end - start - len(data):,} bytes early")
        return data

    def already_stored(self, name: str) -> AlreadyStored:
        """The error."""
        return AlreadyStored(f"there is a {name} in {self.url} already")

    def _not_stored(self, name: str) -> NotStored:
        return NotStored(f"there is no {name} in {self.url}")

    @contextlib.contextmanager
    def errors(self, action: str, name: str = "") -> Iterator[None]:
        """Turns the library's errors into ours."""
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            raise self._failed(action, name, error) from error

    def _failed(self, action: str, name: str, error: Exception) -> RepositoryError:
        what = f"{name} in {self.url}" if name else self.url
        if _NO_CONTAINER.search(str(error)):
            return RepositoryRefused(
                f"can't {action} {what}: there is no such bucket", remedy="make it first"
            )
        said = f"can't {action} {what}: {_said(error)}"
        if isinstance(error, _REFUSED) and _is_final(error):
            return self._refused(said)
        return RepositoryError(said, remedy=f"is it reachable? It is found by {_CREDENTIALS[self._scheme]}")

    def _refused(self, said: str) -> RepositoryRefused:
        return RepositoryRefused(
            said, remedy=f"are these set, and may they do this? {_CREDENTIALS[self._scheme]}"
        )


class _Upload(io.BufferedIOBase):
    """What the block of an upload writes to."""

    def __init__(self, repository: ObjectRepository, name: str, part_bytes: int) -> None:
        self._repository = repository
        self._name = name
        self._part_bytes = part_bytes
        self._pending = bytearray()
        self._bytes = 0
        self._parts: WritableFile | None = None  # once it is too large for one request

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Buffer) -> int:
        """Appends; waits while too much is on its way."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _SLICE_BYTES):
            self._take(view[start : start + _SLICE_BYTES])
        return len(view)

    def _take(self, data: memoryview) -> None:
        self._pending += data
        self._bytes += len(data)
        if self._bytes > _PARTS_MAX * self._part_bytes:
            raise RepositoryError(f"{self._name} is too large for {self._repository.url}")
        if self._parts is None and self._bytes > _PART_BYTES:
            self._parts = self._repository.part_writer(self._name, self._part_bytes)
        if self._parts is not None and len(self._pending) >= _SLICE_BYTES:
            self._send(self._parts)

    def _send(self, parts: WritableFile) -> None:
        with self._repository.errors("write", self._name):
            for start in range(0, len(self._pending), _SLICE_BYTES):
                parts.write(bytes(self._pending[start : start + _SLICE_BYTES]))
        self._pending.clear()

    def finish(self) -> None:
        """All is written: the object is there after this."""
        if self._parts is None:
            self._repository.put(self._name, bytes(self._pending))
            return
        self._send(self._parts)
        parts, self._parts = self._parts, None
        try:
            with self._repository.errors("write", self._name):
                parts.close()
        except RepositoryError:
            # The answer may be lost although it was done; the name is ours alone, and there is no half of it.
            if self._repository.size(self._name) != self._bytes:
                raise

    def abort(self) -> None:
        """Nothing is to be left. Where even that fails, and where finishing has, parts stay that nobody sees."""
        parts, self._parts = self._parts, None
        self._pending.clear()
        if parts is not None:
            with contextlib.suppress(BaseError, OSError):
                parts.__exit__(RepositoryError, None, None)


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if not _CONTAINER.match(parts.netloc) or parts.query or parts.fragment:
        # It may hold credentials, so it isn't shown.
        raise UsageError(
            f"the URL of a repository is {parts.scheme}://, the name of a bucket, and a prefix; nothing else",
            remedy=f"credentials come from the environment: {_CREDENTIALS[parts.scheme]}",
        )
    check_prefix(parts.path.strip("/"))
    return url


def _version(about: ObjectMeta) -> UpdateVersion:
    """What a conditional write is made on, without what this storage does not have."""
    version: UpdateVersion = {"e_tag": about["e_tag"]}
    if about["version"] is not None:
        version["version"] = about["version"]
    return version


def _is_final(error: Exception) -> bool:
    """Whether a refusal lasts; one without a reason, as of a HEAD, may be any."""
    text = _text(error)
    return "<Code>" in text and not _PASSING.search(text)


def _text(error: Exception) -> str:
    return str(error).partition("Debug source")[0]


def _said(error: Exception) -> str:
    """The heart of a message, without addresses and headers that could show a credential."""
    text = _text(error)
    code, message = (re.search(f"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message"))
    if code is not None and message is not None:
        return f"{code[1]}: {message[1]}"
    return " ".join(re.sub(r"\?\S+", "", text).split())[:_SAID_CHARACTERS]
