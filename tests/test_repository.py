"""Where backups are kept: one suite for folders and object storages, then the faults of each, and the lock.

This file is also a program: what has to run in a process of its own.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest
from harness import plain_environment, wait_until
from s3_server import BUCKET, PAGE_OBJECTS, FaultyFront, S3Server, credentials
from store_helpers import fill_disk, small_disk

from understudy.backup import folder_repository, object_repository
from understudy.backup.folder_repository import FolderRepository
from understudy.backup.object_repository import ObjectRepository, Patience
from understudy.backup.repository import (
    IDENTITY,
    Repository,
    claim,
    open_repository,
)
from understudy.backup.repository_lock import LOCK, Lease, RepositoryLock, locked
from understudy.common.errors import (
    AlreadyStored,
    CorruptionError,
    DiskFull,
    ExitCode,
    ForeignCluster,
    NewerFormat,
    NotStored,
    RepositoryBusy,
    RepositoryError,
    RepositoryRefused,
    StorageFailed,
    UsageError,
)
from understudy.common.files import sync_directory
from understudy.common.types import ClusterId, new_id

MIB = 1 << 20
NUMBERS = itertools.count()
IMPATIENT = Patience(request_s=30, total_s=1)
KILLED = -signal.SIGKILL
_DEADLINE_S = 60


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """One server for all tests; each uses a prefix of its own."""
    with S3Server() as server:
        yield server


def new_repository(path: Path) -> Repository:
    """An empty one in a folder that is made."""
    path.mkdir(mode=0o700)
    return open_repository(str(path))


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a repository that is empty."""
    if request.param == "folder":
        return str(new_repository(tmp_path / "repository").url)
    return s3_url(request.getfixturevalue("s3").address, monkeypatch)


@pytest.fixture
def repository(url: str) -> Repository:
    """An empty one."""
    return open_repository(url)


@pytest.fixture
def folder(tmp_path: Path) -> Repository:
    """An empty one, in ``tmp_path / "repository"``."""
    return new_repository(tmp_path / "repository")


@pytest.fixture
def front(s3: S3Server) -> Iterator[FaultyFront]:
    """Before the server."""
    with FaultyFront(s3.address) as started:
        yield started


@pytest.fixture
def behind(front: FaultyFront, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository behind the front."""
    return open_repository(s3_url(front.address, monkeypatch))


@pytest.fixture
def impatient(behind: Repository) -> Repository:
    """The same, but soon given up."""
    return ObjectRepository(behind.url, patience=IMPATIENT)


def s3_url(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own, on the server at an address, which the environment says from now on."""
    for name, value in credentials(address).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/test/{next(NUMBERS)}"


def names(repository: Repository, prefix: str = "") -> list[str]:
    """Of the objects that are listed."""
    return [stored.name for stored in repository.list(prefix)]


def content(size: int, *, seed: int = 1) -> bytes:
    """Bytes that are nowhere alike."""
    return random.Random(seed).randbytes(size)


def upload(repository: Repository, name: str, data: bytes, *, piece: int = 300_000) -> None:
    """In pieces that have nothing to do with those of the storage."""
    with repository.upload(name) as out:
        for start in range(0, len(data), piece):
            assert out.write(data[start : start + piece]) == len(data[start : start + piece])


def download(repository: Repository, name: str) -> bytes:
    """In pieces."""
    with repository.download(name) as file:
        return b"".join(iter(lambda: file.read(1_000_003), b""))


# -- the contract ----------------------------------------------------------------------------------------------


def test_an_object_is_stored_read_listed_and_deleted(repository: Repository) -> None:
    """What was put is read, streamed and listed with its size and a time; deleting what is gone is fine."""
    repository.put("a/b/one", b"1234")
    repository.put("empty", b"")
    assert repository.read("a/b/one") == download(repository, "a/b/one") == b"1234"
    assert repository.read("empty") == download(repository, "empty") == b""
    empty, one = sorted(repository.list(), key=lambda stored: stored.size)
    assert (empty.name, empty.size, one.name, one.size) == ("empty", 0, "a/b/one", 4)
    assert one.modified_s > 1_700_000_000
    assert one.modified_s - 60 < repository.now_s() < one.modified_s + 3600  # of its own clock
    for _ in range(2):
        repository.delete("a/b/one")
        assert names(repository) == ["empty"]
    with pytest.raises(NotStored, match="a/b/one"):
        repository.read("a/b/one")
    with pytest.raises(NotStored, match="a/b/one"), repository.download("a/b/one"):
        pass


def test_nothing_is_overwritten(repository: Repository) -> None:
    """G4: neither put nor upload replaces an object, not even by the same bytes."""
    repository.put("one", b"first")
    for data in (b"first", b"second"):
        with pytest.raises(AlreadyStored, match="one"):
            repository.put("one", data)
    with pytest.raises(AlreadyStored, match="one"):
        upload(repository, "one", content(17 * MIB))
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(repository.upload("two"))
        repository.put("two", b"was faster")
        out.write(b"too late")
        with pytest.raises(AlreadyStored, match="two"):
            stack.close()
    assert (repository.read("one"), repository.read("two")) == (b"first", b"was faster")


def test_a_large_object_is_there_when_its_upload_has_ended(repository: Repository) -> None:
    """G8: until the block ends nobody sees it; then it is there, byte for byte."""
    data = content(21 * MIB + 17)
    with repository.upload("large") as out:
        out.write(data[:100])
        out.write(data[100 : 20 * MIB])  # at once
        assert names(repository) == []
        out.write(data[20 * MIB :])
    assert [(stored.name, stored.size) for stored in repository.list()] == [("large", len(data))]
    assert download(repository, "large") == data
    with pytest.raises(CorruptionError, match="large"):
        repository.read("large", size_max=MIB)
    with repository.download("large") as file:
        assert file.read(10) == data[:10]  # the rest is not asked for


def test_a_very_large_object_is_uploaded_in_larger_parts(behind: Repository) -> None:
    """An object storage takes 10,000 parts: what is expected to need more of the usual ones gets larger ones."""
    data = content(MIB) * 100
    with behind.upload("large", expected_bytes=400 << 30) as out:
        out.write(data)
    assert isinstance(behind, ObjectRepository)
    assert obstore.head(behind._store, "large")["e_tag"].strip('"').endswith("-2")
    assert download(behind, "large") == data


@pytest.mark.parametrize("size", [10, 20 * MIB])
def test_an_upload_that_fails_leaves_nothing(
    repository: Repository, s3: S3Server, tmp_path: Path, size: int
) -> None:
    """G8: an exception in the block, whatever it is, ends with no object and no hidden parts of one."""

    def fail(error: BaseException) -> None:
        with repository.upload("folder/one") as out:
            out.write(content(size))
            raise error

    hidden = s3.unfinished_uploads
    for error in (KeyError("ours"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
    assert names(repository) == []
    assert s3.unfinished_uploads == hidden
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    repository.put("folder/one", b"now")


@pytest.mark.parametrize("create", ["put", "upload"])
def test_of_those_who_create_the_same_object_one_wins(url: str, create: str) -> None:
    """Eight at the same time: one has stored its bytes, the others are told."""
    barrier = threading.Barrier(8)

    def one(number: int) -> bool:
        repository, data = open_repository(url), b"from %d" % number
        barrier.wait()
        try:
            upload(repository, "contested", data) if create == "upload" else repository.put("contested", data)
        except AlreadyStored:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(one, range(8)))
    assert won.count(True) == 1
    assert open_repository(url).read("contested") == b"from %d" % won.index(True)


def test_a_swap_needs_what_is_expected(repository: Repository) -> None:
    """Only who knows the content replaces it; None stands for no object."""
    assert not repository.swap("lock", b"1", b"0")
    assert repository.swap("lock", b"1", None)
    assert not repository.swap("lock", b"2", None)
    assert not repository.swap("lock", b"2", b"0")
    assert repository.read("lock") == b"1"
    assert repository.swap("lock", b"2", b"1")
    assert repository.read("lock") == b"2"


def test_of_those_who_swap_one_wins(url: str) -> None:
    """Eight that count one number up in turns lose none of their steps."""
    open_repository(url).put("number", b"0")

    def count(_: int) -> None:
        repository, done = open_repository(url), 0
        while done < 5:
            found = repository.read("number")
            done += repository.swap("number", b"%d" % (int(found) + 1), found)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    assert open_repository(url).read("number") == b"20"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "a/../b",
        "./a",
        ".hidden",
        "a/.b",
        "a b",
        "ä",
        "a\n",
        "a\\b",
        "a%2e",
    ],
)
def test_a_name_that_could_mean_something_else_is_refused(repository: Repository, name: str) -> None:
    """Nothing but plain relative names is taken, so that nothing outside of the repository can be named."""
    for action in (
        lambda: repository.put(name, b""),
        lambda: repository.read(name),
        lambda: repository.delete(name),
        lambda: repository.swap(name, b"", None),
        lambda: repository.upload(name).__enter__(),
        lambda: repository.download(name).__enter__(),
    ):
        with pytest.raises(UsageError, match="name"):
            action()


def test_a_prefix_may_end_anywhere_in_a_name(repository: Repository) -> None:
    """What is listed begins with the prefix, letter by letter, and comes sorted by its whole name."""
    for name in ("wal/10", "wal/1", "wal-2", "wal/2/x", "base/1", "wal.old"):
        repository.put(name, b"")
    assert names(repository) == ["base/1", "wal-2", "wal.old", "wal/1", "wal/10", "wal/2/x"]
    assert names(repository, "wal/") == ["wal/1", "wal/10", "wal/2/x"]
    assert names(repository, "wal/1") == ["wal/1", "wal/10"]
    assert names(repository, "wal") == ["wal-2", "wal.old", "wal/1", "wal/10", "wal/2/x"]
    assert names(repository, "nothing") == names(repository, "nothing/at/all") == []
    with pytest.raises(UsageError):
        repository.list("../")


def test_more_objects_than_a_page_has_are_listed(repository: Repository) -> None:
    """A listing goes on over all of the storage's pages."""
    expected = [f"many/{number:05d}" for number in range(10 * PAGE_OBJECTS + 30)]
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(lambda name: repository.put(name, b""), random.Random(1).sample(expected, len(expected)))
        )
    assert names(repository) == expected


# -- whose it is -----------------------------------------------------------------------------------------------


def test_a_repository_belongs_to_one_cluster(repository: Repository) -> None:
    """G3: the first claims it; it may come back, and another cluster is refused with both names."""
    ours, theirs = ClusterId(new_id()), ClusterId(new_id())
    claim(repository, ours)
    claim(repository, ours)
    identity = repository.read(IDENTITY)
    with pytest.raises(ForeignCluster) as caught:
        claim(repository, theirs)
    cluster = json.loads(identity)["cluster"]
    assert cluster in str(caught.value)
    assert repository.read(IDENTITY) == identity


@pytest.mark.parametrize(
    ("identity", "error"),
    [
        (b'{"format": 2, "of": "tomorrow"}', NewerFormat),
        (b'{"format": 1, "cluster": "x"}', CorruptionError),
        (b"[]", CorruptionError),
        (b"\xff", CorruptionError),
    ],
)
def test_an_identity_that_says_something_else_is_refused(
    folder: Repository, identity: bytes, error: type[Exception]
) -> None:
    """G4: a repository of a later version, or none of ours, is left as it is."""
    folder.put(IDENTITY, identity)
    with pytest.raises(error):
        claim(folder, ClusterId(new_id()))
    assert folder.read(IDENTITY) == identity


def test_a_storage_that_overwrites_is_refused() -> None:
    """G4: where conditions are ignored, as some storages do, no backups are kept."""

    class Careless:
        url = "s3://careless"

        def read(self, name: str) -> bytes:
            raise NotStored(name)

        def put(self, name: str, data: bytes) -> None:
            pass

    careless: Any = Careless()
    with pytest.raises(RepositoryRefused, match="overwrites"):
        claim(careless, ClusterId(new_id()))


# -- opening ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["ftp://host/path", "relative/path", "file://host/path", "", "s3:bucket"])
def test_a_url_that_names_no_storage_is_refused(url: str) -> None:
    """The message says which ones there are."""
    with pytest.raises(UsageError, match=r"s3://|bucket"):
        open_repository(url)


@pytest.mark.parametrize(
    "url",
    ["s3://key:hidden@bucket/a", "s3://bucket/a?secret=hidden", "ftp://u:hidden@h/", "s3://u:hidden@[h/"],
)
def test_credentials_in_a_url_are_refused_and_not_shown(url: str) -> None:
    """G10: they belong into the environment; messages with the URL would show them."""
    with pytest.raises(UsageError) as caught:
        open_repository(url)
    assert "hidden" not in str(caught.value)


def test_the_other_object_storages_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Google Cloud Storage and Azure open by their URLs; nothing is asked of them before they are used."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    assert open_repository("gs://bucket/prefix").url == "gs://bucket/prefix"
    assert open_repository("az://container/prefix").url == "az://container/prefix"


def test_a_folder_is_never_made_by_opening_it(tmp_path: Path) -> None:
    """G4: a network folder that is not mounted is not taken for an empty repository."""
    root = tmp_path / "mnt" / "backups"
    with pytest.raises(RepositoryError, match="mount") as caught:
        open_repository(str(root))
    assert caught.value.exit_code == ExitCode.UNREACHABLE
    assert not root.parent.exists()
    root.parent.mkdir()
    with pytest.raises(RepositoryError, match="mount"):
        open_repository(str(root))
    assert not root.exists()
    new_repository(root).put("one", b"1")
    assert open_repository(root.as_uri()).read("one") == b"1"


def test_a_folder_that_has_gone_is_not_an_empty_one(folder: Repository, tmp_path: Path) -> None:
    """G4: after an unmount, everything fails as such, and nothing is written to where it was."""
    (tmp_path / "repository").rename(tmp_path / "elsewhere")
    for action in (
        lambda: list(folder.list()),
        lambda: list(folder.list("a/b")),
        lambda: folder.put("a/b/one", b""),
        lambda: folder.read("one"),
        lambda: folder.delete("one"),
        lambda: folder.swap("one", b"", None),
        lambda: folder.sweep(0),
    ):
        with pytest.raises(RepositoryError, match="mount") as caught:
            action()
        assert not isinstance(caught.value, NotStored)
    assert not (tmp_path / "repository").exists()


# -- faults of a folder ----------------------------------------------------------------------------------------


def test_files_are_for_their_owner_only(folder: Repository, tmp_path: Path) -> None:
    """G10: whatever the umask is, nobody else reads a backup."""
    previous = os.umask(0)
    try:
        folder.put("a/b", b"")
        folder.swap(LOCK, b"", None)
    finally:
        os.umask(previous)
    for path in (tmp_path / "repository").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_without_hard_links_nothing_is_overwritten(
    folder: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4: on a file system that knows none, of eight that create the same object one wins all the same."""

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(folder_repository.os, "link", no_links)
    test_of_those_who_create_the_same_object_one_wins(folder.url, "upload")
    with pytest.raises(AlreadyStored):
        folder.put("contested", b"")
    assert {path.name for path in (tmp_path / "repository").iterdir()} == {"contested", ".lock-guard"}


def test_a_full_disk_leaves_no_object(tmp_path: Path) -> None:
    """G9: storing on a disk that is full fails as such, nothing of it is seen, and with space it goes on."""
    with small_disk(tmp_path / "disk", size="4m") as disk:
        folder = new_repository(disk / "repository")
        folder.put("one", b"1")
        with pytest.raises(DiskFull):
            upload(folder, "large", content(5 * MIB))
        folder.put("two", b"2")
        fill = fill_disk(disk)
        with pytest.raises(DiskFull):
            folder.put("three", bytes(5000))
        fill.unlink()
        assert names(folder) == ["one", "two"]
        folder.put("three", b"3")


def test_a_folder_that_can_only_be_read_says_so(tmp_path: Path) -> None:
    """Everything that writes fails as a storage that refuses; what is there can be read."""
    with small_disk(tmp_path / "disk", size="4m") as disk:
        folder = new_repository(disk / "repository")
        folder.put("one", b"1")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for action in (
            lambda: folder.put("a/two", b""),
            lambda: folder.delete("one"),
            lambda: folder.swap(LOCK, b"", None),
        ):
            with pytest.raises(StorageFailed, match="Read-only"):
                action()
        assert folder.read("one") == b"1"
        assert names(folder) == ["one"]


def test_what_is_no_object_is_not_listed(folder: Repository, tmp_path: Path) -> None:
    """Files being written, the lock's guard, and what network folders and people leave behind are no objects."""
    folder.put("a/one", b"1")
    folder.swap(LOCK, b"", None)
    for name in (".writing-0123", "a/.writing-4567", ".nfs0001", "a/with blank", ".snapshot"):
        (tmp_path / "repository" / name).write_bytes(b"")
    (tmp_path / "repository/a/link").symlink_to(tmp_path)
    assert names(folder) == ["a/one", LOCK]


def test_what_is_no_file_is_neither_listed_nor_waited_for(folder: Repository, tmp_path: Path) -> None:
    """A pipe or a socket where an object should be is an error at once: opening a pipe waits for who writes to it."""
    os.mkfifo(tmp_path / "repository/pipe")
    os.mkfifo(tmp_path / "repository" / LOCK)
    os.mknod(tmp_path / "repository/socket", stat.S_IFSOCK | 0o600)
    with open_pipes(tmp_path / "repository"):
        assert names(folder) == []
        for name in ("pipe", "socket", LOCK):
            with pytest.raises(StorageFailed, match=f"{name}: it is no regular file"), folder.download(name):
                pass
        with pytest.raises(StorageFailed, match="no regular file"):
            folder.swap(LOCK, b"", None)
        with pytest.raises(AlreadyStored):
            folder.put("pipe", b"")


@contextlib.contextmanager
def open_pipes(directory: Path) -> Iterator[None]:
    """Somebody writes to the pipes in a directory, so that whoever opens one to read does not wait."""
    pipes = [os.open(path, os.O_RDWR) for path in directory.iterdir() if path.is_fifo()]
    try:
        yield
    finally:
        for pipe in pipes:
            os.close(pipe)


def test_sweeping_takes_only_old_files_that_were_being_written(folder: Repository, tmp_path: Path) -> None:
    """What a run writes right now stays, as does every object, however old."""
    root = tmp_path / "repository"
    folder.put("a/one", b"1")
    (root / "a/.writing-old").write_bytes(b"")
    for name in ("a/.writing-old", "a/one"):
        os.utime(root / name, (1, 1))
    with folder.upload("a/two") as out:
        folder.sweep(older_than_s=3600)
        out.write(b"2")
    assert sorted(path.name for path in root.rglob("*")) == ["a", "one", "two"]


def test_what_is_deleted_leaves_no_empty_folders(folder: Repository, tmp_path: Path) -> None:
    """Backups come and go for years, and nobody walks the folders of those that have gone; the root stays."""
    root = tmp_path / "repository"
    folder.put("a/b/c/one", b"1")
    folder.put("a/two", b"2")
    folder.delete("a/b/c/one")
    assert sorted(path.name for path in root.rglob("*")) == ["a", "two"]
    folder.delete("a/two")
    folder.put("three", b"3")
    folder.delete("three")
    assert list(root.iterdir()) == []
    folder.put("a/b/c/one", b"1")
    assert names(folder) == ["a/b/c/one"]


def test_a_folder_that_is_removed_before_anything_is_in_it_is_made_again(
    folder: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: who deletes the last object of a folder does not make an upload into it fail."""
    make_folders = FolderRepository._make_folders
    removals = iter(["a/b", "a"])

    def overtaken(self: FolderRepository, wanted: Path) -> None:
        make_folders(self, wanted)
        if wanted.name == "b" and (name := next(removals, None)):
            shutil.rmtree(tmp_path / "repository" / name)

    monkeypatch.setattr(FolderRepository, "_make_folders", overtaken)
    folder.put("a/b/one", b"1")
    assert folder.read("a/b/one") == b"1"
    assert next(removals, None) is None


def test_who_stores_and_deletes_at_once_does_not_hinder_the_other(folder: Repository) -> None:
    """G8: two who store and delete in the same folders each find what they have stored."""

    def work(name: str) -> None:
        for number in range(100):
            folder.put(f"a/b/{name}", b"%d" % number)
            assert folder.read(f"a/b/{name}") == b"%d" % number
            folder.delete(f"a/b/{name}")

    with ThreadPoolExecutor() as threads:
        list(threads.map(work, ("one", "two")))
    assert names(folder) == []


def test_a_folder_that_others_remove_and_make_again_meanwhile_is_no_error(
    folder: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a removal and its sync, who else deletes removes the empty folder, and who stores makes it again."""

    def sync(path: Path) -> None:
        path.rmdir()
        try:
            sync_directory(path)
        finally:
            path.mkdir()

    folder.put("a/b/one", b"1")
    with monkeypatch.context() as patched:
        patched.setattr(folder_repository, "sync_directory", sync)
        folder.delete("a/b/one")
    assert names(folder) == []


def test_killed_at_any_step_a_folder_holds_whole_objects(tmp_path: Path) -> None:
    """G8: kill -9 before any change of a file: what is listed is whole, the rest is swept, and a next run goes on."""
    steps = json.loads(_output("dying", str(tmp_path)))
    assert len(steps) > 15, steps
    assert steps.pop() == 0
    assert set(steps) == {KILLED}
    for step in range(1, len(steps) + 1):
        root = tmp_path / str(step)
        found = open_repository(str(root))
        for stored in found.list():
            assert (stored.name, found.read(stored.name)) in _DYING_OBJECTS, step
        found.sweep(older_than_s=0)
        assert not list(root.rglob(".writing-*"))
        _live(found)
        assert names(found) == sorted({name for name, _ in _DYING_OBJECTS})


# -- faults of an object storage -------------------------------------------------------------------------------


def test_a_server_that_asks_to_slow_down_is_tried_again(behind: Repository, front: FaultyFront) -> None:
    """Each call succeeds after a few answers of 503."""
    for call in (
        lambda: behind.put("one", b"1"),
        lambda: upload(behind, "two", content(17 * MIB)),
        lambda: behind.read("one"),
        lambda: download(behind, "two"),
        lambda: list(behind.list()),
        lambda: behind.swap("one", b"2", b"1"),
        lambda: behind.delete("two"),
    ):
        front.refused = 2
        call()
        assert front.refused == 0
    assert (names(behind), behind.read("one")) == (["one"], b"2")


def test_a_server_that_goes_on_refusing_is_an_error(
    behind: Repository, impatient: Repository, front: FaultyFront
) -> None:
    """G9: it ends within bounds, with the storage's words, and nothing is stored."""
    front.refused = 10_000
    for call in (
        lambda: impatient.put("one", b"1"),
        lambda: upload(impatient, "two", content(17 * MIB)),
        lambda: list(impatient.list()),
    ):
        with pytest.raises(RepositoryError, match=r"SlowDown|503") as caught:
            call()
        assert "AWS_ENDPOINT_URL" in str(caught.value)
    front.refused = 0
    assert names(behind) == []


def test_a_lost_answer_is_not_taken_for_another_run(behind: Repository, front: FaultyFront) -> None:
    """What was stored although the answer was lost is found to be ours, for objects, uploads and the lock."""
    front.unanswered_puts = 2
    behind.put("one", b"1")
    front.unanswered_puts = front.unanswered_posts = 2
    upload(behind, "two", content(17 * MIB))
    front.unanswered_puts = 1
    assert behind.swap("one", b"2", b"1")
    front.unanswered_puts = 1
    with pytest.raises(AlreadyStored):
        behind.put("one", b"3")
    assert behind.read("one") == b"2"
    assert download(behind, "two") == content(17 * MIB)


def test_a_completion_whose_answer_is_lost_counts(behind: Repository, front: FaultyFront) -> None:
    """G8: the object is there, whole, so the upload has succeeded, though no attempt was ever answered."""
    repository = ObjectRepository(behind.url, patience=IMPATIENT)
    with repository.upload("large") as out:
        out.write(content(20 * MIB))
        wait_until(lambda: front.requests >= 3)  # a look for the name, the beginning, a part
        front.unanswered_posts = 10_000
    assert download(behind, "large") == content(20 * MIB)


def test_an_upload_that_is_cut_is_stored_whole_or_not_at_all(
    behind: Repository, impatient: Repository, front: FaultyFront
) -> None:
    """G8: parts whose connection is cut in the middle are sent again; cut for good, nothing is left."""
    data = content(20 * MIB)
    front.cut_uploads = 3
    upload(behind, "large", data)
    assert download(behind, "large") == data
    front.cut_uploads = 10_000
    for size in (100, 20 * MIB):
        with pytest.raises(RepositoryError):
            upload(impatient, "cut", data[:size])
    front.cut_uploads = 0
    assert names(behind) == ["large"]


def test_a_server_that_goes_silent_is_an_error(behind: Repository, front: FaultyFront) -> None:
    """G9: a connection that stays open and says nothing ends within bounds."""
    behind.put("one", b"1")
    repository = ObjectRepository(behind.url, patience=Patience(request_s=0.3, total_s=0.5))
    front.is_silent = True
    for call in (
        lambda: repository.read("one"),
        lambda: repository.put("two", b"2"),
        lambda: list(repository.list()),
    ):
        with pytest.raises(RepositoryError, match=r"timeout|timed out|error"):
            call()
    front.is_silent = False
    assert (behind.read("one"), names(behind)) == (b"1", ["one"])


def test_a_server_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what was tried, and by what the server is found; it shows no credential."""
    url = s3_url("127.0.0.1:1", monkeypatch)
    with pytest.raises(RepositoryError, match="AWS_ENDPOINT_URL") as caught:
        ObjectRepository(url, patience=IMPATIENT).read("one")
    assert url in str(caught.value)
    assert caught.value.exit_code == ExitCode.UNREACHABLE
    assert credentials("")["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    assert credentials("")["AWS_ACCESS_KEY_ID"] not in str(caught.value)


def test_a_bucket_that_is_not_there_is_not_an_empty_one(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4: a mistake in its name is told as such, whatever is tried."""
    s3_url(s3.address, monkeypatch)
    repository = open_repository("s3://another/test")
    for call in (
        lambda: claim(repository, ClusterId(new_id())),
        lambda: repository.put("one", b""),
        lambda: upload(repository, "one", content(17 * MIB)),
        lambda: list(repository.list()),
        lambda: repository.delete("one"),
    ):
        with pytest.raises(RepositoryRefused, match="no such bucket"):
            call()


def test_a_storage_that_can_not_be_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that are missing are no fault of the network's, which would pass."""
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RepositoryRefused, match="AZURE_STORAGE_ACCOUNT_NAME"):
        open_repository("az://container/test")


@pytest.mark.parametrize(
    ("status", "code", "message", "lasts"),
    [
        (403, "AccessDenied", "Access Denied", True),
        (403, "InvalidAccessKeyId", "The key does not exist in our records.", True),
        (401, "AuthenticationRequired", "Authentication required.", True),
        (403, "RequestTimeTooSkewed", "The difference between the times is too large.", False),
        (403, "ExpiredToken", "The provided token has expired.", False),
        (403, "AuthenticationFailed", "Signature not valid in the specified time frame.", False),
        (403, "SignatureDoesNotMatch", "Signature expired: it is now earlier than", False),
    ],
)
def test_a_refusal_that_may_pass_is_told_from_one_that_lasts(
    behind: Repository, front: FaultyFront, status: int, code: str, message: str, lasts: bool
) -> None:
    """A clock that is being set and a token that is being renewed are waited for, a missing permission is not."""
    front.refusal = status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    front.refused = 10_000
    for call in (lambda: behind.read("one"), lambda: behind.put("one", b"1"), lambda: behind.delete("one")):
        with pytest.raises(RepositoryError, match=code) as caught:
            call()
        assert caught.value.is_lasting == lasts
    with (
        pytest.raises(RepositoryError) as caught,
        behind.upload("one"),
    ):  # begins with a HEAD, which says no reason
        pass
    assert not caught.value.is_lasting


def test_what_the_system_refuses_for_now_is_no_refusal_of_the_storage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of credentials that lie in a file, the next attempt may read what this one could not."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(object_repository, "from_url", fail)
    with pytest.raises(RepositoryError, match="Too many open files") as caught:
        open_repository("s3://bucket/test")
    assert not caught.value.is_lasting


def test_memory_is_bounded(s3: S3Server) -> None:
    """G9: uploading and downloading an object takes no more memory than a few of its parts."""
    environment = plain_environment() | credentials(s3.address)
    url = f"s3://{BUCKET}/test/{next(NUMBERS)}"
    before, after = json.loads(_output("streaming", url, environment=environment))
    assert after - before < 80 * MIB, (before // MIB, after // MIB)


# -- the lock --------------------------------------------------------------------------------------------------

BRIEF = Lease(length_s=3.0, renewal_s=0.2)  # no briefer than a disk or a storage may stall
UNRENEWED = Lease(length_s=60.0, renewal_s=3600.0)


class Clock:
    """Stands still but for those who sleep by it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Moves it."""
        self.now_s += seconds


def test_the_lock_is_held_by_one_and_given_up(repository: Repository) -> None:
    """Who finds it held is told by whom; after the block, the next one has it."""
    with locked(repository, "a backup", lease=UNRENEWED) as lock:
        lock.check()
        lock.renew()
        with pytest.raises(RepositoryBusy, match=rf"a backup, process {os.getpid()} on .*, since 2"):
            locked(repository, "pruning", wait_s=0).__enter__()
        lock.check()
    with locked(repository, "pruning", wait_s=0) as lock:
        lock.check()


def test_a_lock_that_is_renewed_is_never_taken_over(repository: Repository) -> None:
    """Somebody waits for many times the length of a lease, by a clock that runs much faster."""
    clock = Clock()
    with locked(repository, "a backup", lease=UNRENEWED) as lock:

        def sleep(seconds: float) -> None:
            clock.sleep(40 * seconds)  # somebody else's clock
            lock.renew()

        with pytest.raises(RepositoryBusy):
            locked(repository, "another", wait_s=600, clock=clock, sleep=sleep).__enter__()
        lock.check()


def test_a_lock_that_lapses_is_taken_over_and_its_holder_notices(repository: Repository) -> None:
    """G4: a holder that hung for an hour finds out before it publishes, and leaves its successor's lock alone."""
    clock = Clock()
    with (
        locked(repository, "hung", lease=UNRENEWED) as hung,
        locked(repository, "next", lease=UNRENEWED, wait_s=90, clock=clock, sleep=clock.sleep) as successor,
    ):
        assert clock.now_s == pytest.approx(1060, abs=2)
        for _ in range(2):
            with pytest.raises(RepositoryError, match="lost"):
                hung.check()
            hung.renew()
        successor.check()
        held = repository.read(LOCK)
        hung.release()
        assert repository.read(LOCK) == held


def test_a_lock_that_can_not_be_renewed_counts_as_lost(repository: Repository) -> None:
    """After a lease's length nobody relies on it, though nobody may have taken it."""
    clock = Clock()
    with locked(repository, "a backup", lease=UNRENEWED, clock=clock) as lock:
        clock.now_s += 59
        lock.check()
        lock.renew()
        clock.now_s += 59
        lock.check()
        clock.now_s += 2
        with pytest.raises(RepositoryError, match="lost"):
            lock.check()


def test_a_damaged_lock_lapses_too(repository: Repository) -> None:
    """What nobody can read is waited for as any other, and then replaced."""
    clock = Clock()
    repository.swap(LOCK, b'{"owner": ', None)
    with locked(repository, "a backup", lease=UNRENEWED, clock=clock, sleep=clock.sleep) as lock:
        assert clock.now_s >= 1060
        lock.check()


def test_a_renewal_whose_answer_is_lost_does_not_lose_the_lock(repository: Repository) -> None:
    """It was stored although it failed: the next one goes on from what is there."""

    class Failing:
        url = repository.url
        read = staticmethod(repository.read)
        is_failing = False

        def swap(self, name: str, data: bytes, expected: bytes | None) -> bool:
            swapped = repository.swap(name, data, expected)
            if self.is_failing:
                raise RepositoryError("the answer was lost")
            return swapped

    failing: Any = Failing()
    with locked(failing, "a backup", lease=UNRENEWED) as lock:
        failing.is_failing = True
        with pytest.raises(RepositoryError):
            lock.renew()
        failing.is_failing = False
        lock.renew()
        lock.check()


def test_two_processes_take_turns(url: str, s3: S3Server) -> None:
    """While one process holds the lock, longer than a lease, another waits; killed, it is followed."""
    with _holding(url, s3) as holder:
        repository = open_repository(url)
        with pytest.raises(RepositoryBusy, match=rf"a test, process {holder.pid} "):
            locked(repository, "ours", wait_s=1.5 * BRIEF.length_s, lease=BRIEF).__enter__()
        holder.kill()
        holder.wait()
        with locked(repository, "ours", wait_s=_DEADLINE_S, lease=BRIEF) as lock:
            lock.check()


def test_a_process_that_was_stopped_has_lost_its_lock(url: str, s3: S3Server) -> None:
    """G4: stopped for longer than a lease, and awake again, it does not go on."""
    with _holding(url, s3) as holder:
        holder.send_signal(signal.SIGSTOP)
        with locked(open_repository(url), "ours", wait_s=_DEADLINE_S, lease=BRIEF) as lock:
            holder.send_signal(signal.SIGCONT)
            stdout, _ = holder.communicate(timeout=_DEADLINE_S)
            assert "lost" in stdout
            lock.check()


# -- processes of their own ------------------------------------------------------------------------------------

_DYING_OBJECTS = [("a/b/put", b"put" * 1000), ("a/upload", b"upload" * 1000), (LOCK, b"new"), (LOCK, b"old")]
_STEPS = ("mkdir", "link", "rename", "unlink", "fsync", "open")


def _output(*arguments: str, environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, __file__, *arguments]
    environment = environment or plain_environment()
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, timeout=_DEADLINE_S)
    return done.stdout.decode()


@contextlib.contextmanager
def _holding(url: str, s3: S3Server) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until it is killed, or its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, __file__, "holding", url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=plain_environment() | credentials(s3.address),
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def _hold(url: str) -> None:
    """Says when it has the lock, and what checking says once standard input has ended."""
    with locked(open_repository(url), "a test", lease=BRIEF) as lock:
        print("held", flush=True)
        sys.stdin.read()
        print(_checked(lock), flush=True)


def _checked(lock: RepositoryLock) -> str:
    try:
        lock.check()
    except RepositoryError as error:
        return str(error)
    return "ours"


def _stream(url: str) -> None:
    """Prints how much memory was needed at most, before and after a large object went both ways."""
    repository = open_repository(url)
    repository.put("warm", b"")
    piece = 64 * content(MIB)
    before = _peak_bytes()
    with repository.upload("large") as out:
        for _ in range(2):
            out.write(piece)
    with repository.download("large") as file:
        count = sum(len(piece) for piece in iter(lambda: file.read(MIB), b""))
    assert count == 2 * len(piece)
    print(json.dumps([before, _peak_bytes()]))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _live(repository: Repository) -> None:
    """Stores some objects in all the ways that there are; what is there already stays."""
    for name, create in (("a/b/put", repository.put), ("a/upload", lambda *it: upload(repository, *it))):
        with contextlib.suppress(AlreadyStored):
            create(name, dict(_DYING_OBJECTS)[name])
    repository.swap(LOCK, b"old", None)
    repository.swap(LOCK, b"new", b"old")


def _die(folder: str) -> None:
    """Does so in a process for each step of it, in folders by their numbers; prints how they ended."""
    codes: list[int] = []
    while 0 not in codes:
        step = len(codes) + 1
        repository = new_repository(Path(f"{folder}/{step}"))
        pid = os.fork()
        if not pid:
            _kill_at(step)
            _live(repository)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    print(json.dumps(codes))


def _kill_at(step: int) -> None:
    numbers = itertools.count(1)

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            if next(numbers) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return counted

    for name in _STEPS:
        setattr(os, name, wrapped(getattr(os, name)))


if __name__ == "__main__":
    {"holding": _hold, "streaming": _stream, "dying": _die}[sys.argv[1]](sys.argv[2])
