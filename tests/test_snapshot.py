"""Ranges of a pinned snapshot, and the copy that is put together from them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import pytest

from understudy.common import lmdb_check, lmdb_pages, pinned_snapshot, snapshot
from understudy.common.errors import CorruptionError, Overloaded, StorageFailed, Unavailable
from understudy.common.files import OsFile
from understudy.common.pinned_snapshot import PinnedSnapshot
from understudy.common.snapshot import RANGE_BYTES, SnapshotCopy, range_digest

NAME, OTHER_NAME = b"0123456789abcdef", b"fedcba9876543210"
PAGE_BYTES = 4096
DEADLINE_S = 60.0

WRITER = """
import random, sys, lmdb
env = lmdb.open(sys.argv[1], map_size=1 << 40, max_dbs=2)
data = env.open_db(b"data")
chance = random.Random(int(sys.argv[2]))
while True:
    with env.begin(data, write=True) as txn:
        for _ in range(chance.randrange(1, 40)):
            key = b"%05d" % chance.randrange(1000)
            if chance.random() < 0.3:
                txn.delete(key)
            else:
                txn.put(key, chance.randbytes(chance.choice((10, 300, 3000, 12000))))
    print(flush=True)
"""

COPIER = """
import sys
from pathlib import Path
from understudy.common import snapshot
snapshot.FLUSH_RANGES = 3
image = Path(sys.argv[1]).read_bytes()
ranges = [image[at : at + snapshot.RANGE_BYTES] for at in range(0, len(image), snapshot.RANGE_BYTES)]
digests = [snapshot.range_digest(data) for data in ranges]
copy = snapshot.SnapshotCopy.open(Path(sys.argv[2]), snapshot=b"0123456789abcdef", file_bytes=len(image))
for index in copy.missing(digests):
    copy.write(index, ranges[index], digests[index])
    print(index, flush=True)
assert copy.finish() == []
print("finished", flush=True)
"""


# -- helpers -----------------------------------------------------------------------------------------------


def open_env(path: Path, **options: bool) -> lmdb.Environment:
    """A small environment, opened for writing where nothing else is said."""
    return lmdb.open(str(path), map_size=1 << 40, max_dbs=2, **options)


def fill(env: lmdb.Environment, keys: range, length: int) -> None:
    """Puts one value for each key, in one transaction."""
    with env.begin(write=True) as txn:
        for key in keys:
            txn.put(b"%06d" % key, random.Random(key * length).randbytes(length))


def clear(env: lmdb.Environment, keys: range) -> None:
    """Deletes keys, in one transaction."""
    with env.begin(write=True) as txn:
        for key in keys:
            txn.delete(b"%06d" % key)


def rows(path: Path) -> tuple[int, list[tuple[bytes, bytes]]]:
    """The newest transaction's id and all rows of an environment's unnamed database."""
    with open_env(path, readonly=True) as env, env.begin() as txn:
        return txn.id(), list(txn.cursor())


def digests_of(source: PinnedSnapshot) -> list[bytes]:
    """All ranges' digests."""
    return [range_digest(source.read(index)) for index in range(source.ranges)]


def make_copy(source: PinnedSnapshot, folder: Path) -> Path:
    """A finished copy of all ranges in ``folder``."""
    folder.mkdir()
    digests = digests_of(source)
    with SnapshotCopy.open(folder / "data.mdb", snapshot=NAME, file_bytes=source.file_bytes) as copy:
        for index in copy.missing(digests):
            copy.write(index, source.read(index), digests[index])
        assert copy.finish() == []
    return folder


def wait_for_commits(newest: Callable[[], int], count: int) -> None:
    """Returns once another process has committed so often."""
    deadline, seen = time.monotonic() + DEADLINE_S, newest()
    while newest() < seen + count:
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.001)


@contextlib.contextmanager
def running(script: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process, killed in the end."""
    command = [sys.executable, "-c", script, *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def pinned_by(env: lmdb.Environment) -> list[str]:
    """The readers that hold a snapshot."""
    return [reader for reader in env.readers().splitlines()[1:] if not reader.endswith("-")]


class Image:
    """Any bytes, cut into ranges; the last one is short."""

    def __init__(self, ranges: int, seed: int = 1) -> None:
        data = random.Random(seed).randbytes((ranges - 1) * RANGE_BYTES + 5 * PAGE_BYTES)
        self.bytes = len(data)
        self.ranges = [data[at : at + RANGE_BYTES] for at in range(0, len(data), RANGE_BYTES)]
        self.digests = [range_digest(part) for part in self.ranges]

    def write(self, copy: SnapshotCopy, *indexes: int) -> None:
        """Puts ranges into a copy."""
        for index in indexes:
            copy.write(index, self.ranges[index], self.digests[index])

    def open(self, path: Path, name: bytes = NAME) -> SnapshotCopy:
        """Begins or takes up a copy of it."""
        return SnapshotCopy.open(path, snapshot=name, file_bytes=self.bytes)


@pytest.fixture
def image() -> Image:
    """Ten ranges."""
    return Image(10)


@pytest.fixture
def env(tmp_path: Path) -> Iterator[lmdb.Environment]:
    """An environment of some 6 MiB, a third of whose pages are free."""
    with open_env(tmp_path / "env") as env:
        fill(env, range(2000), 3000)
        clear(env, range(500, 1200))
        fill(env, range(1), 3000)  # from here on, those pages may be used again
        yield env


@pytest.fixture
def env_file(tmp_path: Path, env: lmdb.Environment) -> Path:
    """Its file."""
    return tmp_path / "env" / "data.mdb"


# -- the source --------------------------------------------------------------------------------------------


def test_copies_made_while_another_process_commits_are_equal(tmp_path: Path, seed: int) -> None:
    """G11: ranges read in any order, with commits in between, make the pinned transaction's file, each time."""
    chance = random.Random(seed)
    path = tmp_path / "env"
    with running(WRITER, path, seed) as writer, contextlib.ExitStack() as opened:
        assert writer.stdout is not None
        for _ in range(30):
            writer.stdout.readline()
        threading.Thread(target=writer.stdout.read, daemon=True).start()
        env = opened.enter_context(open_env(path, readonly=True))
        data = env.open_db(b"data", create=False)
        for turn in range(24):
            folder = tmp_path / f"copy{turn}"
            with PinnedSnapshot.open(env, path / "data.mdb") as source:
                expected = source.txn.id(), list(source.txn.cursor(data))
                copy_slowly(source, folder, chance, lambda: env.info()["last_txnid"])
            assert lmdb_check.check_structure(folder) == []
            with open_env(folder, readonly=True) as copied, copied.begin() as txn:
                copied_data = copied.open_db(b"data", txn, create=False)
                assert (txn.id(), list(txn.cursor(copied_data))) == expected


def copy_slowly(
    source: PinnedSnapshot, folder: Path, chance: random.Random, newest: Callable[[], int]
) -> None:
    """Copies in random order; at least ten commits happen between the digests and each half of the ranges."""
    folder.mkdir()
    digests = digests_of(source)
    order = chance.sample(range(source.ranges), source.ranges)
    with SnapshotCopy.open(folder / "data.mdb", snapshot=NAME, file_bytes=source.file_bytes) as copy:
        for half in (order[::2], order[1::2]):
            wait_for_commits(newest, 10)
            for index in half:
                copy.write(index, source.read(index), digests[index])
        assert copy.finish() == []


def test_free_pages_that_are_written_meanwhile_do_not_show(env: lmdb.Environment, env_file: Path) -> None:
    """A range has one digest for as long as it is pinned, and nothing of what was deleted is in it."""
    deleted = random.Random(700 * 3000).randbytes(3000)
    with PinnedSnapshot.open(env, env_file) as source:
        digests, before = digests_of(source), env_file.read_bytes()
        assert deleted in before
        for _ in range(3):
            fill(env, range(5000, 5200), 3500)
            clear(env, range(5000, 5200))
        after = env_file.read_bytes()
        pages = [slice(at, at + PAGE_BYTES) for at in range(2 * PAGE_BYTES, len(before), PAGE_BYTES)]
        written = [page for page in pages if before[page] != after[page]]
        assert len(written) > 100
        assert digests_of(source) == digests
        assert not any(deleted in source.read(index) for index in range(source.ranges))


@pytest.mark.parametrize("commits", range(4))
def test_a_copy_opens_at_the_pinned_transaction(tmp_path: Path, commits: int) -> None:
    """Whichever of the two meta pages was the snapshot's own, and though none was ever committed."""
    with open_env(tmp_path / "env") as env:
        for number in range(commits):
            fill(env, range(number, number + 5), 100)
        with PinnedSnapshot.open(env, tmp_path / "env" / "data.mdb") as source:
            expected = source.txn.id(), list(source.txn.cursor())
            assert expected[0] == commits
            copy = make_copy(source, tmp_path / "copy")
            assert (copy / "data.mdb").read_bytes().startswith(source.read(0)[: 2 * PAGE_BYTES])
    assert lmdb_check.check_structure(copy) == []
    assert rows(copy) == expected
    with open_env(copy) as env:
        fill(env, range(100, 105), 100)
    assert lmdb_check.check_structure(copy) == []
    assert rows(copy)[0] == commits + 1


def test_either_meta_page_of_a_copy_is_whole(tmp_path: Path, env: lmdb.Environment, env_file: Path) -> None:
    """Should one of them be lost, LMDB opens the other, with the same rows."""
    with PinnedSnapshot.open(env, env_file) as source:
        txn_id, expected = source.txn.id(), list(source.txn.cursor())
        copy = make_copy(source, tmp_path / "copy")
        pages = source.read(0)[: 2 * PAGE_BYTES]
    own = lmdb_pages.Meta(page_bytes=PAGE_BYTES, last_page=0, txn_id=txn_id, free_root=None)
    first, second = pages[:PAGE_BYTES], pages[PAGE_BYTES:]
    newer, older = (second, first) if txn_id & 1 else (first, second)
    assert lmdb_pages.lone_meta_pages(newer, own) == pages
    older_meta = lmdb_pages.parse_meta(older, env_file)
    assert (older_meta.txn_id, older_meta.file_bytes) == (txn_id - 1, source.file_bytes)
    with (copy / "data.mdb").open("r+b") as file:
        # The older one once more, as LMDB has it in a file's beginning: with a lower number in the other slot.
        slot = txn_id & 1
        file.seek(slot * PAGE_BYTES + 144)
        file.write((txn_id - 2).to_bytes(8, sys.byteorder))
    assert rows(copy) == (txn_id - 1, expected)


def test_a_commit_while_a_snapshot_is_being_pinned_is_noticed(
    env: lmdb.Environment, env_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pin is tried again until no commit fell into it, so that its meta page is its own, whole."""
    reads = []
    read_metas = pinned_snapshot.read_metas

    def read_and_commit(fd: int, path: Path) -> object:
        reads.append(1)
        if len(reads) == 1:
            fill(env, range(3), 10)
            fill(env, range(3), 20)  # has overwritten the first one's meta page
        found = read_metas(fd, path)
        if len(reads) == 2:
            fill(env, range(3), 30)
        return found

    monkeypatch.setattr(pinned_snapshot, "read_metas", read_and_commit)
    newest = env.info()["last_txnid"]
    with PinnedSnapshot.open(env, env_file) as source:
        assert source.txn.id() == newest + 3
        own_page = source.read(0)[(newest + 3) % 2 * PAGE_BYTES :]
        assert lmdb_pages.parse_meta(own_page, env_file).txn_id == newest + 3
    assert pinned_by(env) == []


def test_a_commit_that_was_killed_half_way_does_not_show(
    tmp_path: Path, env: lmdb.Environment, env_file: Path
) -> None:
    """A meta page is written before readers are told of it; until they are, the snapshot before is the newest."""
    newest = env.info()["last_txnid"]
    fd = os.open(env_file, os.O_RDWR)
    try:
        page = bytearray(os.pread(fd, PAGE_BYTES, newest % 2 * PAGE_BYTES))
        page[0] ^= 1
        page[144:152] = (newest + 1).to_bytes(8, sys.byteorder)
        os.pwrite(fd, page, (newest + 1) % 2 * PAGE_BYTES)
    finally:
        os.close(fd)
    with PinnedSnapshot.open(env, env_file) as source:
        assert source.txn.id() == newest
        expected = source.txn.id(), list(source.txn.cursor())
        copy = make_copy(source, tmp_path / "copy")
    assert rows(copy) == expected


def test_pinning_gives_up_where_commits_never_pause(
    env: lmdb.Environment, env_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many tries the caller is told to come back, and no transaction stays behind."""
    read_metas = pinned_snapshot.read_metas

    def commit_and_read(fd: int, path: Path) -> object:
        fill(env, range(1), 10)
        return read_metas(fd, path)

    monkeypatch.setattr(pinned_snapshot, "read_metas", commit_and_read)
    monkeypatch.setattr(pinned_snapshot, "_PIN_TRIES_MAX", 3)
    with pytest.raises(Overloaded, match="can be pinned"):
        PinnedSnapshot.open(env, env_file)
    assert pinned_by(env) == []


def test_pages_that_were_never_written_are_zeros(tmp_path: Path) -> None:
    """The file may end before the last page, where a transaction took pages and gave them back."""
    path = tmp_path / "env"
    with open_env(path) as env:
        fill(env, range(100), 3000)
        clear(env, range(0, 100, 2))
        fill(env, range(200, 201), 10)
        with env.begin(write=True) as txn:
            txn.put(b"a", bytes(3000))
            txn.put(b"b", bytes(3 << 20))
            txn.delete(b"b")
        with PinnedSnapshot.open(env, path / "data.mdb") as source:
            assert (path / "data.mdb").stat().st_size < source.file_bytes - 2 * RANGE_BYTES
            assert source.read(2) == bytes(RANGE_BYTES)
            expected = source.txn.id(), list(source.txn.cursor())
            digests = digests_of(source)
            with SnapshotCopy.open(
                tmp_path / "data.mdb", snapshot=NAME, file_bytes=source.file_bytes
            ) as copy:
                assert copy.missing(digests) == [0]  # the rest is as it is in a new file
            copied = make_copy(source, tmp_path / "copy")
    assert lmdb_check.check_structure(copied) == []
    assert rows(copied) == expected


def test_a_file_that_was_cut_off_is_corrupt(env: lmdb.Environment, env_file: Path) -> None:
    """Pages that the snapshot reaches are never taken for zeros."""
    with PinnedSnapshot.open(env, env_file) as source:
        source.read(0)
        os.truncate(env_file, env_file.stat().st_size - RANGE_BYTES)
        with pytest.raises(CorruptionError, match="was cut off"):
            source.read(source.ranges - 1)
        source.read(1)


@pytest.mark.parametrize("rounds", [1, 3, 10])
def test_the_list_of_free_pages_is_that_of_the_verifier(tmp_path: Path, seed: int, rounds: int) -> None:
    """Small and large lists, in leaves, long records and under branches."""
    chance = random.Random(seed)
    path = tmp_path / "env" / "data.mdb"
    with open_env(path.parent, sync=False) as env, env.begin() as _:  # which keeps old records in the list
        for turn in range(rounds * 20):
            fill(env, range(turn * 100, turn * 100 + 300), chance.choice((10, 3000, 9000)))
            clear(env, range(turn * 100, turn * 100 + chance.randrange(300)))
        with path.open("rb") as file:
            verifier = lmdb_check._ChainVerifier(file, path.stat().st_size)
            assert verifier.verify() == []
            meta = max(
                (meta for meta, _ in lmdb_pages.read_metas(file.fileno(), path)), key=lambda m: m.txn_id
            )
            free = lmdb_pages.free_pages(file.fileno(), meta, path)
    assert free == verifier.free
    assert sum(free) > 100 * rounds


def test_a_damaged_list_of_free_pages_is_corrupt(env: lmdb.Environment, env_file: Path, seed: int) -> None:
    """Whatever stands in its pages, the answer is a list or an error that names the file."""
    chance, refused = random.Random(seed), 0
    fd = os.open(env_file, os.O_RDWR)
    try:
        meta = max((meta for meta, _ in lmdb_pages.read_metas(fd, env_file)), key=lambda meta: meta.txn_id)
        assert meta.free_root is not None
        page = os.pread(fd, PAGE_BYTES, meta.free_root * PAGE_BYTES)
        for _ in range(300):
            damaged = bytearray(page)
            damaged[chance.choice((chance.randrange(32), chance.randrange(PAGE_BYTES)))] ^= (
                1 << chance.randrange(8)
            )
            os.pwrite(fd, damaged, meta.free_root * PAGE_BYTES)
            try:
                lmdb_pages.free_pages(fd, meta, env_file)
            except CorruptionError as error:
                refused += str(env_file) in str(error)
        os.pwrite(fd, page, meta.free_root * PAGE_BYTES)
    finally:
        os.close(fd)
    assert refused > 30


@pytest.mark.parametrize("root", [0, 1, 1 << 20, 1 << 60])
def test_a_root_that_no_list_of_free_pages_has_is_corrupt(
    env: lmdb.Environment, env_file: Path, root: int
) -> None:
    """A damaged meta page may name any page as the root of the list."""
    with env_file.open("rb") as file:
        meta, _ = lmdb_pages.read_metas(file.fileno(), env_file)[1]
        with pytest.raises(CorruptionError, match="the list of free pages"):
            lmdb_pages.free_pages(file.fileno(), dataclasses.replace(meta, free_root=root), env_file)


@pytest.mark.parametrize(("word", "number"), [(0, 9), (1, 1), (1, 1 << 20)])
def test_a_record_that_no_list_of_free_pages_has_is_corrupt(tmp_path: Path, word: int, number: int) -> None:
    """Another count than there are numbers, a meta page, a page behind the last one."""
    path = tmp_path / "env" / "data.mdb"
    with open_env(path.parent) as env:
        fill(env, range(10), 100)
        fill(env, range(10), 50)
    with path.open("r+b") as file:
        meta = max(
            (meta for meta, _ in lmdb_pages.read_metas(file.fileno(), path)), key=lambda meta: meta.txn_id
        )
        assert meta.free_root is not None
        assert sum(lmdb_pages.free_pages(file.fileno(), meta, path)) == 1
        record = (meta.free_root + 1) * PAGE_BYTES - 16  # a leaf is filled from its end
        os.pwrite(file.fileno(), number.to_bytes(8, sys.byteorder), record + 8 * word)
        with pytest.raises(CorruptionError, match="the list of free pages"):
            lmdb_pages.free_pages(file.fileno(), meta, path)


def test_a_snapshot_closed_while_it_is_read_ends_the_reads(env: lmdb.Environment, env_file: Path) -> None:
    """A read never goes to a descriptor that was closed and given to another file."""
    source = PinnedSnapshot.open(env, env_file)
    ended = threading.Event()

    def read_forever() -> None:
        with contextlib.suppress(Unavailable):
            while True:
                source.read(1)
        ended.set()

    threading.Thread(target=read_forever, daemon=True).start()
    source.close()
    assert ended.wait(DEADLINE_S)
    source.close()


def test_another_environments_file_is_not_pinned(tmp_path: Path, env: lmdb.Environment) -> None:
    """A file that took the open one's place is no source of its snapshots."""
    with open_env(tmp_path / "other") as other:
        fill(other, range(1), 10)
    with pytest.raises(CorruptionError, match="no meta page of transaction 3"):
        PinnedSnapshot.open(env, tmp_path / "other" / "data.mdb")
    assert pinned_by(env) == []


def test_a_file_that_is_not_lmdbs_is_not_pinned(env: lmdb.Environment, tmp_path: Path) -> None:
    """Whatever file is named, what is read of it must be a meta page."""
    (tmp_path / "other").write_bytes(bytes(10_000))
    with pytest.raises(CorruptionError, match="not an LMDB file"):
        PinnedSnapshot.open(env, tmp_path / "other")
    with pytest.raises(StorageFailed):
        PinnedSnapshot.open(env, tmp_path / "absent")


# -- the copy ----------------------------------------------------------------------------------------------


def test_a_copy_is_taken_up_again(tmp_path: Path, image: Image) -> None:
    """After a cut, only what is not in place is missing, and in the end the file is whole and alone."""
    path = tmp_path / "data.mdb"
    with image.open(path) as copy:
        assert copy.missing(image.digests) == list(range(10))
        image.write(copy, 7, 2, 9)
        assert copy.missing(image.digests) == [0, 1, 3, 4, 5, 6, 8]
    with image.open(path) as copy:
        assert copy.missing(image.digests) == [0, 1, 3, 4, 5, 6, 8]
        image.write(copy, 0, 1, 3, 4, 5, 6, 8)
        assert copy.finish() == []
    assert path.read_bytes() == b"".join(image.ranges)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_a_copier_killed_between_writes_goes_on(tmp_path: Path, image: Image, lines: int) -> None:
    """G2: whenever the process is killed, the next one goes on, and no range that was written is written again."""
    source, target = tmp_path / "image", tmp_path / "data.mdb"
    source.write_bytes(b"".join(image.ranges))
    written: list[str] = []
    for _ in range(20):
        with running(COPIER, source, target) as copier:
            assert copier.stdout is not None
            said = [copier.stdout.readline().strip() for _ in range(lines)]
            copier.kill()
            said += copier.stdout.read().split()
        written += filter(str.isdigit, said)
        if "finished" in said:
            break
    assert target.read_bytes() == b"".join(image.ranges)
    assert len(written) == len(set(written))


def test_a_range_counts_only_once_it_is_synced(
    tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note that a range is in place never reaches the file before the range has reached the disk."""
    path, side = tmp_path / "data.mdb", tmp_path / "data.mdb.ranges"
    noted_at_sync: list[int] = []
    may_sync = threading.Semaphore(0)

    def sync(self: OsFile) -> None:
        assert may_sync.acquire(timeout=DEADLINE_S)
        noted_at_sync.append(noted())

    def noted() -> int:
        return sum(digest in side.read_bytes() for digest in image.digests)

    monkeypatch.setattr(OsFile, "sync", sync)
    monkeypatch.setattr(snapshot, "FLUSH_RANGES", 4)
    with image.open(path) as copy:
        image.write(copy, *range(7))
        assert noted() == 0
        may_sync.release(3)
        image.write(copy, 7, 8, 9)
        copy.flush()
        assert noted() == 10
    assert noted_at_sync == [0, 4, 8]


def test_a_failed_sync_leaves_no_range_in_place(
    tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may have dropped what it could not write, so it is written again before it counts."""
    path, side = tmp_path / "data.mdb", tmp_path / "data.mdb.ranges"

    def fail(self: OsFile) -> None:
        raise StorageFailed("no luck")

    with image.open(path) as copy:
        image.write(copy, 1, 2)
        with monkeypatch.context() as patched:
            patched.setattr(OsFile, "sync", fail)
            patched.setattr(snapshot, "FLUSH_RANGES", 1)
            image.write(copy, 3)  # begins the sync of 1 to 3
            patched.setattr(snapshot, "FLUSH_RANGES", 2)
            image.write(copy, 4)
            with pytest.raises(StorageFailed):
                image.write(copy, 5)
        copy.flush()
    assert not any(digest in side.read_bytes() for digest in image.digests)
    writes: list[int] = []
    write_at = OsFile.write_at
    monkeypatch.setattr(
        OsFile,
        "write_at",
        lambda self, data, at: (writes.append(at // RANGE_BYTES), write_at(self, data, at)),
    )
    with image.open(path) as copy:
        assert copy.missing(image.digests) == [0, *range(6, 10)]
    assert writes == [1, 2, 3, 4, 5]


def test_closing_waits_for_the_sync_under_way(
    tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync never goes to a descriptor that was closed and given to another file."""
    begun, may_sync = threading.Event(), threading.Event()
    ended: list[str] = []
    sync = OsFile.sync

    def wait_and_sync(self: OsFile) -> None:
        begun.set()
        assert may_sync.wait(DEADLINE_S)
        sync(self)
        ended.append("sync")

    def close() -> None:
        copy.close()
        ended.append("close")

    monkeypatch.setattr(OsFile, "sync", wait_and_sync)
    monkeypatch.setattr(snapshot, "FLUSH_RANGES", 1)
    copy = image.open(tmp_path / "data.mdb")
    image.write(copy, 0)
    assert begun.wait(DEADLINE_S)
    closing = threading.Thread(target=close)
    closing.start()
    threading.Timer(0.05, may_sync.set).start()
    closing.join(DEADLINE_S)
    assert ended == ["sync", "close"]


def test_what_is_on_its_way_to_the_disk_is_not_read_again(
    tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking what is missing waits for the sync under way and believes it."""
    path = tmp_path / "data.mdb"
    monkeypatch.setattr(snapshot, "FLUSH_RANGES", 2)
    with image.open(path) as copy:
        image.write(copy, 0, 1, 2)
        with path.open("r+b") as file:
            file.write(b"not what was written")  # found by finish(), not by missing()
        assert copy.missing(image.digests) == list(range(3, 10))


def test_ranges_lost_in_a_power_failure_are_missing(tmp_path: Path, image: Image) -> None:
    """What was written but not flushed may be anything afterwards, and is looked at before it counts."""
    path = tmp_path / "data.mdb"
    with image.open(path) as copy:
        image.write(copy, 0, 1, 2)
        copy.flush()
        image.write(copy, 3, 4)
    with path.open("r+b") as file:
        file.seek(3 * RANGE_BYTES + 100)
        file.write(bytes(PAGE_BYTES))
    with image.open(path) as copy:
        assert copy.missing(image.digests) == [3, *range(5, 10)]


def test_a_copy_of_another_snapshot_counts_by_content_only(tmp_path: Path, image: Image) -> None:
    """Under another name nothing noted is believed; ranges that happen to be right are kept all the same."""
    path, newer = tmp_path / "data.mdb", Image(12)
    newer.ranges[4] = random.Random(4).randbytes(RANGE_BYTES)
    newer.digests[4] = range_digest(newer.ranges[4])
    with image.open(path) as copy:
        image.write(copy, *range(7))
        copy.flush()
    with path.open("r+b") as file:
        file.seek(5 * RANGE_BYTES)
        file.write(b"changed behind our back")
    with newer.open(path, OTHER_NAME) as copy:
        assert copy.missing(newer.digests) == [4, 5, *range(7, 12)]
        newer.write(copy, 4, 5, *range(7, 12))
        assert copy.finish() == []
    assert path.read_bytes() == b"".join(newer.ranges)


def test_a_shorter_snapshot_cuts_the_copy(tmp_path: Path, image: Image) -> None:
    """Nothing of a longer one that was begun before stays behind the end."""
    path, shorter = tmp_path / "data.mdb", Image(3, seed=2)
    with image.open(path) as copy:
        image.write(copy, *range(10))
    with shorter.open(path, OTHER_NAME) as copy:
        assert copy.missing(shorter.digests) == [0, 1, 2]
        shorter.write(copy, 0, 1, 2)
        assert copy.finish() == []
    assert path.read_bytes() == b"".join(shorter.ranges)


@pytest.mark.parametrize("damage", ["flipped", "short", "cut", "empty"])
def test_a_damaged_side_file_costs_nothing_but_time(tmp_path: Path, image: Image, damage: str) -> None:
    """It is made anew, and what is in the copy counts by its content."""
    path, side = tmp_path / "data.mdb", tmp_path / "data.mdb.ranges"
    with image.open(path) as copy:
        image.write(copy, 0, 1, 2)
        copy.flush()
    raw = bytearray(side.read_bytes())
    raw[12] ^= damage == "flipped"
    side.write_bytes(raw[: {"flipped": len(raw), "short": len(raw) - 1, "cut": 30, "empty": 0}[damage]])
    with image.open(path) as copy:
        assert copy.missing(image.digests) == list(range(3, 10))


def test_a_side_file_whose_copy_is_gone_says_nothing(tmp_path: Path, image: Image) -> None:
    """Notes about a file that was removed are not believed of the next one of that name."""
    path = tmp_path / "data.mdb"
    with image.open(path) as copy:
        image.write(copy, 0, 1, 2)
        copy.flush()
    path.unlink()
    with image.open(path) as copy:
        assert copy.missing(image.digests) == list(range(10))


def test_a_damaged_range_is_refused_and_fetched_again(tmp_path: Path, image: Image) -> None:
    """G11: one flipped bit, a range too short, or in the wrong place, and nothing is written."""
    with image.open(tmp_path / "data.mdb") as copy:
        flipped = bytearray(image.ranges[3])
        flipped[12_345] ^= 1
        digest = image.digests[3]
        for index, data in (
            (3, bytes(flipped)),
            (3, image.ranges[3][:-1]),
            (9, image.ranges[3]),
            (-1, image.ranges[3]),
        ):
            with pytest.raises(CorruptionError, match="arrived damaged"):
                copy.write(index, data, digest)
        assert copy.missing(image.digests) == list(range(10))
        image.write(copy, *range(10))
        assert copy.finish() == []


def test_damage_on_the_receivers_disk_is_found_in_the_end(tmp_path: Path, image: Image) -> None:
    """G11: the copy is read back, and what the disk did not keep is missing again."""
    path = tmp_path / "data.mdb"
    with image.open(path) as copy:
        image.write(copy, *range(10))
        copy.flush()
        with path.open("r+b") as file:
            file.seek(6 * RANGE_BYTES + 77)
            file.write(b"\xff\x00")
        assert copy.finish() == [6]
        assert copy.missing(image.digests) == [6]
        image.write(copy, 6)
        assert copy.finish() == []
    assert path.read_bytes() == b"".join(image.ranges)


def test_a_wrong_number_of_digests_is_refused(tmp_path: Path, image: Image) -> None:
    """A list cut off on the way never makes a copy look complete."""
    with image.open(tmp_path / "data.mdb") as copy:
        for digests in (image.digests[:-1], [*image.digests, bytes(16)], []):
            with pytest.raises(CorruptionError, match="digests came for the 10 ranges"):
                copy.missing(digests)


def test_a_closed_copy_ends_what_is_under_way(tmp_path: Path, image: Image) -> None:
    """A write never goes to a descriptor that was closed and given to another file."""
    copy = image.open(tmp_path / "data.mdb")
    image.write(copy, 0)
    ended = threading.Event()

    def write_forever() -> None:
        with contextlib.suppress(ValueError):
            while True:
                image.write(copy, 1)
        ended.set()

    threading.Thread(target=write_forever, daemon=True).start()
    copy.close()
    assert ended.wait(DEADLINE_S)
    copy.close()


# -- starting from what is there ---------------------------------------------------------------------------


def test_adopting_fetches_only_what_differs(tmp_path: Path) -> None:
    """Of a store that was copied before, no more is fetched than the ranges that have changed since."""
    with open_env(tmp_path / "env") as env:
        fill(env, range(8000), 3000)
        clear(env, range(100, 300))
        with PinnedSnapshot.open(env, tmp_path / "env" / "data.mdb") as source:
            base = make_copy(source, tmp_path / "base")
            old = digests_of(source)
        fill(env, range(4000, 4010), 3000)
        with PinnedSnapshot.open(env, tmp_path / "env" / "data.mdb") as source:
            digests = digests_of(source)
            expected = source.txn.id(), list(source.txn.cursor())
            differing = [index for index, digest in enumerate(digests) if digest != old[index]]
            assert 0 < len(differing) < 4 < source.ranges
            before = (base / "data.mdb").read_bytes()
            path = tmp_path / "copy" / "data.mdb"
            path.parent.mkdir()
            with SnapshotCopy.open(path, snapshot=NAME, file_bytes=source.file_bytes) as copy:
                assert copy.adopt(base / "data.mdb", digests) == differing
            with SnapshotCopy.open(path, snapshot=NAME, file_bytes=source.file_bytes) as copy:
                copy.write(differing[0], source.read(differing[0]), digests[differing[0]])
                assert copy.adopt(base / "data.mdb", digests) == differing[1:]
                for index in differing[1:]:
                    copy.write(index, source.read(index), digests[index])
                assert copy.finish() == []
    assert rows(path.parent) == expected
    assert lmdb_check.check_structure(path) == []
    assert (base / "data.mdb").read_bytes() == before


def test_free_pages_of_the_base_do_not_count(tmp_path: Path, env: lmdb.Environment, env_file: Path) -> None:
    """Two stores with equal rows in equal places are equal, whatever they held before."""
    with PinnedSnapshot.open(env, env_file) as source:
        digests = digests_of(source)
        assert digests[1] != range_digest(env_file.read_bytes()[RANGE_BYTES : 2 * RANGE_BYTES])
        with SnapshotCopy.open(tmp_path / "data.mdb", snapshot=NAME, file_bytes=source.file_bytes) as copy:
            assert copy.adopt(env_file, digests) == []
            assert copy.finish() == []


@pytest.mark.parametrize("damage", ["empty", "not LMDB", "cut off"])
def test_a_damaged_base_is_fetched_where_it_is_damaged(
    tmp_path: Path, env: lmdb.Environment, env_file: Path, damage: str
) -> None:
    """A copy that can't be read is no reason not to replace it."""
    raw = env_file.read_bytes()
    base = tmp_path / "base"
    base.write_bytes({"empty": b"", "not LMDB": bytes(len(raw)), "cut off": raw[: 4 * RANGE_BYTES]}[damage])
    with PinnedSnapshot.open(env, env_file) as source:
        digests = digests_of(source)
        with SnapshotCopy.open(tmp_path / "data.mdb", snapshot=NAME, file_bytes=source.file_bytes) as copy:
            missing = copy.adopt(base, digests)
            assert missing[-1] == source.ranges - 1
            for index in missing:
                copy.write(index, source.read(index), digests[index])
            assert copy.finish() == []


def test_adopting_does_without_the_help_of_the_file_system(
    tmp_path: Path, env: lmdb.Environment, env_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it can't copy ranges itself, they are written."""

    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    with PinnedSnapshot.open(env, env_file) as source:
        digests = digests_of(source)
        with SnapshotCopy.open(tmp_path / "data.mdb", snapshot=NAME, file_bytes=source.file_bytes) as copy:
            assert copy.adopt(env_file, digests) == []
            assert copy.finish() == []
