"""Drills: backups are proven by restoring them, and what is damaged or can't be opened is told apart."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyrage
import pytest
from harness import ANY_PORT, Processes, complaint, wait_until
from nodes import assert_sound, checkpoint, copy_node, pairs, put

from understudy.backup import drill_server
from understudy.backup import staging as staging_module
from understudy.backup.archiver import Archiver
from understudy.backup.catalog import Finding, StoredBackup, read_catalog
from understudy.backup.drill import Drill, drill_line, drill_newest
from understudy.backup.drill_server import ReadReport, read_all
from understudy.backup.policy import Policy, parse_policy
from understudy.backup.repository import open_repository
from understudy.backup.retention import Retention
from understudy.backup.run import run_policy
from understudy.backup.scratch import PREFIX, scratch
from understudy.backup.staging import NOTE_FILE, replace_staging
from understudy.cli.options import INTERRUPTED
from understudy.common.directory import NODE_FILE, NodeFile
from understudy.common.errors import CorruptionError, UnderstudyError, UsageError
from understudy.common.types import ClusterId

FAILED, CORRUPT, NOT_PERMITTED = 1, 4, 7


def policy_to(folder: Path, **values: object) -> Policy:
    settings: dict[str, object] = {"retries": 0, "archive_log": False, **values}
    return Policy(name="nightly", schedule=None, repositories=(str(folder),), **settings)  # type: ignore[arg-type]


def backed_up(policy: Policy, data_dir: Path, **how: Any) -> StoredBackup:
    """The one backup of a run in which nothing went wrong."""
    report = run_policy(policy, data_dir, **how)
    assert report.all_errors == []
    (backup,) = report.backups
    return backup


def config(path: Path, folder: Path, more: str = "") -> Path:
    path.write_text(
        f'[[backup]]\nname = "nightly"\nrepositories = [{json.dumps(str(folder))}]\nretries = 0\n{more}'
    )
    return path


def drilled(policy: Policy, folder: Path, parent: Path, **how: Any) -> Drill:
    how = {"read_all": read_all, **how}
    return drill_newest(policy, str(folder), parent, **how)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def states(folder: Path) -> list[str]:
    return [backup.state for backup in read_catalog(open_repository(str(folder))).backups]


def left_over(folder: Path) -> list[Path]:
    return list(folder.glob(f"{PREFIX}*"))


def _no_server(directory: Path) -> ReadReport:
    raise UnderstudyError("no server")


# -- what is found ---------------------------------------------------------------------------------------------


def test_a_backup_and_the_log_behind_it_are_proven(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G8: a drill restores, verifies, serves and reads all realms; repository and journal remember it."""
    primary = processes.primary(tmp_path / "a")
    for realm in ("/one", "/two"):
        put(primary.address, realm, (b"key", b"1"))
    checkpoint(primary.address)
    backup = backed_up(policy_to(folder), tmp_path / "a")
    receipt = put(primary.address, "/three", (b"a", b"1"), (b"b", b"1"))
    cluster = ClusterId(_cluster(tmp_path / "a"))
    Archiver(tmp_path / "a" / "log", cluster, open_repository(str(folder)), encryption=None).ship()
    command = ("backup", "drill", "nightly", "--config", config(tmp_path / "u.toml", folder))
    (told,) = json.loads(processes.run(*command, "--data-dir", tmp_path / "a", "--json").stdout)
    assert (told["backup"], told["proven"], told["problem"]) == (backup.id, True, "")
    assert (told["realms"], told["pairs"]) == (3, 4)
    assert told["lsn"] >= receipt.lsn
    assert b"proven" in processes.run("backups", "list", folder).stdout
    assert f"drill of {backup.id}" in (tmp_path / "a" / "backups" / "journal").read_text()
    assert left_over(tmp_path) == []
    said = processes.run(*command, "--scratch", tmp_path).stdout.decode()
    assert "proven, 3 realms, 4 pairs" in said


def _cluster(data_dir: Path) -> bytes:
    import uuid

    return uuid.UUID(NodeFile.read(data_dir / NODE_FILE).cluster).bytes


def test_a_damaged_backup_is_noted_and_passed_over(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G11: a drill finds damage, `backups list` shows it, and a restore takes the one before, and the log."""
    primary = processes.primary(tmp_path / "a")
    made = []
    for number in range(2):
        put(primary.address, "/realm", (b"key", b"%d" % number))
        made.append(backed_up(policy_to(folder, archive_log=True), tmp_path / "a"))
    flip_a_byte(folder / made[1].archive_name)
    command = ("backup", "drill", "nightly", "--config", config(tmp_path / "u.toml", folder))
    (told,) = json.loads(processes.run(*command, "--data-dir", tmp_path / "a", "--json", code=CORRUPT).stdout)
    assert (told["backup"], told["proven"], told["finding"]) == (made[1].id, False, "damaged")
    assert states(folder) == ["unchecked", "damaged"]
    listed = processes.run("backups", "list", folder).stdout.decode()
    assert "damaged" in next(line for line in listed.splitlines() if made[1].id in line)
    said = processes.run("restore", folder, "--to", tmp_path / "b").stderr.decode()
    assert f"from {made[0].id}" in said
    assert pairs(processes.primary(tmp_path / "b").address, "/realm") == {b"key": b"1"}
    assert left_over(tmp_path) == []


def test_a_missing_archive_is_damage(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """G11: a manifest without its archive is no backup that could be restored."""
    processes.primary(tmp_path / "a")
    backup = backed_up(policy_to(folder), tmp_path / "a")
    (folder / backup.archive_name).unlink()
    drill = drilled(policy_to(folder), folder, tmp_path)
    assert (drill.finding, "missing" in drill.problem) == ("damaged", True)


def test_a_damaged_log_does_not_make_the_backup_damaged(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G11: the shipped log behind a good backup is damaged: the drill fails, and the backup itself is still good."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"1"))
    backed_up(policy_to(folder), tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"2"))
    repository = open_repository(str(folder))
    Archiver(tmp_path / "a" / "log", ClusterId(_cluster(tmp_path / "a")), repository, encryption=None).ship()
    for path in (folder / "log").iterdir():
        flip_a_byte(path)
    drill = drilled(policy_to(folder), folder, tmp_path)
    assert (drill.finding, drill.is_proven) == ("intact", False)
    assert "the log behind it" in drill.problem
    assert states(folder) == ["intact"]


@pytest.mark.parametrize("read", [0, CorruptionError("not readable")])
def test_what_a_server_does_not_show_is_damage(
    processes: Processes, tmp_path: Path, folder: Path, read: int | CorruptionError
) -> None:
    """G8: a backup from which a server shows fewer realms than it should, or none, is not good."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"1"))
    backed_up(policy_to(folder), tmp_path / "a")

    def read_badly(directory: Path) -> ReadReport:
        if isinstance(read, CorruptionError):
            raise read
        return ReadReport(address="", realms=read, pairs=read)

    drill = drilled(policy_to(folder), folder, tmp_path, read_all=read_badly)
    assert drill.finding == "damaged"
    assert states(folder) == ["damaged"]


def test_a_drill_that_can_not_be_done_says_nothing_about_the_backup(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """Without a server that starts, without a repository or a backup, nobody is called damaged."""
    processes.primary(tmp_path / "a")
    missing = drilled(policy_to(folder), folder, tmp_path)
    assert (missing.finding, "no backup of nightly" in missing.problem) == (None, True)
    backed_up(policy_to(folder), tmp_path / "a")
    failed = drilled(policy_to(folder), folder, tmp_path, read_all=_no_server)
    assert (failed.finding, failed.problem) == (None, "no server")
    assert states(folder) == ["unchecked"]
    assert drilled(policy_to(folder), tmp_path / "not mounted", tmp_path).finding is None
    assert left_over(tmp_path) == []


# -- keys ------------------------------------------------------------------------------------------------------


HANGING = """
import json, threading
print(json.dumps({"realm": "/realm", "read": 1}), flush=True)
threading.Event().wait()
"""


def test_a_server_that_hangs_is_ended_and_is_no_damage(
    processes: Processes, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing more is read for some time the drill could not be done, and the backup stays what it was."""
    processes.primary(tmp_path / "a")
    backed_up(policy_to(folder), tmp_path / "a")
    (tmp_path / "hanging_server.py").write_text(HANGING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(drill_server, "MODULE", "hanging_server")

    def read_impatiently(directory: Path) -> ReadReport:
        with drill_server.proven_server(directory, ANY_PORT, stalled_s=1.0) as (report, _):
            return report

    drill = drilled(policy_to(folder), folder, tmp_path, read_all=read_impatiently)
    assert drill.finding is None
    assert "has read nothing for 1 s" in drill.problem
    assert states(folder) == ["unchecked"]
    assert left_over(tmp_path) == []


def test_a_wrong_passphrase_is_no_damage(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """G10: what does not open could not be proven, and is not called damaged; with the right one it is proven."""
    processes.primary(tmp_path / "a")
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("correct horse\n")
    wrong.write_text("battery staple\n")
    for path in (right, wrong):
        path.chmod(0o600)
    backed_up(policy_to(folder, passphrase_file=right), tmp_path / "a")
    more = f"passphrase_file = {json.dumps(str(wrong))}\n"
    command = ("backup", "drill", "nightly", "--config", config(tmp_path / "u.toml", folder, more))
    processes.run(*command, "--scratch", tmp_path, code=FAILED)
    assert states(folder) == ["unchecked"]
    assert drilled(policy_to(folder, passphrase_file=right), folder, tmp_path).is_proven
    flip_a_byte_of_the_head(folder)
    assert drilled(policy_to(folder, passphrase_file=right), folder, tmp_path).finding == "damaged"


def flip_a_byte_of_the_head(folder: Path) -> None:
    """Of the newest archive, where its key is wrapped."""
    backup = read_catalog(open_repository(str(folder))).backups[-1]
    data = bytearray((folder / backup.archive_name).read_bytes())
    data[data.index(b"\n", data.index(b"-> scrypt")) + 5] ^= 1
    (folder / backup.archive_name).write_bytes(data)


def test_backups_for_recipients_need_a_key(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """G10: the policy's identity_file opens them; without one a drill says so, and `drill = true` is refused."""
    key = pyrage.x25519.Identity.generate()
    recipient = str(key.to_public())
    table = {"name": "nightly", "repositories": [str(folder)], "recipients": [recipient], "drill": True}
    with pytest.raises(UsageError, match="identity_file"):
        parse_policy(table, "u.toml")
    processes.primary(tmp_path / "a")
    without = policy_to(folder, recipients=(recipient,))
    backed_up(without, tmp_path / "a")
    assert "identity_file" in drilled(without, folder, tmp_path).problem
    assert states(folder) == ["unchecked"]
    (tmp_path / "key").write_text(f"{key}\n")
    policy = parse_policy({**table, "identity_file": str(tmp_path / "key")}, "u.toml")
    (tmp_path / "key").chmod(0o644)
    assert "chmod 600" in drilled(policy, folder, tmp_path).problem
    (tmp_path / "key").chmod(0o600)
    assert drilled(policy, folder, tmp_path).is_proven


def test_a_server_that_asks_for_tokens_is_read_too(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """Whatever has become of the tokens of the real server, its backup can be proven."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"1"))
    processes.run("token", "issue", "--replica", "--data-dir", tmp_path / "a")
    backed_up(policy_to(folder), tmp_path / "a")
    drill = drilled(policy_to(folder), folder, tmp_path)
    assert (drill.is_proven, drill.problem, drill.pairs) == (True, "", 1)


# -- in a run --------------------------------------------------------------------------------------------------


def test_a_policy_with_drill_proves_each_backup_that_it_makes(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """`drill = true`: what `backup run` has made is proven when it ends, and its report says so."""
    processes.primary(tmp_path / "a")
    file = config(tmp_path / "u.toml", folder, "drill = true\n")
    run = ("backup", "run", "nightly", "--config", file, "--data-dir", tmp_path / "a", "--json")
    told = json.loads(processes.run(*run).stdout)
    assert (told["result"], told["repositories"][0]["proven"]) == ("done", True)
    assert states(folder) == ["proven"]


def test_a_run_whose_backup_is_not_proven_is_partial_and_prunes_nothing_for_it(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G8: an older backup is not removed in favour of one that a drill has just found damaged."""
    processes.primary(tmp_path / "a")
    policy = policy_to(folder, drill=True, retention=Retention(last=1))
    backed_up(policy, tmp_path / "a")

    def not_readable(directory: Path) -> ReadReport:
        raise CorruptionError("not readable")

    report = run_policy(policy, tmp_path / "a", read_all=not_readable)
    assert report.result == "partial"
    assert "not readable" in report.all_errors[0]
    assert states(folder) == ["proven", "damaged"]


# -- leftovers, staging, serving -------------------------------------------------------------------------------


def test_what_a_killed_drill_leaves_is_swept_by_the_next(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """A drill killed while its server runs leaves a folder, whose server ends, and which the next drill removes."""
    processes.primary(tmp_path / "a")
    backed_up(policy_to(folder), tmp_path / "a")
    command = ("backup", "drill", "nightly", "--config", config(tmp_path / "u.toml", folder))
    process = processes.start(*command, "--scratch", tmp_path, "--listen", ANY_PORT)
    wait_until(lambda: "served on" in process.stderr, what=process.describe)
    assert left_over(tmp_path) != []
    with_other = drilled(policy_to(folder), folder, tmp_path)
    assert with_other.is_proven
    assert left_over(tmp_path) != []  # of a drill that is at work
    process.kill()

    def swept() -> bool:  # once its server has ended, which takes a moment
        with scratch(tmp_path):
            return len(left_over(tmp_path)) == 1

    wait_until(swept)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_drill_that_is_interrupted_leaves_nothing(
    processes: Processes, tmp_path: Path, folder: Path, number: signal.Signals
) -> None:
    """Ctrl-C and SIGTERM, a second one at once included, leave nothing that is decrypted, and it is said."""
    put(processes.primary(tmp_path / "a").address, "/realm", (b"key", b"1"))
    backed_up(policy_to(folder), tmp_path / "a")
    command = ("backup", "drill", "nightly", "--config", config(tmp_path / "u.toml", folder))
    process = processes.start(*command, "--data-dir", tmp_path / "a")
    wait_until(lambda: [*tmp_path.glob(f"{PREFIX}*/data/node.json")], what=process.describe)
    for _ in range(2):
        process.send(number)
    assert process.wait() == INTERRUPTED
    assert left_over(tmp_path) == []
    assert "was removed again" in process.stderr


def test_a_proven_backup_is_served_on_this_machine(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G10: --listen serves what was proven until Ctrl-C, and refuses addresses that others could reach."""
    put(processes.primary(tmp_path / "a").address, "/realm", (b"key", b"1"))
    backed_up(policy_to(folder), tmp_path / "a")
    command = ("backup", "drill", "nightly", "--config", config(tmp_path / "u.toml", folder))
    flags = ("--scratch", tmp_path, "--listen")
    assert "TLS" in complaint(processes.run(*command, *flags, "0.0.0.0:0", code=NOT_PERMITTED))
    process = processes.start(*command, *flags, ANY_PORT)
    wait_until(lambda: "served on" in process.stderr, what=process.describe)
    address = process.stderr.partition("served on ")[2].split()[0]
    assert pairs(address, "/realm") == {b"key": b"1"}
    process.send(signal.SIGINT)
    assert process.wait() == 0
    assert left_over(tmp_path) == []


def test_the_staging_is_what_was_proven_last(processes: Processes, tmp_path: Path, folder: Path) -> None:
    """G4: a staging is replaced by what was proven, survives a drill that fails, and starts as a server."""
    primary = processes.primary(tmp_path / "a")
    policy = policy_to(folder, staging=tmp_path / "staging")
    for number in range(3):
        put(primary.address, "/realm", (b"key", b"%d" % number))
        backup = backed_up(policy, tmp_path / "a")
        if number == 2:
            flip_a_byte(folder / backup.archive_name)
        drill = drilled(policy, folder, tmp_path)
        assert (drill.is_proven, bool(drill.problem)) == (number < 2, number == 2)
    assert sorted(path.name for path in tmp_path.glob("*staging*")) == ["staging"]
    assert_sound(tmp_path / "staging")
    server = processes.primary(tmp_path / "staging")
    assert pairs(server.address, "/realm") == {b"key": b"1"}
    assert "in use" in drilled(policy, folder, tmp_path).problem


def test_a_staging_that_is_somebody_elses_is_not_replaced(
    processes: Processes, tmp_path: Path, folder: Path
) -> None:
    """G4: a server's own directory, or a staging that was written to, is refused before anything is restored."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/realm", (b"key", b"1"))
    own = policy_to(folder, staging=tmp_path / "a")
    backed_up(own, tmp_path / "a")
    assert primary.terminate() == 0
    assert "no drill has put there" in drilled(own, folder, tmp_path).problem
    policy = policy_to(folder, staging=tmp_path / "staging")
    assert drilled(policy, folder, tmp_path).problem == ""
    server = processes.primary(tmp_path / "staging")
    assert server.terminate() == 0  # looked at only
    assert drilled(policy, folder, tmp_path).problem == ""
    server = processes.primary(tmp_path / "staging")
    put(server.address, "/realm", (b"mine", b"1"))
    assert server.terminate() == 0
    assert "written to since its drill" in drilled(policy, folder, tmp_path).problem
    assert pairs(processes.primary(tmp_path / "staging").address, "/realm")[b"mine"] == b"1"


def test_a_swap_of_the_staging_that_was_cut_off_leaves_one_of_the_two(
    processes: Processes, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4: whatever step a crash comes before, the old or the new one is there whole, and the next drill goes on."""
    processes.primary(tmp_path / "a")
    policy = policy_to(folder, staging=tmp_path / "staging")
    backed_up(policy, tmp_path / "a")
    assert drilled(policy, folder, tmp_path).problem == ""
    copy_node(tmp_path / "staging", tmp_path / "proven")
    steps = _cut_off(monkeypatch)
    for step in range(4):
        if not (tmp_path / "proven").exists():
            copy_node(tmp_path / "staging", tmp_path / "proven")
        with monkeypatch.context() as cut:
            steps(cut, step)
            with pytest.raises(_Crash):
                replace_staging(tmp_path / "staging", tmp_path / "proven")
        present = [path for path in tmp_path.glob("*staging*") if (path / NOTE_FILE).exists()]
        assert present
        assert_sound(present[0])
        assert drilled(policy, folder, tmp_path, read_all=_no_server).problem == "no server"
        assert_sound(tmp_path / "staging")
        assert drilled(policy, folder, tmp_path).problem == ""
        assert [path.name for path in tmp_path.glob("*staging*")] == ["staging"]


class _Crash(Exception):
    """The process ends here."""


def _cut_off(monkeypatch: pytest.MonkeyPatch) -> Callable[[pytest.MonkeyPatch, int], None]:
    """Lets the steps of a swap end before the n-th."""
    rename, remove = staging_module.os.rename, staging_module.shutil.rmtree

    def install(cut: pytest.MonkeyPatch, step: int) -> None:
        left = step

        def wrapped(function: Callable[..., object]) -> Callable[..., None]:
            def call(*arguments: Any, **options: Any) -> None:
                nonlocal left
                if not left:
                    raise _Crash
                left -= 1
                function(*arguments, **options)

            return call

        cut.setattr(staging_module.os, "rename", wrapped(rename))
        cut.setattr(staging_module.shutil, "rmtree", wrapped(remove))

    return install


def test_one_realm_is_no_more_than_one() -> None:
    """What came of a drill reads as people would say it."""
    drill = Drill(url="/backup", finding=Finding.PROVEN, realms=1, pairs=2000, lsn=7)
    assert drill_line(drill) == "drill of /backup: proven, 1 realm, 2,000 pairs, to LSN 7, in 0.0 s"
