"""What checks have found out about stored backups: what counts, what is kept, and that damage of it harms nobody."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from harness import Processes

from understudy.backup.catalog import (
    Check,
    Finding,
    StoredBackup,
    decode_backup,
    last_proven_s,
    new_backup_id,
    note_check,
    publish_backup,
    read_catalog,
)
from understudy.backup.folder_repository import FolderRepository
from understudy.backup.manifest import Manifest, utc_text
from understudy.backup.repository import claim, open_repository
from understudy.common.errors import OTHER_BACKUP, CorruptionError, RepositoryError
from understudy.common.types import ClusterId, Lsn

MADE_S = 1_763_760_000.0
INTACT, PROVEN, DAMAGED = Finding.INTACT, Finding.PROVEN, Finding.DAMAGED
LOG = "the log behind it: damaged"

MANIFEST = Manifest(
    cluster="00000000-0000-4000-8000-000000000001",
    node="00000000-0000-4000-8000-000000000002",
    epoch=1,
    lsn=7,
    digest="00" * 32,
    log_offset=7,
    time=utc_text(MADE_S),
    checkpoint_lsn=7,
    state_digest="00" * 32,
    realms=0,
    made=utc_text(MADE_S),
    version="1",
    machine="x86_64",
    byte_order="little",
    page_bytes=4096,
    files=[],
)
BACKUP = StoredBackup(
    id=new_backup_id(MADE_S, Lsn(7)),
    run=1,
    policy="nightly",
    archive="backup.tar.zst",
    size=0,
    sha256="",
    manifest=MANIFEST,
)


@pytest.fixture
def repository(tmp_path: Path) -> FolderRepository:
    """One with a backup that was never checked."""
    (tmp_path / "repository").mkdir()
    repository = FolderRepository(str(tmp_path / "repository"), tmp_path / "repository")
    publish_backup(repository, BACKUP)
    return repository


def stored(repository: FolderRepository) -> StoredBackup:
    """The backup as it is listed."""
    (backup,) = read_catalog(repository).backups
    return backup


def check_names(repository: FolderRepository) -> list[str]:
    return [one.name for one in repository.list(BACKUP.folder + "checks/")]


@pytest.mark.parametrize(
    ("found", "state"),
    [
        ([], "unchecked"),
        ([(INTACT, "")], "intact"),
        ([(PROVEN, ""), (INTACT, "")], "proven"),
        ([(PROVEN, ""), (INTACT, ""), (INTACT, "")], "proven"),
        ([(PROVEN, ""), (INTACT, LOG)], "intact"),
        ([(PROVEN, ""), (INTACT, LOG), (INTACT, "")], "intact"),
        ([(PROVEN, ""), (DAMAGED, "missing")], "damaged"),
        ([(PROVEN, ""), (DAMAGED, "missing"), (INTACT, "")], "intact"),
        ([(DAMAGED, "missing"), (PROVEN, "")], "proven"),
        ([(INTACT, LOG), (PROVEN, ""), (INTACT, "")], "proven"),
    ],
)
def test_the_last_check_decides(
    repository: FolderRepository, found: list[tuple[Finding, str]], state: str
) -> None:
    """G8: a proof outlives only checks that find the digest as it was, whether older checks were removed or not."""
    checks = [Check(finding=finding, at="", detail=detail) for finding, detail in found]
    assert replace(BACKUP, checks=tuple(checks)).state == state
    for number, (finding, detail) in enumerate(found):
        note_check(repository, BACKUP, finding, detail, MADE_S + number)
    assert stored(repository).state == state


def test_of_checks_that_have_found_the_same_the_newest_is_kept(repository: FolderRepository) -> None:
    """However often a backup is checked, its checks are few."""
    for number in range(20):
        for finding, detail in ((PROVEN, ""), (INTACT, LOG), (DAMAGED, str(number)), (INTACT, "")):
            note_check(repository, BACKUP, finding, detail, MADE_S + number)
    assert len(check_names(repository)) == 4
    assert {check.at for check in stored(repository).checks} == {utc_text(MADE_S + 19)}


class _Overtaken(FolderRepository):
    """Whoever reads a check here for the first time is overtaken by somebody who has found the same again."""

    overtaken = False

    def read(self, name: str, size_max: int = 1 << 30) -> bytes:
        """As ever, but for that."""
        if "/checks/" in name and not self.overtaken:
            self.overtaken = True
            note_check(self, BACKUP, DAMAGED, "again", MADE_S + 1)
        return super().read(name, size_max)


def test_a_check_that_is_replaced_while_it_is_read_is_not_missed(repository: FolderRepository) -> None:
    """G11: between two checks that find a backup damaged, nobody reads that it is unchecked."""
    note_check(repository, BACKUP, DAMAGED, "missing", MADE_S)
    overtaken = _Overtaken(repository.url, Path(repository.url))
    assert stored(overtaken).state == "damaged"
    assert len(check_names(repository)) == 1


def test_a_storage_that_lets_nobody_remove_takes_checks(
    repository: FolderRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found counts, though older checks stay."""

    def refuse(self: FolderRepository, name: str) -> None:
        raise RepositoryError(f"may not remove {name}")

    monkeypatch.setattr(FolderRepository, "delete", refuse)
    for number in range(3):
        note_check(repository, BACKUP, PROVEN, "", MADE_S + number)
    assert len(check_names(repository)) == 3
    assert last_proven_s(read_catalog(repository), BACKUP.policy) == MADE_S + 2


def test_no_bit_of_a_check_counts(repository: FolderRepository) -> None:
    """G11: a check that is not what was written counts as damage, and no reader of the repository ends for it."""
    note_check(repository, BACKUP, PROVEN, "", MADE_S)
    (name,) = check_names(repository)
    path = Path(repository.url) / name
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        backup = stored(repository)
        assert (backup.state, last_proven_s(read_catalog(repository), BACKUP.policy)) in (
            ("damaged", 0.0),
            ("proven", MADE_S),  # white space
        )


@pytest.mark.parametrize("at", ["", "yesterday", "2025-11-21", None, 7])
def test_a_check_of_no_time_counts_as_damage(repository: FolderRepository, at: object) -> None:
    """G11: earlier versions wrote no seal, so what each value can be is looked at as well."""
    raw = json.dumps({"finding": "proven", "at": at, "detail": ""}).encode()
    repository.put(f"{BACKUP.folder}checks/1.json", raw)
    assert stored(repository).state == "damaged"
    assert last_proven_s(read_catalog(repository), BACKUP.policy) == 0.0


@pytest.mark.parametrize("key", ["made", "time"])
@pytest.mark.parametrize("moment", ["", "yesterday", "2025-11-21T00:00:00", None])
def test_a_manifest_of_no_time_is_told_as_damaged(key: str, moment: object) -> None:
    """G11: earlier versions wrote no seal, and a time that is none ends neither a listing nor a retention."""
    raw = json.loads(BACKUP.encode())
    del raw["seal"]
    raw["manifest"][key] = moment
    with pytest.raises(CorruptionError, match="can't be read"):
        decode_backup(json.dumps(raw).encode(), "manifest.json")


FILE = {"path": "store/data.mdb", "bytes": 1, "xxh3": "0" * 32}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 0),
        ("form", "other"),
        ("cluster", "a cluster"),
        ("node", 7),
        ("version", None),
        ("machine", []),
        ("byte_order", 1),
        ("epoch", 0),
        ("epoch", -1),
        ("epoch", True),
        ("lsn", 0),
        ("lsn", 2**64),
        ("lsn", 2**70),
        ("lsn", 7.0),
        ("log_offset", -1),
        ("log_offset", 2**64),
        ("checkpoint_lsn", -1),
        ("checkpoint_lsn", 2**70),
        ("realms", -1),
        ("page_bytes", -4096),
        ("page_bytes", "4096"),
        ("digest", "00" * 31),
        ("digest", "zz" * 32),
        ("digest", 7),
        ("state_digest", "0"),
        ("state_digest", "no digest"),
        ("realms_chosen", "/a"),
        ("realms_excluded", [7]),
        ("failed", [{"realm": "/a", "error": 7}]),
        ("time", "yesterday"),
        ("made", 7),
    ],
)
def test_a_manifest_of_what_can_not_be_is_told_as_damaged(key: str, value: object) -> None:
    """G11: one without a seal, as earlier versions wrote it, is refused for a value that can't be, and says which."""
    refuse({key: value}, repr(value) if key == "form" else key)


@pytest.mark.parametrize(
    "path", ["", ".", "/etc/passwd", "../a", "log/../../a", "log//a", "log/./a", "a\0", "a/", 7]
)
def test_a_manifest_names_only_files_within_its_backup(path: object) -> None:
    """G11: nothing outside of a backup is read or written, whatever its manifest says."""
    refuse({"files": [{**FILE, "path": path}]}, "the path of a file")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"bytes": -1}, "bytes of store"),
        ({"bytes": 2**63}, "bytes of store"),
        ({"xxh3": "z" * 32}, "xxh3 of store"),
    ],
)
def test_a_manifest_names_files_as_they_can_be(wrong: dict[str, object], says: str) -> None:
    """G11: as with its other values."""
    refuse({"files": [{**FILE, **wrong}]}, says)


def test_a_manifest_names_no_file_twice() -> None:
    """G11: one of both would not be looked at."""
    Manifest.decode(without_seal({"files": [FILE]}), "backup.json")
    refuse({"files": [FILE, FILE]}, "the path of a file is 'store/data.mdb'")


def refuse(changed: dict[str, object], says: str) -> None:
    """Reads a manifest of an earlier version, with some values changed."""
    with pytest.raises(CorruptionError, match=f"backup.json can't be read: .*{re.escape(says)}") as refused:
        Manifest.decode(without_seal(changed), "backup.json")
    assert refused.value.remedy == OTHER_BACKUP


def without_seal(changed: dict[str, object]) -> bytes:
    facts = json.loads(MANIFEST.encode())
    del facts["seal"]
    return json.dumps({**facts, **changed}).encode()


def test_verify_of_an_empty_repository_says_so(processes: Processes, tmp_path: Path) -> None:
    """Nobody takes silence for a good backup."""
    claim(open_repository(str(tmp_path)), ClusterId(bytes(16)))
    said = processes.run("backups", "verify", tmp_path).stdout.decode()
    assert said == f"no backup in {tmp_path}\n"
    assert json.loads(processes.run("backups", "verify", tmp_path, "--json").stdout) == []
