"""The folders of drills: what is removed and replaced there is only what a drill has made, and nobody has touched."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from harness import Processes
from nodes import assert_sound, copy_node, offline_status, put

from understudy.backup.scratch import scratch
from understudy.backup.staging import NOTE_FILE, check_staging, replace_staging
from understudy.common.directory import DataDirectory
from understudy.common.errors import DirectoryInUse, WrongRole

REPLACED, DISCARDED = ".staging.replaced-by-drill", ".staging.discarded-by-drill"


@pytest.fixture(scope="module")
def server_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a stopped server with one key."""
    folder = tmp_path_factory.mktemp("server")
    processes = Processes(tmp_path_factory.mktemp("processes"))
    try:
        primary = processes.primary(folder / "a")
        put(primary.address, "/realm", (b"key", b"1"))
        primary.terminate()
    finally:
        processes.close()
    return folder / "a"


def proven(server_files: Path, to: Path, *, lsn: int | None = None) -> Path:
    """A directory that a drill has proven up to an LSN; up to its end if not given."""
    copy_node(server_files, to)
    proven_lsn = offline_status(to).lsn if lsn is None else lsn
    (to / NOTE_FILE).write_text(json.dumps({"lsn": proven_lsn}))
    return to


def test_a_staging_that_was_moved_away_stays(tmp_path: Path, server_files: Path) -> None:
    """G4: under whatever name an operator keeps what he has written to, no later drill removes or moves it."""
    staging = proven(server_files, tmp_path / "staging", lsn=0)
    with pytest.raises(WrongRole, match="move it away"):
        check_staging(staging)
    kept = staging.rename(tmp_path / "staging.old")
    check_staging(staging)
    assert not staging.exists()
    for number in range(2):
        replace_staging(staging, proven(server_files, tmp_path / f"proven{number}"))
    assert_sound(kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["staging", "staging.old"]


def test_what_was_replaced_is_removed_only_while_nobody_has_touched_it(
    tmp_path: Path, server_files: Path
) -> None:
    """G4: what a drill that was cut off had put aside stays if it was written to, or a server runs on it."""
    proven(server_files, tmp_path / "staging")
    proven(server_files, tmp_path / REPLACED, lsn=0)
    with pytest.raises(WrongRole, match="written to since"):
        check_staging(tmp_path / "staging")
    assert_sound(tmp_path / REPLACED)
    (tmp_path / REPLACED).rename(tmp_path / "mine")
    proven(server_files, tmp_path / REPLACED)
    with DataDirectory.open(tmp_path / REPLACED), pytest.raises(DirectoryInUse):
        check_staging(tmp_path / "staging")
    check_staging(tmp_path / "staging")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "staging"]


def test_a_removal_that_was_cut_off_is_finished(tmp_path: Path, server_files: Path) -> None:
    """What is half removed can't be looked at any more, and its name says that it may go."""
    proven(server_files, tmp_path / "staging")
    (tmp_path / DISCARDED / "log").mkdir(parents=True)
    check_staging(tmp_path / "staging")
    assert [path.name for path in tmp_path.iterdir()] == ["staging"]


def test_folders_that_only_look_like_a_drills_stay(tmp_path: Path) -> None:
    """G4: a scratch folder is told by its mark, not by its name alone, and others beside it are left alone."""
    for name in (".drill-notes", ".drill-0123abcd", ".drill-0123abcde"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / ".drill-76543210").mkdir()  # of one that was killed at once
    with scratch(tmp_path) as target:
        assert target.parent.exists()
    assert sorted(os.listdir(tmp_path)) == [".drill-0123abcd", ".drill-0123abcde", ".drill-notes"]
    assert all((tmp_path / name / "mine").exists() for name in os.listdir(tmp_path))


def test_what_a_killed_drill_has_marked_is_removed(tmp_path: Path) -> None:
    """A folder with the mark, whose owner is gone, goes with all in it, whatever that is."""
    with scratch(tmp_path) as target:
        copied = tmp_path / ".drill-89abcdef"
        copy_node(target.parent, copied)
        (copied / "data" / "log").mkdir(parents=True)
    with scratch(tmp_path):
        assert not copied.exists()


def test_ctrl_c_in_the_middle_of_a_removal_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies there in plain goes, though Ctrl-C comes while it is removed."""
    interrupts = [KeyboardInterrupt()]
    rmtree = shutil.rmtree

    def interrupted(path: Path, **how: bool) -> None:
        if interrupts:
            raise interrupts.pop()
        rmtree(path, **how)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), scratch(tmp_path) as target:
        target.mkdir()  # and whatever is in it
    assert interrupts == []
    assert os.listdir(tmp_path) == []
