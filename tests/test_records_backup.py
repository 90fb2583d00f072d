"""Backups as records: portable ones, and ones of chosen realms; what comes out is a server's directory again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from harness import DEADLINE_S, Processes, complaint
from hypothesis import given
from hypothesis import strategies as st
from nodes import DIRECTORY, assert_equal, assert_sound, checkpoint, copy_node, pairs, put, status

from understudy.backup import records as records_module
from understudy.backup.archive import write_archive
from understudy.backup.archive_options import ArchiveOptions
from understudy.backup.catalog import read_catalog
from understudy.backup.encryption import Encryption, Unlocking
from understudy.backup.history import Result
from understudy.backup.make import make_backup
from understudy.backup.manifest import Form, Manifest, read_manifest, write_manifest
from understudy.backup.point import Point
from understudy.backup.policy import parse_policy
from understudy.backup.repository import open_repository
from understudy.backup.restore import restore_backup, restore_stored
from understudy.backup.rows import TailRow, decode_rows, decode_tail, encode_row
from understudy.backup.run import run_policy
from understudy.backup.selection import EVERYTHING, Selection
from understudy.backup.source import open_source
from understudy.client import Put, aconnect, connect
from understudy.common import portal
from understudy.common.directory import IN_PROGRESS_FILE, NODE_FILE
from understudy.common.errors import (
    CorruptionError,
    DirectoryError,
    UnfinishedBackup,
    UsageError,
)
from understudy.common.log_reader import LogPlace
from understudy.common.operations import to_protos
from understudy.common.state import RealmHead, State
from understudy.common.store_layout import HistoryRow, dropping_key, open_environment, realm_prefix
from understudy.common.types import DIGEST_BYTES, SYSTEM_REALMS, Digest, Lsn, Position
from understudy.v1 import data_pb2, data_pb2_grpc

FAILED, USAGE, CORRUPT = 1, 2, 4
CLIENT, OTHER_CLIENT = b"c" * 16, b"o" * 16
EVERY_BYTE = 1 << 62
MEMORY_BYTES_MAX = 300 << 20


# -- a source --------------------------------------------------------------------------------------------------


def commit_as(address: str, client: bytes, number: int, realm: str, value: bytes) -> tuple[int, int, bytes]:
    """Commits one put under a client's id and number; the LSN, version and digest that it is answered with."""
    answered = threading.Event()

    def requests() -> Iterator[data_pb2.CommitRequest]:
        yield data_pb2.CommitRequest(bind=data_pb2.Bind(protocol_version=1, client=client))
        operations = to_protos([Put(b"of %s" % client, value)])
        transaction = data_pb2.Transaction(number=number, realm=realm, operations=operations)
        yield data_pb2.CommitRequest(transactions=data_pb2.Transactions(transactions=[transaction]))
        answered.wait(DEADLINE_S)

    with grpc.insecure_channel(address) as channel:
        call = data_pb2_grpc.DataStub(channel).Commit(requests(), timeout=DEADLINE_S)
        assert next(call).HasField("bound")
        results = next(call).results
        answered.set()
    assert not results.refusals, results
    return results.lsns[0], results.versions[0], results.digests


class Source(NamedTuple):
    """A directory to back up, and what a client was answered when it was a server's."""

    path: Path
    receipts: dict[tuple[str, int], tuple[int, int, bytes]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    """A long tail of log behind the store: freeze marks, drops, realms made and made again, and a new epoch.

    It is a backup that was brought up to date, since only there so much log is behind a store.
    """
    folder = tmp_path_factory.mktemp("source")
    processes = Processes(tmp_path_factory.mktemp("processes"))
    receipts = {}
    try:
        primary = processes.primary(folder / "a")
        address = primary.address
        for realm in ("/one", "/two/x", "/two/y", "/two/z", "/three/deep/down"):
            put(
                address,
                realm,
                *((b"%06d" % number, b"%d of " % number + realm.encode() * 5) for number in range(200)),
            )
        for realm in ("/one", "/two/x"):
            receipts[realm, 1] = commit_as(address, CLIENT, 1, realm, b"first")
        checkpoint(address)
        behind = make_backup(folder / "a", folder / "c").manifest.checkpoint_lsn
        for realm in ("/two/x", "/one", "/new", "/two/x"):
            put(address, realm, (b"late", realm.encode()), (b"000007", b"changed"))
        checkpoint(address)
        with connect(address) as server:
            for realm in ("/two/y", "/two/z", "/one"):
                server.drop_realm(realm)
        for realm in ("/two/y", "/new", "/one", "/two/w"):
            put(address, realm, (b"again", b"made"))
        for realm in ("/two/x", "/one"):
            receipts[realm, 2] = commit_as(address, CLIENT, 2, realm, b"second")
        primary.terminate()
        make_backup(folder / "a", folder / "b")
        make_backup(folder / "a", folder / "c", update=True)
        primary = processes.primary(folder / "b")  # begins an epoch, behind an entry of /one
        put(primary.address, "/two/x", (b"epoch", b"2"))
        receipts["/two/x", 3] = commit_as(primary.address, OTHER_CLIENT, 3, "/two/x", b"third")
        put(primary.address, "/one", (b"epoch", b"2"))
        primary.terminate()
        made = make_backup(folder / "b", folder / "c", update=True).manifest
        assert (made.checkpoint_lsn, made.epoch) == (behind, 2)
        yield Source(folder / "c", receipts)
    finally:
        processes.close()


class Realm(NamedTuple):
    """All that a realm's clients can tell it by."""

    id: int
    version: int
    head: bytes
    pairs: list[tuple[bytes, bytes]]
    history: list[HistoryRow] | None
    numbers: list[int]


def contents(path: Path) -> dict[str, Realm]:
    """Every realm of a directory that nobody has open, at the end of its log."""
    with open_source(path) as opened:
        state = opened.state
        return {
            name: Realm(
                *head_of(state.realm(name)),
                all_pairs(state, name),
                state.history(name, state.history_first(name), count_max=EVERY_BYTE, bytes_max=EVERY_BYTE),
                [state.last_number(name, client) for client in (CLIENT, OTHER_CLIENT)],
            )
            for name in state.realms()
        }


def all_pairs(state: State, realm: str) -> list[tuple[bytes, bytes]]:
    with state.scan(realm) as scan:
        keys, values, is_end = scan.page(bytes_max=EVERY_BYTE, pairs_max=EVERY_BYTE)
    assert is_end
    return list(zip(keys, values, strict=True))


def head_of(head: RealmHead | None) -> tuple[int, int, bytes]:
    assert head is not None
    return head.id, head.version, head.head


def chosen(path: Path, selection: Selection) -> dict[str, Realm]:
    """The same of the realms that a selection takes."""
    return {name: realm for name, realm in contents(path).items() if selection.takes(name)}


TWO = Selection(realms=("/two/*",))
WITHOUT = Selection(exclude=("/two/x", "/three/**"))


def assert_same(restored: Path, source: Source, selection: Selection = EVERYTHING) -> None:
    """A directory holds the chosen realms of the source at its end, and verifies."""
    assert_sound(restored)
    assert contents(restored) == chosen(source.path, selection)
    manifest, origin = read_manifest(restored), read_manifest(source.path)
    assert (manifest.form, manifest.failed) == (Form.PAGES, [])
    assert (manifest.lsn, manifest.digest, manifest.log_offset) == (
        origin.lsn,
        origin.digest,
        origin.log_offset,
    )
    assert (manifest.epoch, manifest.time) == (2, origin.time)
    assert manifest.realms == sum(name not in SYSTEM_REALMS for name in chosen(source.path, selection))
    assert (manifest.realms_chosen, manifest.realms_excluded) == (
        list(selection.realms),
        list(selection.exclude),
    )


# -- portable --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["folder", "a.tar.zst", "a.tar.zst.age"])
def test_a_portable_backup_brings_everything_back(tmp_path: Path, source: Source, name: str) -> None:
    """G8, G11: pairs, versions, histories and receipts of all realms are as they were, at the same LSN and digest."""
    portable = Selection(portable=True)
    unlocking = Unlocking()
    if name == "folder":
        made = make_backup(source.path, tmp_path / name, selection=portable)
    else:
        encryption = Encryption("correct horse") if name.endswith("age") else None
        unlocking = Unlocking(("correct horse",))
        made = write_archive(
            source.path, tmp_path / name, ArchiveOptions(selection=portable, encryption=encryption)
        )
    assert made.manifest.form is Form.RECORDS
    assert made.manifest.realms == read_manifest(source.path).realms == 6
    assert (
        restore_backup(tmp_path / name, tmp_path / "b", unlocking=unlocking).manifest.lsn == made.manifest.lsn
    )
    assert_same(tmp_path / "b", source)


def test_rows_may_be_cut_into_any_number_of_files(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: files are bounded, and what is cut between two rows of a realm comes together again."""
    monkeypatch.setattr(records_module, "PART_BYTES", 500)
    made = make_backup(source.path, tmp_path / "portable", selection=Selection(portable=True)).manifest
    assert sum(entry.path.startswith("records/data-") for entry in made.files) > 20
    assert sum(entry.path.startswith("records/tail-") for entry in made.files) > 2
    restore_backup(tmp_path / "portable", tmp_path / "b")
    assert_same(tmp_path / "b", source)


def test_a_store_without_any_log_behind_it_is_backed_up(tmp_path: Path, source: Source) -> None:
    """What was restored from records stands at the end of its log, and gives the same records again."""
    portable = Selection(portable=True)
    make_backup(source.path, tmp_path / "a", selection=portable)
    restore_backup(tmp_path / "a", tmp_path / "b")
    again = make_backup(tmp_path / "b", tmp_path / "c", selection=portable).manifest
    assert not any(entry.path.startswith("records/tail") for entry in again.files)
    restore_backup(tmp_path / "c", tmp_path / "d")
    assert_same(tmp_path / "d", source)


def test_a_machine_of_another_kind_takes_a_portable_backup_and_no_other(
    tmp_path: Path, source: Source
) -> None:
    """Pages of another byte order are refused, with the option that is the way out; records of any are taken."""
    for name, selection in (("pages", EVERYTHING), ("records", Selection(portable=True))):
        make_backup(source.path, tmp_path / name, selection=selection)
        other = {"little": "big", "big": "little"}[sys.byteorder]
        write_manifest(
            tmp_path / name, replace(read_manifest(tmp_path / name), byte_order=other, machine="other")
        )
    with pytest.raises(DirectoryError, match="--portable"):
        restore_backup(tmp_path / "pages", tmp_path / "b1")
    manifest = restore_backup(tmp_path / "records", tmp_path / "b2").manifest
    assert manifest.byte_order == sys.byteorder
    assert_same(tmp_path / "b2", source)


def test_no_server_runs_on_a_portable_backup_and_all_say_what_to_do(
    processes: Processes, tmp_path: Path, source: Source
) -> None:
    """G8: whoever is given the directory says that it has to be restored first; it is not brought up to date either."""
    target = tmp_path / "portable"
    said = processes.run("backup", "-f", source.path, "-t", target, "--portable")
    assert said.stdout.decode().startswith("6 realms, ")
    assert not (target / NODE_FILE).exists()
    for arguments in (
        ("primary", "--data-dir", target, "--listen", "127.0.0.1:0"),
        ("verify", target),
        ("backup", "-f", target, "-t", tmp_path / "b"),
    ):
        assert f"understudy restore {target} --to" in complaint(processes.run(*arguments, code=DIRECTORY))
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.name != "lock"}
    for flags in ((), ("--update",), ("--portable",)):
        done = processes.run("backup", "-f", source.path, "-t", target, *flags, code=DIRECTORY)
        assert "make it anew" in complaint(done)
    processes.run("backup", "-f", source.path, "-t", target, "--portable", "--update", code=USAGE)
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.name != "lock"} == before
    processes.run("restore", target, "--to", tmp_path / "b")
    assert_same(tmp_path / "b", source)


# -- chosen realms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "excluded", "taken"),
    [
        ((), (), {"/a", "/a/b", "/a/b/c", "/d"}),
        (("/a/**",), (), {"/a", "/a/b", "/a/b/c"}),
        (("/a/*", "/d"), (), {"/a/b", "/d"}),
        ((), ("/a/*",), {"/a", "/a/b/c", "/d"}),
        (("/a/**",), ("/a/b/**",), {"/a"}),
    ],
)
def test_patterns_choose_realms(
    patterns: tuple[str, ...], excluded: tuple[str, ...], taken: set[str]
) -> None:
    """What any --realm holds and no --exclude does is chosen; the system's own realms always are."""
    selection = Selection(realms=patterns, exclude=excluded)
    selection.check()
    known = {"/a", "/a/b", "/a/b/c", "/d", *SYSTEM_REALMS}
    assert {path for path in known if selection.takes(path)} == taken | set(SYSTEM_REALMS)


@pytest.mark.parametrize("selection", [TWO, WITHOUT], ids=str)
@pytest.mark.parametrize("way", ["directory", "archive"])
def test_a_backup_of_chosen_realms_has_them_and_no_others(
    tmp_path: Path, source: Source, selection: Selection, way: str
) -> None:
    """G8, G11: chosen realms are as they were at the end of the log, whatever others did in between, and verify."""
    if way == "directory":
        make_backup(source.path, tmp_path / "b", selection=selection)
    else:
        write_archive(source.path, tmp_path / "a.tar.zst", ArchiveOptions(selection=selection))
        restore_backup(tmp_path / "a.tar.zst", tmp_path / "b")
    assert_same(tmp_path / "b", source, selection)


def test_clients_of_chosen_realms_go_on(processes: Processes, tmp_path: Path, source: Source) -> None:
    """G3, G6: on a restored server a retry is answered with its first receipt; realms left out can begin anew."""
    processes.run("backup", "-f", source.path, "-t", tmp_path / "b", "--realm", "/two/*")
    before = contents(source.path)["/two/x"]
    server = processes.primary(tmp_path / "b")
    assert status(server.address).epoch == 3
    with connect(server.address) as opened:
        assert [one.path for one in opened.realms()] == ["/two/w", "/two/x", "/two/y"]
    for number in (1, 2):
        receipt = commit_as(server.address, CLIENT, number, "/two/x", b"again")
        assert receipt == source.receipts["/two/x", number]
    assert commit_as(server.address, OTHER_CLIENT, 3, "/two/x", b"again") == source.receipts["/two/x", 3]
    assert pairs(server.address, "/two/x") == dict(before.pairs)
    assert commit_as(server.address, CLIENT, 3, "/two/x", b"new")[1] == before.version + 1
    assert put(server.address, "/one", (b"begun", b"anew")).version == 1
    checkpoint(server.address)
    server.terminate()
    assert_sound(tmp_path / "b")


@pytest.mark.parametrize("portable", [False, True])
def test_a_backup_of_chosen_realms_does_not_hold_the_operators_token(
    tmp_path: Path, source: Source, portable: bool
) -> None:
    """G10: who is given some realms is not given the key to the server; a backup of all realms has it."""
    token = copy_node(source.path, tmp_path / "a") / "admin-token"
    token.write_text("secret")
    for name, selection in (
        ("chosen", Selection(realms=TWO.realms, portable=portable)),
        ("all", Selection(portable=portable)),
    ):
        made = make_backup(tmp_path / "a", tmp_path / name, selection=selection).manifest
        assert (tmp_path / name / "admin-token").exists() == (name == "all")
        assert ("admin-token" in {entry.path for entry in made.files}) == (name == "all")


def test_a_replica_follows_the_server_on_a_backup_of_chosen_realms(
    processes: Processes, tmp_path: Path, source: Source
) -> None:
    """G11: an empty replica gets the state, and its digests agree with the primary's."""
    make_backup(source.path, tmp_path / "b", selection=TWO)
    server = processes.primary(tmp_path / "b")
    replica = processes.replica(tmp_path / "r", server.address, "--id", "r")
    put(server.address, "/two/x", (b"one", b"more"))
    checkpoint(server.address)
    assert_equal(server.address, replica.address)


def test_what_does_not_hold_all_realms_is_not_brought_up_to_date(
    processes: Processes, tmp_path: Path, source: Source
) -> None:
    """G4, G8: nor is anything with it: entries of what it lacks could not be applied, and whole copies stay whole."""
    make_backup(source.path, tmp_path / "b", selection=TWO)
    make_backup(tmp_path / "b", tmp_path / "c")
    assert read_manifest(tmp_path / "c").realms_chosen == ["/two/*"]
    make_backup(source.path, tmp_path / "whole")
    for origin, target in ((source.path, "b"), (source.path, "c"), (tmp_path / "b", "whole")):
        done = processes.run("backup", "-f", origin, "-t", tmp_path / target, "--update", code=USAGE)
        assert "does not hold all realms" in complaint(done)
        assert_sound(tmp_path / target)
    assert_same(tmp_path / "whole", source)


def test_a_bad_pattern_is_refused_before_anything_is_made(
    processes: Processes, tmp_path: Path, source: Source
) -> None:
    """The command says what a pattern is."""
    done = processes.run("backup", "-f", source.path, "-t", tmp_path / "b", "--realm", "/a/**/b", code=USAGE)
    assert "a pattern is a realm path" in complaint(done)
    assert not (tmp_path / "b").exists()


def test_what_is_left_of_dropped_realms_stays_behind(tmp_path: Path, source: Source) -> None:
    """Rows that a checkpoint has still to delete are not in a backup of records, nor is the note about them."""
    copy_node(source.path, tmp_path / "a")
    environment = open_environment(tmp_path / "a" / "store", readonly=False)
    with contextlib.closing(environment), environment.env.begin(write=True) as txn:
        txn.put(dropping_key(77), b"", db=environment.meta)
        txn.put(realm_prefix(77) + b"key", b"value", db=environment.data)
    make_backup(tmp_path / "a", tmp_path / "b", selection=WITHOUT)
    assert_same(tmp_path / "b", source, WITHOUT)
    environment = open_environment(tmp_path / "b" / "store", readonly=True)
    with contextlib.closing(environment), environment.env.begin() as txn:
        assert txn.get(dropping_key(77), db=environment.meta) is None
        assert txn.get(realm_prefix(77) + b"key", db=environment.data) is None


# -- restoring some realms of any backup -----------------------------------------------------------------------


@pytest.mark.parametrize("of", ["pages", "records"])
def test_some_realms_of_any_backup_are_restored(
    processes: Processes, tmp_path: Path, source: Source, of: str
) -> None:
    """G8: `restore --realm` gives only these, and leaves nothing of the others behind."""
    selection = EVERYTHING if of == "pages" else Selection(portable=True)
    made = write_archive(source.path, tmp_path / "a.tar.zst", ArchiveOptions(selection=selection)).manifest
    said = processes.run("restore", tmp_path / "a.tar.zst", "--to", tmp_path / "b", "--realm", "/two/*")
    assert said.stdout.decode().startswith("3 realms, ")
    assert_same(tmp_path / "b", source, TWO)
    assert read_manifest(tmp_path / "b").node == made.node
    assert not (tmp_path / "b" / "incoming").exists()


def test_some_realms_are_restored_up_to_a_point(tmp_path: Path, source: Source) -> None:
    """A point and a choice go together: the realms are as they were then."""
    lsn = read_manifest(source.path).lsn - 1
    manifest = restore_backup(source.path, tmp_path / "b", point=Point(lsn=Lsn(lsn)), selection=TWO).manifest
    assert manifest.lsn == lsn
    assert_sound(tmp_path / "b")
    assert contents(tmp_path / "b") == chosen(source.path, TWO)  # what came behind was of another realm


# -- bad luck --------------------------------------------------------------------------------------------------


def damaged(source: Source, to: Path, *realms: str) -> Path:
    """A copy of the source in which some realms' pairs in the store are not what was written."""
    copy_node(source.path, to)
    with open_source(to) as opened:
        rows = {realm: opened.state.store.current.realm(realm) for realm in realms}
    environment = open_environment(to / "store", readonly=False)
    with contextlib.closing(environment), environment.env.begin(environment.data, write=True) as txn:
        for row in rows.values():
            assert row is not None
            txn.put(realm_prefix(row.id) + b"000011", b"damage")
    return to


def test_a_damaged_realm_is_left_out_and_the_others_are_saved(
    processes: Processes, tmp_path: Path, source: Source
) -> None:
    """G8, G11: the backup says that it is not whole, exit code 1; and so does a restore of it."""
    bad = damaged(source, tmp_path / "bad", "/two/x")
    for target, flags in (
        ("portable", ("--portable",)),
        ("a.tar.zst", ("--portable",)),
        ("b", ("--exclude", "/one")),
    ):
        done = processes.run("backup", "-f", bad, "-t", tmp_path / target, *flags, code=FAILED)
        assert "problem: realm /two/x was left out: realm /two/x holds 201 entries of" in done.stderr.decode()
    for name in ("portable", "a.tar.zst"):
        done = processes.run(
            "restore", tmp_path / name, "--to", tmp_path / f"{name}.r", "--json", code=FAILED
        )
        assert len(json.loads(done.stdout)["problems"]) == 1
        assert_sound(tmp_path / f"{name}.r")
        assert contents(tmp_path / f"{name}.r") == chosen(source.path, Selection(exclude=("/two/x",)))
    manifest = read_manifest(tmp_path / "portable.r")
    assert [one.realm for one in manifest.failed] == ["/two/x"]
    assert manifest.realms == 5
    assert_sound(tmp_path / "b")
    done = processes.run("backup", "-f", source.path, "-t", tmp_path / "portable.r", "--update", code=USAGE)
    assert "make it anew" in complaint(done)


def test_damage_of_what_was_dropped_since_is_no_loss(tmp_path: Path, source: Source) -> None:
    """A realm that the log drops, or drops and makes again, is as whole as ever."""
    bad = damaged(source, tmp_path / "bad", "/two/y", "/two/z")
    assert make_backup(bad, tmp_path / "b", selection=TWO).manifest.failed == []
    assert_same(tmp_path / "b", source, TWO)


def test_a_flipped_bit_in_a_leaf_page_is_found(tmp_path: Path, source: Source) -> None:
    """G11: what no LMDB notices is found by the digests, and concerns the realm alone."""
    copy_node(source.path, tmp_path / "bad")
    store = tmp_path / "bad" / "store" / "data.mdb"
    value = b"123 of " + b"/three/deep/down" * 5
    content = store.read_bytes()
    assert value in content
    store.write_bytes(content.replace(value, value[:-1] + b"m"))
    report = write_archive(
        tmp_path / "bad", tmp_path / "a.tar.zst", ArchiveOptions(selection=Selection(portable=True))
    )
    assert [one.realm for one in report.manifest.failed] == ["/three/deep/down"]
    restore_backup(tmp_path / "a.tar.zst", tmp_path / "b")
    assert_sound(tmp_path / "b")
    assert contents(tmp_path / "b") == chosen(source.path, Selection(exclude=("/three/**",)))


def test_without_the_systems_realm_there_is_no_backup(tmp_path: Path, source: Source) -> None:
    """G10: it holds the keys, and a server without them would make others."""
    copy_node(source.path, tmp_path / "bad")
    with open_source(tmp_path / "bad") as opened:
        row = opened.state.store.current.realm("/__system")
        assert row is not None
    environment = open_environment(tmp_path / "bad" / "store", readonly=False)
    with contextlib.closing(environment), environment.env.begin(environment.data, write=True) as txn:
        assert txn.delete(realm_prefix(row.id) + b"history-key")
    with pytest.raises(CorruptionError, match="/__system"):
        make_backup(tmp_path / "bad", tmp_path / "b", selection=TWO)
    assert (tmp_path / "b" / IN_PROGRESS_FILE).exists()


def test_a_realm_that_the_list_has_lost_is_missed(tmp_path: Path, source: Source) -> None:
    """G8: no realm can be named then, but the backup is not whole, and says so."""
    copy_node(source.path, tmp_path / "bad")
    environment = open_environment(tmp_path / "bad" / "store", readonly=False)
    with contextlib.closing(environment), environment.env.begin(environment.realms, write=True) as txn:
        assert txn.delete(b"/three/deep/down")
    (failed,) = make_backup(
        tmp_path / "bad", tmp_path / "b", selection=Selection(portable=True)
    ).manifest.failed
    assert failed.realm == ""
    assert "some are lost" in failed.error


def test_a_flipped_bit_in_any_file_of_records_is_found(tmp_path: Path, source: Source) -> None:
    """G8, G11: restore names the file, or says what of its content can't be, and leaves a mark."""
    manifest = make_backup(source.path, tmp_path / "a", selection=Selection(portable=True)).manifest
    names = [entry.path for entry in manifest.files]
    assert {name.partition("-")[0] for name in names if name.startswith("records/")} == {
        f"records/{database}" for database in ("data", "history", "clients", "realms", "meta", "tail")
    }
    for name in names:
        path = tmp_path / "a" / name
        good = path.read_bytes()
        for at in {0, 5, len(good) // 2, len(good) - 1}:
            path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
            with pytest.raises(CorruptionError):
                restore_backup(tmp_path / "a", tmp_path / "b")
            assert not (tmp_path / "b").exists()
        path.write_bytes(good[:-1])
        with pytest.raises(CorruptionError):
            restore_backup(tmp_path / "a", tmp_path / "b")
        path.write_bytes(good)
    restore_backup(tmp_path / "a", tmp_path / "b")  # goes on where the others have failed
    assert_same(tmp_path / "b", source)


@pytest.mark.parametrize("selection", [Selection(portable=True), TWO], ids=str)
def test_what_was_cut_off_is_finished_by_the_same_command_only(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch, selection: Selection
) -> None:
    """G8: neither an update nor another choice goes on with it."""
    with monkeypatch.context() as patched:
        patched.setattr(records_module.Records, "_meta", lambda _: fail())
        with pytest.raises(OSError, match="cut off"):
            make_backup(source.path, tmp_path / "b", selection=selection)
    for update, other in ((True, EVERYTHING), (False, Selection(realms=("/one",)))):
        with pytest.raises(UnfinishedBackup):
            make_backup(source.path, tmp_path / "b", selection=other, update=update)
    with pytest.raises(UnfinishedBackup):
        restore_backup(tmp_path / "b", tmp_path / "r")
    make_backup(source.path, tmp_path / "b", selection=selection)
    if selection.portable:
        restore_backup(tmp_path / "b", tmp_path / "r")
    assert_same(tmp_path / ("r" if selection.portable else "b"), source, replace(selection, portable=False))


def fail() -> Iterator[object]:
    raise OSError("cut off")
    yield


# -- policies and repositories ---------------------------------------------------------------------------------


def test_a_policy_of_chosen_realms(tmp_path: Path, source: Source) -> None:
    """Its backups are of these realms, without the log; a restore that names none takes one of all realms."""
    repository_path, data_dir = tmp_path / "repository", copy_node(source.path, tmp_path / "data")
    repository_path.mkdir()
    table = {"name": "two", "repositories": [str(repository_path)], "realms": ["/two/*"], "retries": 0}
    policy = parse_policy(table, "u.toml")
    assert not policy.archive_log
    report = run_policy(policy, data_dir)
    assert report.result is Result.DONE, report.all_errors
    repository = open_repository(str(repository_path))
    (stored,) = read_catalog(repository).backups
    assert (stored.manifest.form, stored.manifest.realms) == (Form.RECORDS, 3)
    restore_stored(repository, stored, tmp_path / "b", with_log=False)
    assert_same(tmp_path / "b", source, TWO)
    with pytest.raises(UsageError, match="does not hold all realms"):
        restore_stored(repository, stored, tmp_path / "c", with_log=True)


def test_restore_takes_no_backup_of_some_realms_for_one_of_all(
    processes: Processes, tmp_path: Path, source: Source
) -> None:
    """G8: unless it is named; from one of all, whichever form it has, the log goes on, and realms can be chosen."""
    repository_path, data_dir = tmp_path / "repository", copy_node(source.path, tmp_path / "data")
    repository_path.mkdir()
    settings = {"repositories": [str(repository_path)], "retries": 0}
    run_policy(parse_policy({"name": "two", "exclude": ["/one"], **settings}, "u.toml"), data_dir)
    done = processes.run("restore", str(repository_path), "--to", tmp_path / "b", code=USAGE)
    assert "holds all realms" in complaint(done)
    whole = parse_policy({"name": "whole", "portable": True, **settings}, "u.toml")
    assert run_policy(whole, data_dir).result is Result.DONE
    processes.run("restore", str(repository_path), "--to", tmp_path / "b")
    assert_same(tmp_path / "b", source)
    processes.run("restore", str(repository_path), "--to", tmp_path / "c", "--realm", "/two/*")
    assert_same(tmp_path / "c", source, TWO)


def test_a_run_that_had_to_leave_a_realm_out_is_partial(tmp_path: Path, source: Source) -> None:
    """G8: the report, the history and the backup's manifest say which realm, and why."""
    bad = damaged(source, tmp_path / "bad", "/two/x")
    (tmp_path / "repository").mkdir()
    table = {"name": "n", "repositories": [str(tmp_path / "repository")], "portable": True, "retries": 0}
    report = run_policy(parse_policy(table, "u.toml"), bad)
    assert report.result is Result.PARTIAL
    assert any("realm /two/x was left out" in error for error in report.all_errors)
    assert len(report.backups) == 1


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"realms": ["two"]}, "bad pattern 'two'"),
        ({"exclude": ["/a"], "archive_log": True}, "the log holds all realms"),
        ({"portable": "yes"}, "portable is 'yes'"),
    ],
)
def test_a_policy_that_can_t_be_is_refused(table: dict[str, object], says: str) -> None:
    """The message names the key."""
    with pytest.raises(UsageError, match=says):
        parse_policy({"name": "n", "repositories": ["/backup"], **table}, "u.toml")


# -- many realms -----------------------------------------------------------------------------------------------

_MEASURED = r"""
import re, sys
from pathlib import Path
from understudy.backup.archive import write_archive
from understudy.backup.archive_options import ArchiveOptions
from understudy.backup.restore import restore_backup
from understudy.backup.selection import Selection
if sys.argv[1] == "backup":
    write_archive(Path(sys.argv[2]), Path(sys.argv[3]), ArchiveOptions(selection=Selection(portable=True)))
else:
    restore_backup(Path(sys.argv[2]), Path(sys.argv[3]))
status = Path("/proc/self/status").read_text()
print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10)
"""


async def make_realms(address: str, count: int) -> None:
    """So many realms with a pair each."""
    async with aconnect(address) as server:
        for first in range(0, count, 500):
            numbers = range(first, first + 500)
            await asyncio.gather(
                *(server.commit(f"/realm/{number}", [Put(b"key", b"%d" % number)]) for number in numbers)
            )


def memory_of(what: str, one: Path, other: Path) -> int:
    """The most memory, in bytes, that a process of its own had while it backed up or restored."""
    run = subprocess.run([sys.executable, "-c", _MEASURED, what, one, other], capture_output=True, check=True)
    return int(run.stdout)


def test_many_small_realms_take_little_memory(processes: Processes, tmp_path: Path) -> None:
    """G9: 20,000 realms are backed up as records and restored, one after another."""
    count = 20_000
    primary = processes.primary(tmp_path / "a")
    portal.call(make_realms(primary.address, count))
    checkpoint(primary.address)
    primary.terminate()
    assert memory_of("backup", tmp_path / "a", tmp_path / "a.tar.zst") < MEMORY_BYTES_MAX
    assert memory_of("restore", tmp_path / "a.tar.zst", tmp_path / "b") < MEMORY_BYTES_MAX
    assert read_manifest(tmp_path / "b").realms == count
    assert_sound(tmp_path / "b")


# -- bytes -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=600), st.binary(max_size=40))))
def test_rows_come_back_as_they_were_written(rows: list[tuple[bytes, bytes]]) -> None:
    """Keys that LMDB can hold, in their order, with any values."""
    expected = sorted({key[:511]: value for key, value in rows}.items())
    data = b"".join(encode_row(key, value) for key, value in expected)
    assert list(decode_rows(data, "name")) == expected


@pytest.mark.parametrize("keys", [(b"b", b"a"), (b"a", b"a"), (b"",), (b"k" * 512,)])
def test_keys_that_no_database_has_in_that_order_are_damage(keys: tuple[bytes, ...]) -> None:
    """G11: rows are appended as they come, so a key that is not behind the one before is refused."""
    with pytest.raises(CorruptionError, match="a key that can't be there"):
        list(decode_rows(b"".join(encode_row(key, b"value") for key in keys), "name"))


@given(st.binary(max_size=200), st.binary(max_size=30))
def test_any_bytes_give_rows_or_our_error(data: bytes, end: bytes) -> None:
    """Whatever is in a file, it is read, or said to be damaged (G11)."""
    good = b"".join(encode_row(b"key %d" % number, b"v" * number) for number in range(3)) + end
    for content in (data, good):
        for decode in (decode_rows, decode_tail):
            with contextlib.suppress(CorruptionError):
                for _ in decode(content, "name"):
                    pass


@given(
    st.integers(1, 2**63), st.integers(0, 2**63), st.integers(0, 2**63), st.binary(max_size=40), st.binary()
)
def test_entries_of_the_tail_come_back(
    lsn: int, offset: int, time_us: int, digest: bytes, payload: bytes
) -> None:
    """With place and time, whether they are kept or stand for some that are not."""
    position = Position(Lsn(lsn), Digest(digest[:DIGEST_BYTES].ljust(DIGEST_BYTES, b"\0")))
    row = TailRow(LogPlace(position, offset), time_us, payload)
    assert list(decode_tail(row.encode(), "name")) == [row]


def test_manifests_of_before_are_read(tmp_path: Path, source: Source) -> None:
    """One without the keys of forms and choices is that of a whole backup of pages."""
    facts = json.loads(read_manifest(source.path).encode())
    for key in ("form", "realms_chosen", "realms_excluded", "failed", "seal"):
        del facts[key]
    manifest = Manifest.decode(json.dumps(facts).encode(), "name")
    assert manifest == read_manifest(source.path)
    assert manifest.is_whole
    for bad in ({"form": "other"}, {"failed": [{"realm": 7, "error": ""}]}, {"realms_chosen": [1]}):
        with pytest.raises(CorruptionError):
            Manifest.decode(json.dumps({**facts, **bad}).encode(), "name")
