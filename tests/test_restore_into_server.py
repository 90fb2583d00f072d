"""Single realms of a backup brought back into a running server, as ordinary changes."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import stat
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from harness import DEADLINE_S, Processes, as_program, plain_environment, wait_until
from hypothesis import given
from hypothesis import strategies as st
from nodes import assert_equal, checkpoint, pairs, put

from understudy.backup.archiver import Archiver
from understudy.backup.policy import Policy
from understudy.backup.repository import open_repository
from understudy.backup.restored_realms import Difference, differences
from understudy.backup.run import run_policy
from understudy.cli.main import run
from understudy.cli.restore_into import Plan, _Restoring
from understudy.client import Add, Delete, DeleteRange, Put, aconnect, connect
from understudy.common import portal
from understudy.common.directory import NODE_FILE, NodeFile
from understudy.common.types import ClusterId

FAILED, USAGE, DIRECTORY, NOT_PERMITTED = 1, 2, 6, 7
# The command line in a process whose clock is 40 days behind.
OLD_CLOCK = """
import time
real_ns = time.time_ns
time.time_ns = lambda: real_ns() - 40 * 86_400 * 10**9
time.time = lambda: time.time_ns() / 1e9
from understudy.cli.main import main
main()
"""
CHANGES = [
    [Put(b"a", b"1"), Put(b"n", b"5")],
    [Add(b"n", 2), Put(b"b", b"1")],
    [Delete(b"a"), Put(b"c", b"1")],
    [Put(b"late", b"1")],
]
WHOLE = {b"n": b"7", b"b": b"1", b"c": b"1", b"late": b"1"}


class Site:
    """A server that is backed up into a repository, which the log is shipped to."""

    def __init__(self, processes: Processes, folder: Path) -> None:
        self.processes = processes
        self.path = folder / "a"
        self.primary = processes.primary(self.path)
        self.address = self.primary.address
        self.times: list[str] = []  # after each of CHANGES
        self.repository = folder / "repository"
        self.repository.mkdir()

    def back_up(self) -> None:
        policy = Policy(name="nightly", schedule=None, repositories=(str(self.repository),))
        assert run_policy(policy, self.path).all_errors == []

    def ship(self) -> None:
        cluster = ClusterId(uuid.UUID(NodeFile.read(self.path / NODE_FILE).cluster).bytes)
        Archiver(self.path / "log", cluster, open_repository(str(self.repository)), encryption=None).ship()

    def make_orders(self) -> list[int]:
        """Commits CHANGES, the backup in between; the LSN of each."""
        lsns = []
        with connect(self.address) as server:
            for number, operations in enumerate(CHANGES):
                lsns.append(server.commit("/orders", operations).lsn)
                self.times.append(datetime.datetime.now(datetime.UTC).isoformat())
                if number == 1:
                    self.back_up()
        self.ship()
        return lsns

    def drop(self, realm: str = "/orders") -> None:
        with connect(self.address) as server:
            server.drop_realm(realm)

    def restore(self, *flags: str | Path, realm: str = "/orders", code: int = 0) -> Any:
        """What the command says of the realms, as JSON."""
        done = self.processes.run(*self.command(*flags, realm=realm), "--json", code=code)
        return json.loads(done.stdout)["realms"]

    def command(self, *flags: str | Path, realm: str = "/orders") -> list[str | Path]:
        return ["restore", self.repository, "--into-server", self.address, "--realm", realm, *flags]

    def refused(self, *flags: str | Path, realm: str = "/orders", code: int = USAGE) -> str:
        """The last line that it says."""
        done = self.processes.run(*self.command(*flags, realm=realm), code=code)
        return done.stderr.decode().splitlines()[-1]

    def changes(self, realm: str = "/orders") -> list[dict[str, Any]]:
        """What `understudy log` shows of a realm, behind its last drop."""
        done = self.processes.run("log", self.path, "--realm", realm, "--json")
        entries = [json.loads(line) for line in done.stdout.splitlines()]
        drops = [number for number, entry in enumerate(entries) if entry["kind"] == "realm_dropped"]
        return entries[drops[-1] + 1 :] if drops else entries

    def version(self, realm: str = "/orders") -> int:
        with connect(self.address) as server:
            return next((one.version for one in server.realms() if one.path == realm), 0)


@pytest.fixture
def site(processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site; commands run in an empty folder, ``tmp_path / "here"``."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Site(processes, tmp_path)


def exports() -> list[Path]:
    """What is left in the current folder."""
    return sorted(Path().iterdir())


def exported(path: str | Path) -> dict[bytes, bytes]:
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {line["key"].encode(): line["value"].encode() for line in lines}


# -- a realm that is gone --------------------------------------------------------------------------------------


def test_a_dropped_realm_comes_back_with_its_history(site: Site, tmp_path: Path) -> None:
    """Each change of its life is a transaction again, in order; a replica has them, too (G11)."""
    replica = site.processes.replica(tmp_path / "b", site.address)
    site.make_orders()
    before = site.changes()
    site.drop()
    (told,) = site.restore()
    assert (told["created"], told["history"], told["transactions"]) == (True, 4, 4)
    assert pairs(site.address, "/orders") == WHOLE
    after = site.changes()
    assert [one["operations"] for one in after] == [one["operations"] for one in before]
    assert (after[-1]["lsn"], after[-1]["version"]) == (told["lsn"], 4)
    assert_equal(site.address, replica.address)
    assert exports() == []


def test_a_realm_comes_back_as_it_was_at_a_moment(site: Site) -> None:
    """--lsn and --at go no further; with --as, the present realm stays as it is beside it."""
    lsns = site.make_orders()
    (told,) = site.restore("--lsn", str(lsns[2]), "--as", "/orders-before")
    assert (told["target"], told["created"], told["history"]) == ("/orders-before", True, 3)
    (told,) = site.restore("--at", site.times[2], "--as", "/orders-then")
    assert told["history"] == 3
    before = {b"n": b"7", b"b": b"1", b"c": b"1"}
    assert pairs(site.address, "/orders-before") == pairs(site.address, "/orders-then") == before
    assert pairs(site.address, "/orders") == WHOLE
    assert site.version() == 4
    assert exports() == []


def test_of_a_realm_whose_first_changes_are_forgotten_the_state_comes_first(
    site: Site, tmp_path: Path
) -> None:
    """History of more than 30 days is gone: what the backup began with is written, then each change behind it.

    A realm of which nothing else is left is there again, too.
    """
    site.path = tmp_path / "old"
    old = site.processes.primary(site.path, launch=as_program("-c", OLD_CLOCK))
    with connect(old.address) as server:
        for operations in CHANGES:
            server.commit("/orders", operations)
        server.commit("/empty", [Put(b"a", b"1")])
        server.commit("/empty", [Delete(b"a")])
    checkpoint(old.address)
    old.terminate()
    site.address = site.processes.primary(site.path).address
    for number in range(2):  # one notes the time, the next forgets what is older
        put(site.address, "/orders", (b"number", b"%d" % number))
        checkpoint(site.address)
    site.back_up()
    with connect(site.address) as server:
        for _ in range(3):
            server.commit("/orders", [Add(b"n", 1)])
    checkpoint(site.address)
    site.ship()
    site.drop()
    site.drop("/empty")
    (told,) = site.restore()
    assert (told["history"], told["transactions"], told["version"]) == (3, 4, 4)
    assert pairs(site.address, "/orders") == WHOLE | {b"n": b"10", b"number": b"1"}
    site.restore(realm="/empty")
    assert (pairs(site.address, "/empty"), site.version("/empty")) == ({}, 1)


def test_realms_of_a_pattern_come_back_together(site: Site) -> None:
    """What the pattern does not hold is left alone, and so are the system's own realms."""
    for realm in ("/a/one", "/a/two", "/b"):
        put(site.address, realm, (b"key", b"old"))
    site.back_up()
    site.drop("/a/one")
    put(site.address, "/a/new", (b"key", b"new"))
    put(site.address, "/b", (b"key", b"new"))
    assert [one["realm"] for one in site.restore(realm="/a/**")] == ["/a/one", "/a/two"]
    found = [pairs(site.address, realm)[b"key"] for realm in ("/a/one", "/a/two", "/a/new", "/b")]
    assert found == [b"old", b"old", b"new", b"new"]
    assert [one["realm"] for one in site.restore("--dry-run", realm="/**")] == ["/a/one", "/a/two", "/b"]


# -- a realm that is there -------------------------------------------------------------------------------------


def spoil(site: Site) -> dict[bytes, bytes]:
    """Changes, deletes and adds keys; what the realm then holds."""
    with connect(site.address) as server:
        server.commit("/orders", [Put(b"b", b"spoilt"), Delete(b"c"), Put(b"x", b"1"), Put(b"y", b"1")])
    return pairs(site.address, "/orders")


def test_in_a_realm_that_is_there_only_what_differs_is_written(site: Site, tmp_path: Path) -> None:
    """G4: it ends equal to the backup's, on the replica too, and what it was lies beside in an export."""
    replica = site.processes.replica(tmp_path / "b", site.address)
    site.make_orders()
    spoilt = spoil(site)
    (told,) = site.restore("--yes")
    assert (told["created"], told["puts"], told["overwrites"], told["deletes"]) == (False, 2, 1, 2)
    assert (told["transactions"], told["version"], told["others"]) == (1, 6, 0)
    assert sorted(one["kind"] for one in site.changes()[-1]["operations"]) == ["delete"] * 2 + ["put"] * 2
    assert pairs(site.address, "/orders") == WHOLE
    assert exports() == [Path(told["export"])]
    assert stat.S_IMODE(exports()[0].stat().st_mode) == 0o600
    assert exported(told["export"]) == spoilt
    assert_equal(site.address, replica.address)
    (again,) = site.restore()  # nothing differs, so nobody need be asked
    assert (again["transactions"], again["export"], site.version()) == (0, None, 6)
    assert len(exports()) == 1


def test_without_a_person_nothing_is_overwritten_unless_told(site: Site) -> None:
    """G4: it is refused with both ways out; a dry run counts; what takes nothing away is written."""
    site.make_orders()
    spoilt = spoil(site)
    said = site.refused()
    for words in ("/orders: 2 puts, of which 1 overwrite, and 2 deletes", "--as PATH", "--yes"):
        assert words in said
    (told,) = site.restore("--dry-run")
    assert (told["puts"], told["deletes"], told["transactions"]) == (2, 2, 0)
    assert (pairs(site.address, "/orders"), exports()) == (spoilt, [])
    with connect(site.address) as server:
        server.commit("/orders", [DeleteRange(b"", b"")])
    (told,) = site.restore()
    assert (told["puts"], told["overwrites"], told["deletes"]) == (len(WHOLE), 0, 0)
    assert (pairs(site.address, "/orders"), exports()) == (WHOLE, [])


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"y\n", 0)])
def test_a_person_is_asked(site: Site, answer: bytes, code: int) -> None:
    """The counts are shown before; a no changes nothing and leaves nothing."""
    site.make_orders()
    spoilt = spoil(site)
    person, terminal = os.openpty()
    os.write(person, answer)
    command = [sys.executable, "-m", "understudy.cli", *map(str, site.command())]
    done = subprocess.run(
        command, stdin=terminal, capture_output=True, timeout=DEADLINE_S, env=plain_environment()
    )
    os.close(person)
    os.close(terminal)
    said = done.stderr.decode()
    assert done.returncode == code, said
    assert said.index("2 deletes") < said.index("Write this to the server?")
    assert pairs(site.address, "/orders") == (spoilt if code else WHOLE)
    assert len(exports()) == (not code)


@given(*[st.dictionaries(st.binary(max_size=2), st.binary(max_size=1))] * 2)
def test_differences_make_one_realm_the_other(one: dict[bytes, bytes], other: dict[bytes, bytes]) -> None:
    """Each key that differs is named once, with both values, and no other."""
    found = list(differences(sorted(one.items()), sorted(other.items())))
    expected = [
        Difference(key, one.get(key), other.get(key))
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]
    assert found == expected


# -- others, and bad luck --------------------------------------------------------------------------------------


def test_changes_of_others_meanwhile_are_told(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What came in between the look and the writing may have been overwritten: exit code 1, and where to see it."""
    site.make_orders()
    spoil(site)
    asked = _Restoring._ask

    def ask(self: _Restoring, plans: list[Plan]) -> None:
        put(site.address, "/orders", (b"b", b"theirs"), (b"z", b"theirs"))
        asked(self, plans)

    monkeypatch.setattr(_Restoring, "_ask", ask)
    assert run(list(map(str, site.command("--yes")))) == FAILED
    assert "problem: 1 change to /orders came from others" in capsys.readouterr().err
    assert pairs(site.address, "/orders") == WHOLE | {b"z": b"theirs"}


def test_nothing_more_is_written_to_a_realm_that_others_have_begun_meanwhile(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4: its history is not poured over theirs; given again, the command compares."""
    site.make_orders()
    site.drop()
    monkeypatch.setattr(
        _Restoring, "_ask", lambda *_: put(site.address, "/orders", (b"z", b"theirs")) and None
    )
    assert run(list(map(str, site.command("--yes")))) == FAILED
    assert "give the command again" in capsys.readouterr().err
    assert pairs(site.address, "/orders") == {b"z": b"theirs", b"a": b"1", b"n": b"5"}
    assert "--yes" in site.refused()


def test_killed_in_the_middle_it_goes_on_when_given_again(site: Site, tmp_path: Path) -> None:
    """G2: what is there is a prefix of the history; the same command brings it to the end, and sweeps the scratch."""
    count = 20_000

    async def make() -> None:
        async with aconnect(site.address) as server:
            for start in range(0, count, 1_000):
                await asyncio.gather(
                    *(
                        server.commit("/orders", [Add(b"n", 1), Put(b"%06d" % number, b"value")])
                        for number in range(start, start + 1_000)
                    )
                )

    portal.call(make())
    site.back_up()
    whole = pairs(site.address, "/orders")
    site.drop()
    (tmp_path / "scratch").mkdir()
    command = site.command("--scratch", tmp_path / "scratch", "--yes")
    cut_off = site.processes.start(*command)
    with connect(site.address) as server:
        wait_until(server.realms)
        cut_off.kill()
        version = server.realms()[0].version
    assert version < count
    found = pairs(site.address, "/orders")
    assert found == dict(sorted(whole.items())[: len(found) - 1]) | {b"n": b"%d" % (len(found) - 1)}
    assert len(list((tmp_path / "scratch").iterdir())) == 1
    site.processes.run(*command)
    assert pairs(site.address, "/orders") == whole
    assert list((tmp_path / "scratch").iterdir()) == []
    (export,) = exports()
    assert exported(export)[b"n"] == found[b"n"]


# -- where from, and who ---------------------------------------------------------------------------------------


def test_an_encrypted_archive_is_taken_too(site: Site, tmp_path: Path) -> None:
    """Also with --lsn, and without a repository."""
    lsns = site.make_orders()
    (tmp_path / "secret").touch(mode=0o600)
    (tmp_path / "secret").write_text("correct horse\n")
    archive, unlock = tmp_path / "a.tar.zst.age", ("--passphrase-file", tmp_path / "secret")
    site.processes.run("backup", "-f", site.path, "-t", archive, *unlock)
    command = ["restore", archive, "--into-server", site.address, "--realm", "/orders", *unlock]
    for number in (2, 4):
        site.processes.run(*command, "--lsn", str(lsns[number - 1]), "--as", f"/orders-{number}")
        assert site.version(f"/orders-{number}") == number
    assert pairs(site.address, "/orders-4") == WHOLE


def test_a_token_is_shown_where_the_server_asks_for_one(site: Site) -> None:
    """G10: who has no permission to write the realm writes nothing."""
    site.make_orders()
    site.drop()
    token = ("--token", f"@{site.path / 'admin-token'}")
    site.processes.run(
        "user", "add", "ann", "--server", site.address, *token, "--password-stdin", stdin=b"correct horse"
    )
    site.refused(code=NOT_PERMITTED)
    (told,) = site.restore(*token)
    assert told["version"] == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--realm", "/orders", "--to", "x"), "--to or --into-server"),
        ((), "needs --realm"),
        (("--realm", "/__system"), "the system's own"),
        (("--realm", "/orders", "--as", "/__system"), "the system's own"),
        (("--realm", "/orders", "--as", "/~/orders"), "the user's id"),
        (("--realm", "/orders", "--as", "orders"), "does not begin with /"),
        (("--realm", "/**", "--as", "/x"), "holds 2: /orders, /other"),
        (("--realm", "/gone"), "holds no realm of --realm /gone at LSN"),
        (("--realm", "/orders", "--lsn", "3", "--at", "2026-05-01"), "not both"),
    ],
)
def test_what_can_not_be_is_refused(site: Site, flags: tuple[str, ...], words: str) -> None:
    """Before anything is written, with what is wrong."""
    site.make_orders()
    put(site.address, "/other", (b"key", b"value"))
    site.ship()
    before = site.version()
    command = ("restore", site.repository, "--into-server", site.address, *flags)
    assert words in site.processes.run(*command, code=USAGE).stderr.decode()
    assert (site.version(), exports()) == (before, [])


def test_flags_of_the_one_way_are_refused_for_the_other(site: Site, tmp_path: Path) -> None:
    """--as, --yes and --scratch mean nothing with --to; one of --to and --into-server has to be there."""
    for flags in (("--as", "/x"), ("--yes",), ("--scratch", tmp_path)):
        said = site.processes.run("restore", site.repository, "--to", tmp_path / "x", *flags, code=USAGE)
        assert "are for --into-server" in said.stderr.decode()
    site.processes.run("restore", site.repository, code=USAGE)


def test_a_replica_is_not_written_to(site: Site, tmp_path: Path) -> None:
    """It is told at once, before anything is restored."""
    site.make_orders()
    replica = site.processes.replica(tmp_path / "b", site.address)
    command = ["restore", site.repository, "--realm", "/orders", "--into-server"]
    done = site.processes.run(*command, replica.address, code=DIRECTORY)
    assert "is a replica" in done.stderr.decode()
