"""A restore that is given again: what an attempt before has left is gone on with only where it is of use."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from backup_helpers import contents
from harness import Processes
from nodes import DIRECTORY, assert_sound, checkpoint, offline_status, pairs, put, settle, status
from repositories import done, policy_to, ship

from understudy.backup.archive import write_archive
from understudy.backup.archive_options import ArchiveOptions
from understudy.backup.catalog import StoredBackup
from understudy.backup.in_progress import in_progress, read_filled
from understudy.backup.log_following import Following
from understudy.backup.make import make_backup
from understudy.backup.manifest import read_manifest
from understudy.backup.point import Point
from understudy.backup.repository import Repository, open_repository
from understudy.backup.restore import restore_backup, restore_stored
from understudy.backup.restore_target import open_target
from understudy.backup.run import run_policy
from understudy.backup.selection import Selection
from understudy.backup.stretch import Stretch, list_stretches
from understudy.common.directory import NODE_FILE, DataDirectory, NodeFile, Role
from understudy.common.errors import CorruptionError, NotStored, StorageFailed, UsageError
from understudy.common.log_reader import segments_behind
from understudy.common.types import ClusterId, Lsn, new_id

FAILED, USAGE, CORRUPT = 1, 2, 4
VALUE_BYTES = 300_000


def stored(
    processes: Processes, tmp_path: Path, folder: Path, *, stretches: int = 1, puts: int = 1
) -> StoredBackup:
    """A backup of two realms, and the log behind it in so many stretches, each of so many large changes."""
    numbers = random.Random(1)
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"0"))
    put(primary.address, "/other", (b"key", b"0"))
    checkpoint(primary.address)
    backup = done(run_policy(policy_to(folder, archive_log=False), tmp_path / "a"))
    for _ in range(stretches):
        for number in range(puts):
            put(
                primary.address,
                "/realm",
                (b"key", b"%d" % number),
                (b"more", numbers.randbytes(VALUE_BYTES // 2).hex().encode()),
            )
        settle(primary.address)
        ship(tmp_path / "a", open_repository(str(folder)))
    primary.terminate()
    return backup


def cut_off(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, restore: Callable[[], object]) -> None:
    """Restores up to the call of a method, which fails as a disk may."""

    def fail(*_: object, **__: object) -> None:
        raise StorageFailed("cut off")

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        with pytest.raises(StorageFailed, match="cut off"):
            restore()


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def spoil(path: Path) -> None:
    path.write_bytes(b"\x55" * path.stat().st_size)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


ACCIDENTS: list[tuple[Callable[[Path], None], str]] = [
    *((remove, name) for name in ("store", "store/data.mdb", "log", "log/*", "node.json", "backup.json")),
    *((spoil, name) for name in ("store/data.mdb", "log/*", "node.json", "backup.json")),
    *((shorten, name) for name in ("store/data.mdb", "log/*", "node.json", "backup.json")),
]


def test_what_was_in_place_and_is_not_any_more_is_fetched_anew(
    processes: Processes, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: parts of an unfinished restore that have gone or are damaged don't keep the same command from its end."""
    backup = stored(processes, tmp_path, folder)
    repository = open_repository(str(folder))
    expected = contents(tmp_path / "a")
    target = tmp_path / "b"

    def restore() -> object:
        return restore_stored(repository, backup, target, with_log=True)

    for happens, where in ACCIDENTS:
        cut_off(monkeypatch, Following, "follow", restore)
        assert read_filled(target, f"{folder} {backup.id}") is not None
        (path,) = target.glob(where)
        happens(path)
        restore()
        assert_sound(target)
        assert contents(target) == expected, (happens, where)
        shutil.rmtree(target)


def begun_and_damaged(path: Path) -> NodeFile:
    """A restore that was cut off, with a spoilt ``node.json``; returns what that said."""
    with DataDirectory.open_unfinished(path) as directory:
        directory.begin(Role.BACKUP, ClusterId(new_id()))
    with contextlib.suppress(StorageFailed), in_progress(path, "it", anew=True, goes_on=False):
        raise StorageFailed("cut off")
    before = NodeFile.read(path / NODE_FILE)
    spoil(path / NODE_FILE)
    return before


def test_what_another_restore_has_made_good_meanwhile_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4: a ``node.json`` that was damaged when it was read, and is sound when it is to be replaced."""
    before = begun_and_damaged(tmp_path)
    open_unfinished = DataDirectory.open_unfinished

    def open_then_mend(path: Path) -> DataDirectory:
        try:
            return open_unfinished(path)
        except CorruptionError:
            (path / NODE_FILE).write_text(json.dumps(asdict(before)))
            raise

    monkeypatch.setattr(DataDirectory, "open_unfinished", open_then_mend)
    with open_target(tmp_path, "it") as directory:
        assert not directory.is_new
    assert NodeFile.read(tmp_path / NODE_FILE) == before


def test_a_damaged_part_that_can_not_be_removed_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the file's name; and the lock is free again."""
    begun_and_damaged(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", fail)
        with (
            pytest.raises(StorageFailed, match=r"can't replace .*node\.json: Read-only"),
            open_target(tmp_path, "it"),
        ):
            pass
    with open_target(tmp_path, "it") as directory:
        assert directory.is_new


@pytest.mark.parametrize(
    ("happens", "where"), [(remove, "store"), (remove, "log"), (spoil, "store/data.mdb")]
)
def test_what_realms_were_to_be_taken_from_is_fetched_anew_where_it_has_gone(
    processes: Processes,
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    happens: Callable[[Path], None],
    where: str,
) -> None:
    """G8: as of a whole restore, of what one of chosen realms has restored before it chooses."""
    backup = stored(processes, tmp_path, folder)
    repository = open_repository(str(folder))
    target = tmp_path / "b"

    def restore() -> object:
        return restore_stored(
            repository, backup, target, with_log=True, selection=Selection(realms=("/realm",))
        )

    cut_off(monkeypatch, Selection, "unmatched", restore)
    happens(target / "incoming" / where)
    restore()
    assert_sound(target)
    assert contents(target)["/realm"] == contents(tmp_path / "a")["/realm"]


def test_a_gap_is_told_at_once_where_nothing_of_the_log_was_taken_yet(
    processes: Processes, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an attempt before has only put the backup in place, that is not fetched once more to find the same gap."""
    backup = stored(processes, tmp_path, folder, stretches=2)
    repository = open_repository(str(folder))

    def restore() -> object:
        return restore_stored(repository, backup, tmp_path / "b", with_log=True)

    cut_off(monkeypatch, Following, "follow", restore)
    repository.delete(first_stretch(repository).name)
    (folder / backup.archive_name).unlink()
    with pytest.raises(CorruptionError, match=f"ends with LSN {backup.manifest.lsn}"):
        restore()


def test_a_gap_is_told_after_another_look_where_some_of_the_log_was_taken(
    processes: Processes, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G3: an attempt before may have gone a wrong way, from which no other leads on; the backup has to be there."""
    backup = stored(processes, tmp_path, folder, stretches=2)
    repository = open_repository(str(folder))

    def restore() -> object:
        return restore_stored(repository, backup, tmp_path / "b", with_log=True)

    cut_off(monkeypatch, Following, "_joins", restore)
    last = max(list_stretches(repository), key=lambda one: one.first)
    repository.delete(last.name)
    write_stretch(repository, last.name, bytes(1000))
    for _ in range(2):
        with pytest.raises(CorruptionError, match="is damaged"):
            restore()
    (folder / backup.archive_name).unlink()
    with pytest.raises(NotStored):
        restore()


def first_stretch(repository: Repository) -> Stretch:
    return min(list_stretches(repository), key=lambda one: one.first)


def write_stretch(repository: Repository, name: str, data: bytes) -> None:
    with repository.upload(name) as out:
        out.write(data)


def test_damage_in_a_compressed_stretch_names_the_last_entry_before_it(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G11: the error says up to where the log can be restored, and that is so."""
    backup = stored(processes, tmp_path, folder, puts=12)
    repository = open_repository(str(folder))
    (stretch,) = list_stretches(repository)
    with repository.download(stretch.name) as file:
        data = bytearray(file.read())
    middle = len(data) // 2
    data[middle : middle + 200_000] = (
        b"\xff" * 200_000
    )  # longer than a block, so that one's header is of no kind
    repository.delete(stretch.name)
    write_stretch(repository, stretch.name, bytes(data))
    refused = processes.run("restore", folder, "--to", tmp_path / "b", code=CORRUPT).stderr.decode()
    assert f"{stretch.name} is damaged" in refused
    found = re.search(r"restore up to --lsn (\d+), or", refused)
    assert found is not None
    assert backup.manifest.lsn < int(found[1]) < stretch.last
    processes.run("restore", folder, "--to", tmp_path / "c", "--lsn", found[1])
    assert_sound(tmp_path / "c")
    assert offline_status(tmp_path / "c").lsn == int(found[1])
    assert contents(tmp_path / "c")["/realm"][0] > 2


# -- realms that are not there ---------------------------------------------------------------------------------


def test_realms_that_a_backup_does_not_hold_are_a_mistake(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """Patterns that match nothing leave nothing that starts; with others, it goes on with what was fetched."""
    backup = stored(processes, tmp_path, folder)
    target = tmp_path / "b"
    command = ("restore", folder, "--to", target)
    refused = processes.run(*command, "--realm", "/nope", "--realm", "/no/**", code=USAGE)
    said = refused.stderr.decode()
    assert "holds no realm of /nope or /no/**" in said
    assert "/other, /realm" in said
    assert refused.stdout == b""
    processes.run("primary", "--data-dir", target, "--listen", "127.0.0.1:0", code=DIRECTORY)
    (folder / backup.archive_name).unlink()
    processes.run(*command, "--realm", "/realm")
    assert_sound(target)
    assert read_manifest(target).realms_chosen == ["/realm"]
    assert list(target.glob("incoming")) == []


def test_of_several_patterns_the_one_that_matches_nothing_is_named(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """The others' realms are restored, and the exit code is 1."""
    stored(processes, tmp_path, folder)
    command = ("restore", folder, "--to", tmp_path / "b", "--realm", "/realm", "--realm", "/nope")
    made = processes.run(*command, "--json", code=FAILED)
    assert "problem: the backup has no realm /nope" in made.stderr.decode()
    assert json.loads(made.stdout)["problems"] == ["the backup has no realm /nope"]
    assert_sound(tmp_path / "b")
    server = processes.primary(tmp_path / "server").address
    into = ("restore", folder, "--into-server", server, "--realm", "/realm", "--realm", "/nope")
    made = processes.run(*into, "--scratch", tmp_path, code=FAILED)
    assert "problem: the backup has no realm /nope" in made.stderr.decode()
    assert pairs(server, "/realm")[b"key"] == b"0"


# -- a point within a backup of records ------------------------------------------------------------------------


def test_a_backup_of_records_is_restored_up_to_any_point_in_its_tail(
    processes: Processes, tmp_path: Path
) -> None:
    """G2: as one of pages is, by LSN and by time, with an error where it does not hold the point."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"0"))
    settle(primary.address)
    lsns = [put(primary.address, "/realm", (b"key", b"%d" % number)).lsn for number in (1, 2)]
    moment_us = time.time_ns() // 1000
    lsns += [put(primary.address, "/realm", (b"key", b"%d" % number)).lsn for number in (3, 4)]
    put(primary.address, "/new", (b"key", b"1"))
    primary.kill()
    write_archive(tmp_path / "a", tmp_path / "pages.tar.zst")
    portable = ArchiveOptions(selection=Selection(portable=True))
    manifest = write_archive(tmp_path / "a", tmp_path / "records.tar.zst", portable).manifest
    assert manifest.checkpoint_lsn < lsns[0]
    points = [Point(lsn=Lsn(lsn)) for lsn in range(manifest.checkpoint_lsn, manifest.lsn + 1)]
    points.append(Point(time_us=moment_us))
    for point in points:
        for name in ("pages", "records"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            made = restore_backup(tmp_path / f"{name}.tar.zst", tmp_path / name, point=point).manifest
            assert_sound(tmp_path / name)
        assert point.lsn in (made.lsn, None)
        assert contents(tmp_path / "records") == contents(tmp_path / "pages"), point
    assert lsns[1] <= made.lsn < manifest.lsn
    with pytest.raises(UsageError, match="use an older backup"):
        restore_backup(tmp_path / "records.tar.zst", tmp_path / "c", point=Point(lsn=Lsn(1)))
    with pytest.raises(UsageError, match="reaches up to"):
        restore_backup(tmp_path / "records.tar.zst", tmp_path / "d", point=Point(lsn=Lsn(manifest.lsn + 1)))


def test_a_point_among_entries_that_a_backup_of_chosen_realms_lacks_is_as_good_as_the_one_before(
    processes: Processes, tmp_path: Path
) -> None:
    """G2: of the realms that it holds, all is restored that was there at the point."""
    primary = processes.primary(tmp_path / "a")
    last = put(primary.address, "/realm", (b"key", b"0")).lsn
    others = [put(primary.address, "/other", (b"key", b"%d" % number)).lsn for number in range(3)]
    put(primary.address, "/realm", (b"key", b"1"))
    primary.kill()
    chosen = Selection(realms=("/realm",))
    write_archive(tmp_path / "a", tmp_path / "b.tar.zst", ArchiveOptions(selection=chosen))
    point = Point(lsn=others[1])
    assert restore_backup(tmp_path / "b.tar.zst", tmp_path / "c", point=point).manifest.lsn == last
    assert_sound(tmp_path / "c")
    make_backup(tmp_path / "a", tmp_path / "pages")
    restore_backup(tmp_path / "pages", tmp_path / "d", point=point, selection=chosen)
    assert contents(tmp_path / "c") == contents(tmp_path / "d")


def test_an_epoch_behind_the_point_has_not_begun_in_what_is_restored_of_records(
    processes: Processes, tmp_path: Path
) -> None:
    """G7: a server on it begins the one behind the last epoch that it has, as on a restored backup of pages."""
    primary = processes.primary(tmp_path / "a")
    lsn = put(primary.address, "/realm", (b"key", b"0")).lsn
    primary.kill()
    make_backup(tmp_path / "a", tmp_path / "first")
    begun = processes.primary(tmp_path / "first")  # epoch 2
    put(begun.address, "/realm", (b"key", b"1"))
    begun.kill()
    made = make_backup(tmp_path / "first", tmp_path / "b", selection=Selection(portable=True)).manifest
    assert made.epoch == 2
    found = restore_backup(tmp_path / "b", tmp_path / "c", point=Point(lsn=lsn)).manifest
    assert (found.epoch, found.lsn) == (1, lsn)
    (segment,) = segments_behind(tmp_path / "c" / "log", found.cluster_id, Lsn(lsn))
    assert segment.header.epoch == 1
    assert status(processes.primary(tmp_path / "c").address).epoch == 2
