"""A backup whose log has lost its end: nobody takes what is left for all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Processes, complaint
from nodes import assert_sound, checkpoint, offline_status, pairs, put

from understudy.backup.make import make_backup
from understudy.backup.manifest import read_manifest
from understudy.backup.point import Point, cut_log
from understudy.common.directory import IN_PROGRESS_FILE, MANIFEST_FILE, DataDirectory
from understudy.common.types import Lsn

CORRUPT = 4


@pytest.fixture
def shortened(processes: Processes, tmp_path: Path) -> Path:
    """A backup without the last two entries of its log, as if it had never had them."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"early", b"1"))
    checkpoint(primary.address)
    for number in range(4):
        put(primary.address, "/realm", (b"late", b"%d" % number))
    primary.terminate()
    lsn = make_backup(tmp_path / "a", tmp_path / "b").manifest.lsn
    with DataDirectory.open_existing(tmp_path / "b") as directory:
        cut_log(directory, Point(lsn=Lsn(lsn - 2)))
    return tmp_path / "b"


def test_a_backup_that_has_lost_its_end_is_refused_by_all(
    processes: Processes, tmp_path: Path, shortened: Path
) -> None:
    """G8, G11: by who looks, copies, restores or serves it; the error says how to take what is left."""
    for words in (
        ("verify", shortened),
        ("backup", "-f", shortened, "-t", tmp_path / "copy"),
        ("backup", "-f", shortened, "-t", tmp_path / "copy.tar.zst"),
        ("restore", shortened, "--to", tmp_path / "restored"),
        ("primary", "--data-dir", shortened, "--listen", "127.0.0.1:0"),
    ):
        done = processes.run(*words, code=CORRUPT)
        assert not (tmp_path / "copy").exists()
        if words[0] not in ("restore", "verify"):
            assert "remove backup.json to take what is left" in complaint(done)
    (shortened / MANIFEST_FILE).unlink()
    served = processes.primary(shortened)
    assert pairs(served.address, "/realm") == {b"early": b"1", b"late": b"1"}


def test_what_was_there_before_an_update_must_be_there_for_it_to_be_finished(
    processes: Processes, shortened: Path
) -> None:
    """G8: --finish saves what an update has brought, and never makes less of a backup without a word."""
    (shortened / IN_PROGRESS_FILE).write_text("{}")
    assert "was lost" in complaint(processes.run("backup", "-t", shortened, "--finish", code=CORRUPT))
    assert (shortened / IN_PROGRESS_FILE).exists()


def test_an_update_from_the_source_brings_back_what_was_lost(tmp_path: Path, shortened: Path) -> None:
    """G8: as long as the source is there."""
    make_backup(tmp_path / "a", shortened, update=True)
    assert_sound(shortened)
    assert read_manifest(shortened).lsn == offline_status(shortened).lsn == offline_status(tmp_path / "a").lsn


def test_a_damaged_manifest_is_told_of(processes: Processes, shortened: Path) -> None:
    """G11: where the backup ends can't be known then; the error names the file."""
    for damaged in (b"", b"[]", b"{}", b'{"lsn": 3, "digest": "zz"}', b"[" * 100_000):
        (shortened / MANIFEST_FILE).write_bytes(damaged)
        done = processes.run("primary", "--data-dir", shortened, "--listen", "127.0.0.1:0", code=CORRUPT)
        assert MANIFEST_FILE in complaint(done)
